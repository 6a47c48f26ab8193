"""WeightedClassSampler: mixed batches whose composition follows class weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._class_sampler import ClassSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from annbatch.types import LoadRequest


class WeightedClassSampler(ClassSampler):
    """Draw batches in which, on average, each class has the share its weight gives it.

    Chunks are drawn as by :class:`ClassSampler`, the class anew for each; the rows of a whole preload window are then
    shuffled before it is cut, so that a batch mixes the window's classes. Takes the same parameters.
    """

    def _iter_requests(self) -> Iterator[LoadRequest]:
        n_full = self._chunk_size * self._preload_nchunks
        # Full windows go on shuffling one array: this is what makes a seed's order that of annbatch 0.3.1.
        full_window = np.arange(n_full)
        for window, n_rows in self._draw_windows(1):
            positions = full_window if n_rows == n_full else np.arange(n_rows)
            self._rng.shuffle(positions)
            splits = self._cut(positions, copy=True)
            if splits:
                yield {"requests": window, "splits": splits}
