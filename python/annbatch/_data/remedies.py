"""What to do about data that cannot be read as they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from annbatch._data.attributes import names_in, text_of

if TYPE_CHECKING:
    import h5py
    import zarr


def csc_remedy(name: str = "X") -> str:
    """Say what to do with the CSC matrix that is stored as `name` (``"X"``, ``"obsm/…"``, ``"layers/…"``)."""
    keyed = re.search(r"(?:^|/)(layers|obsm)/(.+)", name)
    place = f"adata.{keyed[1]}[{keyed[2]!r}]" if keyed else "adata.X"
    return f"Store it as CSR, for example `{place} = {place}.tocsr()` before writing."


def said_of_missing_group(path: str, file: h5py.File, within: str) -> str:
    """Say that the HDF5 file at `path` has no group `within`, and what it has."""
    return said_of_mudata(path, file) or f"{path} has no group {within}; it has {sorted(file)}"


def said_of_mudata(path: str, group: zarr.Group | h5py.Group) -> str | None:
    """Say what to do with the MuData that lies at `path`, which has an AnnData for each modality; ``None`` if it is none."""
    if text_of(group, "encoding-type") != "MuData":
        return None
    names = names_in(group, "mod")
    example = f", for example {path}/mod/{names[0]}" if names else ""
    return f"{path} is a MuData of the modalities {names}. Open one of them by its path{example}."
