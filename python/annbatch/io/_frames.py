"""Annotations: reading single columns, and joining data frames without losing their values or types.

Frames come in as files and functions of users gave them. Out comes one frame, each column of the one type that holds
what all of them have; :func:`annbatch.io._checks.check_columns` refuses columns for which there is none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from annbatch._data.attributes import columns_of, index_of, read_element

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal, TypeAlias

    import h5py
    import zarr

    Kind: TypeAlias = Literal["text", "booleans", "integers", "numbers", "dates", "missing", "other"]

_PAST_FLOAT = 2**53
"""The integers below this are floats of 64 bits, too."""

_NULLABLE = {"boolean": "boolean", "integer": "Int64", "floating": "Float64"}
"""Types for objects of one kind, by what pandas calls it."""


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
    stored = columns_of(group)
    chosen = stored if columns is None else [column for column in columns if column in stored]
    index = read_element(group[index_of(group)])
    return pd.DataFrame({column: read_element(group[column]) for column in chosen}, index=index)


@dataclass(frozen=True)
class ColumnType:
    """What joining has to know of one column of one frame.

    Attributes
    ----------
    dtype
        Its dtype, in normal form.
    kind
        What its values are, or its categories; ``"missing"`` if there are none, ``"other"`` for all that has no name here.
    has_gaps
        Whether values are missing.
    largest
        The largest absolute value of integers; 0 for all else.
    objects
        Names of the Python types of what is of kind ``"other"``, or of its dtype.
    """

    dtype: Any
    kind: Kind
    has_gaps: bool
    largest: int = 0
    objects: tuple[str, ...] = ()

    @classmethod
    def of(cls, column: pd.Series) -> ColumnType:
        """Look at a column."""
        column = _normal(column)
        values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
        has_gaps = bool(column.isna().any())
        kind = _kind(values)
        largest = _largest(values) if kind == "integers" else 0
        objects: tuple[str, ...] = ()
        if kind == "other":
            is_object = pd.api.types.is_object_dtype(values.dtype)
            objects = tuple(sorted({type(v).__name__ for v in values})) if is_object else (str(values.dtype),)
        return cls(column.dtype, kind, has_gaps or kind == "missing", largest, objects)

    @property
    def values_dtype(self) -> Any:
        """The dtype of the values, which of a categorical column are its categories."""
        return self.dtype.categories.dtype if self.is_categorical else self.dtype

    @property
    def is_categorical(self) -> bool:
        """Whether the column is categorical."""
        return isinstance(self.dtype, pd.CategoricalDtype)


def column_types(frame: pd.DataFrame) -> dict[str, ColumnType]:
    """Look at every column of a frame whose columns have distinct names."""
    return {name: ColumnType.of(column) for name, column in frame.items()}


def joint_dtypes(frames: Sequence[Mapping[str, ColumnType]]) -> dict[str, Any]:
    """Return, for each column of any frame, the dtype that holds the values of all, and gaps where frames lack it.

    See :func:`joint_dtype`.
    """
    columns = dict.fromkeys(column for frame in frames for column in frame)
    return {column: joint_dtype([frame.get(column) for frame in frames]) for column in columns}


def concat_frames(frames: Sequence[pd.DataFrame], dtypes: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Lay frames one after the other; a column that some of them lack is missing in their rows.

    Unlike :func:`pandas.concat` this keeps categorical columns categorical, under the union of their categories, and
    columns with missing rows in a type that anndata can write. An index that bears the name of a column of other values,
    which anndata cannot write, loses the name.

    Parameters
    ----------
    frames
        At least one frame.
    dtypes
        The dtypes of the columns, as :func:`joint_dtypes` gives them for these frames or for more. By default, found out.

    Returns
    -------
    pandas.DataFrame
        The columns in order of first appearance, the indexes one after the other.
    """
    if not all(frame.columns.is_unique for frame in frames):
        return pd.concat(frames)  # which of two columns of one name would go with which is pandas' affair
    index = functools.reduce(lambda left, right: left.append(right), (frame.index for frame in frames))
    if dtypes is None:
        dtypes = joint_dtypes([column_types(frame) for frame in frames])
    columns = {
        column: _concat_column(frames, column, dtype)
        for column, dtype in dtypes.items()
        if any(column in frame.columns for frame in frames)
    }
    return with_index(pd.DataFrame(columns, index=index, columns=None if columns else frames[0].columns), index)


