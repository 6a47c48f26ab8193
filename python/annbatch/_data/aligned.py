"""A stored AnnData opened for a loader: annotations in memory, matrices left on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import pandas as pd

from annbatch._data.attributes import index_of, read_element, text_of
from annbatch._data.stored import read_backed, read_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    import zarr


def load_all_aligned(g: zarr.Group) -> ad.AnnData:
    """Open one stored AnnData for a loader: annotations in memory, matrices left on disk.

    ``X`` is opened if there is one, ``obs`` is read, of ``var`` only the names are read. Of ``obsm`` and ``layers`` the dense arrays
    and CSR matrices are opened; elements of other kinds (data frames, awkward arrays) are left out, since no batch
    could hold them.

    Parameters
    ----------
    g
        Group that holds one AnnData.

    Raises
    ------
    TypeError
        If ``X`` is neither a dense array nor a CSR matrix.
    """
    return _load_aligned(g, read_element(g["obs"]))


def load_chosen_columns(group: zarr.Group, columns: Sequence[str]) -> ad.AnnData:
    """Open a stored AnnData like `load_all_aligned`, reading no more of obs than the named columns."""
    return _load_aligned(group, read_columns(group["obs"], columns, group.store_path, read_element))


def _load_aligned(g: zarr.Group, obs: pd.DataFrame) -> ad.AnnData:
    members: dict[str, Any] = {attribute: g[attribute] for attribute in ("obsm", "layers", "var") if attribute in g}
    var = members.pop("var")
    aligned = {
        attribute: {
            key: read_backed(elem)
            for key, elem in mapping.members()
            if text_of(elem, "encoding-type") in ("array", "csr_matrix")
        }
        for attribute, mapping in members.items()
    }
    has_x = "X" in g and text_of(g["X"], "encoding-type") != "null"
    return ad.AnnData(
        X=read_backed(g["X"]) if has_x else None,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(read_element(var[index_of(var)]))),
        **aligned,
    )
