"""One pass over opened datasets: a stream of the core, and how it is fed.

- *native*: the core computes the order itself from one number (`Pass.native`);
- *submitted*: a sampler in Python makes load requests, on the consumer's thread, and `Pass.submitted` hands them to the
  core some batches ahead of the consumer.

Either way batches come out as `RawBatch`: tensors over the core's buffers, which belong to whoever holds them.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd import profiler

from annbatch._core import ops

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from annbatch._core.requests import Window
    from annbatch.types import LoaderStats


@dataclass(frozen=True)
class Element:
    """One element of the batches of a collection, as the core describes it."""

    name: str
    kind: str
    dtype: torch.dtype
    n_var: int | None
    tail: tuple[int, ...]

    @property
    def n_tensors(self) -> int:
        return 3 if self.kind == "csr" else 1

    def empty(self, device: torch.device | None) -> tuple[torch.Tensor, ...]:
        """Return what a batch without rows has of this element."""
        if self.kind == "csr":
            return (
                torch.zeros(1, dtype=torch.int32, device=device),
                torch.empty(0, dtype=torch.int32, device=device),
                torch.empty(0, dtype=self.dtype, device=device),
            )
        return (torch.empty((0, *self.tail), dtype=self.dtype, device=device),)


@dataclass(frozen=True)
class RawBatch:
    """One batch as delivered: `rows` int64 ``[n]`` on the CPU, each element's tensors (``indptr, indices, data`` or one)."""

    rows: torch.Tensor
    parts: Mapping[str, tuple[torch.Tensor, ...]]


class Pass:
    """One epoch over a collection.

    Parameters
    ----------
    stream
        The core's state, not yet started; closed by `close`.
    elements
        The elements of its batches, in the core's order.
    device
        The CUDA device that the stream delivers to, or ``None``.
    """

    def __init__(self, stream: torch.Tensor, elements: Sequence[Element], device: torch.device | None = None):
        self._stream = stream
        self._elements = elements
        self._device = device
        self._told_of_paging = device is None
        self._pid = os.getpid()
        self.closed = False
        self._final_stats: LoaderStats | None = None

    def native(self, epoch_seed: int) -> Iterator[RawBatch]:
        """Yield the batches of the epoch that `epoch_seed` (any int64) names."""
        ops.start(self._stream, epoch_seed)
        while (batch := self._load()).rows.numel() > 0:
            yield batch

    def submitted(self, windows: Iterator[Window], batches_ahead: int | None) -> Iterator[RawBatch]:
        """Yield the batches of `windows`, drawing them from the sampler only so far ahead.

        Parameters
        ----------
        windows
            The sampler's load requests; advanced on the calling thread.
        batches_ahead
            Draw the next window as soon as fewer than this many batches would follow the one to be delivered.
            ``None``: keep one window submitted behind the one being delivered. 0: draw a window when all batches
            before it have been consumed.
        """
        ops.start(self._stream, 0)
        waiting: deque[deque[int]] = deque()  # per submitted window, the sizes of its batches still to be delivered
        exhausted = False
        while True:
            while not exhausted and _draw_another(waiting, batches_ahead):
                window = next(windows, None)
                if window is None:
                    exhausted = True
                    ops.finish(self._stream)
                elif window.sizes:
                    self._submit(window)
                    waiting.append(deque(window.sizes))
            if not waiting:
                return
            size = waiting[0].popleft()
            if not waiting[0]:
                waiting.popleft()
            yield self._load_expecting(size)

    def stats(self) -> LoaderStats:
        """Return the core's counters for this pass; after `close` as they stood then."""
        return self._final_stats.copy() if self._final_stats is not None else ops.stats(self._stream)

    def close(self) -> None:
        """Stop reading ahead. Batches already delivered stay valid. A second call does nothing."""
        # in a forked child the state belongs to the parent, and the core has let go of it already
        if self.closed or self._pid != os.getpid():
            return
        self.closed = True
        try:
            self._final_stats = ops.stats(self._stream)
        finally:
            ops.close(self._stream)

    def _submit(self, window: Window) -> None:
        # a batch of zero rows would be taken for the end of the epoch; `_load_expecting` makes those itself
        sizes = [size for size in window.sizes if size]
        if sizes:
            arrays = window.rows, window.positions, np.array(sizes, dtype=np.int64)
            ops.submit(self._stream, *(torch.from_numpy(array) for array in arrays))

    def _load_expecting(self, size: int) -> RawBatch:
        if size == 0:
            rows = torch.empty(0, dtype=torch.int64)
            return RawBatch(rows, {element.name: element.empty(self._device) for element in self._elements})
        batch = self._load()
        if batch.rows.numel() != size:
            raise RuntimeError(f"a batch of {size} rows was submitted but one of {batch.rows.numel()} delivered")
        return batch

    def _load(self) -> RawBatch:
        # false where this torch has no such flag: then the profiler shows the op alone
        if not getattr(profiler, "_is_profiler_enabled", False):
            return self._take()
        with profiler.record_function("annbatch.load"):
            batch = self._take()
            # sizes are known only now, and profilers show no arguments of ranges: so a mark that is named after them
            n_bytes = sum(tensor.nbytes for tensor in chain([batch.rows], *batch.parts.values()))
            with profiler.record_function(f"annbatch.batch rows={batch.rows.numel()} bytes={n_bytes}"):
                return batch

    def _tell_of_paging(self) -> None:
        self._told_of_paging = True
        locked = ops.describe(self._stream)["pinned"]
        if locked is not True:
            warnings.warn(
                f"Batches are copied to {self._device} from ordinary memory, which is slower: {locked}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _take(self) -> RawBatch:
        rows, *tensors = ops.load(self._stream, self._device, host_rows=True)
        if not self._told_of_paging:
            self._tell_of_paging()
        parts, at = {}, 0
        for element in self._elements:
            parts[element.name] = tuple(tensors[at : at + element.n_tensors])
            at += element.n_tensors
        return RawBatch(rows, parts)


def _draw_another(waiting: deque[deque[int]], batches_ahead: int | None) -> bool:
    if batches_ahead is None:
        return len(waiting) < 2
    return not waiting or sum(map(len, waiting)) <= batches_ahead