def with_index(frame: pd.DataFrame, index: pd.Index) -> pd.DataFrame:
    """Give a frame another index, which loses its name if it is that of a column of other values."""
    return frame.set_axis(index.rename(None) if is_named_as_another(index, frame) else index)


def is_named_as_another(index: pd.Index, frame: pd.DataFrame) -> bool:
    """Whether an index has the name of a column of other values, which anndata cannot write."""
    return index.name in frame.columns and list(index) != list(frame[index.name])


def _concat_column(frames: Sequence[pd.DataFrame], column: str, dtype: Any) -> Any:
    parts = [
        _cast(_normal(frame[column]), dtype) if column in frame.columns else pd.Series(index=frame.index, dtype=dtype)
        for frame in frames
    ]
    return parts[0].array if len(parts) == 1 else pd.concat(parts, ignore_index=True).array


def _cast(column: pd.Series, dtype: Any) -> pd.Series:
    if column.dtype == dtype:
        return column
    if column.isna().all():
        return pd.Series(index=column.index, dtype=dtype)  # of whatever type no values are
    if isinstance(column.dtype, pd.CategoricalDtype) and not isinstance(dtype, pd.CategoricalDtype):
        # by the categories: pandas would take integers with gaps for floats on the way
        codes = column.cat.codes.to_numpy()
        categories = column.cat.categories.astype(dtype).array
        return pd.Series(categories.take(codes, allow_fill=bool((codes < 0).any())), index=column.index, dtype=dtype)
    return column.astype(dtype)


