"""Annotations of the rows of a batch.

The obs frames of all datasets are joined once, when the first batch's obs is read; from then on a batch costs one
`take`. Joining and indexing are asked for lazily by `annbatch._output.batch.Batch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import union_categoricals

if TYPE_CHECKING:
    from collections.abc import Sequence

# torch has these dtypes but hardly an operation for them
_WIDENED = {np.dtype("uint16"): np.int32, np.dtype("uint32"): np.int64, np.dtype("uint64"): np.int64}


class ObsTable:
    """The obs frames of several datasets as one table.

    Parameters
    ----------
    frames
        One frame per dataset, in the order of the datasets.
    """

    def __init__(self, frames: Sequence[pd.DataFrame]):
        self._frames = tuple(frames)
        self._joined: pd.DataFrame | None = None
        self._codes: _CodePacks | None = None

    @property
    def joined(self) -> pd.DataFrame:
        """All frames below one another, as `pandas.concat` joins them, but categoricals stay categorical."""
        if self._joined is None:
            self._joined = join_frames(self._frames)
        return self._joined

    def frame(self, rows: np.ndarray) -> pd.DataFrame:
        """Return the given rows (int64 ``[n]``, counted over all datasets) in the order asked for."""
        return self.joined.take(rows)

    @property
    def code_packs(self) -> _CodePacks:
        """The table as numbers, see `codes`."""
        if self._codes is None:
            self._codes = _CodePacks(self.joined)
        return self._codes

    def codes(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return each column of the given rows as a tensor ``[n]``.

        Categorical and string columns come as int64 codes into `categories` (-1 where missing), booleans as bool,
        numbers in their own dtype (unsigned integers wider than 8 bits in the next wider signed one; nullable
        integers with gaps as float64 with NaN).
        """
        return self.code_packs.take(rows)

    @property
    def categories(self) -> dict[str, pd.Index]:
        """What the codes of each categorical or string column stand for."""
        return self.code_packs.categories


def join_frames(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join frames below one another like `pandas.concat`, keeping categorical columns categorical.

    `pandas.concat` turns a column into objects as soon as two frames know different categories of it, which happens
    to any column whose rare categories are absent from some datasets. Here such columns get the union of the
    categories, sorted if each frame had them sorted. Ordered categoricals that differ are left to pandas.
    """
    if len(frames) == 1:
        return frames[0]
    casts = {}
    for name in frames[0].columns:
        dtype = _common_categories([frame.get(name) for frame in frames])
        if dtype is not None:
            casts[name] = dtype
    return pd.concat([frame.astype(casts) for frame in frames] if casts else list(frames))


def _common_categories(columns: Sequence[Any]) -> pd.CategoricalDtype | None:
    """Return the categories to cast `columns` to, or ``None`` where pandas' own rule should decide."""
    # not a Series: a name that a frame lacks or has twice
    if not all(isinstance(column, pd.Series) and isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
        return None
    dtypes = {column.dtype for column in columns}
    kinds = {dtype.categories.dtype for dtype in dtypes}
    if len(dtypes) == 1 or len(kinds) > 1 or any(dtype.ordered for dtype in dtypes):
        return None
    ascending = all(dtype.categories.is_monotonic_increasing for dtype in dtypes)
    empty = [pd.Categorical([], dtype=column.dtype) for column in columns]
    return union_categoricals(empty, sort_categories=ascending).dtype


class _CodePacks:
    """A table as few row-major matrices of numbers, one per dtype.

    Rows of a batch are far apart: so each costs one cache miss per matrix instead of one per column. NumPy gathers
    and casts them, because torch would start its threads for it, which are busy with the model.
    """

    def __init__(self, table: pd.DataFrame):
        self.categories: dict[str, pd.Index] = {}
        if not table.columns.is_unique:
            raise ValueError('obs="codes" needs distinct column names.')
        packs: dict[tuple[np.dtype, np.dtype], dict[str, np.ndarray]] = {}
        for name in table.columns:
            values, delivered = self._encode(name, table[name])
            packs.setdefault((values.dtype, delivered), {})[name] = values
        self._order = list(table.columns)
        self._packs = [
            (list(columns), np.stack(list(columns.values()), axis=1), delivered)
            for (_, delivered), columns in packs.items()
        ]

    def _encode(self, name: str, column: pd.Series) -> tuple[np.ndarray, np.dtype]:
        """``(values, delivered dtype)`` of one column; notes its categories if it has any."""
        if isinstance(column.dtype, pd.CategoricalDtype):
            self.categories[name] = column.dtype.categories
            return column.cat.codes.to_numpy(), np.dtype("int64")
        if pd.api.types.is_bool_dtype(column.dtype) and not column.hasnans:
            return column.to_numpy(dtype=bool), np.dtype("bool")
        if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_complex_dtype(column.dtype):
            values = _numbers(column)
            return values, values.dtype
        if pd.api.types.is_string_dtype(column.dtype) or pd.api.types.is_object_dtype(column.dtype):
            categorical = pd.Categorical(column)
            self.categories[name] = categorical.categories
            return np.asarray(categorical.codes), np.dtype("int64")
        raise TypeError(
            f'obs="codes" has no numbers for column {name!r} of dtype {column.dtype}; '
            "leave it out with obs_columns=[...] or convert it to numbers or categories first."
        )

    def take(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for names, pack, delivered in self._packs:
            columns = pack.take(rows, axis=0).T.astype(delivered, order="C")
            found.update(zip(names, torch.from_numpy(columns).unbind(0), strict=True))
        return {name: found[name] for name in self._order}


def _numbers(column: pd.Series) -> np.ndarray:
    """Return a numeric column as native numbers torch can compute with; float64 with NaN if it is nullable and has gaps."""
    if pd.api.types.is_extension_array_dtype(column.dtype) and column.isna().any():
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    values = column.to_numpy(dtype=getattr(column.dtype, "numpy_dtype", None))
    if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
        raise OverflowError(
            f"obs column {column.name!r} holds unsigned integers past 2**63 - 1, torch has none so large."
        )
    return values.astype(_WIDENED.get(values.dtype.newbyteorder("="), values.dtype.newbyteorder("=")), copy=False)
