"""SequentialSampler: observations in stored order."""

from __future__ import annotations

from annbatch.samplers._chunk_sampler import _ChunkSampler


class SequentialSampler(_ChunkSampler):
    """Read all observations of a range once, in order, as for evaluation and inference.

    :meth:`~annbatch.abc.Sampler.sample` refuses to run in several DataLoader workers.

    Parameters
    ----------
    chunk_size
        Consecutive observations per slice of a request.
    preload_nchunks
        Slices per request, which are in memory together.
    batch_size
        Observations per batch; divides ``chunk_size * preload_nchunks``.
    drop_last
        Leave out a last batch that is not full.
    mask
        Range of observations to read, as a slice of step 1; everything by default.

    Raises
    ------
    ValueError
        For sizes below 1, a window that is no multiple of ``batch_size``, or an invalid mask.

    See Also
    --------
    RandomSampler : the same chunks, in random order and mixed.
    """

    def __init__(
        self,
        chunk_size: int,
        preload_nchunks: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        mask: slice | None = None,
    ):
        super().__init__(chunk_size, preload_nchunks, batch_size, drop_last=drop_last, mask=mask)

    def _native_sampling(self, n_obs: int) -> dict[str, object] | None:
        return self._describe_pass(n_obs, SequentialSampler, "sequential")
