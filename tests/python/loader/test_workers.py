"""Loaders in the workers of a DataLoader, in forked processes and in threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from annbatch import Loader
from annbatch.abc import Sampler
from annbatch.samplers import RandomSampler, SequentialSampler
from support.cells import SIZES, Cells, check_batch, check_epoch, densify, loader_over, make_adata
from support.processes import run_python

# a worker that hangs fails the test instead of the run
TIMEOUT_S = 60


def workers(loader: Loader, method: str = "fork", n: int = 2, **kwargs) -> DataLoader:
    return DataLoader(
        loader, batch_size=None, num_workers=n, multiprocessing_context=method, timeout=TIMEOUT_S, **kwargs
    )


def rows_of(batches: Any, cells: Cells) -> list[np.ndarray]:
    # DataLoader turns arrays into tensors
    return [check_batch({**batch, "index": np.asarray(batch["index"])}, cells) for batch in batches]


# ---------------------------------------------------------------- DataLoader


@pytest.mark.parametrize(
    ("method", "to"), [("fork", None), ("fork", "torch"), ("forkserver", None), ("spawn", "torch")]
)
def test_each_row_comes_once_over_all_workers(cells: Cells, method: str, to: str | None):
    loader = loader_over(cells, shuffle=True, to=to)
    next(iter(loader))  # something is open already when workers start
    batches = rows_of(workers(loader, method), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(cells.n_obs))
    assert sorted(map(len, batches)) == [1] + [10] * 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than CPUs
@pytest.mark.parametrize("n", [1, 3, 9])
def test_any_number_of_workers(cells: Cells, n: int):
    batches = rows_of(workers(loader_over(cells, shuffle=True), n=n), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(cells.n_obs))


def test_sequential_order_within_each_worker(cells: Cells):
    batches = rows_of(workers(loader_over(cells)), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(cells.n_obs))
    assert all((np.diff(rows) == 1).all() for rows in batches)


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_differ(cells: Cells, persistent: bool):
    data = workers(loader_over(cells, shuffle=True), persistent_workers=persistent)
    orders = [np.concatenate(rows_of(data, cells)) for _ in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(cells.n_obs))
    assert (orders[0] != orders[1]).any()
    assert (orders[1] != orders[2]).any()
    assert (orders[0] != orders[2]).any()


def test_seeds_repeat_the_epochs(cells: Cells):
    def order(seed: int) -> list[np.ndarray]:
        loader = loader_over(cells, shuffle=True, rng=np.random.default_rng(seed))
        data = workers(loader, generator=torch.Generator().manual_seed(7))
        return [np.concatenate(rows_of(data, cells)) for _ in range(2)]

    first, again, other = order(0), order(0), order(1)
    np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_sampler_without_generator_still_splits_the_rows(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    loader.batch_sampler.rng = None
    np.testing.assert_array_equal(np.sort(np.concatenate(rows_of(workers(loader), cells))), np.arange(cells.n_obs))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_memory_travels_to_workers(method: str):
    adata = make_adata(50, 0)
    loader = Loader(**SIZES, shuffle=True, return_index=True).add_dataset(adata.X, obs=adata.obs)
    seen = []
    for batch in workers(loader, method):
        rows = np.asarray(batch["index"])  # DataLoader has made it a tensor
        np.testing.assert_array_equal(densify(batch["X"]), adata.X.toarray()[rows])
        assert list(batch["obs"].index) == list(adata.obs.index[rows])
        seen.append(rows)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(50))


def test_a_pass_of_the_parent_goes_on(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    batches = iter(loader)
    first = next(batches)
    inside = rows_of(workers(loader), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(inside)), np.arange(cells.n_obs))
    check_epoch([first, *batches], cells)


def test_a_given_up_epoch_ends_its_workers(cells: Cells):
    batches = iter(workers(loader_over(cells, shuffle=True)))
    next(batches)
    processes = list(batches._workers)
    del batches
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode is not None


def test_failure_in_a_worker_reaches_the_parent(cells: Cells):
    loader = Loader(batch_sampler=SequentialSampler(**SIZES, mask=slice(0, 500))).add_adatas(cells.without_extras())
    with pytest.raises(ValueError, match="exceeds loader n_obs"):
        next(iter(workers(loader)))


FORMS = {
    "numpy": {},
    "torch, dense, codes": {"to": "torch", "dense": True, "obs": "codes"},
    "sequential": {"shuffle": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 1000])  # the second would wait for more batches than there are
def test_a_dataloader_that_would_collate_batches_is_told_the_remedy(cells: Cells, form: str, batch_size: int):
    loader = loader_over(cells, **{"shuffle": True, **FORMS[form]})
    with pytest.raises(ValueError, match=r"needs batch_size=None.*DataLoader\(loader, batch_size=None"):
        next(iter(DataLoader(loader, batch_size=batch_size)))
    assert loader.stats() == {}  # nothing was begun
    loader.add_adatas(cells.without_extras())


def test_and_so_it_is_in_a_worker(cells: Cells):
    with pytest.raises(ValueError, match="needs batch_size=None"):
        next(iter(DataLoader(loader_over(cells), batch_size=1000, num_workers=1, timeout=TIMEOUT_S)))


def test_a_dataloader_that_would_collate_batches_without_obs_is_told_the_remedy():
    loader = Loader(to="torch", batch_size=2).add_dataset(np.ones((4, 2), dtype="float32"))
    with pytest.raises(ValueError, match="needs batch_size=None"):
        next(iter(DataLoader(loader)))


class Passing(torch.utils.data.IterableDataset):
    """A dataset of the user's own around a loader."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


