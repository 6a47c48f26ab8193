"""Texts in attributes, the only place where they are read, and elements that anndata reads by them.

anndata writes texts of variable length. HDF5.jl, rhdf5, hdf5r, MATLAB and others write texts of a fixed length, padded with
zeros or blanks, a list of one text, a single text for a list of one, and nothing for an empty list. All of them mean the same.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata as ad
import h5py
import numpy as np
import zarr
from h5py import h5a, h5f, h5i, h5t

if TYPE_CHECKING:
    from h5py.h5d import DatasetID
    from h5py.h5g import GroupID

    Hdf5: TypeAlias = h5py.Group | h5py.Dataset | GroupID | DatasetID
    Stored: TypeAlias = zarr.Group | zarr.Array[Any] | Hdf5

_TEXT = h5t.py_create(h5py.string_dtype())
# what anndata looks at when it reads an element
_SINGLE = ("encoding-type", "encoding-version", "_index", "na-value")


def texts_of(stored: Stored, name: str) -> list[str] | None:
    """Read an attribute that is a list of texts, or one of them; ``None`` if there is none.

    Parameters
    ----------
    stored
        A group or array; of HDF5 its identifier, too, for which no object has to be made.
    name
        The attribute.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if isinstance(stored, zarr.Group | zarr.Array):
        value = stored.attrs.get(name)
        texts = [value] if isinstance(value, str) else value
        if texts is None or (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            return texts
        raise ValueError(f"{_place(stored)}: the attribute {name} is {value!r}; expected text")
    identifier = stored.id if isinstance(stored, h5py.Group | h5py.Dataset) else stored
    try:
        attribute = h5a.open(identifier, name.encode())
    except KeyError:
        return None
    shape = attribute.shape
    # nothing at all, or a list of nothing: then its type says nothing
    if shape is None or 0 in shape:
        return []
    values = np.zeros(shape, object)
    try:
        attribute.read(values, _TEXT)
    except OSError:
        # libhdf5 makes no text of variable length of a fixed one; blanks that its type names as padding it takes off
        values = np.zeros(shape, attribute.dtype)
        if values.dtype.kind == "S":
            attribute.read(values)
    if values.ndim > 1 or values.dtype.kind not in "OS":
        raise ValueError(f"{_place(stored)}: the attribute {name} is no text, and no list of texts")
    return [value.partition(b"\0")[0].decode("utf-8", "surrogateescape") for value in values.flat]


def text_of(stored: Stored, name: str) -> str | None:
    """Read an attribute that is one text, without blanks at its end; ``None`` if there is none.

    Raises
    ------
    ValueError
        If it is something else.
    """
    texts = texts_of(stored, name)
    if not texts:
        return None
    if len(texts) > 1:
        raise ValueError(f"{_place(stored)}: the attribute {name} has the texts {texts}; expected one")
    return texts[0].rstrip(" ")


def _place(stored: Stored) -> str:
    if isinstance(stored, zarr.Group | zarr.Array):
        return str(stored.store_path)
    identifier = stored.id if isinstance(stored, h5py.Group | h5py.Dataset) else stored
    return os.fsdecode(h5f.get_name(identifier) + h5i.get_name(identifier))


def columns_of(frame: zarr.Group | h5py.Group) -> list[str]:
    """Names of the columns of a stored frame; of one that does not say them, all that it holds."""
    names = texts_of(frame, "column-order")
    if names is None:
        beside = {index_of(frame), "__categories"}
        return [name for name in frame if name not in beside]
    return [_unpadded(frame, name) for name in names]


def index_of(frame: zarr.Group | h5py.Group) -> str:
    """Name of the array that is the index of a stored frame."""
    return text_of(frame, "_index") or "_index"


def _unpadded(frame: zarr.Group | h5py.Group, name: str) -> str:
    # blanks at its end may be of the name
    return name.rstrip(" ") if name.endswith(" ") and name not in frame else name


def names_in(group: zarr.Group | h5py.Group, member: str) -> list[str]:
    """Names of what a member of a group holds, sorted; none if it is missing or no group."""
    held = group.get(member)
    return sorted(held) if isinstance(held, zarr.Group | h5py.Group) else []


def is_plain(element: zarr.Group | zarr.Array[Any] | h5py.Group | h5py.Dataset) -> bool:
    """Whether anndata reads the attributes of an element as they are meant."""
    return not isinstance(element, h5py.Group | h5py.Dataset) or not _meant(element)


def read_element(element: zarr.Group | zarr.Array[Any] | h5py.Group | h5py.Dataset) -> Any:
    """Read an element as anndata does, and one that it cannot read for the form of its attributes, too."""
    copied: Any
    try:
        return ad.io.read_elem(element)
    except Exception:
        meant: dict[str, dict[str, Any]] = {}
        if isinstance(element, h5py.Group | h5py.Dataset):
            # what is no text means nothing
            with suppress(ValueError):
                meant = _meant(element)
        if not meant or isinstance(element, zarr.Group | zarr.Array):
            raise
    with h5py.File("meant", "w", driver="core", backing_store=False) as memory:
        element.file.copy(element, memory, "element")
        copied = memory["element"]
        for place, attributes in meant.items():
            (copied[place] if place else copied).attrs.update(attributes)
        return ad.io.read_elem(copied)


def _meant(element: h5py.Group | h5py.Dataset) -> dict[str, dict[str, Any]]:
    """Give the attributes that anndata reads otherwise than they are meant, by their object's place in the element."""
    found: dict[str, dict[str, Any]] = {}

    def look(place: str, part: h5py.Group | h5py.Dataset) -> None:
        values: dict[str, Any] = {name: text_of(part, name) for name in _SINGLE}
        if values["encoding-type"] == "dataframe":
            values |= {"_index": index_of(part), "column-order": columns_of(part)}
        others = {
            name: np.array(value, dtype=h5py.string_dtype())
            for name, value in values.items()
            if value is not None and value != _read_by_anndata(part, name)
        }
        if others:
            found[place] = others

    look("", element)
    if isinstance(element, h5py.Group):
        element.visititems(look)
    return found


def _read_by_anndata(part: h5py.Group | h5py.Dataset, name: str) -> Any:
    value = part.attrs.get(name)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return [text.decode() if isinstance(text, bytes) else text for text in value]
    return value.decode() if isinstance(value, bytes) else value
