"""One input of a conversion: found by its name, opened without its matrices, and read into memory."""

from __future__ import annotations

import zipfile
from copy import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import zarr
from scipy import sparse as sp

from annbatch._data.attributes import is_plain, read_element, text_of
from annbatch._data.places import is_remote, places
from annbatch._data.remedies import said_of_missing_group, said_of_mudata

from ._sizes import is_self_describing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    import pandas as pd

    Stored: TypeAlias = zarr.Group | h5py.Group | PathLike[str] | str


def named_by(x: Any) -> list[Any]:
    """Return what stands for one input, in natural order if it is several: a pattern's files, those of a folder."""
    if not isinstance(x, str | PathLike) or is_remote(x):
        return [x]
    try:
        found = places(x)
    except FileNotFoundError:
        # a `load_adata` of the user's may know
        return [x]
    return [x] if len(found) == 1 and Path(x) == found[0].path else [str(place) for place in found]


def open_stored(x: Stored) -> zarr.Group | h5py.Group:
    """Open an AnnData store for reading: an h5ad file, a group in one, a Zarr store, or a group that is open already."""
    if isinstance(x, zarr.Group | h5py.Group):
        return x
    if is_remote(x):
        return zarr.open_group(x, mode="r")
    path, within = places(x)[0]
    if not path.is_file():
        return zarr.open_group(path, mode="r")
    if zipfile.is_zipfile(path):
        return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), path=within, mode="r")
    file = h5py.File(path, mode="r")
    if within and within not in file:
        raise KeyError(said_of_missing_group(str(path), file, within))
    return file[within] if within else file


def stored_if_any(x: Any) -> zarr.Group | h5py.Group | None:
    """Open what `load_adata` was given, which may be anything."""
    try:
        return open_stored(x)
    except (OSError, TypeError, ValueError):
        return None


def load_lazily(x: Stored) -> ad.AnnData:
    """Open an AnnData: annotations and small things in memory, matrices as dask arrays over the store.

    Files from before anndata 0.8, which do not say how their parts are encoded, are read as a whole.

    Parameters
    ----------
    x
        Path of an h5ad file or Zarr store, or an open group.
    """
    group = open_stored(x)
    if message := said_of_mudata(str(x), group):
        raise ValueError(message)
    if not is_self_describing(group):
        return ad.read_h5ad(group.file.filename) if isinstance(group, h5py.Group) else ad.read_zarr(group)
    parts: dict[str, Any] = {key: read_element(group[key]) for key in ("obs", "var", "varm", "uns") if key in group}
    if "X" in group:
        parts["X"] = _lazy_element(group["X"])
    for mapping in ("layers", "obsm", "obsp", "varp"):
        if mapping in group:
            parts[mapping] = {key: _lazy_element(node) for key, node in _members(group[mapping])}
    if "raw" in group and has_x(group["raw"]):
        raw: Any = group["raw"]
        parts["raw"] = {key: read_element(raw[key]) for key in ("var", "varm") if key in raw}
        parts["raw"]["X"] = _lazy_element(raw["X"])
    return ad.AnnData(**parts)


def has_x(group: zarr.Group | zarr.Array[Any] | h5py.Group) -> bool:
    """Whether a stored AnnData, or ``raw``, has X: anndata 0.12.0 and others write an element of the type "null" for none."""
    # raw may be of that type, too
    if not isinstance(group, zarr.Group | h5py.Group):
        return False
    return "X" in group and text_of(group["X"], "encoding-type") != "null"


def _members(group: zarr.Group | h5py.Group, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a stored mapping holds; keys that had slashes in them lie in groups of no encoding, one in another."""
    for key in group:
        node = group[key]
        if (
            isinstance(node, zarr.Group | h5py.Group)
            and not is_self_describing(node)
            and text_of(node, "h5sparse_format") is None
        ):
            yield from _members(node, f"{prefix}{key}/")
        else:
            yield prefix + key, node


def _lazy_element(node: Any) -> Any:
    if text_of(node, "encoding-type") in ("array", "csr_matrix", "csc_matrix") and is_plain(node):
        return ad.experimental.read_elem_lazy(node)
    return read_element(node)


def to_memory(x: Any) -> Any:
    """Read a lazy array or frame, or copy what is in memory already (anndata's views hold on to their origin)."""
    from anndata.experimental.backed import Dataset2D
    from dask import compute
    from dask.array import Array as DaskArray

    if isinstance(x, DaskArray):
        if x.shape[0] == 0 and isinstance(x._meta, sp.sparray | sp.spmatrix | np.ndarray):
            return type(x._meta)(x.shape, dtype=x.dtype)  # dask would read a block to take nothing from it
        if isinstance(x._meta, sp.csr_matrix | sp.csr_array) and x.numblocks[1] == 1:
            # dask would join sparse blocks pairwise, over and over
            return sp.vstack(compute(*x.blocks), format="csr")
        return x.compute()
    if isinstance(x, Dataset2D):
        return frame_to_memory(x)
    if isinstance(x, h5py.Dataset | zarr.Array):
        return x[...]
    if isinstance(x, ad.abc.CSRDataset | ad.abc.CSCDataset):
        return x.to_memory()
    return x.copy() if hasattr(x, "copy") else copy(x)


def frame_to_memory(lazy: Any) -> pd.DataFrame:
    """Read a lazy frame under its stored index, which anndata may have put beside a range index."""
    lazy.index = lazy.true_index
    frame = lazy.to_memory()
    return frame.set_index("_index") if "_index" in frame.columns else frame