def test_so_is_one_around_a_dataset_that_passes_batches_on(cells: Cells):
    data = Passing(loader_over(cells, shuffle=True, to="torch", obs="codes"))
    with pytest.raises(ValueError, match="needs batch_size=None"):
        next(iter(DataLoader(data)))
    batches = rows_of(DataLoader(Passing(loader_over(cells, shuffle=True)), batch_size=None), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(cells.n_obs))


@pytest.mark.parametrize("n", [0, 2])
def test_a_collate_fn_of_ones_own_may_merge_batches(cells: Cells, n: int):
    loader = loader_over(cells, shuffle=True)
    data = DataLoader(loader, batch_size=3, num_workers=n, collate_fn=_merge_rows, timeout=TIMEOUT_S if n else 0)
    merged = list(data)
    np.testing.assert_array_equal(np.sort(np.concatenate(merged)), np.arange(cells.n_obs))
    assert max(map(len, merged)) == 30


def _merge_rows(batches: list[dict[str, Any]]) -> np.ndarray:
    return np.concatenate([batch["index"] for batch in batches])


def test_workers_share_the_cpus(cells: Cells, monkeypatch: pytest.MonkeyPatch):
    from annbatch._core import session as _session

    monkeypatch.setattr(_session.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert _session.worker_threads() is None
    for n, local_ranks, threads in [(2, None, 8), (3, None, 5), (2, 4, 2), (4, 8, 1)]:
        monkeypatch.setattr(_session.torch.utils.data, "get_worker_info", lambda n=n: _Info(0, n))
        if local_ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        assert _session.worker_threads() == threads


class _Info:
    def __init__(self, worker: int, num_workers: int):
        self.id, self.num_workers = worker, num_workers


# ---------------------------------------------------------------- samplers in workers


class Strided(Sampler):
    """Each worker takes every so manieth row."""

    batch_size = 10
    shuffle = False

    def n_batches(self, n_obs: int) -> int:
        return n_obs // 10

    def validate(self, n_obs: int) -> None:
        pass

    def _sample(self, n_obs: int):
        worker = get_worker_info()
        rows = np.arange(worker.id, n_obs, worker.num_workers)
        yield {"requests": rows, "splits": np.array_split(np.arange(len(rows)), 7)}


def test_samplers_of_ones_own_share_out_the_rows_themselves(cells: Cells):
    loader = Loader(batch_sampler=Strided(), return_index=True).add_adatas(cells.without_extras())
    batches = rows_of(workers(loader), cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(cells.n_obs))


def test_which_is_said(cells: Cells, monkeypatch: pytest.MonkeyPatch):
    from annbatch._output import reader as module

    loader = Loader(batch_sampler=Strided(), return_index=True).add_adatas(cells.without_extras())
    info = _Info(1, 2)
    monkeypatch.setattr(module, "get_worker_info", lambda: info)
    monkeypatch.setitem(Strided._sample.__globals__, "get_worker_info", lambda: info)
    with pytest.warns(UserWarning, match="Every worker of the DataLoader runs Strided by itself"):
        rows = np.concatenate(rows_of(loader, cells))
    np.testing.assert_array_equal(rows, np.arange(1, cells.n_obs, 2))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SequentialSampler(**SIZES), "Multiple workers are not supported with non-shuffled sampling"),
        (RandomSampler(**SIZES), "drop_last=False is not supported"),
    ],
)
def test_samplers_asked_directly_refuse_workers(cells: Cells, sampler: Sampler, message: str):
    """Only the loader hands out windows to workers; whoever samples by themselves is warned as ever."""
    data = DataLoader(_Sampling(sampler, cells.n_obs), batch_size=None, num_workers=2, timeout=TIMEOUT_S)
    with pytest.raises(ValueError, match=message):
        list(data)


