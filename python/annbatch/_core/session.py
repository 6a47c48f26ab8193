"""What a loader has running: opened datasets, passes over them, joined annotations.

A `Session` belongs to one process. It is no part of a loader's pickles, and what it has opened is opened anew when
datasets were added or the process was forked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from annbatch._core import ops
from annbatch._core.passes import Element, Pass
from annbatch._core.requests import check_rows
from annbatch._output.obs import ObsTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from annbatch._data.datasets import Datasets
    from annbatch._data.sources import Source
    from annbatch.transforms import Transform


class Session:
    """The run-time state of one loader."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []
        # each with what it was made for
        self._opened: tuple[Any, Collection] | None = None
        self._joined: tuple[Datasets, ObsTable] | None = None
        self._variables: tuple[Datasets, tuple[pd.DataFrame | None, int]] | None = None

    def sibling(self) -> Session:
        """Return a session of its own that starts from what this one has opened."""
        sibling = Session()
        sibling._opened, sibling._joined = self._opened, self._joined
        return sibling

    def collection(
        self, datasets: Datasets, *, dtype: str, transform: Transform, threads: int | None, direct_io: bool
    ) -> Collection:
        """Open `datasets`, or return them as they are open already."""
        key = (datasets, dtype, threads, direct_io, os.getpid())
        # Two threads may both open them; the second then stands for both.
        if self._opened is None or self._opened[0] != key:
            config = transform.config(datasets.var, datasets.n_var)
            opened = Collection(datasets, dtype=dtype, transform=config, threads=threads, direct_io=direct_io)
            self._opened = (key, opened)
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

    def obs_table(self, datasets: Datasets) -> ObsTable | None:
        """Return the obs frames of all datasets as one table, joined when first needed; ``None`` if there are none."""
        if datasets.obs is None:
            return None
        if self._joined is None or self._joined[0] is not datasets:
            self._joined = (datasets, ObsTable(datasets.obs))
        return self._joined[1]

    def variables(self, datasets: Datasets, transform: Transform) -> tuple[pd.DataFrame | None, int]:
        """Return var as batches have it, the same frame each time, and the number of variables."""
        if not datasets.shapes:
            return None, 0
        if self._variables is None or self._variables[0] is not datasets:
            var, n_var = datasets.var, datasets.n_var
            if (selected := transform.selected(var, n_var)) is not None:
                var, n_var = None if var is None else var.iloc[selected], len(selected)
            self._variables = (datasets, (var, n_var))
        return self._variables[1]

    def stats(self) -> dict[str, Any]:
        """Return the core's counters of the pass begun last; empty if none was."""
        return self._passes[-1].stats() if self._passes else {}

    def close(self) -> None:
        """End all passes and let go of the datasets."""
        for begun in self._passes:
            begun.close()
        self._opened = None


class Collection:
    """Datasets opened by the core, shared by all passes over them.

    Parameters
    ----------
    datasets
        The datasets; each has the same elements.
    dtype
        How values are delivered, ``"torch"`` or ``"native"``.
    transform
        What is done to ``X``, as `annbatch.transforms.Transform.config` says it.
    threads
        Decode threads; ``None`` leaves it to the core.
    direct_io
        Whether files are read past the page cache.
    """

    def __init__(
        self,
        datasets: Datasets,
        *,
        dtype: str,
        transform: Mapping[str, Any],
        threads: int | None,
        direct_io: bool,
    ):
        buffers: list[torch.Tensor] = []
        names = list(datasets.sources[0])
        entries = [
            {
                "name": _label(i, first),
                "sources": {name: source.config(buffers) for name, source in elements.items()},
            }
            for i, (first, elements) in enumerate(zip(datasets.firsts, datasets.sources, strict=True))
        ]
        joined = _lend_columns(datasets, entries, buffers)
        config = {
            "elements": [
                {
                    "name": name,
                    "dtype": dtype,
                    **({"n_var": datasets.n_var} if name in joined else {}),
                    **({"transform": transform} if name == "X" else {}),
                }
                for name in names
            ],
            "datasets": entries,
            "threads": threads if threads is not None else worker_threads(),
            "direct_io": direct_io,
        }
        self._state = ops.open_state(config, buffers)
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


def locate(collection: Collection, datasets: Datasets, rows: np.ndarray) -> list[dict[str, Any]]:
    """Say where rows (int64 ``[n]``) are stored, see `annbatch.Loader.locate`."""
    starts = np.cumsum([0, *(shape[0] for shape in datasets.shapes)])
    check_rows(rows, int(starts[-1]), "locate")
    places = []
    for found in collection.locate(torch.from_numpy(rows)):
        dataset = int(np.searchsorted(starts, found["row"], side="right")) - 1
        local_row = int(found["row"] - starts[dataset])
        obs = None if datasets.obs is None else datasets.obs[dataset]
        places.append(
            {
                "row": found["row"],
                "dataset": dataset,
                "path": datasets.firsts[dataset].path,
                "local_row": local_row,
                "obs_name": None if obs is None else obs.index[local_row],
                "chunks": found["chunks"],
            }
        )
    return places


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


def _lend_columns(datasets: Datasets, entries: Sequence[dict[str, Any]], buffers: list[torch.Tensor]) -> set[str]:
    """Say in the core's description of each dataset where columns come to stand; return the elements that are joined."""
    joined, known = set(), {}
    for i, entry in enumerate(entries):
        for name in entry["sources"]:
            columns = datasets.columns(i, name)
            if columns is None:
                continue
            # one buffer for all datasets of the same variables
            if id(columns) not in known:
                known[id(columns)] = len(buffers)
                buffers.append(torch.from_numpy(columns))
            entry.setdefault("columns", {})[name] = known[id(columns)]
            joined.add(name)
    return joined


def _label(index: int, source: Source) -> str:
    return source.path if source.path is not None else f"dataset {index} (in memory)"
