"""AnnData on disk, by its path: annotations are read when asked for, matrices stay where they are.

In comes a path; out come `StoredAnnData`, one for a store, several for a collection. Another kind of file is another way
to open a path here, and everything else stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import pandas as pd
import zarr

from annbatch._sources import HDF5_REFUSAL
from annbatch.io import DatasetCollection
from annbatch.utils import _read_backed

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_HDF5_SUFFIXES = (".h5ad", ".h5")


@dataclass(frozen=True)
class StoredAnnData:
    """One AnnData on disk.

    Parameters
    ----------
    path
        Where it lies, as messages name it.
    group
        Its opened group.
    """

    path: str
    group: zarr.Group

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of obs."""
        return list(self.group["obs"].attrs["column-order"])

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read obs, or the named columns of it.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        frame = self.group["obs"]
        return ad.io.read_elem(frame) if columns is None else read_columns(frame, columns)

    def var(self, *, raw: bool = False) -> pd.DataFrame:
        """Read var, or that of ``raw``."""
        return ad.io.read_elem(self._member("raw/var" if raw else "var"))

    def element(self, name: str) -> Any:
        """Open ``"X"``, ``"raw/X"``, ``"layers/..."`` or ``"obsm/..."`` without reading it.

        Raises
        ------
        KeyError
            If there is none of that name.
        TypeError
            If it is neither a dense array nor a CSR matrix.
        """
        try:
            return _read_backed(self._member(name))
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def elements(self, wanted: Mapping[str, Sequence[str]], x: str = "X") -> dict[str, Any]:
        """Open the data matrix `x` as ``"X"``, and the elements `wanted` (names by ``"layers"`` and ``"obsm"``)."""
        names = [f"{group}/{name}" for group, names in wanted.items() for name in names]
        return {"X": self.element(x), **{name: self.element(name) for name in names}}

    def _member(self, name: str) -> Any:
        if name not in self.group:
            parent, _, _ = name.rpartition("/")
            held = self.group.get(parent, ()) if parent else self.group
            raise KeyError(f"{self.path} has no {name}; it has {sorted(f'{parent}/{key}'.lstrip('/') for key in held)}")
        return self.group[name]


def stored_at(path: str | os.PathLike[str]) -> list[StoredAnnData]:
    """Open what lies at `path`: an AnnData Zarr store, or a collection of several.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    TypeError
        If it is an HDF5 file, or a directory of these.
    ValueError
        If it is something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}")
    if path.suffix in _HDF5_SUFFIXES or any(path.glob("dataset_*.h5ad")):
        raise TypeError(f"{path}: {HDF5_REFUSAL}")
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


def read_columns(obs: zarr.Group, columns: Sequence[str]) -> pd.DataFrame:
    """Read the named columns of a stored frame and no others."""
    stored = list(obs.attrs["column-order"])
    for column in columns:
        if column not in stored:
            raise KeyError(f"obs of {obs.store_path} has no column {column!r}; it has {stored}")
    if obs.attrs.get("encoding-version") != "0.2.0":
        # older frames keep categories apart from the columns
        return ad.io.read_elem(obs)[list(columns)]
    index = pd.Index(ad.io.read_elem(obs[obs.attrs["_index"]]))
    return pd.DataFrame({name: ad.io.read_elem(obs[name]) for name in columns}, index=index)
