"""Passes over datasets: from a sampler to batches in the form that a loader was asked for."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from annbatch._core.requests import resolve_requests
from annbatch._core.session import Session
from annbatch._data.description import describe, locate
from annbatch._output.obs import ObsTable
from annbatch._output.options import warn_of_ranks, warn_of_sharding
from annbatch.abc.sampler import draw_epoch_seed, native_sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import pandas as pd
    import torch

    from annbatch._core.passes import Pass, RawBatch
    from annbatch._core.session import Collection
    from annbatch._data.datasets import Datasets
    from annbatch._output.form import Form
    from annbatch.abc import Sampler
    from annbatch.types import LoaderStats, RowPlace


class Reader:
    """What one loader reads with: the form of its batches, limits, and what is open.

    What is open, and annotations as they were joined, are no part of copies and pickles; `sibling` shares them.

    Parameters
    ----------
    form
        The form of batches.
    limits
        ``memory_budget`` and ``batches_ahead``, as for `annbatch.Loader`.
    threads, direct_io
        As for `annbatch.Loader`.

    Attributes
    ----------
    told_of_ranks
        Whether nothing more is to be said of ranks that read the same rows.
    """

    def __init__(self, form: Form, *, limits: Mapping[str, Any], threads: int | None, direct_io: bool) -> None:
        self.form = form
        self._limits = limits
        self._threads = threads
        self._direct_io = direct_io
        self.told_of_ranks = False
        self._open_nothing()

    def _open_nothing(self) -> None:
        self._session = Session()
        # each with what it was made of
        self._joined: tuple[Datasets, ObsTable] | None = None
        self._variables: tuple[Datasets, tuple[pd.DataFrame | None, int]] | None = None

    def batches(self, datasets: Datasets, sampler: Sampler) -> Iterator[Any]:
        """Yield the dictionaries of one pass; see `annbatch.Loader.__iter__`."""
        with ExitStack() as at_end:
            datasets.check_not_empty()
            obs = self.obs_table(datasets)
            for raw in self._raw_batches(datasets, sampler, at_end):
                yield self.form.dress(raw, datasets, self.variables(datasets), obs)

    def _raw_batches(self, datasets: Datasets, sampler: Sampler, at_end: ExitStack) -> Iterator[RawBatch]:
        """Begin a pass; `at_end` is told what to close after it."""
        n_obs, worker = datasets.n_obs, get_worker_info()
        if not self.told_of_ranks:
            self.told_of_ranks = warn_of_ranks(sampler, worker)
        sampling = native_sampling(sampler, n_obs)
        if sampling is not None:
            sampler.validate(n_obs)
            # the core refuses settings its orders do not have, even when they are off
            sampling = {name: value for name, value in sampling.items() if value is not None and value is not False}
            if worker is not None:
                sampling = {**sampling, "part": [worker.id, worker.num_workers]}
            seed = draw_epoch_seed(sampler, worker) if sampling["kind"] == "random" else 0
            return self._begin_pass(datasets, sampling, at_end).native(seed)
        if worker is not None and worker.num_workers > 1:
            warn_of_sharding(sampler)
        load_requests = sampler.sample(n_obs)
        at_end.callback(getattr(load_requests, "close", lambda: None))
        windows = resolve_requests(load_requests, n_obs)
        # a sampler checks itself when its first request is drawn: do that before files are opened
        if (first := next(windows, None)) is not None:
            windows = chain([first], windows)
        begun = self._begin_pass(datasets, {"kind": "submitted"}, at_end)
        return begun.submitted(windows, self._limits["batches_ahead"])

    def _begin_pass(self, datasets: Datasets, sampling: Mapping[str, Any], at_end: ExitStack) -> Pass:
        begun = self._session.begin(self.collection(datasets), sampling, self._limits, self.form.device_now())
        at_end.callback(begun.close)
        return begun

    def collection(self, datasets: Datasets) -> Collection:
        """Open some datasets, or return them as they are open already."""
        key = (datasets, self.form.stored_as, self._threads, self._direct_io)
        return self._session.collection(key, partial(self._describe, datasets))

    def _describe(self, datasets: Datasets) -> tuple[dict[str, Any], list[torch.Tensor]]:
        transform = self.form.transform.config(datasets.var, datasets.n_var)
        config, buffers = describe(datasets, dtype=self.form.stored_as, transform=transform)
        return {**config, "threads": self._threads, "direct_io": self._direct_io}, buffers

    def obs_table(self, datasets: Datasets) -> ObsTable | None:
        """Return the obs frames of all datasets as one table, joined when first needed; ``None`` if there are none."""
        if datasets.obs is None:
            return None
        if self._joined is None or self._joined[0] is not datasets:
            self._joined = (datasets, ObsTable(datasets.obs))
        return self._joined[1]

    def variables(self, datasets: Datasets) -> tuple[pd.DataFrame | None, int]:
        """Return var as batches have it, the same frame each time, and the number of variables."""
        if not datasets.shapes:
            return None, 0
        if self._variables is None or self._variables[0] is not datasets:
            var, n_var = datasets.var, datasets.n_var
            if (selected := self.form.transform.selected(var, n_var)) is not None:
                var, n_var = None if var is None else var.iloc[selected], len(selected)
            self._variables = (datasets, (var, n_var))
        return self._variables[1]

    def locate(self, datasets: Datasets, rows: np.ndarray) -> list[RowPlace]:
        """Say where rows (int64 ``[n]``) are stored, see `annbatch.Loader.locate`."""
        return locate(self.collection(datasets), datasets, rows)

    def stats(self) -> LoaderStats:
        """Return the core's counters of the pass begun last; empty if none was."""
        return self._session.stats()

    def close(self) -> None:
        """End all passes and let go of the files."""
        self._session.close()

    def sibling(self) -> Reader:
        """Return a reader of its own that starts from what this one has opened and joined."""
        sibling = Reader.__new__(Reader)
        sibling.__setstate__(self.__getstate__())
        # opening anew would read every indptr again
        sibling._session, sibling._joined = self._session.sibling(), self._joined
        return sibling

    def __getstate__(self) -> dict[str, Any]:
        run_time = ("_session", "_joined", "_variables")
        return {name: value for name, value in self.__dict__.items() if name not in run_time}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_nothing()
