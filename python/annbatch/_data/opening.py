"""Stores as they are, with variables of their own, as datasets of one loader."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from annbatch._base.warn import warn_once
from annbatch._data.datasets import Datasets
from annbatch._data.hdf5 import SharedReader
from annbatch._data.joins import join_annotations
from annbatch._data.labels import twins
from annbatch._data.stored import stored_at

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from annbatch._data.stored import OpenedAnnData


def join_stored(
    paths: Sequence[str | os.PathLike[str]],
    *,
    x: str | None,
    wanted: Mapping[str, Sequence[str]],
    obs_columns: Sequence[str] | None,
    join: Literal["outer", "inner"],
    dense: bool,
) -> Datasets:
    """Open AnnData stores and join their annotations; see `annbatch.open`.

    Parameters
    ----------
    paths
        Where they lie.
    x
        The layer that is read as ``X``, ``"raw"`` for that of ``raw``; ``None`` for ``X`` itself.
    wanted
        Names of further elements by ``"layers"`` and ``"obsm"``.
    obs_columns
        The columns of obs to keep; ``None`` for all.
    join
        Which variables and obs columns are kept, ``"outer"`` or ``"inner"``.
    dense
        Whether rows of ``X`` are yielded dense.
    """
    stores = [store for path in paths for store in stored_at(path)]
    elements, obs, var, shared = [], [], [], SharedReader()
    for store in stores:
        with store.opened() as adata:
            name = _data_matrix(adata, x)
            elements.append(adata.elements(wanted, name))
            obs.append(_read_obs(adata, obs_columns, needed=join == "inner", read=shared.read))
            var.append(adata.var(raw=name == "raw/X", read=shared.read))
    for column in obs_columns or ():
        if not any(column in frame for frame in obs):
            with stores[0].opened() as first:
                raise KeyError(f"obs of {first.path} has no column {column!r}; it has {first.obs_columns}")
    names = [store.path for store in stores]
    joined = join_annotations(names, obs, var, join)
    for message in twins(names, obs, joined.obs[0]):
        warn_once(message, UserWarning)
    if obs_columns is not None:
        joined = replace(joined, obs=tuple(frame[list(obs_columns)] for frame in joined.obs))
    return Datasets.of_joined(elements, joined, dense=dense)


def _data_matrix(adata: OpenedAnnData, layer: str | None) -> str:
    """Name of the element that is read as ``X``."""
    if layer is None:
        return "X"
    return "raw/X" if layer == "raw" and not adata.has_layer(layer) else f"layers/{layer}"


def _read_obs(
    adata: OpenedAnnData, columns: Sequence[str] | None, *, needed: bool, read: Callable[[Any], Any]
) -> pd.DataFrame:
    """Read obs, of the named columns those that there are, or all of them if they are `needed`."""
    if columns is None or needed:
        return adata.obs(columns, read=read)
    stored = adata.obs_columns
    return adata.obs([column for column in columns if column in stored], read=read)
