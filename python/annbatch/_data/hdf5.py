"""What is read of an HDF5 file before the core reads of it: what its matrices are, and frames.

There may be hundreds of files, and h5py takes longer to make an object for each array and attribute than to read it: what
anndata writes in all of them is read by h5py's identifiers.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import pandas as pd
from h5py import h5a, h5f, h5i, h5o, h5s
from h5py.h5d import DatasetID

from annbatch._core import ops
from annbatch._data.attributes import names_in, read_element, text_of, texts_of
from annbatch._data.remedies import csc_remedy

if TYPE_CHECKING:
    from h5py.h5g import GroupID

# The core, which reads them all at once, opens the file for each array.
_MANY_TEXTS = 2_048

# raised where something is not as anndata writes it now; who is asked then says what is wrong with it
_OF_ANOTHER_FORM = (AttributeError, KeyError, TypeError, ValueError, OSError)


@dataclass(frozen=True)
class Hdf5Matrix:
    """A matrix in an HDF5 file that is not held open.

    Parameters
    ----------
    file
        Absolute path of the file.
    name
        Where it is in there: ``"X"``, ``"layers/counts"``, …
    kind, shape
        As of `Source`.
    dtypes
        Stored types: of the values, and of column indices where it is sparse.
    stamp
        Bytes of the file and its time of change when it was described: the annotations are of then.
    """

    file: str
    name: str
    kind: Literal["csr", "dense"]
    shape: tuple[int, ...]
    dtypes: tuple[np.dtype, ...]
    stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raise `OSError` if the file is not the one that was described."""
        if stamp_of(self.file) != self.stamp:
            raise OSError(
                f"{self.file} was replaced or changed after it was opened: its obs and var have been read and may be "
                "others now. Open it again."
            )

    @property
    def dtype(self) -> np.dtype:
        """Stored type of the values."""
        return self.dtypes[0]


def hdf5_matrix(opened: h5py.File, name: str, stamp: tuple[int, int]) -> Hdf5Matrix:
    """Describe a dense array or CSR matrix of an HDF5 file, as anndata has written them since version 0.5.

    Parameters
    ----------
    opened
        The file, by its absolute path.
    name
        Where the matrix is in there.
    stamp
        `stamp_of` the file, from before it was opened.

    Raises
    ------
    KeyError
        If there is none of that name, or something that stands for nothing (encoding type "null").
    TypeError
        If it is something else.
    """
    file = opened.filename
    node = opened.get(name)
    if node is None or (isinstance(node, h5py.Dataset) and node.shape is None):
        parent, _, _ = name.rpartition("/")
        held = names_in(opened, parent) if parent else sorted(opened)
        raise KeyError(f"{file} has no {name}; {parent or 'it'} has {held}")
    if isinstance(node, h5py.Dataset):
        dtype = node.dtype
        if dtype.kind not in "buif":
            raise TypeError(f"{file}: {name} has dtype {dtype}; bool, integers and floats can be read.")
        return Hdf5Matrix(file, name, "dense", node.shape, (dtype,), stamp)
    encoding, shape = _encoding_and_shape(node)
    if encoding == "csc_matrix":
        raise TypeError(f"{file}: {name} is a CSC matrix. {csc_remedy(name)}")
    if encoding != "csr_matrix":
        raise TypeError(f"{file}: {name} is {encoding!r}; dense arrays and CSR matrices can be read.")
    if shape is None or np.shape(shape) != (2,):
        raise TypeError(f"{file}: {name} has the attribute shape {shape}; expected two numbers.")
    dtypes = []
    for part in ("data", "indices", "indptr"):
        try:
            stored = h5o.open(node.id, part.encode())
        except KeyError:
            stored = None
        if not isinstance(stored, DatasetID):
            raise TypeError(f"{file}: {name} is a CSR matrix without {part}.")
        dtypes.append(stored.dtype)
    return Hdf5Matrix(file, name, "csr", tuple(int(n) for n in shape), tuple(dtypes[:2]), stamp)