class _Sampling(torch.utils.data.IterableDataset):
    def __init__(self, sampler: Sampler, n_obs: int):
        self.sampler, self.n_obs = sampler, n_obs

    def __iter__(self):
        for load_request in self.sampler.sample(self.n_obs):
            yield len(load_request["splits"])


# ---------------------------------------------------------------- processes of ones own


def in_child(work: Any, method: str = "fork") -> Any:
    """What `work` returns in a child process."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_report, args=(work, queue))
    child.start()
    result = queue.get(timeout=TIMEOUT_S)
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    return result


def _report(work: Any, queue: Any) -> None:
    queue.put(work())


def test_a_forked_pass_cannot_go_on_but_the_loader_can(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    batches = iter(loader)
    first = next(batches)

    def work() -> tuple[str, int]:
        try:
            next(batches)
        except RuntimeError as error:
            failure = str(error)
        batches.close()
        return failure, sum(len(batch["index"]) for batch in loader)

    failure, n_rows = in_child(work)
    assert "fork" in failure
    assert n_rows == cells.n_obs
    check_epoch([first, *batches], cells)


def test_batches_survive_a_fork(cells: Cells):
    batch = next(iter(loader_over(cells, shuffle=True)))
    assert in_child(lambda: check_batch(batch, cells).tolist()) == batch["index"].tolist()


def test_forks_in_the_middle_of_reading(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    batches = []
    for k, batch in enumerate(loader):
        batches.append(batch)
        if k % 3 == 0:
            assert in_child(lambda: sum(len(batch["index"]) for batch in loader)) == cells.n_obs
    check_epoch(batches, cells)


def test_forks_at_the_first_use(cells: Cells):
    """Whatever is made once per process, by this library or below it, no child waits for a thread that was making it."""
    code = """
    import os, random, signal, sys, threading, time
    from annbatch._core import ops as _ops
    config = {"elements": [{"name": "X"}], "datasets": [{"path": path, "name": path} for path in sys.argv[1:]]}

    def epoch():
        parent = _ops.open_state(config, ())
        state = _ops.stream(parent, {"sampling": {"kind": "random", "chunk_size": 8, "preload_nchunks": 2, "batch_size": 8}})
        _ops.start(state, 1)
        while len(_ops.load(state)[0]):
            pass

    def fork(work):
        child = os.fork()
        if child == 0:
            work()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def child():
        signal.alarm(20)
        epoch()
        os._exit(0)

    def first_use():
        threading.Thread(target=epoch, daemon=True).start()
        time.sleep(random.random() ** 2 * 0.02)
        os._exit(abs(fork(child)))

    for trial in range(40):
        random.seed(trial)
        assert fork(first_use) == 0, trial
    """
    done = run_python(code, *cells.paths, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------- threads


def in_threads(*work: Any) -> list[Any]:
    results: list[Any] = [None] * len(work)

    def run(k: int) -> None:
        try:
            results[k] = work[k]()
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_passes_in_threads(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    for batches in in_threads(*[lambda: list(loader)] * 6):
        check_epoch(batches, cells)
    loader.add_adatas(cells.without_extras())  # all passes are over


def test_copies_in_threads(cells: Cells):
    import copy

    loader = loader_over(cells, shuffle=True)
    next(iter(loader))
    for batches in in_threads(*[lambda: list(copy.copy(loader))] * 4):
        check_epoch(batches, cells)


def test_closing_from_another_thread_ends_the_pass(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    started = threading.Event()

    def consume() -> str:
        try:
            for _ in loader:
                started.set()
                closed.wait(TIMEOUT_S)
        except RuntimeError as error:
            return str(error)
        return "went on"

    closed = threading.Event()

    def close() -> None:
        started.wait(TIMEOUT_S)
        loader.close()
        closed.set()

    assert "closed" in in_threads(consume, close)[0]
    check_epoch(list(loader), cells)


def test_workers_are_quiet(cells: Cells, capfd: pytest.CaptureFixture):
    """Nothing is printed by workers that start, read and end, whatever state they inherit."""
    loader = loader_over(cells, shuffle=True, to="torch")
    next(iter(loader))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(workers(loader), cells)
    assert capfd.readouterr().err == ""
    assert os.getpid() == multiprocessing.current_process().pid
