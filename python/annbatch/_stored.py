"""AnnData on disk, by its path: annotations are read when asked for, matrices stay where they are.

In comes a path; out come `StoredAnnData`, one for a store or file, several for a collection. HDF5 files are open only
while something is read of them: there may be thousands.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import pandas as pd
import zarr

from annbatch._hdf5 import hdf5_matrix, open_hdf5, stamp_of
from annbatch.io import DatasetCollection
from annbatch.utils import _read_backed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import h5py


@dataclass(frozen=True)
class StoredAnnData:
    """One AnnData on disk.

    Parameters
    ----------
    path
        Where it lies, as messages name it.
    group
        Its opened group; ``None`` for an HDF5 file.
    """

    path: str
    group: zarr.Group | None

    @contextmanager
    def opened(self) -> Iterator[OpenedAnnData]:
        """Open it once for all that is read of it.

        Raises
        ------
        OSError
            If it is no readable HDF5 file.
        """
        if self.group is not None:
            yield OpenedAnnData(self.path, self.group)
            return
        stamp = stamp_of(self.path)
        with open_hdf5(self.path) as file:
            if not _is_old(file):
                yield OpenedAnnData(self.path, file, stamp)
                return
        # not while it is open here: HDF5 wants all to lock a file or none
        old = _read_old(self.path)
        with open_hdf5(self.path) as file:
            yield OpenedAnnData(self.path, file, stamp, old)


@dataclass(frozen=True)
class OpenedAnnData:
    """A `StoredAnnData` that is being read.

    Parameters
    ----------
    path
        Where it lies, as messages name it.
    group
        Its group or file.
    stamp
        What an HDF5 file is known by, see `annbatch._hdf5.stamp_of`.
    old
        The frames of a file that anndata wrote before version 0.7, by name.
    """

    path: str
    group: zarr.Group | h5py.File
    stamp: tuple[int, int] | None = None
    old: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of obs."""
        return list(self.old["obs"].columns if "obs" in self.old else self._member("obs").attrs["column-order"])

    def obs(
        self, columns: Sequence[str] | None = None, *, read: Callable[[Any], Any] = ad.io.read_elem
    ) -> pd.DataFrame:
        """Read obs, or the named columns of it, with `ad.io.read_elem` or what does the same.

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

    def var(self, *, raw: bool = False, read: Callable[[Any], Any] = ad.io.read_elem) -> pd.DataFrame:
        """Read var, or that of ``raw``, with `ad.io.read_elem` or what does the same."""
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
        if self.stamp is not None:
            return hdf5_matrix(self.group, name, self.stamp)
        try:
            return _read_backed(self._member(name))
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def elements(self, wanted: Mapping[str, Sequence[str]], x: str = "X") -> dict[str, Any]:
        """Open the data matrix `x` as ``"X"``, and the elements `wanted` (names by ``"layers"`` and ``"obsm"``)."""
        names = [f"{group}/{name}" for group, names in wanted.items() for name in names]
        return {"X": self.element(x), **{name: self.element(name) for name in names}}

    def _frame(self, name: str, read: Callable[[Any], Any] = ad.io.read_elem) -> pd.DataFrame:
        return self.old[name] if name in self.old else read(self._member(name))

    def _member(self, name: str) -> Any:
        if name not in self.group:
            parent, _, _ = name.rpartition("/")
            held = self.group.get(parent, ()) if parent else self.group
            raise KeyError(f"{self.path} has no {name}; it has {sorted(f'{parent}/{key}'.lstrip('/') for key in held)}")
        return self.group[name]


def stored_at(path: str | os.PathLike[str]) -> list[StoredAnnData]:
    """Open what lies at `path`: an AnnData Zarr store or h5ad file, or a collection of several.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}")
    if path.is_file():
        # whether it is HDF5 is seen when something is read of it: of thousands of files each opening counts
        return [StoredAnnData(str(path.absolute()), None)]
    files = [file for file in path.glob("dataset_*.h5ad") if file.stem[8:].isdecimal()]
    numbers = [int(file.stem[8:]) for file in files]
    if files:
        if len(set(numbers)) < len(numbers) or any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise ValueError(
                f"{path} is no collection: it holds {sorted(file.name for file in files)}, with a number twice or in a "
                "Zarr group. Name the files one by one, as a list."
            )
        ordered = sorted(zip(numbers, files, strict=True))
        return [StoredAnnData(str(file.absolute()), None) for _, file in ordered]
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError, NotADirectoryError) as error:
        raise ValueError(f"{path} is no Zarr group, so no AnnData store and no collection ({error})") from error
    if "obs" in group:
        return [StoredAnnData(str(path), group)]
    datasets = [StoredAnnData(str(path / dataset.basename), dataset) for dataset in DatasetCollection(group)]
    if not datasets:
        raise ValueError(f"{path} is neither an AnnData store, for it has no obs, nor a collection of such stores")
    return datasets


def _is_old(file: h5py.File) -> bool:
    """Whether a file may have frames that anndata wrote before version 0.7."""
    if "encoding-type" in file.attrs:
        return False
    frames = ("obs", "var", "raw/var", "raw.var")
    return any(name in file and "encoding-type" not in file[name].attrs for name in frames)


def _read_old(path: str) -> dict[str, pd.DataFrame]:
    """Read the frames of an HDF5 file by anndata's own rules for old ones."""
    adata = ad.read_h5ad(path, backed="r")
    try:
        frames = {"obs": adata.obs, "var": adata.var}
        return frames if adata.raw is None else {**frames, "raw/var": adata.raw.var}
    finally:
        adata.file.close()


def read_columns(
    obs: zarr.Group | h5py.Group, columns: Sequence[str], at: Any, read: Callable[[Any], Any]
) -> pd.DataFrame:
    """Read the named columns of a frame stored in `at` and no others, with `ad.io.read_elem` or what does the same."""
    _check_stored(columns, list(obs.attrs["column-order"]), at)
    if obs.attrs.get("encoding-version") != "0.2.0":
        # older frames keep categories apart from the columns
        return read(obs)[list(columns)]
    key = obs.attrs["_index"]
    index = pd.Index(read(obs[key]), name=None if key == "_index" else key)
    return pd.DataFrame({name: read(obs[name]) for name in columns}, index=index)


def _check_stored(columns: Sequence[str], stored: Sequence[str], at: Any) -> None:
    for column in columns:
        if column not in stored:
            raise KeyError(f"obs of {at} has no column {column!r}; it has {stored}")
