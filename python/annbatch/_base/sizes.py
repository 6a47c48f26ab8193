"""Sizes: checked, and arrays cut by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_lt_1(vals: Sequence[int], obs: Sequence[str]) -> None:
    """Refuse values below 1.

    Parameters
    ----------
    vals
        The values.
    obs
        What each value is called in the message; as many as ``vals``.

    Raises
    ------
    ValueError
        Naming the first value below 1.
    """
    for value, label in zip(vals, obs, strict=True):
        if value < 1:
            raise ValueError(f"{label} must be greater than 1, got {value}: the smallest allowed is 1 itself")


def split_given_size(a: np.ndarray, size: int, *, copy: bool = False) -> list[np.ndarray]:
    """Cut an array into consecutive pieces of ``size`` elements; the last may be shorter.

    Parameters
    ----------
    a
        Array, cut along its first axis.
    size
        Elements per piece, at least 1.
    copy
        Give copies. The default gives views, which change when ``a`` is shuffled in place afterwards.

    Returns
    -------
    list of numpy.ndarray
        At least one piece: an empty array gives one empty piece.
    """
    pieces = np.split(a, range(size, len(a), size))
    return [piece.copy() for piece in pieces] if copy else pieces
