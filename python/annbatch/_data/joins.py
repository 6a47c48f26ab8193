"""Datasets with variables of their own as one: which column each of theirs becomes, and annotations that fit together.

The order of the joined variables, the types of obs columns and their categories are anndata's own: `anndata.concat` is
asked for them, with annotations only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Joined:
    """Annotations of several datasets as one.

    Parameters
    ----------
    var
        The joined variables, and the columns that all datasets have with the same values.
    columns
        For each dataset, int32 ``[n_var of the dataset]``: the joined column of each of its own, -1 where it is left
        out. ``None`` where each keeps its place. Datasets of the same variables have the same array.
    obs
        For each dataset its observations; all frames have the same columns of the same types.
    """

    var: pd.DataFrame
    columns: tuple[np.ndarray | None, ...]
    obs: tuple[pd.DataFrame, ...]


def join_annotations(
    labels: Sequence[str],
    obs: Sequence[pd.DataFrame],
    var: Sequence[pd.DataFrame],
    join: Literal["outer", "inner"],
) -> Joined:
    """Join datasets as ``anndata.concat(..., join=join, merge="same")`` does.

    Parameters
    ----------
    labels
        What messages call the datasets.
    obs, var
        Their annotations.
    join
        ``"outer"``: all variables and obs columns that any dataset has, with missing values in obs. ``"inner"``: those
        that all have.

    Raises
    ------
    ValueError
        If names of variables repeat in a dataset and are not the same in all, in the same order, or no variable is left.
    """
    if join not in ("outer", "inner"):
        raise ValueError(f'join must be "outer" or "inner", got {join!r}')
    with warnings.catch_warnings():
        # names of cells repeat between files, and nothing is looked up by them; those of variables are looked at below
        warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique", UserWarning)
        warnings.filterwarnings("ignore", "Transforming to str index", UserWarning)
        # frames that are one object count once: no union or comparison with itself changes anything
        different = list({id(frame): frame for frame in var}.values())
        of_frame = {
            id(frame): ad.AnnData(var=named) for frame, named in zip(different, _share_names(different), strict=True)
        }
        # as text: numbers become names
        names = [of_frame[id(frame)].var.index for frame in var]
        if (twice := next((k for k, index in enumerate(names) if not index.is_unique), None)) is not None:
            if not all(index is names[0] or index.equals(names[0]) for index in names):
                repeated = names[twice][names[twice].duplicated()][0]
                raise ValueError(
                    f"{labels[twice]}: variables cannot be joined by name, for {repeated!r} comes more than once. Call "
                    "adata.var_names_make_unique() and write it again."
                )
            return Joined(_merged(list(of_frame.values()), names[0]), (None,) * len(names), _join_obs(obs, join))
        joined_var = ad.concat(list(of_frame.values()), join=join, merge="same").var
        joined_obs = _join_obs(obs, join)
    if len(joined_var) == 0:
        raise ValueError(
            f"join={join!r} of {len(labels)} datasets leaves no variable: see whether all name them alike (symbols or "
            f"identifiers); {labels[0]} begins with {list(names[0][:3])}."
        )
    columns: dict[int, np.ndarray | None] = {}
    # where frames share no index (pandas copies on write), columns are found out for each, and kept once
    known: dict[bytes, np.ndarray] = {}
    for label, index in zip(labels, names, strict=True):
        if id(index) in columns:
            continue
        places = joined_var.index.get_indexer(index).astype(np.int32)
        if join == "outer" and (places < 0).any():
            raise ValueError(f"{label}: the name {index[places < 0][0]!r} is not among the joined ones.")
        kept = len(places) == len(joined_var) and np.array_equal(places, np.arange(len(joined_var)))
        columns[id(index)] = None if kept else known.setdefault(places.tobytes(), places)
    return Joined(joined_var, tuple(columns[id(index)] for index in names), joined_obs)


def _merged(adatas: Sequence[ad.AnnData], names: pd.Index) -> pd.DataFrame:
    """Join variables that have the same names in the same order, of which some repeat: by their places."""
    places = pd.Index([str(place) for place in range(len(names))], name=names.name)
    var = ad.concat([ad.AnnData(var=adata.var.set_axis(places)) for adata in adatas], join="outer", merge="same").var
    return var.loc[places].set_axis(names.rename(var.index.name))


def _join_obs(obs: Sequence[pd.DataFrame], join: Literal["outer", "inner"]) -> tuple[pd.DataFrame, ...]:
    """Give frames the columns and types that they have in their `anndata.concat`.

    That takes half a millisecond for each frame, so frames of the same types are one to it.
    """
    alike: dict[Any, list[int]] = {}
    for number, frame in enumerate(obs):
        types = tuple((name, _type_key(dtype, number)) for name, dtype in frame.dtypes.items())
        alike.setdefault((types, frame.index.dtype, frame.index.name), []).append(number)
    merged = [pd.concat([obs[number] for number in numbers]) for numbers in alike.values()]
    no_var = pd.DataFrame(index=pd.Index([], dtype=str))
    joined = ad.concat([ad.AnnData(obs=frame, var=no_var) for frame in merged], join=join).obs
    frames: dict[int, pd.DataFrame] = {}
    end = 0
    for number in (number for numbers in alike.values() for number in numbers):
        start, end = end, end + len(obs[number])
        frames[number] = joined.iloc[start:end]
    return tuple(frames[number] for number in range(len(obs)))


def _type_key(dtype: Any, number: int) -> Any:
    """Give what is equal for the equal types of frames that may be joined before others.

    Of categoricals those that share their categories, which takes no comparing. Of objects and extension arrays none: what
    becomes of missing values of theirs depends on whether a frame has others.
    """
    if isinstance(dtype, pd.CategoricalDtype) and dtype.categories.dtype == object:
        return id(dtype.categories), dtype.ordered
    return dtype if isinstance(dtype, np.dtype) and dtype.kind in "biuf" else number


def _share_names(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Give frames that name their rows alike the same index: pandas hashes it once and need not compare it."""
    known: dict[tuple[Any, ...], pd.Index] = {}
    shared = [frame.copy(deep=False) for frame in frames]
    for frame in shared:
        names = frame.index
        frame.index = known.setdefault((tuple(names.tolist()), names.name, names.dtype), names)
    return shared
