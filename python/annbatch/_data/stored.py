"""AnnData on disk, by its path: annotations are read when asked for, matrices stay where they are.

In comes a path; out come `StoredAnnData`, one for a store or file, several for a collection. HDF5 files are open only
while something is read of them: there may be thousands.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import pandas as pd
import zarr

from annbatch._data.attributes import columns_of, index_of, names_in, read_element, text_of
from annbatch._data.collections import dataset_keys
from annbatch._data.hdf5 import hdf5_matrix, open_hdf5, stamp_of
from annbatch._data.places import places
from annbatch._data.remedies import csc_remedy, said_of_missing_group, said_of_mudata

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from annbatch._data.places import Place


@dataclass(frozen=True)
class StoredAnnData:
    """One AnnData on disk.

    Parameters
    ----------
    path
        Where it lies, as messages name it.
    group
        Its opened group; ``None`` in an HDF5 file.
    within
        The group of an HDF5 file that holds it, with which `path` ends: ``"mod/rna"``; ``""`` for the file itself.
    """

    path: str
    group: zarr.Group | None
    within: str = ""

    @contextmanager
    def opened(self) -> Iterator[OpenedAnnData]:
        """Open it once for all that is read of it.

        Raises
        ------
        OSError
            If it is no readable HDF5 file.
        KeyError
            If the file has no such group.
        """
        if self.group is not None:
            yield OpenedAnnData(self.path, self.group)
            return
        name = self.path.removesuffix(f"/{self.within}") if self.within else self.path
        stamp = stamp_of(name)
        with open_hdf5(name) as file:
            group = self._group_in(file)
            if self.within or not _is_old(file):
                yield OpenedAnnData(self.path, group, file, stamp)
                return
        # not while it is open here: HDF5 wants all to lock a file or none
        old = _read_old(name)
        with open_hdf5(name) as file:
            yield OpenedAnnData(self.path, file, file, stamp, old)

    def _group_in(self, file: h5py.File) -> h5py.Group:
        if not self.within:
            return file
        group = file.get(self.within)
        if isinstance(group, h5py.Group):
            return group
        raise KeyError(said_of_missing_group(file.filename, file, self.within))


@dataclass(frozen=True)
class OpenedAnnData:
    """A `StoredAnnData` that is being read.

    Parameters
    ----------
    path
        Where it lies, as messages name it.
    group
        Its group.
    file
        The HDF5 file that the group is of, if it is.
    stamp
        What that file is known by, see `annbatch._data.hdf5.stamp_of`.
    old
        The frames of a file that anndata wrote before version 0.7, by name.
    """

    path: str
    group: zarr.Group | h5py.Group
    file: h5py.File | None = None
    stamp: tuple[int, int] | None = None
    old: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of obs."""
        return list(self.old["obs"].columns) if "obs" in self.old else columns_of(self._member("obs"))

    def obs(self, columns: Sequence[str] | None = None, *, read: Callable[[Any], Any] = read_element) -> pd.DataFrame:
        """Read obs, or the named columns of it, with `read_element` or what does the same.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        if columns is None:
            return self._frame("obs", read)
        if "obs" in self.old:
            _check_stored(columns, self.obs_columns, self.path)
            return self.old["obs"][list(columns)]
        return read_columns(self._member("obs"), columns, self.path, read)

    def var(self, *, raw: bool = False, read: Callable[[Any], Any] = read_element) -> pd.DataFrame:
        """Read var, or that of ``raw``, with `read_element` or what does the same."""
        return self._frame("raw/var" if raw else "var", read)

    def has_layer(self, name: str) -> bool:
        """Whether there is a layer of that name."""
        return f"layers/{name}" in self.group

    def element(self, name: str) -> Any:
        """Open ``"X"``, ``"raw/X"``, ``"layers/..."`` or ``"obsm/..."`` without reading it.

        Raises
        ------
        KeyError
            If there is none of that name.
        TypeError
            If it is neither a dense array nor a CSR matrix.
        """
        if self.file is not None and self.stamp is not None:
            within = self.group.name.strip("/")
            try:
                return hdf5_matrix(self.file, f"{within}/{name}" if within else name, self.stamp)
            except KeyError:
                if name != "X" and said_of_mudata(self.path, self.group) is None:
                    raise
                raise KeyError(self._absent(name)) from None
        member = self._member(name)
        if text_of(member, "encoding-type") == "null":
            raise KeyError(self._absent(name))
        try:
            return read_backed(member)
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def elements(self, wanted: Mapping[str, Sequence[str]], x: str = "X") -> dict[str, Any]:
        """Open the data matrix `x` as ``"X"``, and the elements `wanted` (names by ``"layers"`` and ``"obsm"``).

        There is no ``"X"`` among them if it is missing and others are wanted.
        """
        others = {
            f"{group}/{name}": self.element(f"{group}/{name}") for group, names in wanted.items() for name in names
        }
        try:
            return {"X": self.element(x), **others}
        except KeyError:
            if x != "X" or not others:
                raise
            return others

    def _absent(self, name: str) -> str:
        """Say that there is no such member, and what there is."""
        if (message := said_of_mudata(self.path, self.group)) is not None:
            return message
        if name != "X":
            parent, _, _ = name.rpartition("/")
            held = names_in(self.group, parent) if parent else sorted(self.group)
            return f"{self.path} has no {name}; it has {[f'{parent}/{key}'.lstrip('/') for key in held]}"
        names = [*names_in(self.group, "layers"), *(["raw"] if "X" in names_in(self.group, "raw") else [])]
        if not names:
            return (
                f"{self.path} has no X, no layers and no raw: there is no matrix to read. It has {sorted(self.group)}"
            )
        return (
            f"{self.path} has no X; it has the layers {names}. Read one of them in its place, as in annbatch.open(..., "
            f"layer={names[0]!r}), or as it is, with Loader(layers=[...])."
        )

    def _frame(self, name: str, read: Callable[[Any], Any] = read_element) -> pd.DataFrame:
        return self.old[name] if name in self.old else read(self._member(name))

    def _member(self, name: str) -> Any:
        if name not in self.group:
            raise KeyError(self._absent(name))
        return self.group[name]


def stored_at(path: str | os.PathLike[str]) -> list[StoredAnnData]:
    """Open what lies at `path`: an AnnData Zarr store or h5ad file, a collection or folder of several, all of a pattern.

    A path may lead on into an HDF5 file: ``cells.h5mu/mod/rna``.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is something else.
    """
    return [stored for place in places(path) for stored in _stored_in(place)]


def _stored_in(place: Place) -> list[StoredAnnData]:
    path = place.path
    if path.is_file():
        # whether it is HDF5 is seen when something is read of it: of thousands of files each opening counts
        return [StoredAnnData(str(path.absolute() / place.within), None, place.within)]
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError, NotADirectoryError) as error:
        raise ValueError(
            f"{path} is no Zarr group and holds no h5ad files, so it is no AnnData store and no collection ({error}). "
            f"Several files or stores are named with a pattern, such as {path}/*.zarr, or as a list."
        ) from error
    if "obs" in group:
        return [StoredAnnData(str(path), group)]
    members: Any = group
    datasets = [StoredAnnData(str(path / key), members[key]) for key in dataset_keys(group)]
    if not datasets:
        raise ValueError(
            said_of_mudata(str(path), group)
            or f"{path} is neither an AnnData store, for it has no obs, nor a collection of such stores; it has {sorted(group)}"
        )
    return datasets


def _is_old(file: h5py.File) -> bool:
    """Whether a file may have frames that anndata wrote before version 0.7."""
    if text_of(file.id, "encoding-type") is not None:
        return False
    frames = ("obs", "var", "raw/var", "raw.var")
    return any(name in file and text_of(file[name], "encoding-type") is None for name in frames)


def _read_old(path: str) -> dict[str, pd.DataFrame]:
    """Read the frames of an HDF5 file by anndata's own rules for old ones."""
    adata = ad.read_h5ad(path, backed="r")
    try:
        frames = {"obs": adata.obs, "var": adata.var}
        return frames if adata.raw is None else {**frames, "raw/var": adata.raw.var}
    finally:
        adata.file.close()


