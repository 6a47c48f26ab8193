"""Which rows of a split one rank reads in one epoch, and in which order.

The native samplers of :mod:`annbatch.samplers` serve one contiguous range of rows. This module serves any
:class:`~annbatch._splits.rows.RowSet` and cuts a split into shares for the ranks of a distributed job:

``share``           the rows of one rank and its number of batches, the same number on every rank
``RowSetSampler``   blocks of the row set, each row exactly once per pass
``split_sampler``   the native sampler where the share allows it, a ``RowSetSampler`` otherwise
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from annbatch.abc import Sampler
from annbatch.samplers import RandomSampler, SequentialSampler
from annbatch.samplers._utils import get_torch_worker_info

if TYPE_CHECKING:
    from collections.abc import Iterator

    from annbatch._splits.rows import RowSet
    from annbatch.types import LoadRequest


class Share(NamedTuple):
    """What one rank reads of a split in one epoch."""

    rows: RowSet
    n_batches: int


class WindowSizes(NamedTuple):
    """The sizes that every sampler knows, in rows (``preload_nchunks``: in chunks)."""

    chunk_size: int = 512
    preload_nchunks: int = 32
    batch_size: int = 1

    @property
    def window_rows(self) -> int:
        """Rows of one request."""
        return self.chunk_size * self.preload_nchunks


def share(rows: RowSet, *, rank: int, world_size: int, batch_size: int, drop_last: bool, turn: float = 0.0) -> Share:
    """Cut a split into contiguous shares of its rows, one per rank, with equally many batches each.

    Parameters
    ----------
    rows
        All rows of the split.
    rank, world_size
        Which share, of how many.
    batch_size
        Rows per batch.
    drop_last
        True: every share is the same whole number of full batches, as in
        :class:`annbatch.samplers.DistributedSampler`; the rest of the rows is left out.
        False: shares differ by one row at most and no row is left out. Where one rank would then need one batch
        more, the others cut their last batch in two (with ``batch_size=1``, where nothing can be cut, the longer
        shares end in a batch of two rows).
    turn
        Where in the split the rows left out by `drop_last` lie, from 0 (at its end) to 1 (at its start). Drawn anew
        for each epoch it makes every row take part over time.

    Raises
    ------
    ValueError
        If a rank would be left without a batch.
    """
    n_rows = len(rows)
    if drop_last:
        n_batches = n_rows // world_size // batch_size
        if n_batches == 0:
            raise ValueError(
                f"{n_rows} rows do not give each of {world_size} ranks one batch of {batch_size} rows; "
                "lower batch_size, or set drop_last=False"
            )
        if world_size == 1:
            return Share(rows, n_batches)  # the sampler itself leaves out other rows in each epoch
        per_rank = n_batches * batch_size
        first = round(turn * (n_rows - per_rank * world_size)) + rank * per_rank
        return Share(rows.part(first, first + per_rank), n_batches)
    if n_rows < world_size:
        raise ValueError(f"{n_rows} rows cannot be shared between {world_size} ranks; use fewer ranks")
    first, stop = (n_rows * r // world_size for r in (rank, rank + 1))
    longest = -(-n_rows // world_size)
    n_batches = n_rows // world_size if batch_size == 1 else math.ceil(longest / batch_size)
    return Share(rows.part(first, stop), n_batches)


class RowSetSampler(Sampler):
    """Batches of any set of rows, each row exactly once per pass.

    The set is cut into chunks of `chunk_size` members (neighbours in the set, not always in the store); a request
    holds `preload_nchunks` chunks. With `shuffle` the chunks come in random order and the rows of a request are
    dealt to its batches at random, as :class:`annbatch.samplers.RandomSampler` does for a range.

    Parameters
    ----------
    rows
        The rows to read.
    chunk_size, preload_nchunks, batch_size
        As for the native samplers; the rows of a request must make whole batches.
    shuffle
        Whether the order is random.
    drop_last
        Leave out the rows that do not fill a batch.
    n_batches
        Number of batches to cut the rows into where it may be one more, or one fewer, than the sizes say; see
        :func:`share`. By default as many as are needed.
    rng
        Draws the order of each pass.

    Raises
    ------
    ValueError
        If the sizes contradict each other.
    """

    def __init__(
        self,
        rows: RowSet,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        n_batches: int | None = None,
        rng: np.random.Generator | None = None,
    ):
        # The native sampler knows the rules for sizes, and their messages.
        SequentialSampler(chunk_size, preload_nchunks, batch_size)
        self._rows = rows
        self._sizes = WindowSizes(chunk_size, preload_nchunks, batch_size)
        self._shuffle = shuffle
        n_rows = len(rows) // batch_size * batch_size if drop_last else len(rows)
        self._batches = _batch_sizes(n_rows, batch_size, n_batches)
        self._rng: np.random.Generator = np.random.default_rng() if rng is None else rng

    @property
    def batch_size(self) -> int:
        """Rows per batch."""
        return self._sizes.batch_size

    @property
    def shuffle(self) -> bool:
        """Whether the order is random."""
        return self._shuffle

    def n_batches(self, n_obs: int) -> int:
        """Return the number of batches of a pass, whatever `n_obs` is."""
        return self._batches.size

    def validate(self, n_obs: int) -> None:
        """Raise ValueError if the set has rows beyond `n_obs`."""
        if self._rows.last >= n_obs:
            raise ValueError(
                f"Row {self._rows.last} is out of range for n_obs={n_obs}. The rows were chosen for other data: choose "
                "them again for those of this loader."
            )

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        n_rows = int(self._batches.sum())
        if n_rows == 0:
            return
        worker = get_torch_worker_info()
        first_members, stop_members = self._chunks()
        # Position in the pass at which each chunk ends, and each batch.
        chunk_ends = np.cumsum(stop_members - first_members)
        batch_ends = np.cumsum(self._batches)
        window_ends = np.arange(self._sizes.window_rows, n_rows, self._sizes.window_rows)
        # A last batch that is longer than the last window takes that window's rows along.
        window_ends = np.append(window_ends[window_ends <= n_rows - self._batches[-1]], n_rows)
        begin = 0
        for window, end in enumerate(window_ends.tolist()):
            order = self._rng.permutation(end - begin) if self._shuffle else np.arange(end - begin)
            if worker is None or window % worker.num_workers == worker.id:
                first = np.searchsorted(chunk_ends, begin, side="right")
                chunks = slice(first, np.searchsorted(chunk_ends, end - 1, side="right") + 1)
                members = [
                    self._rows.rows(a, b) for a, b in zip(first_members[chunks], stop_members[chunks], strict=True)
                ]
                cuts = batch_ends[(batch_ends > begin) & (batch_ends < end)] - begin
                yield {"requests": self._kept(np.concatenate(members), end - begin), "splits": np.split(order, cuts)}
            begin = end

    def _kept(self, rows: np.ndarray, n_kept: int) -> np.ndarray:
        """Return `rows` without those that `drop_last` leaves out: the last ones, or random ones with `shuffle`."""
        if n_kept == rows.size or not self._shuffle:
            return rows[:n_kept]
        return rows[np.sort(self._rng.permutation(rows.size)[:n_kept])]

    def _chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the member numbers at which each chunk begins and stops, in the order of the pass.

        The chunk that is short, if one is, comes last wherever it lies in the set, so that every request but the last
        makes whole batches.
        """
        n_rows, chunk_size = len(self._rows), self._sizes.chunk_size
        n_chunks = -(-n_rows // chunk_size)
        order = self._rng.permutation(n_chunks) if self._shuffle else np.arange(n_chunks)
        lengths = np.full(n_chunks, chunk_size, dtype=np.int64)
        lengths[order[-1]] -= n_chunks * chunk_size - n_rows
        stops = np.cumsum(lengths)
        return (stops - lengths)[order], stops[order]


def split_sampler(
    rows: RowSet,
    sizes: WindowSizes,
    *,
    shuffle: bool,
    drop_last: bool,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> Sampler:
    """Return the sampler of one rank for one epoch: a function of its arguments alone.

    Parameters
    ----------
    rows
        All rows of the split.
    sizes
        Sizes of chunks, requests and batches.
    shuffle
        Whether the order is random.
    drop_last
        See :func:`share`.
    rank, world_size
        Which share, of how many.
    seed, epoch
        What the order is drawn from, with the rank.
    """
    epoch_rng = np.random.default_rng([seed, epoch])
    turn = epoch_rng.random() if shuffle else 0.0
    part, n_batches = share(
        rows, rank=rank, world_size=world_size, batch_size=sizes.batch_size, drop_last=drop_last, turn=turn
    )
    rng = np.random.default_rng([seed, epoch, rank])
    plain = len(part) // sizes.batch_size if drop_last else -(-len(part) // sizes.batch_size)
    if part.contiguous is not None and n_batches == plain:
        if shuffle:
            return RandomSampler(*sizes, drop_last=drop_last, mask=part.contiguous, rng=rng)
        return SequentialSampler(*sizes, drop_last=drop_last, mask=part.contiguous)
    return RowSetSampler(part, *sizes, shuffle=shuffle, drop_last=drop_last, n_batches=n_batches, rng=rng)


def _batch_sizes(n_rows: int, batch_size: int, n_batches: int | None) -> np.ndarray:
    """Return the length of each batch, int64 [n_batches], with the sum `n_rows`."""
    plain = -(-n_rows // batch_size)
    n_batches = plain if n_batches is None else n_batches
    lengths = np.full(n_batches, batch_size, dtype=np.int64)
    if n_batches == 0:
        return lengths
    lengths[-1] = n_rows - batch_size * (n_batches - 1)
    if lengths[-1] == 0 and n_batches > 1 and batch_size > 1:
        lengths[-2:] = batch_size - batch_size // 2, batch_size // 2
    if (lengths < 1).any() or abs(n_batches - plain) > 1:
        raise ValueError(f"{n_rows} rows do not make {n_batches} batches of up to {batch_size} rows")
    return lengths
