"""Arguments of `annbatch.Loader`: which go together, what stands for what, and what has to be installed for them."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from annbatch._base.warn import stacklevel_outside_package
from annbatch.samplers import ClassSampler, RandomSampler, SequentialSampler, WeightedClassSampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from annbatch.abc import Sampler
    from annbatch.convert import OutputLibrary


def choose_sampler(
    given: Sampler | None,
    sizes: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    shuffle: bool | None,
    rng: np.random.Generator | None,
) -> Sampler:
    """Return the sampler that is given, or one made from the other arguments.

    Parameters
    ----------
    given
        The sampler, or ``None``.
    sizes
        Arguments of the samplers by name, ``None`` where they were not given.
    defaults
        What `sizes` are then.
    shuffle, rng
        As for `annbatch.Loader`.

    Raises
    ------
    ValueError
        If a sampler is given and any of the other arguments too, or sizes do not fit together.
    """
    if given is not None:
        if also := [name for name, value in {**sizes, "rng": rng, "shuffle": shuffle}.items() if value is not None]:
            raise ValueError(
                f"Cannot specify {', '.join(also)} when providing a custom sampler: these are controlled by the sampler."
            )
        return given
    resolved = {name: defaults[name] if value is None else value for name, value in sizes.items()}
    return RandomSampler(**resolved, rng=rng) if shuffle else SequentialSampler(**resolved)


def distinct_names(argument: str, names: Sequence[str]) -> list[str]:
    """Return `names` as a list.

    Raises
    ------
    TypeError
        If it is a single string.
    ValueError
        If a name comes twice.
    """
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a list of names, got the string {names!r}")
    names = list(names)
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} names something twice: {names}")
    return names


def instead_of_to_torch(to_torch: bool, to: OutputLibrary) -> OutputLibrary:
    """Return what `to` should be for code written against annbatch 0.2, after a `DeprecationWarning`."""
    warnings.warn('`to_torch` is deprecated, use `to="torch"`.', DeprecationWarning, stacklevel=3)
    if to_torch and to not in (None, "torch"):
        raise ValueError(f"to_torch=True contradicts to={to!r}")
    return "torch" if to_torch else to


def check_output(to: str | None, obs: str, preload_to_gpu: bool) -> None:
    """Refuse forms of batches that do not exist (`ValueError`) or need what is not installed (`ImportError`)."""
    if to not in (None, "torch", "jax"):
        raise ValueError(f'to must be "torch", "jax" or None, got {to!r}')
    if obs not in ("frame", "codes"):
        raise ValueError(f'obs must be "frame" or "codes", got {obs!r}')
    if to == "jax" and find_spec("jax") is None:
        raise ImportError("Could not find jax dependency. Try `pip install jax`.")
    if preload_to_gpu and find_spec("cupy") is None and not (to == "torch" and torch.cuda.is_available()):
        raise ImportError(
            "Could not find cupy dependency. preload_to_gpu=True needs it "
            '(but for to="torch" on a machine with a CUDA device): see https://docs.cupy.dev/en/stable/install.html.'
        )


def choose_device(device: torch.device | str | int | None, to: str | None) -> torch.device | None:
    """Return the CUDA device that batches are delivered to, without an index the current one; ``None`` for the CPU.

    Parameters
    ----------
    device
        What the user asked for.
    to
        What batches are made of.

    Raises
    ------
    ValueError
        If it is neither a CUDA device nor the CPU.
    RuntimeError
        If this torch sees no such device.
    ImportError
        If `to` needs cupy on it.
    """
    if device is None:
        return None
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f'device must be a CUDA device, "cpu" or None, got {str(device)!r}')
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device here"
        raise RuntimeError(f"device={str(device)!r}: {why}. Leave the device out for batches on the CPU.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise RuntimeError(
            f"device={str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0."
        )
    if to is None and find_spec("cupy") is None:
        raise ImportError("Batches of NumPy's kind on a GPU are cupy's, which is not installed: pass to=\"torch\".")
    return device


def device_now(chosen: torch.device | None, preload_to_gpu: bool) -> torch.device | None:
    """Return the device of a pass that begins now.

    Not earlier: ranks choose their devices after loaders were made, and `preload_to_gpu`, which is on wherever cupy is
    installed, must not ask CUDA for anything before the process forks.

    Parameters
    ----------
    chosen
        What `choose_device` returned.
    preload_to_gpu
        Whether upstream's argument asks for the current CUDA device. Where torch has none, and in workers of a
        `DataLoader`, arrays take upstream's own way.

    Raises
    ------
    RuntimeError
        In a worker of a `DataLoader`, if a device was chosen.
    """
    in_worker = torch.utils.data.get_worker_info() is not None
    if chosen is None:
        if not preload_to_gpu or in_worker or not torch.cuda.is_available():
            return None
        chosen = torch.device("cuda")
    if in_worker:
        raise RuntimeError(
            f"A worker of a DataLoader cannot deliver to {chosen}. The loader reads ahead in threads of its own: iterate it "
            "directly, or use num_workers=0."
        )
    return chosen if chosen.index is not None else torch.device("cuda", torch.cuda.current_device())


def warn_of_sharding(sampler: Any) -> None:
    """Warn, in a worker of a `DataLoader`, that a sampler of the user's own has to share out the rows."""
    warnings.warn(
        f"Every worker of the DataLoader runs {type(sampler).__name__} by itself: unless it shares out the rows with "
        "the help of torch.utils.data.get_worker_info, each row comes once per worker.",
        UserWarning,
        stacklevel=2,
    )


# Samplers that give every rank the same rows. Subclasses are not among them: they may share rows out by themselves.
_OF_ALL_ROWS = (RandomSampler, SequentialSampler, ClassSampler, WeightedClassSampler)


def warn_of_ranks(sampler: Any, worker: Any) -> bool:
    """Warn if this is one of several ranks and the sampler gives all of them the same rows.

    Parameters
    ----------
    sampler
        The sampler of a pass that begins now.
    worker
        `torch.utils.data.get_worker_info`'s answer. The first of several workers speaks for all.

    Returns
    -------
    bool
        Whether it was said.
    """
    n_ranks = _n_ranks(in_worker=worker is not None)
    if n_ranks < 2 or type(sampler) not in _OF_ALL_ROWS or (worker is not None and worker.id > 0):
        return False
    kind = type(sampler).__name__
    warnings.warn(
        f"All {n_ranks} ranks read the same rows: each runs {kind} over all that its Loader has. To share the rows out, "
        f'pass batch_sampler=annbatch.samplers.DistributedSampler({kind}(...), dist_info="torch"). If each rank was '
        "given data or a mask of its own, this warning can be ignored.",
        UserWarning,
        stacklevel=stacklevel_outside_package(),
    )
    return True


def _n_ranks(*, in_worker: bool) -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    # a worker that was spawned is in no process group; what its rank was told is in the environment
    said = os.environ.get("WORLD_SIZE", "") if in_worker else ""
    return int(said) if said.isdecimal() else 1
