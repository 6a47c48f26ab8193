"""Sets of rows, held as ranges."""

from __future__ import annotations

import zlib

import numpy as np


class RowSet:
    """Sorted, distinct row numbers, held as ranges.

    Parameters
    ----------
    starts
        First row of each range, int64 [n_ranges], increasing.
    stops
        One past the last row of each range, int64 [n_ranges]; ``starts[i] < stops[i] < starts[i + 1]``.

    Notes
    -----
    A contiguous split of any size costs 32 bytes, a fraction drawn row by row about 16 bytes for each run of rows.
    """

    __slots__ = ("_offsets", "_starts")

    def __init__(self, starts: np.ndarray, stops: np.ndarray):
        self._starts = np.asarray(starts, dtype=np.int64)
        lengths = np.asarray(stops, dtype=np.int64) - self._starts
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @classmethod
    def from_range(cls, start: int, stop: int) -> RowSet:
        """Return the rows ``start <= row < stop`` (none if ``stop <= start``)."""
        return cls(np.array([start]), np.array([stop])) if stop > start else cls(np.empty(0), np.empty(0))

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> RowSet:
        """Return the rows at which a boolean array [n_obs] is true."""
        edges = np.flatnonzero(np.diff(np.asarray(mask, dtype=np.int8), prepend=0, append=0))
        return cls(edges[::2], edges[1::2])

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> RowSet:
        """Return the set of the row numbers in an integer array, which may come in any order.

        Raises
        ------
        ValueError
            If a row number appears twice.
        """
        rows = np.sort(np.asarray(rows, dtype=np.int64))
        step = np.diff(rows)
        if rows.size and (step == 0).any():
            raise ValueError(f"row {rows[:-1][step == 0][0]} appears more than once in the row numbers of a split")
        breaks = np.flatnonzero(step != 1) + 1
        if rows.size == 0:
            return cls(rows, rows)
        return cls(rows[np.concatenate([[0], breaks])], rows[np.concatenate([breaks - 1, [-1]])] + 1)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __repr__(self) -> str:
        return f"RowSet({len(self)} rows in {self._starts.size} ranges)"

    @property
    def contiguous(self) -> slice | None:
        """The one range that holds all rows, or None if there are several ranges or no rows."""
        if self._starts.size != 1:
            return None
        return slice(int(self._starts[0]), int(self._starts[0] + len(self)))

    @property
    def last(self) -> int:
        """The greatest row number, -1 if there are no rows."""
        return int(self._starts[-1] + self._offsets[-1] - self._offsets[-2] - 1) if len(self) else -1

    @property
    def digest(self) -> int:
        """A 32-bit number that differs, in all likelihood, between different sets."""
        return zlib.crc32(self._offsets.tobytes(), zlib.crc32(self._starts.tobytes()))

    def rows(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the members number ``first`` to ``stop`` (exclusive) in increasing order, int64 [stop - first]."""
        stop = len(self) if stop is None else min(stop, len(self))
        members = np.arange(first, stop, dtype=np.int64)
        if self._starts.size == 1:
            return members + self._starts[0]
        of_range = np.searchsorted(self._offsets, members, side="right") - 1
        return self._starts[of_range] + members - self._offsets[of_range]

    def part(self, first: int, stop: int) -> RowSet:
        """Return the set of the members number ``first`` to ``stop`` (exclusive)."""
        if not 0 <= first <= stop <= len(self):
            raise ValueError(f"members {first} to {stop} of a set of {len(self)} rows")
        offsets = np.clip(self._offsets, first, stop)
        keep = offsets[1:] > offsets[:-1]
        starts = self._starts + (offsets[:-1] - self._offsets[:-1])
        return RowSet(starts[keep], (starts + np.diff(offsets))[keep])

    def first_common(self, other: RowSet) -> int | None:
        """Return the least row that is in both sets, None if they are disjoint."""
        if len(self) == 0 or len(other) == 0:
            return None
        # The least common row opens a range in one of the two sets.
        found = [a._starts[b._holds(a._starts)] for a, b in ((self, other), (other, self))]
        return min((int(f[0]) for f in found if f.size), default=None)

    def _holds(self, rows: np.ndarray) -> np.ndarray:
        of_range = np.searchsorted(self._starts, rows, side="right") - 1
        lengths = np.diff(self._offsets)
        return (of_range >= 0) & (rows < self._starts[of_range] + lengths[of_range])
