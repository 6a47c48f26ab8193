"""AnnData objects in memory, one after the other: over the union of their variables, in types that anndata can write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from ._checks import check_var_names
from ._frames import concat_frames, with_index

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal, TypeAlias

    Merge: TypeAlias = Literal["same", "unique", "first", "only"] | None


def extend_adata(old: ad.AnnData, new: ad.AnnData, merge: Merge, dtypes: Mapping[str, Mapping[str, Any]]) -> ad.AnnData:
    """Lay new observations behind old ones, both in memory, with frames of the dtypes that `joint_frame_dtypes` gives.

    Both lose their frames in ``obsm``.
    """
    frames = [_pop_frames(piece) for piece in (old, new)]
    joined = join_adatas([old, new], merge)
    for name, of_columns in dtypes.items():
        parts = [
            of_piece.get(name, pd.DataFrame(index=piece.obs_names))
            for of_piece, piece in zip(frames, (old, new), strict=True)
        ]
        frame = concat_frames(parts, of_columns)
        key = name.removeprefix("obsm/")
        if name == "obs":
            joined.obs = frame
        elif key in joined.obsm:
            raise ValueError(
                f"obsm {key!r} is a data frame in the collection or in what is added, and a matrix in the other. "
                "Rename or convert it with a function of your own as `load_adata`."
            )
        else:
            joined.obsm[key] = with_index(frame, joined.obs_names)
    settle_var(joined)
    return joined


def join_adatas(pieces: Sequence[ad.AnnData], merge: Merge) -> ad.AnnData:
    """Lay objects in memory one after the other, over the union of their variables and in the dtypes they have.

    anndata 0.13 computes dense matrices whose variables differ in float64; they are cast back. ``obs`` is not joined.
    """
    repeated = _number_repeated(pieces)
    joined = ad.concat(pieces, join="outer", merge=merge)
    for names, set_names in repeated:
        set_names(joined, names)
    if isinstance(joined.X, np.ndarray):
        joined.X = _cast_back(joined.X, [piece.X for piece in pieces])
    for name in ("layers", "obsm"):
        mapping = getattr(joined, name)
        for key in [key for key in mapping if key is not None and isinstance(mapping[key], np.ndarray)]:
            origins = [getattr(piece, name)[key] for piece in pieces if key in getattr(piece, name)]
            mapping[key] = _cast_back(mapping[key], origins)
    return joined


def _pop_frames(adata: ad.AnnData) -> dict[str, pd.DataFrame]:
    frames = {key: value for key, value in adata.obsm.items() if isinstance(value, pd.DataFrame)}
    for key in frames:
        del adata.obsm[key]
    return {"obs": adata.obs, **{f"obsm/{key}": frame for key, frame in frames.items()}}


def settle_var(adata: ad.AnnData) -> None:
    """Give frames along the variables types that anndata can write: merging them has left gaps."""
    adata.var = concat_frames([adata.var])
    for key in [key for key, value in adata.varm.items() if isinstance(value, pd.DataFrame)]:
        adata.varm[key] = concat_frames([adata.varm[key]])
    if adata.raw is not None:
        _set_raw_var(adata, concat_frames([adata.raw.var]))


def _number_repeated(pieces: Sequence[ad.AnnData]) -> list[tuple[pd.Index, Callable[[ad.AnnData, pd.Index], None]]]:
    """Give numbers for names to variables that cannot be told by name, which have to be the same in all pieces.

    Returns
    -------
    list
        The names there were, of ``var`` and of ``raw.var``, and what gives an object these names again.
    """
    axes: list[tuple[list[pd.Index], Callable[[ad.AnnData, pd.Index], None]]]
    axes = [([piece.var_names for piece in pieces], _set_var_names)]
    if all(piece.raw is not None for piece in pieces):
        axes.append(([piece.raw.var_names for piece in pieces], _set_raw_names))
    repeated = []
    for names, set_names in axes:
        if not all(each.is_unique for each in names):
            check_var_names(range(1, len(pieces) + 1), names)
            repeated.append((names[0], set_names))
            for piece in pieces:
                set_names(piece, pd.Index(np.arange(len(names[0])).astype(str), name=names[0].name))
    return repeated


def _set_var_names(adata: ad.AnnData, names: pd.Index) -> None:
    adata.var_names = names


def _set_raw_names(adata: ad.AnnData, names: pd.Index) -> None:
    if adata.raw is not None:  # anndata joins none of no rows
        _set_raw_var(adata, adata.raw.var.set_axis(names))


def _set_raw_var(adata: ad.AnnData, var: pd.DataFrame) -> None:
    varm = {key: v.set_axis(var.index) if isinstance(v, pd.DataFrame) else v for key, v in adata.raw.varm.items()}
    adata.raw = ad.AnnData(X=adata.raw.X, obs=pd.DataFrame(index=adata.obs_names), var=var, varm=varm)


def _cast_back(matrix: np.ndarray, origins: Sequence[Any]) -> np.ndarray:
    dtype = np.result_type(*(origin.dtype for origin in origins))
    return matrix.astype(dtype) if dtype.kind == "f" and matrix.dtype.itemsize > dtype.itemsize else matrix