def read_backed(elem: zarr.Array[Any] | zarr.Group) -> Any:
    """Present a stored dense array or CSR matrix without reading it.

    Returns
    -------
    zarr.Array or anndata.abc.CSRDataset

    Raises
    ------
    TypeError
        For any other element.
    """
    encoding = text_of(elem, "encoding-type")
    if encoding == "array" and isinstance(elem, zarr.Array):
        return elem
    if encoding == "csr_matrix" and isinstance(elem, zarr.Group):
        return ad.io.sparse_dataset(elem)
    message = f"Unrecognized encoding type {encoding} for {elem.name}"
    if encoding == "csc_matrix":
        message += f": its columns are contiguous, not its rows. {csc_remedy(elem.path)}"
    raise TypeError(message)


def read_columns(
    obs: zarr.Group | h5py.Group, columns: Sequence[str], at: Any, read: Callable[[Any], Any]
) -> pd.DataFrame:
    """Read the named columns of a frame stored in `at` and no others, with `read_element` or what does the same."""
    _check_stored(columns, columns_of(obs), at)
    if text_of(obs, "encoding-version") != "0.2.0":
        # older frames keep categories apart from the columns
        return read(obs)[list(columns)]
    key = index_of(obs)
    index = pd.Index(read(obs[key]), name=None if key == "_index" else key)
    return pd.DataFrame({name: read(obs[name]) for name in columns}, index=index)


def _check_stored(columns: Sequence[str], stored: Sequence[str], at: Any) -> None:
    for column in columns:
        if column not in stored:
            raise KeyError(f"obs of {at} has no column {column!r}; it has {stored}")
