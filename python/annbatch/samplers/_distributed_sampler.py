"""DistributedSampler: one contiguous shard of the observations per process."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from annbatch.abc import Sampler
from annbatch.abc.sampler import native_sampling
from annbatch.samplers._utils import overrides_nothing, spawn_worker_rng, validate_mask_n_obs_and_resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from annbatch.types import LoadRequest


def _get_dist_info_torch() -> tuple[int, int]:
    import torch.distributed as dist

    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized. "
            "Call torch.distributed.init_process_group() before creating a DistributedSampler with dist_info='torch'."
        )
    return dist.get_rank(), dist.get_world_size()


def _get_dist_info_jax() -> tuple[int, int]:
    import jax

    if not jax.distributed.is_initialized():
        raise RuntimeError(
            "JAX distributed is not initialized. "
            "Call jax.distributed.initialize() before creating a DistributedSampler with dist_info='jax'."
        )
    return jax.process_index(), jax.process_count()


DISTRIBUTED_BACKENDS: dict[str, Callable[[], tuple[int, int]]] = {
    "torch": _get_dist_info_torch,
    "jax": _get_dist_info_jax,
}


class DistributedSampler(Sampler):
    """Restrict a sampler to this process's shard of the observations.

    The range is cut into as many contiguous shards of equal length as there are processes; observations left over
    after the last are in no shard. The cut is made at the start of each pass, when the number of observations is
    known.

    Parameters
    ----------
    sampler
        The sampler each process runs on its shard. It is copied, generator included, and each rank's copy gets a
        generator of its own derived from it; later changes to the original do not reach the copy. The original's
        ``mask`` is ignored: to restrict the range that is cut into shards, set ``mask`` here.
    dist_info
        Where rank and number of processes come from, asked once, here: ``"torch"``, ``"jax"`` (either must be
        initialised), or a function that returns ``(rank, world_size)``.
    enforce_equal_batches
        Shorten all shards to a multiple of the batch size, so that every process yields the same number of full
        batches. Without it a shard may end on a partial batch.

    Raises
    ------
    ValueError
        If ``dist_info`` is an unknown name.
    RuntimeError
        If the framework named is not initialised.

    Examples
    --------
    >>> from annbatch.samplers import DistributedSampler, RandomSampler
    >>> sampler = RandomSampler(chunk_size=256, preload_nchunks=4, batch_size=32)
    >>> shard = DistributedSampler(sampler, dist_info=lambda: (1, 4))
    >>> shard.n_batches(1280)
    10
    """

    _rank: int
    _world_size: int
    _enforce_equal_batches: bool
    _sampler: Sampler
    _num_open_passes: int

    def __init__(
        self,
        sampler: Sampler,
        *,
        dist_info: Literal["torch", "jax"] | Callable[[], tuple[int, int]],
        enforce_equal_batches: bool = True,
    ):
        if not callable(dist_info):
            if dist_info not in DISTRIBUTED_BACKENDS:
                raise ValueError(f"Unknown dist_info {dist_info!r}. Supported backends: {sorted(DISTRIBUTED_BACKENDS)}")
            dist_info = DISTRIBUTED_BACKENDS[dist_info]
        self._rank, self._world_size = dist_info()
        self._enforce_equal_batches = enforce_equal_batches
        self._sampler = copy.deepcopy(sampler)  # its mask is moved onto the shard for each pass
        self._sampler.mask = slice(0, None)
        if self._sampler.rng is not None:
            self._sampler.rng = spawn_worker_rng(self._sampler.rng, self._rank)
        self._num_open_passes = 0

    @property
    def batch_size(self) -> int | None:
        return self._sampler.batch_size

    @property
    def shuffle(self) -> bool:
        return self._sampler.shuffle

    @property
    def rng(self) -> np.random.Generator | None:
        """The generator of this rank's copy of the sampler."""
        return self._sampler.rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:
        self._sampler.rng = value

    def _resolve_start_stop(self, n_obs: int) -> tuple[int, int]:
        """Return the range that is cut into shards."""
        if self._mask == slice(0, None):
            return 0, n_obs  # whether nothing at all can be sampled is for the wrapped sampler to say
        return validate_mask_n_obs_and_resolve(self._mask, n_obs)

    def _shard_mask(self, n_obs: int) -> slice:
        """Return this rank's shard of the masked range; empty if there are too few rows for all ranks."""
        start, stop = self._resolve_start_stop(n_obs)
        n_per_rank = (stop - start) // self._world_size
        if self._enforce_equal_batches:
            if (batch_size := self._sampler.batch_size) is None:
                raise TypeError(
                    "the sampler has no batch_size to make equal batches of: pass enforce_equal_batches=False"
                )
            n_per_rank -= n_per_rank % batch_size
        first = start + self._rank * n_per_rank
        return slice(first, first + n_per_rank)

    def _filled_shard_mask(self, n_obs: int) -> slice:
        shard = self._shard_mask(n_obs)
        if shard.start >= shard.stop:
            start, stop = self._resolve_start_stop(n_obs)
            equal = self._enforce_equal_batches
            raise ValueError(
                f"Sampler mask.start ({shard.start}) must be < mask.stop ({shard.stop}). {stop - start} observations do "
                f"not give each of {self._world_size} ranks one {f'batch of {self.batch_size}' if equal else 'row'}: use "
                f"fewer ranks{', a smaller batch_size or enforce_equal_batches=False' if equal else ''}."
            )
        return shard

    def n_batches(self, n_obs: int) -> int:
        """Count the batches of one pass of this rank; safe to ask during a pass.

        Parameters
        ----------
        n_obs
            Number of observations of all ranks together.
        """
        if self._num_open_passes > 0:
            # The copy's mask stands on the shard, which lies inside the whole n_obs.
            return self._sampler.n_batches(n_obs)
        # The copy's mask is open: a loader that held just the shard has as many batches as the shard.
        shard = self._filled_shard_mask(n_obs)
        return self._sampler.n_batches(shard.stop - shard.start)

    def validate(self, n_obs: int) -> None:
        """Run the wrapped sampler's checks against all observations; its shard is checked when a pass starts."""
        self._resolve_start_stop(n_obs)
        self._sampler.validate(n_obs)

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        self._sampler.mask = self._filled_shard_mask(n_obs)
        self._num_open_passes += 1
        try:
            yield from self._sampler.sample(n_obs)
        finally:
            self._num_open_passes -= 1
            if self._num_open_passes == 0:  # another pass may still be running on the shard
                self._sampler.mask = slice(0, None)

    def _native_sampling(self, n_obs: int) -> dict[str, object] | None:
        if not overrides_nothing(self, DistributedSampler, _STOCK_METHODS):
            return None
        self.validate(n_obs)
        if native_sampling(self._sampler, n_obs) is None:
            return None
        on_shard = copy.copy(self._sampler)  # shares the generator, from which describing a pass draws nothing
        on_shard.mask = self._filled_shard_mask(n_obs)
        return native_sampling(on_shard, n_obs)


_STOCK_METHODS = {
    name: getattr(DistributedSampler, name)
    for name in ("sample", "_sample", "n_batches", "batch_size", "shuffle", "_resolve_start_stop", "_shard_mask")
}
