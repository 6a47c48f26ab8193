"""Labels in obs that seem one and are two: a number (or bool) in one dataset and its text in another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def twins(names: Sequence[str], frames: Sequence[pd.DataFrame], joined: pd.DataFrame) -> Iterator[str]:
    """Find columns in which what seems one label is two; yield what is to be said of each.

    Parameters
    ----------
    names
        What the message calls the frames.
    frames
        The frames; columns may be missing in some.
    joined
        A frame that has the columns, of the types that they have when the frames are joined.
    """
    for column, dtype in joined.dtypes.items():
        if not _may_be_mixed(dtype):
            continue
        # not a Series: a name that a frame has twice
        parts = [(n, frame[column]) for n, frame in enumerate(frames) if isinstance(frame.get(column), pd.Series)]
        if found := twin_of(parts):
            yield said_of_twin(column, found, names, "so it is two labels, with a code each")


def said_of_twin(column: Any, twin: tuple[Any, int, int], names: Sequence[str], so: str) -> str:
    """Return the warning of a label of an obs column, as `twin_of` found it in datasets of these names."""
    value, number, text = twin
    return (
        f"{value!r} of obs column {column!r} is a number in {names[number]} and text in {names[text]}, {so}. Write them "
        f"alike, for example adata.obs[{column!r}].astype(str)."
    )


def _may_be_mixed(dtype: Any) -> bool:
    if isinstance(dtype, pd.CategoricalDtype):
        of_objects = dtype.categories.dtype.kind == "O" and pd.api.types.infer_dtype(dtype.categories)
        return of_objects not in (False, "string", "empty")
    return dtype.kind == "O" and isinstance(dtype, np.dtype)


def _has_numbers(column: pd.Series) -> bool:
    dtype = column.dtype.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    return pd.api.types.is_numeric_dtype(dtype)


def twin_of(columns: Sequence[tuple[int, pd.Series]]) -> tuple[Any, int, int] | None:
    """Find a label that is a number (or bool) in one column and its text in another.

    Returns
    -------
    The number, and what these two columns are numbered by; ``None`` if there is none.
    """
    numbers = [(n, column) for n, column in columns if _has_numbers(column)]
    if not 0 < len(numbers) < len(columns):
        return None
    texts = {t: n for n, column in reversed(columns) if not _has_numbers(column) for t in column.dropna().unique()}
    for n, column in numbers:
        for value in column.dropna().unique().tolist():
            # whole floats are often numbers of clusters that had gaps
            whole = [str(int(value))] if isinstance(value, float) and value.is_integer() else []
            for text in (str(value), *whole):
                if text in texts:
                    return value, n, texts[text]
    return None
