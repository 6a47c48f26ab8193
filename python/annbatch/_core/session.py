"""What the core has running for a loader: opened datasets, and passes over them.

A `Session` belongs to one process. It is no part of a loader's pickles, and what it has opened is opened anew when
something else is asked for or the process was forked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from annbatch._core import ops
from annbatch._core.passes import Element, Pass

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from annbatch.types import LoaderStats


class Session:
    """The core's run-time state of one loader."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []
        # with what it was opened for
        self._opened: tuple[Hashable, Collection] | None = None

    def sibling(self) -> Session:
        """Return a session of its own that starts from what this one has opened."""
        sibling = Session()
        sibling._opened = self._opened
        return sibling

    def collection(
        self, of: Hashable, describe: Callable[[], tuple[Mapping[str, Any], Sequence[torch.Tensor]]]
    ) -> Collection:
        """Open a collection, or return it as it is open already.

        Parameters
        ----------
        of
            What it is of: another one is opened when this is not equal to what it was.
        describe
            Gives the configuration and buffers to open it with.
        """
        key = (of, os.getpid())
        # Two threads may both open it; the second then stands for both.
        if self._opened is None or self._opened[0] != key:
            self._opened = (key, Collection(*describe()))
        return self._opened[1]

    def begin(
        self,
        collection: Collection,
        sampling: Mapping[str, Any],
        limits: Mapping[str, Any],
        device: torch.device | None,
    ) -> Pass:
        """Begin a pass; see `Collection.begin`."""
        begun = collection.begin(sampling, limits, device)
        # the latest is kept after its end, for `stats`
        self._passes = [*(other for other in self._passes if not other.closed), begun]
        return begun

    def stats(self) -> LoaderStats:
        """Return the core's counters of the pass begun last; empty if none was."""
        return self._passes[-1].stats() if self._passes else {}

    def close(self) -> None:
        """End all passes and let go of the collection."""
        for begun in self._passes:
            begun.close()
        self._opened = None


class Collection:
    """Datasets opened by the core, shared by all passes over them.

    Parameters
    ----------
    config
        The core's configuration, see `annbatch._core.ops.open_state`. Without ``threads`` the core chooses, and in a worker
        of a `DataLoader` `worker_threads`.
    buffers
        What it refers to by number.
    """

    def __init__(self, config: Mapping[str, Any], buffers: Sequence[torch.Tensor]) -> None:
        threads = config.get("threads")
        self._state = ops.open_state({**config, "threads": worker_threads() if threads is None else threads}, buffers)
        self._elements = [_element(entry) for entry in ops.describe(self._state)["elements"]]

    def begin(self, sampling: Mapping[str, Any], limits: Mapping[str, Any], device: torch.device | None) -> Pass:
        """Open a stream with the given sampling, to a CUDA device or the CPU.

        `limits` are ``memory_budget`` and ``batches_ahead``.
        """
        config = {"sampling": dict(sampling), **limits}
        if device is not None:
            config["device"] = device.index
        return Pass(ops.stream(self._state, config), self._elements, device)

    def locate(self, rows: torch.Tensor) -> list[dict[str, Any]]:
        """Where rows (int64 ``[n]``) lie, see `annbatch._core.ops.locate`."""
        return ops.locate(self._state, rows)


def worker_threads() -> int | None:
    """Return the CPUs this process should use if it is a worker of a `DataLoader`, else ``None``: the core's default."""
    worker = torch.utils.data.get_worker_info()
    if worker is None:
        return None
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cpus // (local_ranks * worker.num_workers))


def _element(entry: Mapping[str, Any]) -> Element:
    return Element(
        name=entry["name"],
        kind=entry["kind"],
        dtype=getattr(torch, entry["dtype"]),
        n_var=entry.get("n_var"),
        tail=tuple(entry.get("tail") or ()),
    )
