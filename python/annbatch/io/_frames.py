"""Observation annotations: reading single columns, and joining data frames without losing their types."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    import h5py
    import zarr


def read_frame(group: zarr.Group | h5py.Group, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a stored data frame, or some of its columns.

    Parameters
    ----------
    group
        The stored frame.
    columns
        Columns to read, in this order; those the frame lacks are left out. None reads all.

    Returns
    -------
    pandas.DataFrame
        The columns, under the stored index.
    """
    stored = list(group.attrs.get("column-order", []))
    chosen = stored if columns is None else [column for column in columns if column in stored]
    index = ad.io.read_elem(group[group.attrs.get("_index", "_index")])
    return pd.DataFrame({column: ad.io.read_elem(group[column]) for column in chosen}, index=index)


def concat_frames(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Lay frames one after the other; a column that some of them lack is missing in their rows.

    Unlike :func:`pandas.concat` this keeps categorical columns categorical, under the union of their categories, and
    columns with missing rows in a type that anndata can write.

    Parameters
    ----------
    frames
        At least one frame.

    Returns
    -------
    pandas.DataFrame
        The columns in order of first appearance, the indexes one after the other.
    """
    if len(frames) == 1:
        return frames[0].copy(deep=False)
    if not all(frame.columns.is_unique for frame in frames):
        return pd.concat(frames)  # which of two columns of one name would go with which is pandas' affair
    index = functools.reduce(lambda left, right: left.append(right), (frame.index for frame in frames))
    columns = dict.fromkeys(column for frame in frames for column in frame.columns)
    return pd.DataFrame({column: _concat_column(frames, column) for column in columns}, index=index)


def _concat_column(frames: Sequence[pd.DataFrame], column: str) -> Any:
    present = [frame[column] for frame in frames if column in frame.columns]
    has_gaps = len(present) < len(frames)
    dtype = _common_dtype(present, has_gaps=has_gaps)
    parts = [
        frame[column].astype(dtype) if column in frame.columns else pd.Series(index=frame.index, dtype=dtype)
        for frame in frames
    ]
    joined = pd.concat(parts, ignore_index=True)
    if has_gaps and joined.dtype == object:
        joined = joined.astype("category")  # text with gaps, which anndata refuses to write as an object column
    return joined.array


def _common_dtype(parts: Sequence[pd.Series], *, has_gaps: bool) -> Any:
    """Return the dtype that holds all parts, and missing values where there are gaps."""
    if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
        return _common_categories([part.dtype for part in parts])
    common = pd.concat([part[:0] for part in parts]).dtype
    if has_gaps and isinstance(common, np.dtype):
        return {"b": pd.BooleanDtype(), "i": np.dtype(float), "u": np.dtype(float)}.get(common.kind, common)
    return common


def _common_categories(dtypes: Sequence[pd.CategoricalDtype]) -> pd.CategoricalDtype:
    """Return the dtype that holds all categories: the same where they agree, else their unordered union."""
    first, *others = dtypes
    if all(first.ordered == other.ordered and first.categories.equals(other.categories) for other in others):
        return first
    categories = functools.reduce(lambda left, right: left.union(right), (dtype.categories for dtype in dtypes))
    return pd.CategoricalDtype(categories)
