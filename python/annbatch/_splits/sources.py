"""What a data module is given to read: opened, and the labels that its rows are split by."""

from __future__ import annotations

import copy
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import pandas as pd
import zarr

from annbatch._base.warn import stacklevel_outside_package
from annbatch._data.aligned import load_all_aligned, load_chosen_columns
from annbatch._data.attributes import read_element, text_of
from annbatch._data.labels import said_of_twin, twin_of
from annbatch._data.places import is_zarr, places
from annbatch._data.remedies import said_of_mudata
from annbatch._data.stored import StoredAnnData, stored_at
from annbatch.io import DatasetCollection
from annbatch.loader import Loader, datasets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from annbatch._data.places import Place


def places_of(path: str | os.PathLike[str]) -> list[Place]:
    try:
        return places(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no store at {path}.") from error


def open_source(
    source: Any, load_adata: Callable[[zarr.Group], ad.AnnData] | None, options: Mapping[str, Any]
) -> Loader:
    """Return a Loader over `source` with no sampler of consequence."""
    if isinstance(source, Loader):
        return copy.copy(source)
    loader = Loader(**{"to": "torch", **options})
    kwargs = {} if load_adata is None else {"load_adata": load_adata}
    if load_adata is None:
        columns = options.get("obs_columns")
        load_adata = load_all_aligned if columns is None else partial(load_chosen_columns, columns=columns)
    for item in source if isinstance(source, list | tuple) else [source]:
        item = _resolve(item)
        if isinstance(item, DatasetCollection):
            loader.use_collection(item, **kwargs)
        elif isinstance(item, ad.AnnData):
            loader.add_adata(item)
        elif isinstance(item, list):
            loader.add_adatas([s.path if s.group is None else load_adata(s.group) for s in item])
        else:
            loader.add_adata(load_adata(item))
    return loader


def _resolve(item: Any) -> DatasetCollection | ad.AnnData | zarr.Group | list[StoredAnnData]:
    """Return a path or group as what it holds: a collection, the group of an AnnData store, or several of these and files."""
    if isinstance(item, DatasetCollection | ad.AnnData):
        return item
    if isinstance(item, str | os.PathLike):
        found = places_of(item)
        path, within = found[0]
        if len(found) > 1 or within or path.is_file() or not is_zarr(path):
            return stored_at(item)
        item = zarr.open_group(path, mode="r")
    if not isinstance(item, zarr.Group):
        raise TypeError(
            f"Cannot read from {type(item).__name__}: expected a DatasetCollection, an AnnData, a Loader, "
            "or the path or zarr.Group of a collection, an AnnData store or an h5ad file."
        )
    if message := said_of_mudata(str(item.store_path), item):
        raise ValueError(message)
    return item if text_of(item, "encoding-type") == "anndata" else DatasetCollection(item)


def labels_of(source: Any, loader: Loader, column: str) -> pd.Series:
    """Return one obs column of all rows [n_obs], from memory where the loader has it, from the stores otherwise."""
    datasets = datasets_of(loader)
    frames = datasets.obs or ()
    parts = [frame[column] for frame in frames if column in frame]
    if not parts or len(parts) < len(datasets.shapes):
        parts = _stored_labels(source, column)
    if sum(map(len, parts)) != loader.n_obs:
        known = f"; those read have {sorted({name for frame in frames for name in frame})}" if frames else ""
        raise KeyError(f"split_by: not every dataset has an obs column {column!r}{known}")
    if found := twin_of(list(enumerate(parts))):
        names = [first.path or f"dataset {number}" for number, first in enumerate(datasets.firsts)]
        so = "so that its rows are two groups, which may come into different splits"
        warnings.warn(
            f"split_by: {said_of_twin(column, found, names, so)}", UserWarning, stacklevel=stacklevel_outside_package()
        )
    return pd.concat(parts, ignore_index=True)


def _stored_labels(source: Any, column: str) -> list[pd.Series]:
    parts = []
    for item in [] if isinstance(source, Loader) else source if isinstance(source, list | tuple) else [source]:
        item = _resolve(item)
        for part in item if isinstance(item, DatasetCollection | list) else [item]:
            if isinstance(part, StoredAnnData):
                with part.opened() as stored:
                    if column in stored.obs_columns:
                        parts.append(stored.obs([column])[column])
                continue
            obs: Any = part.obs if isinstance(part, ad.AnnData) else part["obs"]
            if column not in obs:
                break
            parts.append(
                obs[column] if isinstance(part, ad.AnnData) else pd.Series(read_element(obs[column]), name=column)
            )
    return parts