def _encoding_and_shape(node: h5py.Group) -> tuple[Any, Any]:
    """Read the attributes of a sparse matrix, each ``None`` where there is none."""
    encoding = text_of(node.id, "encoding-type")
    # before anndata 0.7 under other names
    if encoding is None and (old := text_of(node.id, "h5sparse_format")) is not None:
        encoding = f"{old}_matrix"
    with suppress(*_OF_ANOTHER_FORM):
        return encoding, _attribute(node.id, b"shape")
    return encoding, node.attrs.get("shape", node.attrs.get("h5sparse_shape"))


def stamp_of(file: str | os.PathLike[str]) -> tuple[int, int]:
    """Bytes of a file and its time of change."""
    now = Path(file).stat()
    return now.st_size, now.st_mtime_ns


def open_hdf5(file: str | os.PathLike[str]) -> h5py.File:
    """Open an HDF5 file for reading, without a lock: cluster file systems refuse them.

    Raises
    ------
    OSError
        If it cannot be opened, naming it and what may be wrong.
    """
    try:
        os.fsencode(file).decode()
    except UnicodeDecodeError:
        raise ValueError(
            f"{os.fsencode(file)!r} is no text in UTF-8, as names of files must be: rename it or make a symbolic link."
        ) from None
    try:
        return h5py.File(file, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        # who has it open in this process may have locked it, and HDF5 wants all to do the same
        with suppress(OSError):
            return h5py.File(file, "r")
        if zipfile.is_zipfile(file):
            raise OSError(
                f"{file} is a zip archive. Unpack it (`unzip {Path(file).name}`) and open the directory or file that comes "
                "out of it."
            ) from error
        raise OSError(
            f"{file} cannot be opened as HDF5 ({error}): it is of another kind, truncated, or being written by another "
            "program. Write it again, or wait until it is closed."
        ) from error


class SharedReader:
    """Reads frames, columns and indexes as anndata does; what several HDF5 files have alike becomes one object.

    That are arrays of strings, with a mask (pandas 3) or without, categories, and frames that have nothing but such
    arrays, as that of the variables often is. Python objects are made of them only once, and when frames are joined pandas
    need not compare what is one object.

    What anndata writes is read without asking for the version of each array. All else is read by anndata itself, which also
    says what is wrong with it.
    """

    def __init__(self) -> None:
        # by what they hold, as a digest: names of cells are many, and different
        self._strings: dict[tuple[str, bytes], np.ndarray] = {}
        self._masked: dict[tuple[Any, ...], pd.api.extensions.ExtensionArray] = {}
        # as anndata reads them, by the attributes that it looks at
        self._string_types: dict[tuple[str | None, ...], pd.StringDtype] = {}
        # by the numbers of their arrays, which are kept, so that no others have these numbers
        self._types: dict[tuple[int, bool], pd.CategoricalDtype] = {}
        self._frames: dict[
            tuple[tuple[str, ...], tuple[tuple[str, int], ...]], tuple[pd.DataFrame, dict[str, Any]]
        ] = {}

    def read(self, element: Any) -> Any:
        """Read a stored element."""
        is_hdf5 = isinstance(element, h5py.Group | h5py.Dataset)
        return self._read(element.id) if is_hdf5 else read_element(element)

    def _read(self, stored: GroupID | DatasetID) -> Any:
        value = None
        with suppress(*_OF_ANOTHER_FORM):
            if isinstance(stored, DatasetID):
                value = self._array(stored)
            elif (kind := text_of(stored, "encoding-type")) == "dataframe":
                value = self._frame(stored)
            elif kind == "categorical":
                value = self._categorical(stored)
            elif kind == "nullable-string-array":
                value = self._masked_strings(stored)
        if value is None:
            return read_element(h5py.Dataset(stored) if isinstance(stored, DatasetID) else h5py.Group(stored))
        return value

    def _array(self, stored: GroupID | DatasetID) -> np.ndarray | None:
        """Read numbers or strings of one dimension; ``None`` if it is something else."""
        if not _is_list(stored):
            return None
        if (text := _text(stored)) is not None:
            key = _key(*text)
            if key not in self._strings:
                self._strings[key] = _strings(*text)
            return self._strings[key]
        is_numbers = stored.dtype.kind in "biuf" and text_of(stored, "encoding-type") == "array"
        return _values(stored) if is_numbers else None

    def _masked_strings(self, stored: GroupID) -> pd.api.extensions.ExtensionArray | None:
        """Read strings some of which may be missing; ``None`` if they are of another form."""
        values, mask = (h5o.open(stored, name) for name in (b"values", b"mask"))
        text, is_missing = _text(values), self._array(mask)
        if text is None or is_missing is None or is_missing.dtype != bool or is_missing.shape != values.shape:
            return None
        # asked for first: that there is none is an exception, which takes longer
        na_value = text_of(stored, "na-value") if h5a.exists(stored, b"na-value") else None
        attributes = text_of(stored, "encoding-version"), na_value
        key = (*_key(*text), is_missing.tobytes(), *attributes)
        if key not in self._masked:
            dtype = self._string_types.get(attributes)
            if dtype is None or is_missing.any():
                array = read_element(h5py.Group(stored))
                self._string_types[attributes] = array.dtype
            else:
                array = pd.array(_strings(*text), dtype=dtype)
            self._masked[key] = array
        return self._masked[key]

    def _categorical(self, stored: GroupID) -> pd.Categorical | None:
        """Read a categorical of strings; ``None`` if it is another."""
        codes, names = (self._array(h5o.open(stored, name)) for name in (b"codes", b"categories"))
        if codes is None or names is None or names.dtype != object:
            return None
        key = (id(names), bool(_attribute(stored, b"ordered")))
        if key not in self._types:
            self._types[key] = pd.CategoricalDtype(names, ordered=key[1])
        return pd.Categorical.from_codes(codes, dtype=self._types[key])

    def _frame(self, stored: GroupID) -> pd.DataFrame | None:
        """Read a frame; ``None`` if it is of an older form."""
        if text_of(stored, "encoding-version") != "0.2.0":
            return None
        columns, index = texts_of(stored, "column-order"), text_of(stored, "_index")
        if columns is None or index is None:
            return None
        members = {name: self._read(h5o.open(stored, name.encode())) for name in [*columns, index]}
        key = ((*columns, index), tuple((name, id(member)) for name, member in members.items()))
        if key in self._frames:
            return self._frames[key][0]
        frame = pd.DataFrame({name: members[name] for name in columns}, members[index], columns or None)
        if index != "_index":
            frame.index.name = index
        if all(
            (type(member) is np.ndarray and member.dtype == object) or isinstance(member.dtype, pd.StringDtype)
            for member in members.values()
        ):
            self._frames[key] = frame, members
        return frame


def _is_list(stored: GroupID | DatasetID) -> bool:
    return isinstance(stored, DatasetID) and len(stored.shape) == 1 and stored.shape[0] > 0


def _text(stored: GroupID | DatasetID) -> tuple[str, bytes] | None:
    """Read strings as anndata writes them: encoding, and all of them with zero bytes between; ``None`` for anything else."""
    if not _is_list(stored):
        return None
    kind = h5py.check_string_dtype(stored.dtype)
    if kind is None or kind.length is not None or text_of(stored, "encoding-type") != "string-array":
        return None
    # libhdf5 knows what somebody else in this process has written and not flushed
    if stored.shape[0] >= _MANY_TEXTS and h5i.get_file_id(stored).get_intent() == h5f.ACC_RDONLY:
        # what the core does not read, libhdf5 reads, or says what is wrong with it
        with suppress(*_OF_ANOTHER_FORM, RuntimeError):
            return kind.encoding, ops.texts(os.fsdecode(h5f.get_name(stored)), h5i.get_name(stored).decode())[:-1]
    # a zero byte ends each in the file, so none has one within
    return kind.encoding, b"\0".join(_values(stored))


def _strings(encoding: str, text: bytes) -> np.ndarray:
    return np.array(text.decode(encoding).split("\0"), dtype=object)


def _values(stored: DatasetID) -> np.ndarray:
    # libhdf5 leaves out what was never written
    values = np.zeros(stored.shape, stored.dtype)
    stored.read(h5s.ALL, h5s.ALL, values)
    return values


def _key(encoding: str, text: bytes) -> tuple[str, bytes]:
    return encoding, hashlib.sha256(text).digest()


def _attribute(stored: GroupID | DatasetID, name: bytes) -> np.ndarray:
    attribute = h5a.open(stored, name)
    values = np.zeros(attribute.shape, attribute.dtype)
    attribute.read(values)
    return values
