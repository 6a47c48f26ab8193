"""The Python reference for chunk-wise sampling, behind RandomSampler and SequentialSampler.

A pass goes through three steps, each a method that a subclass may replace:

1. ``_compute_slices``: the range is laid out as slices of ``chunk_size`` rows, in the order they are read;
2. ``_iter_from_slices``: consecutive slices are grouped into windows of ``preload_nchunks``;
3. each window's positions are shuffled (or not) and cut into batches.

The native core has its own, equally distributed order for the unmodified samplers; these steps then only serve code
that calls :meth:`~annbatch.abc.Sampler.sample` itself. The draws taken from ``rng`` are those of scverse annbatch
0.3.1, so a seed gives the order it gave there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from annbatch._base.sizes import check_lt_1, split_given_size
from annbatch.abc import Sampler
from annbatch.samplers._utils import (
    get_torch_worker_info,
    overrides_nothing,
    resolve_rng,
    spawn_worker_rng,
    validate_chunk_batch_preload_sizes,
    validate_mask_and_resolve,
    validate_mask_n_obs_and_resolve,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from annbatch.samplers._utils import WorkerInfo
    from annbatch.types import LoadRequest


class _ChunkSampler(Sampler):
    """Sampler over chunks of consecutive observations.

    Parameters
    ----------
    chunk_size, preload_nchunks, batch_size, replacement, num_samples, drop_last, mask, rng
        See :class:`~annbatch.samplers.RandomSampler`.
    shuffle
        Whether chunks, and the rows of each window, come in random order.
    """

    _chunk_size: int
    _preload_nchunks: int
    _batch_size: int
    _in_memory_size: int
    _replacement: bool
    _num_samples: int | None
    _shuffle: bool
    _drop_last: bool
    _rng: np.random.Generator

    def __init__(
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        replacement: bool = False,
        num_samples: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        mask: slice | None = None,
        rng: np.random.Generator | None = None,
    ):
        if num_samples is not None:
            check_lt_1([num_samples], ["num_samples"])
        start, stop = validate_mask_and_resolve(slice(0, None) if mask is None else mask)
        validate_chunk_batch_preload_sizes(chunk_size, preload_nchunks, batch_size)
        self._chunk_size = chunk_size
        self._preload_nchunks = preload_nchunks
        self._batch_size = batch_size
        self._in_memory_size = chunk_size * preload_nchunks
        self._replacement = replacement
        self._num_samples = num_samples
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._mask = slice(start, stop)
        self._rng = resolve_rng(rng)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def shuffle(self) -> bool:
        return self._shuffle

    def _resolve_start_stop(self, n_obs: int) -> tuple[int, int]:
        return validate_mask_n_obs_and_resolve(self._mask, n_obs)

    def _resolve_mask_size(self, n_obs: int) -> int:
        start, stop = self._resolve_start_stop(n_obs)
        return stop - start

    def _resolve_num_samples(self, n_obs: int) -> int:
        return self._resolve_mask_size(n_obs) if self._num_samples is None else self._num_samples

    def n_batches(self, n_obs: int) -> int:
        """Count the batches of one pass over a loader of ``n_obs`` observations."""
        n_samples = self._resolve_num_samples(n_obs)
        return n_samples // self.batch_size if self._drop_last else math.ceil(n_samples / self.batch_size)

    def validate(self, n_obs: int) -> None:
        """Check the mask and ``num_samples`` against the data.

        Raises
        ------
        ValueError
            If the mask reaches past ``n_obs``, or more samples are asked for than the range can give.
        """
        n_range = self._resolve_mask_size(n_obs)
        n_samples = self._resolve_num_samples(n_obs)
        if n_samples <= n_range:
            return
        if not self._replacement:
            raise ValueError(
                f"num_samples ({n_samples}) cannot exceed the observation range ({n_range}). "
                "Lower num_samples, widen the mask, or draw with replacement=True."
            )
        if n_range < self._chunk_size:
            raise ValueError(
                f"Observation range ({n_range}) is smaller than chunk_size ({self._chunk_size}) "
                f"with num_samples ({n_samples}) exceeding that range. "
                "Lower chunk_size or num_samples, or widen the mask."
            )

    def _validate_worker_mode(self, worker_info: WorkerInfo | None) -> None:
        """Refuse what several DataLoader workers, each on its own share of the chunks, could not do right."""
        if worker_info is None or worker_info.num_workers <= 1:
            return
        if not self._shuffle:
            raise ValueError(
                "Multiple workers are not supported with non-shuffled sampling. "
                "Use num_workers=1 or 0, or iterate an annbatch.Loader, which hands out windows to its workers."
            )
        if self._replacement:
            raise NotImplementedError(
                "Multiple workers are not supported with replacement sampling. "
                "See https://github.com/scverse/annbatch/issues/173"
            )
        if not self._drop_last and self.batch_size > 1:  # each worker would end on a partial batch of its own
            raise ValueError(
                "drop_last=False is not supported when using DataLoader with multiple workers and batch_size>1. "
                "Pass drop_last=True, use num_workers=1 or 0, or iterate an annbatch.Loader, which shares out windows."
            )

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        worker_info = get_torch_worker_info()
        self._validate_worker_mode(worker_info)
        # All workers hold the same generator. Each derives its own for the batches first, then all compute the same
        # slices, of which each takes its share.
        batch_rng = self._rng if worker_info is None else spawn_worker_rng(self._rng, worker_info.id)
        slices = self._compute_slices(n_obs, rng=self._rng)
        yield from self._iter_from_slices(n_obs, slices, batch_rng=batch_rng, worker_info=worker_info)

    def _compute_slices(self, n_obs: int, rng: np.random.Generator) -> list[slice]:
        """Lay out one pass as slices in reading order; only the last may be shorter than ``chunk_size``."""
        start, stop = self._resolve_start_stop(n_obs)
        if self._replacement:
            return self._compute_slices_with_replacement(start, stop, n_obs, rng)
        return self._compute_slices_without_replacement(start, stop, rng)

    def _compute_slices_with_replacement(
        self, start: int, stop: int, n_obs: int, rng: np.random.Generator
    ) -> list[slice]:
        """Draw slices of ``chunk_size`` rows with replacement, and a shorter one for the remainder."""
        n_samples = self._resolve_num_samples(n_obs)
        n_full = n_samples // self._chunk_size
        firsts = rng.integers(start, stop - self._chunk_size + 1, size=n_full)
        slices = [slice(int(first), int(first) + self._chunk_size) for first in firsts]
        n_needed = n_samples // self.batch_size * self.batch_size if self._drop_last else n_samples
        n_left = n_needed - n_full * self._chunk_size
        if n_left > 0:
            first = int(rng.integers(start, stop - n_left + 1))
            slices.append(slice(first, first + n_left))
        return slices

    def _compute_slices_without_replacement(self, start: int, stop: int, rng: np.random.Generator) -> list[slice]:
        """Cover the range once with slices of ``chunk_size`` rows.

        Whichever slice comes last takes the shorter length, and the ones stored after it move up: every partial
        window is then the last one.
        """
        n_slices = math.ceil((stop - start) / self._chunk_size)
        order = np.arange(n_slices)
        if self.shuffle:
            rng.shuffle(order)
        lengths = np.full(n_slices, self._chunk_size)
        lengths[order[-1]] = (stop - start) - (n_slices - 1) * self._chunk_size
        stops = start + np.cumsum(lengths)
        return [slice(int(stops[i] - lengths[i]), int(stops[i])) for i in order]

    def _iter_from_slices(
        self,
        n_obs: int,
        slices: list[slice],
        batch_rng: np.random.Generator,
        worker_info: WorkerInfo | None,
    ) -> Iterator[LoadRequest]:
        """Turn a pass's slices into requests, ``n_batches`` batches at most (of a worker, its share of these)."""
        n_left = self.n_batches(n_obs)
        if worker_info is not None:
            n_left = len(range(worker_info.id, n_left, worker_info.num_workers))
        windows = self._iter_from_slices_base(slices, batch_rng, worker_info)
        if not self._replacement and self._num_samples is None:
            yield from windows
            return
        while n_left > 0 and (request := next(windows, None)) is not None:
            splits = request["splits"][:n_left]
            n_left -= len(splits)
            yield {"requests": request["requests"], "splits": splits}

    def _iter_from_slices_base(
        self, slices: list[slice], batch_rng: np.random.Generator, worker_info: WorkerInfo | None
    ) -> Iterator[LoadRequest]:
        """Group slices (this worker's share of them) into windows and cut each into batches."""
        if worker_info is not None:
            shares = np.array_split(np.array(slices, dtype=object), worker_info.num_workers)
            slices = list(shares[worker_info.id])
        # Shuffled in place again and again, never reset: this is what makes a seed's order that of annbatch 0.3.1.
        positions = np.arange(self._in_memory_size)
        for first in range(0, len(slices), self._preload_nchunks):
            window = list(slices[first : first + self._preload_nchunks])
            if first + self._preload_nchunks < len(slices):
                if self.shuffle:
                    batch_rng.shuffle(positions)
                yield {"requests": window, "splits": split_given_size(positions, self.batch_size, copy=self.shuffle)}
                continue
            # The last window may be partial, even where its rows happen to be a multiple of the batch size.
            n_rows = sum(rows.stop - rows.start for rows in window)
            if self._drop_last:
                n_rows -= n_rows % self.batch_size
                if n_rows == 0:
                    return
            last = batch_rng.permutation(n_rows) if self.shuffle else np.arange(n_rows)
            yield {"requests": window, "splits": split_given_size(last, self.batch_size)}

    def _describe_pass(self, n_obs: int, exact: type, kind: str) -> dict[str, object] | None:
        """Describe a pass for the native core if this is exactly the stock sampler ``exact``, else None."""
        if not overrides_nothing(self, exact, _STOCK_METHODS):
            return None
        self.validate(n_obs)
        return {
            "kind": kind,
            "chunk_size": int(self._chunk_size),
            "preload_nchunks": int(self._preload_nchunks),
            "batch_size": int(self._batch_size),
            "drop_last": bool(self._drop_last),
            "mask": [int(bound) for bound in self._resolve_start_stop(n_obs)],
            "replacement": bool(self._replacement),
            "num_samples": None if self._num_samples is None else int(self._num_samples),
        }


# Every method that has a say in the order, as it stands here: a sampler on which one is replaced is driven by Python.
_STOCK_METHODS = {
    name: getattr(_ChunkSampler, name)
    for name in (
        "sample",
        "_sample",
        "n_batches",
        "batch_size",
        "shuffle",
        "_resolve_start_stop",
        "_resolve_mask_size",
        "_resolve_num_samples",
        "_compute_slices",
        "_compute_slices_with_replacement",
        "_compute_slices_without_replacement",
        "_iter_from_slices",
        "_iter_from_slices_base",
        "_default_splits",
    )
}