def _normal(column: pd.Series) -> pd.Series:
    """Give a column, or its categories, a dtype that says what the values are, if any does.

    Objects that all are booleans, integers or floats become those, nullable floats, which anndata does not write, floats
    with NaN. Text stays as it is.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = column.cat.categories
        plain = _plain_categories(categories)
        return column if plain is categories else column.cat.rename_categories(plain)
    if pd.api.types.is_object_dtype(column.dtype):
        inferred = pd.api.types.infer_dtype(column.dropna())
        if inferred not in _NULLABLE:
            return column
        try:
            column = pd.Series(pd.array(column.to_numpy(), dtype=_NULLABLE[inferred]), index=column.index)
        except (OverflowError, TypeError, ValueError):
            return column  # integers of more than 64 bits
        if not column.isna().any():
            return column.astype(column.dtype.numpy_dtype)
    if isinstance(column.array, pd.arrays.FloatingArray):
        return column.astype(column.dtype.numpy_dtype)
    return column


def _plain_categories(categories: pd.Index) -> pd.Index:
    """Categories as NumPy holds them: of extension types anndata would write objects."""
    if pd.api.types.is_object_dtype(categories.dtype):
        return categories.infer_objects(copy=False)
    return categories.astype(getattr(categories.dtype, "numpy_dtype", categories.dtype), copy=False)


def _kind(values: pd.Series | pd.Index) -> Kind:
    dtype = values.dtype
    if isinstance(dtype, pd.SparseDtype):
        return "other"
    if pd.api.types.is_bool_dtype(dtype):
        return "booleans"
    if pd.api.types.is_integer_dtype(dtype):
        return "integers"
    if pd.api.types.is_float_dtype(dtype):
        return "numbers" if len(values) and values.notna().any() else "missing"
    if pd.api.types.is_datetime64_any_dtype(dtype):
        return "dates"
    if isinstance(dtype, pd.StringDtype):
        return "text"
    if pd.api.types.is_object_dtype(dtype):
        of_objects: dict[str, Kind] = {"string": "text", "empty": "missing"}
        return of_objects.get(pd.api.types.infer_dtype(values.dropna()), "other")
    return "other"


def _largest(values: pd.Series | pd.Index) -> int:
    return 0 if values.isna().all() else max(int(values.max()), -int(values.min()))


def joint_dtype(columns: Sequence[ColumnType | None]) -> Any:
    """Return the dtype for what frames have in one column, `None` being a frame that lacks it.

    It is ``object`` for text in all its rows, and where no other holds all values as they are.
    """
    present = [column for column in columns if column is not None]
    # a column without values has some type or other: it says nothing of what its values would be
    telling = [column for column in present if column.kind != "missing"] or present
    has_gaps = len(present) < len(columns) or any(column.has_gaps for column in present)
    kinds = _joint_kinds(telling)
    if len(kinds) > 1:
        return np.dtype(object)
    (kind,) = kinds
    if all(column.is_categorical for column in telling):
        return _joint_categories(telling)
    match kind:
        case "text":
            return _joint_text(telling, has_gaps=has_gaps)
        case "booleans":
            is_nullable = has_gaps or any(column.values_dtype == "boolean" for column in telling)
            return pd.BooleanDtype() if is_nullable else np.dtype(bool)
        case "integers":
            return _joint_integers(telling, has_gaps=has_gaps)
        case "numbers":
            return np.result_type(*(_numpy_dtype(column) for column in telling))
    dtypes = {column.dtype for column in telling}
    if len(dtypes) == 1 and not pd.api.types.is_object_dtype(telling[0].dtype):
        return dtypes.pop()
    return pd.StringDtype("python") if kind == "missing" else np.dtype(object)


def _joint_kinds(columns: Sequence[ColumnType]) -> set[Kind]:
    """Return what the values of some columns are: more than one kind if no type holds them all."""
    kinds = {column.kind for column in columns}
    largest = max(column.largest for column in columns)
    if kinds == {"integers", "numbers"} and largest <= _PAST_FLOAT:  # larger ones would be rounded
        return {"numbers"}
    return kinds


def _joint_text(columns: Sequence[ColumnType], *, has_gaps: bool) -> Any:
    first, *others = (column.values_dtype for column in columns)
    if isinstance(first, pd.StringDtype) and all(first == other for other in others):
        return first
    # among objects, missing text would be written as "nan"
    return pd.StringDtype("python") if has_gaps else np.dtype(object)


def _joint_integers(columns: Sequence[ColumnType], *, has_gaps: bool) -> Any:
    dtype = np.result_type(*map(_numpy_dtype, columns))
    largest = max(column.largest for column in columns)
    if dtype.kind == "f":  # NumPy's answer to int64 and uint64
        if largest > np.iinfo("int64").max:
            return np.dtype(object)
        dtype = np.dtype("int64")
    is_nullable = any(pd.api.types.is_extension_array_dtype(column.values_dtype) for column in columns)
    if not has_gaps and not is_nullable:
        return dtype
    if not is_nullable and largest <= _PAST_FLOAT:
        return np.dtype(float)
    return pd.array(np.zeros(0, dtype)).dtype


def _numpy_dtype(column: ColumnType) -> np.dtype:
    return getattr(column.values_dtype, "numpy_dtype", column.values_dtype)


def _joint_categories(columns: Sequence[ColumnType]) -> Any:
    """Return the dtype that holds all categories: the same where they agree, else their unordered union."""
    first, *others = (column.dtype for column in columns)
    if all(first.ordered == other.ordered and first.categories.equals(other.categories) for other in others):
        return first
    categories = [column.dtype.categories for column in columns]
    if all(column.kind == "integers" for column in columns):
        dtype = _joint_integers(columns, has_gaps=False)
        if dtype == np.dtype(object):
            return dtype
        categories = [index.astype(dtype) for index in categories]
    return pd.CategoricalDtype(functools.reduce(lambda left, right: left.union(right), categories))
