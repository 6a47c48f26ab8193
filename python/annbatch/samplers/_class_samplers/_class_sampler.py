"""ClassSampler: batches that each hold a single class."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from annbatch._base.sizes import split_given_size
from annbatch.abc import Sampler
from annbatch.samplers._utils import (
    check_lt_1,
    get_torch_worker_info,
    resolve_rng,
    validate_chunk_batch_preload_sizes,
    validate_mask_n_obs_and_resolve,
)

from ._runs import ClassRuns, resolve_class_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from annbatch.types import LoadRequest


class ClassSampler(Sampler):
    """Draw batches of a single class each, with replacement.

    A class is drawn in proportion to its weight, then chunks of consecutive observations of that class, until
    ``num_samples`` observations are drawn. The class changes only where a chunk and a batch end together, every
    ``lcm(chunk_size, batch_size)`` observations: every chunk and every batch belongs to one class. A request may span
    several classes. For a draw of its own per batch, make ``batch_size`` a multiple of ``chunk_size``.

    There are no epochs: each pass draws anew. Several DataLoader workers are refused.

    Parameters
    ----------
    chunk_size
        Consecutive observations read together. Every run of consecutive observations of a class must be at least so
        long, unless the class has no weight.
    preload_nchunks
        Chunks in memory together.
    batch_size
        Observations per batch; divides ``chunk_size * preload_nchunks``.
    classes
        The class of every observation of the loader, in its order, e.g. ``collection.obs(["cell_type"])["cell_type"]
        .array`` for a column stored as categorical.
    num_samples
        Observations to draw in a pass, at least 1.
    class_weights
        How often each class is drawn, relative to the others: one number per entry of ``classes.categories``. Zero or
        less leaves a class out. Equal weights by default; pass the classes' sizes to draw as a uniform sampler would.
    mask
        Range of observations to draw from, as a slice of step 1; everything by default. The weights of the classes in
        it are rescaled. It can be moved later, but not while a pass is open.
    drop_last
        Leave out a last batch that is not full.
    rng
        Generator behind all randomness here. ``torch.manual_seed`` plays no part.

    Raises
    ------
    TypeError
        If ``classes`` is no :class:`pandas.Categorical`, ``class_weights`` is a Series, or ``rng`` is no generator.
    ValueError
        For missing classes, sizes that do not fit, weights that do not fit, an invalid mask, or runs that are shorter
        than ``chunk_size``.

    Examples
    --------
    >>> import pandas as pd
    >>> from annbatch.samplers import ClassSampler
    >>> classes = pd.Categorical(["T"] * 40 + ["B"] * 60)
    >>> sampler = ClassSampler(10, 4, 20, classes=classes, num_samples=200, class_weights=[3, 1])
    >>> sampler.n_batches(100)
    10
    """

    _batch_size: int
    _chunk_size: int
    _preload_nchunks: int
    _num_samples: int
    _n_obs: int
    _rng: np.random.Generator
    _drop_last: bool
    _rle_manager: ClassRuns
    _num_open_passes: int

    def __init__(
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        classes: pd.Categorical,
        num_samples: int,
        class_weights: np.ndarray | None = None,
        mask: slice | None = None,
        drop_last: bool = False,
        rng: np.random.Generator | None = None,
    ):
        check_lt_1([num_samples], ["num_samples"])
        if not isinstance(classes, pd.Categorical):
            raise TypeError(
                f"classes must be a pandas.Categorical, got {type(classes).__name__}. Pass pd.Categorical(labels)."
            )
        if (classes.codes == -1).any():
            raise ValueError("classes contains NA values (codes == -1). Give every observation a class.")
        validate_chunk_batch_preload_sizes(chunk_size, preload_nchunks, batch_size)
        start, stop = validate_mask_n_obs_and_resolve(slice(0, None) if mask is None else mask, len(classes))
        self._rng = resolve_rng(rng)
        self._chunk_size = chunk_size
        self._preload_nchunks = preload_nchunks
        self._batch_size = batch_size
        self._num_samples = num_samples
        self._drop_last = drop_last
        self._n_obs = len(classes)
        self._num_open_passes = 0
        weights = resolve_class_weights(classes, class_weights)
        self._rle_manager = ClassRuns(classes, weights, chunk_size=chunk_size, mask=slice(start, stop))

    @property
    def mask(self) -> slice:
        """The range drawn from; setting it checks it at once, and raises ValueError while a pass is open."""
        return self._rle_manager.mask

    @mask.setter
    def mask(self, value: slice) -> None:
        mask = slice(*validate_mask_n_obs_and_resolve(value, self._n_obs))
        if mask == self.mask:
            return
        if self._num_open_passes > 0:
            raise ValueError(
                f"mask cannot move to {mask} while a pass is being iterated: its chunks are drawn already. "
                "Finish or close the iterator first."
            )
        moved = copy.copy(self._rle_manager)  # a shallow copy of this sampler keeps the range it has
        moved.mask = mask
        self._rle_manager = moved

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def shuffle(self) -> bool:
        return True

    def n_batches(self, n_obs: int) -> int:
        """Count the batches of one pass, which depends on ``num_samples`` only."""
        del n_obs
        if self._drop_last:
            return self._num_samples // self._batch_size
        return math.ceil(self._num_samples / self._batch_size)

    def validate(self, n_obs: int) -> None:
        """Check that there is one class per observation.

        Raises
        ------
        ValueError
            If ``classes`` and the loader differ in length.
        """
        if n_obs != self._n_obs:
            raise ValueError(
                f"classes length ({self._n_obs}) does not match loader n_obs ({n_obs}). "
                "Give the class of each of the loader's observations."
            )

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        worker_info = get_torch_worker_info()
        if worker_info is not None and worker_info.num_workers > 1:
            raise NotImplementedError(f"Multiple workers are not supported with {type(self).__name__}.")
        return self._count_open_pass()

    def _count_open_pass(self) -> Iterator[LoadRequest]:
        self._num_open_passes += 1
        try:
            yield from self._iter_requests()
        finally:
            self._num_open_passes -= 1

    def _iter_requests(self) -> Iterator[LoadRequest]:
        """Yield the requests of one pass; what a variant of this sampler replaces."""
        n_chunks_per_class = self._batch_size // math.gcd(self._chunk_size, self._batch_size)
        for window, n_rows in self._draw_windows(n_chunks_per_class):
            splits = self._cut(np.arange(n_rows))
            for batch in splits:
                self._rng.shuffle(batch)
            if splits:
                yield {"requests": window, "splits": splits}

    def _draw_windows(self, n_chunks_per_class: int) -> Iterator[tuple[list[slice], int]]:
        """Draw all chunks of a pass at once, the class anew for every ``n_chunks_per_class`` of them.

        Yields
        ------
        tuple
            The chunks of one window, and the number of rows in them.
        """
        n_chunks = math.ceil(self._num_samples / self._chunk_size)
        codes = self._rle_manager.draw_classes(math.ceil(n_chunks / n_chunks_per_class), self._rng)
        chunks = self._rle_manager.slices_from_classes(np.repeat(codes, n_chunks_per_class)[:n_chunks], self._rng)
        n_surplus = n_chunks * self._chunk_size - self._num_samples
        chunks[-1] = slice(chunks[-1].start, chunks[-1].stop - n_surplus)
        for first in range(0, n_chunks, self._preload_nchunks):
            window = chunks[first : first + self._preload_nchunks]
            yield window, sum(rows.stop - rows.start for rows in window)

    def _cut(self, positions: np.ndarray, *, copy: bool = False) -> list[np.ndarray]:
        """Cut a window's positions into batches, without the partial one if it is to be dropped."""
        splits = split_given_size(positions, self._batch_size, copy=copy)
        if self._drop_last and splits[-1].size < self._batch_size:
            splits.pop()
        return splits
