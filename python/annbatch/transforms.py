"""What a `annbatch.Loader` does to the rows of ``X`` before it yields them.

Steps are done in the order given, by the core's threads, each row for itself::

    from annbatch.transforms import Log1p, NormalizeTotal, SelectVar

    Loader(..., transform=[NormalizeTotal(1e4), Log1p(), SelectVar(marker_genes)], dense=True, dtype="bfloat16")

Results are those of scanpy to rounding. Values are computed in float32, or in float64 if they are stored or asked for so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

__all__ = ["Log1p", "NormalizeTotal", "SelectVar"]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class NormalizeTotal:
    """Scale every row so that it adds up to `target_sum`, as `scanpy.pp.normalize_total` does.

    A row that adds up to 0 stays as it is. The sum is that of what the steps before left of the row.

    Parameters
    ----------
    target_sum
        A number above 0. There is no default: scanpy's is the median over all rows of a data set, which a loader would
        have to read whole.
    """

    target_sum: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target_sum) and self.target_sum > 0):
            raise ValueError(f"target_sum must be a number above 0, got {self.target_sum!r}")


@dataclass(frozen=True)
class Log1p:
    """Replace every value x by log(1 + x), as `scanpy.pp.log1p` does.

    Parameters
    ----------
    base
        Of the logarithm; ``None`` means e.
    """

    base: float | None = None

    def __post_init__(self) -> None:
        if self.base is not None and not (math.isfinite(self.base) and self.base > 0 and self.base != 1):
            raise ValueError(f"base must be a number above 0 and not 1, got {self.base!r}")


@dataclass(frozen=True, eq=False)
class SelectVar:
    """Keep some variables, in the order given, as ``adata[:, var]`` does.

    Parameters
    ----------
    var
        Names as in the index of var, column numbers, or a boolean mask; each variable at most once.
    """

    var: Sequence[str] | Sequence[int] | np.ndarray | pd.Index

    def columns(self, names: pd.Index | None, n_var: int) -> np.ndarray:
        """Return the column numbers, int64, among variables of these names.

        Raises
        ------
        KeyError
            If there is no variable of a name.
        IndexError
            If there is no such column.
        ValueError
            If nothing is selected, something twice, or by name where there are no (or ambiguous) names.
        """
        if isinstance(self.var, str):
            raise TypeError(f"SelectVar takes a list of variables, got the string {self.var!r}")
        wanted = np.asarray(self.var)
        if wanted.ndim != 1 or wanted.size == 0:
            raise ValueError(f"SelectVar takes a list of at least one variable, got an array of shape {wanted.shape}")
        if wanted.dtype == bool:
            if len(wanted) != n_var:
                raise ValueError(f"SelectVar got a mask of {len(wanted)} values for {n_var} variables")
            columns = np.flatnonzero(wanted)
            if not len(columns):
                raise ValueError("SelectVar got a mask that selects no variable")
        elif np.issubdtype(wanted.dtype, np.integer):
            columns = wanted.astype(np.int64)
            if (outside := columns[(columns < -n_var) | (columns >= n_var)]).size:
                raise IndexError(f"SelectVar got column {outside[0]}, but there are {n_var} variables")
            columns = np.where(columns < 0, columns + n_var, columns)
        else:
            columns = _columns_of_names(wanted, names)
        if len(np.unique(columns)) < len(columns):
            raise ValueError("SelectVar got the same variable more than once")
        return columns


def _columns_of_names(wanted: np.ndarray, names: pd.Index | None) -> np.ndarray:
    if names is None:
        raise ValueError("SelectVar got names, but the data sets were added without var: give column numbers")
    if not names.is_unique:
        raise ValueError("SelectVar got names, but those of var are not unique: give column numbers")
    columns = names.get_indexer(wanted)
    if (absent := wanted[columns < 0]).size:
        raise KeyError(f"{absent.size} of {wanted.size} variables are not in var, among them {list(absent[:5])}")
    chosen: np.ndarray = columns.astype(np.int64)
    return chosen


def _name_of(dtype: Any) -> str:
    try:
        return str(np.dtype(dtype))
    except TypeError:
        # NumPy knows no bfloat16
        return str(dtype)


@dataclass(frozen=True)
class Transform:
    """Steps, form and type together, as a loader was asked for them."""

    steps: tuple[NormalizeTotal | Log1p | SelectVar, ...] = ()
    dense: bool = False
    dtype: str | None = None

    @classmethod
    def of(cls, steps: Sequence[Any], dense: bool, dtype: torch.dtype | str | None, to: str | None) -> Transform:
        """Check what a loader was asked for; `to` is what it yields.

        Raises
        ------
        TypeError
            If something is no step.
        ValueError
            If there is no such type, or `to` has none of it.
        """
        for step in steps:
            if not isinstance(step, NormalizeTotal | Log1p | SelectVar):
                raise TypeError(
                    f"transform takes annbatch.transforms.NormalizeTotal, Log1p and SelectVar, got {step!r} of type "
                    f"{type(step).__name__}"
                )
        name = None
        if dtype is not None:
            name = DTYPES.get(dtype) if isinstance(dtype, torch.dtype) else _name_of(dtype)
            if name not in DTYPES.values():
                raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {dtype!r}")
            if name == "bfloat16" and to != "torch":
                raise ValueError(f'dtype="bfloat16" needs to="torch": NumPy has no such type (to={to!r})')
        return cls(tuple(steps), bool(dense), name)

    def config(self, var: pd.DataFrame | None, n_var: int) -> dict[str, Any]:
        """Return the core's configuration for data of these variables."""
        steps: list[dict[str, Any]] = []
        names = None if var is None else var.index
        for step in self.steps:
            if isinstance(step, NormalizeTotal):
                steps.append({"normalize_total": {"target_sum": float(step.target_sum)}})
            elif isinstance(step, Log1p):
                steps.append({"log1p": {} if step.base is None else {"base": float(step.base)}})
            else:
                columns = step.columns(names, n_var)
                steps.append({"columns": columns.tolist()})
                names, n_var = None if names is None else names[columns], len(columns)
        return {"steps": steps, "dense": self.dense, "dtype": self.dtype}

    def selected(self, var: pd.DataFrame | None, n_var: int) -> np.ndarray | None:
        """Return the numbers of the variables that are left, in their order; ``None`` if all are, as they were."""
        columns = None
        for step in self.steps:
            if isinstance(step, SelectVar):
                left = None if var is None else var.index if columns is None else var.index[columns]
                chosen = step.columns(left, n_var if columns is None else len(columns))
                columns = chosen if columns is None else columns[chosen]
        return columns
