"""Checks and look-ups that several samplers share."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from annbatch._base.sizes import check_lt_1
from annbatch._base.warn import stacklevel_outside_package

__all__ = [
    "WorkerInfo",
    "check_lt_1",
    "get_torch_worker_info",
    "known_settings",
    "overrides_nothing",
    "resolve_rng",
    "spawn_worker_rng",
    "validate_chunk_batch_preload_sizes",
    "validate_mask_and_resolve",
    "validate_mask_n_obs_and_resolve",
]


def resolve_rng(rng: np.random.Generator | int | None) -> np.random.Generator:
    """Return the generator a sampler uses: the given one, or a fresh one.

    Parameters
    ----------
    rng
        A generator, None, or (deprecated) an integer seed.

    Raises
    ------
    TypeError
        For anything else, ``True`` and ``False`` included.
    """
    if rng is None:
        return np.random.default_rng()
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        warnings.warn(
            f"Passing a seed as rng is deprecated; pass np.random.default_rng({rng!r}) instead.",
            FutureWarning,
            stacklevel=stacklevel_outside_package(),
        )
        return np.random.default_rng(int(rng))
    raise TypeError(
        f"rng must be a numpy.random.Generator, got {type(rng).__name__}. Pass np.random.default_rng(seed)."
    )


def spawn_worker_rng(rng: np.random.Generator, worker_id: int) -> np.random.Generator:
    """Derive a worker's own generator from one draw of a generator that all workers hold in the same state.

    The seed is a sequence of integers, worker first, as NumPy's page on parallel generation recommends
    (https://numpy.org/doc/stable/reference/random/parallel.html#sequence-of-integer-seeds).
    """
    shared_seed = int(rng.integers(np.iinfo(np.int64).max))
    return np.random.default_rng([worker_id, shared_seed])


class WorkerInfo(NamedTuple):
    """Which of a DataLoader's worker processes this is."""

    id: int
    num_workers: int


def get_torch_worker_info() -> WorkerInfo | None:
    """Ask torch whether this process is a DataLoader worker; None if it is not."""
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return None if info is None else WorkerInfo(id=info.id, num_workers=info.num_workers)


def validate_chunk_batch_preload_sizes(chunk_size: int, preload_nchunks: int, batch_size: int) -> None:
    """Check that a preload window divides into whole batches.

    Raises
    ------
    ValueError
        If a size is below 1, or the window of ``chunk_size * preload_nchunks`` rows is smaller than a batch or no
        multiple of it.
    """
    check_lt_1([chunk_size, preload_nchunks, batch_size], ["Chunk size", "Preloaded chunks", "batch_size"])
    window = chunk_size * preload_nchunks
    if batch_size > window:
        raise ValueError(
            f"batch_size cannot exceed chunk_size * preload_nchunks. Got batch_size={batch_size}, but max is {window}. "
            "Lower batch_size, or raise chunk_size or preload_nchunks."
        )
    if window % batch_size != 0:
        fitting = next(size for size in range(batch_size, 0, -1) if window % size == 0)
        raise ValueError(
            "chunk_size * preload_nchunks must be divisible by batch_size. "
            f"Got {window} % {batch_size} = {window % batch_size}. The next smaller batch_size that fits is {fitting}; "
            f"batch_size={batch_size} fits with a preload_nchunks that is a multiple of "
            f"{batch_size // math.gcd(chunk_size, batch_size)}."
        )


def validate_mask_and_resolve(mask: slice) -> tuple[int, int | None]:
    """Check a mask by itself.

    Returns
    -------
    tuple
        Start and stop; a stop of None means "to the last observation".

    Raises
    ------
    ValueError
        If the step is not 1, the start is negative, or the range is empty.
    TypeError
        If it is no slice.
    """
    if not isinstance(mask, slice):
        raise TypeError(f"mask must be a slice such as slice(0, 1000), got {type(mask).__name__}.")
    if mask.step not in (None, 1):
        raise ValueError(f"mask.step must be 1, but got {mask.step}. A mask is one range without gaps.")
    start = mask.start or 0
    if start < 0:
        raise ValueError(f"mask.start must be >= 0. Got {mask}; count from the first observation.")
    if mask.stop is not None and mask.stop <= start:
        raise ValueError(
            f"mask.start must be < mask.stop when mask.stop is specified. Got {mask}; both count from the first "
            "observation, and stop=None means to the last one."
        )
    return start, mask.stop


def validate_mask_n_obs_and_resolve(mask: slice, n_obs: int) -> tuple[int, int]:
    """Check a mask against the number of observations.

    Returns
    -------
    tuple
        Start and stop.

    Raises
    ------
    ValueError
        If the mask is invalid by itself, reaches past ``n_obs``, or leaves nothing.
    """
    start, stop = validate_mask_and_resolve(mask)
    if stop is None:
        stop = n_obs
    elif stop > n_obs:
        raise ValueError(
            f"Sampler mask.stop ({stop}) exceeds loader n_obs ({n_obs}). "
            "The sampler range must be within the loader's observations."
        )
    if start >= stop:
        remedy = "add data that have rows" if n_obs == 0 else "choose a mask that leaves some"
        raise ValueError(
            f"Sampler mask.start ({start}) must be < mask.stop ({stop}). "
            f"Of the loader's {n_obs} observations none is left to sample: {remedy}."
        )
    return start, stop


def overrides_nothing(sampler: object, exact: type, originals: dict[str, object]) -> bool:
    """Whether a sampler is exactly of a stock class and every listed method is still the stock one.

    A replaced method, be it on the instance or patched into the class, means that Python decides the order.
    """
    cls = type(sampler)
    return (
        cls is exact
        and originals.keys().isdisjoint(vars(sampler))
        and all(getattr(cls, name) is original for name, original in originals.items())
    )


def known_settings(sampler: object) -> dict[str, Any]:
    """Return those of the stock samplers' settings that a sampler has under the protected names of upstream's.

    They are ``chunk_size``, ``preload_nchunks``, ``batch_size`` (each an int) and ``drop_last``.
    """
    names = ("chunk_size", "preload_nchunks", "batch_size", "drop_last")
    held = {name: getattr(sampler, f"_{name}", None) for name in names}
    return {name: value for name, value in held.items() if isinstance(value, int)}
