"""Sizes of data in bytes: parsing what people write, and measuring what is stored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import h5py
import zarr

if TYPE_CHECKING:
    import anndata as ad

_PREFIXES = "kmgtpezy"
_UNIT = re.compile(rf"([{_PREFIXES}])(?:i?b|[a-z]+bytes?)?|b|bytes?|", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a number of bytes such as ``"512MB"``, ``"1.5 GB"``, ``"2 GiB"`` or ``"100"``.

    Every prefix stands for a power of 1024, ``GB`` as much as ``GiB``.

    Raises
    ------
    ValueError
        If the text is not a number and, optionally, a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNIT.fullmatch(match[2]) if match else None
    if unit is None:
        raise ValueError(f"Failed to parse size {text!r}: write a number and a unit, such as '512MB' or '20GB'.")
    exponent = _PREFIXES.index(unit[1].lower()) + 1 if unit[1] else 0
    return int(float(match[1]) * 1024**exponent) if "." in match[1] else int(match[1]) * 1024**exponent


def is_self_describing(store: zarr.Group | h5py.Group) -> bool:
    """Whether a stored AnnData names its encoding, as all since anndata 0.8 do."""
    return "encoding-type" in store.attrs


def stored_bytes_per_row(adata: ad.AnnData, store: zarr.Group | h5py.Group) -> float:
    """Estimate the uncompressed bytes per observation of what an object keeps of a store, from metadata alone.

    Parameters
    ----------
    adata
        The object, which names the elements to count: ``X``, ``layers``, ``obsm`` and ``obs``.
    store
        The stored AnnData it was opened from.

    Raises
    ------
    KeyError
        If the object has an element of a name that the store lacks.
    """
    n_obs = adata.shape[0]
    if n_obs == 0:
        return 0.0
    if not is_self_describing(store):
        return _stored_bytes(store) / n_obs  # element by element is not how these are laid out
    paths = ["obs"] if adata.X is None else ["obs", "X"]
    for attribute in ("layers", "obsm"):
        paths += [f"{attribute}/{key}" for key in getattr(adata, attribute) if key is not None]
    for path in paths:
        if path not in store:
            raise KeyError(f"Could not find {path} on AnnData object in backing store")
    return sum(_stored_bytes(store[path]) for path in paths) / n_obs


def _stored_bytes(node: zarr.Group | zarr.Array | h5py.Group | h5py.Dataset) -> int:
    """Uncompressed bytes of all arrays of one element, but for what does not grow with the rows."""
    if isinstance(node, zarr.Array | h5py.Dataset):
        return node.size * node.dtype.itemsize
    skipped = {"dataframe": "_index", "categorical": "categories"}.get(node.attrs.get("encoding-type", ""))
    return sum(_stored_bytes(node[key]) for key in node if key != skipped)
