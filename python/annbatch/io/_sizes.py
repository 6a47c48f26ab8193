"""Sizes of data in bytes: parsing what people write, and measuring what is stored."""

from __future__ import annotations

import re
from typing import Any

import anndata as ad
import h5py
import pandas as pd
import zarr
from dask import compute
from scipy import sparse as sp

from annbatch._data.attributes import names_in, text_of

_PREFIXES = "kmgtpezy"
_SPARSE = ("csr_matrix", "csc_matrix")
_UNIT = re.compile(rf"([{_PREFIXES}])(?:i?b|[a-z]+bytes?)?|b|bytes?|", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``"512MB"``, ``"1.5 GB"``, ``"2 GiB"`` or ``"100"``.

    Every prefix stands for a power of 1024, ``GB`` as much as ``GiB``: so scverse annbatch reads the sizes of what is written.
    (``memory_budget`` of a loader, which it does not have, tells ``GB`` from ``GiB``.)

    Raises
    ------
    ValueError
        If the text is not a number and, optionally, a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNIT.fullmatch(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"Failed to parse size {text!r}: write a number and a unit, such as '512MB' or '20GB'.")
    exponent = _PREFIXES.index(unit[1].lower()) + 1 if unit[1] else 0
    return int(float(match[1]) * 1024**exponent) if "." in match[1] else int(match[1]) * 1024**exponent


def is_self_describing(store: zarr.Group | h5py.Group) -> bool:
    """Whether a stored AnnData names its encoding, as all since anndata 0.8 do."""
    return text_of(store, "encoding-type") is not None


def stored_bytes_per_row(adata: ad.AnnData, store: zarr.Group | h5py.Group | None) -> float:
    """Estimate the uncompressed bytes per observation of ``X``, ``layers``, ``obsm`` and ``obs`` of an object.

    What is on disk is not read, but for a few blocks of lazy sparse matrices that are not elements of the store.

    Parameters
    ----------
    adata
        The object; what backs it may be anything.
    store
        The stored AnnData that it was opened from, if any, whose metadata tell how many elements lazy matrices have.
    """
    n_obs = adata.shape[0]
    if n_obs == 0:
        return 0.0
    elements = {} if adata.X is None else {"X": adata.X}
    for attribute in ("layers", "obsm"):
        elements |= {f"{attribute}/{key}": value for key, value in getattr(adata, attribute).items() if key is not None}
    total: float = _frame_bytes(adata.obs)
    for path, element in elements.items():
        stored = None if store is None or not is_lazy_sparse(element) else _stored_origin(element, store, path)
        total += _bytes(element) if stored is None else _array_bytes(stored)
    return total / n_obs


def is_lazy_sparse(element: Any) -> bool:
    """Whether an element is a dask array of sparse blocks, which does not know how many elements it has."""
    return isinstance(getattr(element, "_meta", None), sp.sparray | sp.spmatrix)


def _bytes(element: Any) -> float:
    """Uncompressed bytes of an element, as it would be stored."""
    if isinstance(element, pd.DataFrame):
        return _frame_bytes(element)
    if isinstance(element, ad.abc.CSRDataset | ad.abc.CSCDataset):
        return _array_bytes(element.group)
    if isinstance(element, sp.sparray | sp.spmatrix):
        return sum(part.nbytes for part in (element.data, element.indices, element.indptr))
    if is_lazy_sparse(element):
        rows = sorted({0, element.numblocks[0] // 2, element.numblocks[0] - 1})
        blocks = compute(*(block for row in rows for block in element.blocks[row].blocks.ravel()))
        n_rows = sum(element.chunks[0][row] for row in rows)
        return sum(map(_bytes, blocks)) / max(n_rows, 1) * element.shape[0]
    if isinstance(element, zarr.Array | h5py.Dataset):
        return _array_bytes(element)
    return getattr(element, "nbytes", 0)


def _frame_bytes(frame: pd.DataFrame) -> int:
    arrays = (
        values.cat.codes if isinstance(values.dtype, pd.CategoricalDtype) else values for _, values in frame.items()
    )
    return sum(array.memory_usage(index=False) for array in arrays)


def _stored_origin(lazy: Any, store: zarr.Group | h5py.Group, path: str) -> zarr.Group | h5py.Group | None:
    """Return the stored sparse matrix that a dask array of anndata's is: dask calls the same array the same.

    The one of the same path and shape counts as it, too, whatever blocks it is opened in.
    """
    paths = [path, "X", *(f"{parent}/{key}" for parent in ("layers", "obsm", "raw") for key in names_in(store, parent))]
    nodes: dict[str, Any] = {
        at: store[at] for at in paths if at in store and text_of(store[at], "encoding-type") in _SPARSE
    }
    for node in nodes.values():
        if ad.experimental.read_elem_lazy(node).name == lazy.name:
            return node
    node = nodes.get(path)
    return node if node is not None and tuple(node.attrs["shape"]) == lazy.shape else None


def _array_bytes(node: zarr.Group | zarr.Array[Any] | h5py.Group | h5py.Dataset) -> int:
    """Uncompressed bytes of an array, or of all arrays in a group."""
    if isinstance(node, zarr.Array | h5py.Dataset):
        return node.size * node.dtype.itemsize
    return sum(_array_bytes(node[key]) for key in node)
