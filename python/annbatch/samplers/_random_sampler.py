"""RandomSampler: chunks in random order, rows shuffled within each preload window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from annbatch.samplers._chunk_sampler import _ChunkSampler

if TYPE_CHECKING:
    import numpy as np


class RandomSampler(_ChunkSampler):
    """Read chunks of consecutive observations in random order, and shuffle each preload window.

    A pass without replacement visits every observation of the range once (but for what ``drop_last`` drops). With
    replacement, chunks start at uniformly random positions. Larger ``chunk_size`` reads faster, smaller mixes better;
    1 is a true random permutation.

    Parameters
    ----------
    chunk_size
        Consecutive observations read together.
    preload_nchunks
        Chunks in memory together; the window that is shuffled holds ``chunk_size * preload_nchunks`` observations.
    batch_size
        Observations per batch; divides the window.
    replacement
        Draw chunks independently instead of visiting each once. A range smaller than ``chunk_size`` then allows no
        more than its own number of samples.
    num_samples
        Observations to draw per pass, at least 1; the size of the range by default. Without replacement it cannot be
        larger than the range.
    drop_last
        Leave out a last batch that is not full.
    mask
        Range of observations to sample from, as a slice of step 1; everything by default.
    rng
        Generator behind all randomness here. ``torch.manual_seed`` plays no part.

    Raises
    ------
    ValueError
        For sizes below 1, a window that is no multiple of ``batch_size``, or an invalid mask.
    TypeError
        If ``rng`` is no generator.

    See Also
    --------
    SequentialSampler : the same chunks, in order.
    """

    def __init__(
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        replacement: bool = False,
        num_samples: int | None = None,
        drop_last: bool = False,
        mask: slice | None = None,
        rng: np.random.Generator | None = None,
    ):
        super().__init__(
            chunk_size,
            preload_nchunks,
            batch_size,
            replacement=replacement,
            num_samples=num_samples,
            shuffle=True,
            drop_last=drop_last,
            mask=mask,
            rng=rng,
        )

    def _native_sampling(self, n_obs: int) -> dict[str, object] | None:
        return self._describe_pass(n_obs, RandomSampler, "random")
