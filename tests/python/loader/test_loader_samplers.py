"""Samplers written in Python: what their requests mean, when they are asked, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from annbatch import Loader
from annbatch.abc import Sampler
from annbatch.samplers import ClassSampler, DistributedSampler, RandomSampler, SequentialSampler, WeightedClassSampler
from support.cells import Cells, check_batch, check_epoch


class Fixed(Sampler):
    """Yields the load requests it is given, and notes when it was asked."""

    def __init__(self, *load_requests: dict[str, Any], batch_size: int = 5, shuffle: bool = False):
        self.load_requests = load_requests
        self.asked = 0
        self.ended = False
        self._size, self._shuffle = batch_size, shuffle

    @property
    def batch_size(self) -> int:
        return self._size

    @property
    def shuffle(self) -> bool:
        return self._shuffle

    def n_batches(self, n_obs: int) -> int:
        return sum(len(request.get("splits", ())) for request in self.load_requests)

    def validate(self, n_obs: int) -> None:
        if n_obs < 10:
            raise ValueError("too few")

    def _sample(self, n_obs: int):
        try:
            for request in self.load_requests:
                self.asked += 1
                yield dict(request)
        finally:
            self.ended = True


def loader_over(cells: Cells, sampler: Any, **kwargs) -> Loader:
    return Loader(batch_sampler=sampler, return_index=True, **kwargs).add_adatas(cells.without_extras())


def rows_of(loader: Loader, cells: Cells) -> list[list[int]]:
    return [check_batch(batch, cells).tolist() for batch in loader]


# ---------------------------------------------------------------- meaning of requests


@pytest.mark.parametrize(
    "requests",
    [
        [slice(90, 94), slice(3, 5), slice(35, 39)],
        np.array([slice(90, 94), slice(3, 5), slice(35, 39)], dtype=object),
        np.array([90, 91, 92, 93, 3, 4, 35, 36, 37, 38]),
        np.array([90, 91, 92, 93, 3, 4, 35, 36, 37, 38], dtype="uint8"),
        [np.array([90, 91]), slice(92, 94), np.array([3, 4]), slice(35, 39)],
    ],
)
def test_splits_are_places_in_the_order_of_the_requests(cells: Cells, requests: Any):
    splits = [np.array([9, 0, 5]), np.array([1, 4])]
    loader = loader_over(cells, Fixed({"requests": requests, "splits": splits}))
    assert rows_of(loader, cells) == [[38, 90, 4], [91, 3]]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ([0, 0, 2], [10, 10, 12]),
        (np.array([-1, -4]), [13, 10]),
        (np.array([True, False, False, True]), [10, 13]),
        (slice(1, 3), [11, 12]),
        (range(3), [10, 11, 12]),
        (np.array([1], dtype="int8"), [11]),
    ],
)
def test_splits_follow_numpy(cells: Cells, split: Any, rows: list[int]):
    loader = loader_over(cells, Fixed({"requests": [slice(10, 14)], "splits": [split]}))
    assert rows_of(loader, cells) == [rows]


def test_rows_may_repeat(cells: Cells):
    load_request = {"requests": np.array([50, 7, 50, 50]), "splits": [np.array([0, 1, 2]), np.array([3, 0])]}
    assert rows_of(loader_over(cells, Fixed(load_request)), cells) == [[50, 7, 50], [50, 50]]


@pytest.mark.parametrize("to", [None, "torch"])
def test_empty_splits_are_empty_batches(cells: Cells, to: str | None):
    none = np.array([], dtype=int)
    load_requests = [
        {"requests": [slice(0, 4)], "splits": [none, np.array([2]), none]},
        {"requests": [slice(0, 4)], "splits": []},
        {"requests": [slice(4, 8)], "splits": [none]},
        {"requests": [slice(8, 9)], "splits": [np.array([0])]},
    ]
    loader = loader_over(cells, Fixed(*load_requests), to=to)
    assert rows_of(loader, cells) == [[], [2], [], [], [8]]


def test_splits_are_made_where_they_are_missing(cells: Cells):
    assert rows_of(loader_over(cells, Fixed({"requests": [slice(4, 12)]})), cells) == [[4, 5, 6, 7, 8], [9, 10, 11]]
    shuffled = rows_of(loader_over(cells, Fixed({"requests": [slice(0, 121)]}, shuffle=True, batch_size=121)), cells)
    assert shuffled[0] != sorted(shuffled[0]) == list(range(121))


def test_no_requests_no_batches(cells: Cells):
    assert rows_of(loader_over(cells, Fixed()), cells) == []


def test_python_and_the_core_agree_on_sequential_order(cells: Cells):
    class InPython(SequentialSampler):
        pass

    for drop_last in (False, True):
        sizes = {"chunk_size": 8, "preload_nchunks": 3, "batch_size": 6, "drop_last": drop_last, "mask": slice(5, 117)}
        native = rows_of(loader_over(cells, SequentialSampler(**sizes)), cells)
        assert rows_of(loader_over(cells, InPython(**sizes)), cells) == native


def test_a_subclass_decides(cells: Cells):
    class Backwards(RandomSampler):
        def _sample(self, n_obs: int):
            yield {"requests": np.arange(n_obs)[::-1], "splits": [np.arange(n_obs)]}

    sampler = Backwards(chunk_size=4, preload_nchunks=5, batch_size=10)
    assert rows_of(loader_over(cells, sampler), cells) == [list(range(121))[::-1]]


def test_class_sampler(cells: Cells):
    classes = pd.Categorical(np.repeat(["a", "b", "c"], [40, 40, 41]))
    sampler = ClassSampler(5, 4, 10, classes=classes, num_samples=200, rng=np.random.default_rng(0))
    batches = rows_of(loader_over(cells, sampler), cells)
    assert sum(map(len, batches)) == 200
    assert all(len(set(classes[rows])) == 1 for rows in batches)
    assert len({classes[rows[0]] for rows in batches}) == 3
    # a pass that is given up lets the mask move again
    batches = iter(loader_over(cells, sampler))
    next(batches)
    with pytest.raises(ValueError, match="mask cannot move"):
        sampler.mask = slice(0, 80)
    batches.close()
    sampler.mask = slice(0, 80)


def test_distributed_sampler(cells: Cells):
    rows = []
    for rank in range(3):
        inner = RandomSampler(chunk_size=4, preload_nchunks=5, batch_size=10)
        sampler = DistributedSampler(inner, dist_info=lambda rank=rank: (rank, 3))
        loader = loader_over(cells, sampler)
        batches = rows_of(loader, cells)
        assert len(batches) == len(loader) == 4
        assert set(np.concatenate(batches)) <= set(range(40 * rank, 40 * rank + 40))
        rows += batches
    assert len(np.unique(np.concatenate(rows))) == 120


# ---------------------------------------------------------------- when a sampler is asked


def windows(n: int) -> list[dict[str, Any]]:
    """`n` load requests of four rows, two batches each."""
    return [{"requests": [slice(4 * k, 4 * k + 4)], "splits": [np.array([0, 1]), np.array([2, 3])]} for k in range(n)]


def test_one_window_is_asked_for_ahead(cells: Cells):
    sampler = Fixed(*windows(5))
    batches = iter(loader_over(cells, sampler))
    assert sampler.asked == 0
    assert [sampler.asked for _ in batches] == [2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("batches_ahead", "expected"),
    [
        (0, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (1, [1, 2, 2, 3, 3, 4, 4, 5, 5, 5]),
        (2, [2, 2, 3, 3, 4, 4, 5, 5, 5, 5]),
        (100, [5] * 10),
    ],
)
def test_batches_ahead(cells: Cells, batches_ahead: int, expected: list[int]):
    sampler = Fixed(*windows(5))
    asked = []
    for batch in loader_over(cells, sampler, batches_ahead=batches_ahead):
        check_batch(batch, cells)
        asked.append(sampler.asked)
    assert asked == expected


def test_a_sampler_can_adapt_to_the_training(cells: Cells):
    class Adaptive(Fixed):
        wanted = 0

        def _sample(self, n_obs: int):
            for _ in range(6):
                yield {"requests": [slice(self.wanted, self.wanted + 2)], "splits": [np.arange(2)]}

    sampler = Adaptive()
    seen = []
    for batch in loader_over(cells, sampler, batches_ahead=0):
        seen.append(int(batch["index"][0]))
        sampler.wanted = seen[-1] + 11
    assert seen == [0, 11, 22, 33, 44, 55]


def test_what_was_asked_for_is_read_ahead(cells: Cells):
    loader = loader_over(cells, Fixed(*windows(5)))
    batches = iter(loader)
    first = next(batches)
    deadline = time.monotonic() + 20
    while loader.stats()["batches_ready"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader.stats()["batches_ready"] == 4
    assert loader.stats()["batches_delivered"] == 1
    rows = [check_batch(batch, cells) for batch in [first, *batches]]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(20))


def test_a_given_up_pass_closes_the_sampler(cells: Cells):
    sampler = Fixed(*windows(5))
    batches = iter(loader_over(cells, sampler))
    next(batches)
    assert not sampler.ended
    batches.close()
    assert sampler.ended


def test_several_passes_of_one_sampler(cells: Cells):
    loader = loader_over(cells, Fixed({"requests": [slice(0, 121)], "splits": np.array_split(np.arange(121), 9)}))
    first, second = zip(*zip(loader, loader, strict=True), strict=True)
    check_epoch(list(first), cells)
    check_epoch(list(second), cells)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("load_request", "error", "message"),
    [
        ({"splits": [np.arange(2)]}, KeyError, "load_request must contain"),
        ({"requests": [slice(119, 122)]}, IndexError, "row 121, but n_obs is 121"),
        ({"requests": np.array([0, -3])}, IndexError, "row -3, but n_obs is 121"),
        ({"requests": [slice(0, 4)], "splits": [np.array([4])]}, IndexError, "out of bounds"),
        ({"requests": [slice(0, 4)], "splits": [np.array([0.5])]}, IndexError, None),
        ({"requests": np.array([0.5, 1.5]), "splits": [np.arange(2)]}, TypeError, None),
    ],
)
def test_bad_requests(cells: Cells, load_request: dict, error: type[Exception], message: str | None):
    sampler = Fixed(windows(1)[0], load_request)
    loader = loader_over(cells, sampler, batches_ahead=0)
    batches = iter(loader)
    next(batches), next(batches)
    with pytest.raises(error, match=message):
        next(batches)
    assert sampler.ended
    loader.add_adatas(cells.without_extras())


def test_a_sampler_that_overrides_sample_must_give_splits(cells: Cells):
    class Bare(Fixed):
        def sample(self, n_obs: int):
            yield {"requests": [slice(0, 4)]}

    with pytest.raises(KeyError, match="splits"):
        next(iter(loader_over(cells, Bare())))


def test_the_sampler_is_checked_when_the_first_batch_is_asked_for():
    loader = Loader(batch_sampler=Fixed(*windows(1))).add_dataset(np.ones((4, 2)))
    batches = iter(loader)
    with pytest.raises(ValueError, match="too few"):
        next(batches)


def test_failure_of_the_sampler_reaches_the_consumer(cells: Cells):
    class Failing(Fixed):
        def _sample(self, n_obs: int):
            yield windows(1)[0]
            raise ZeroDivisionError

    loader = loader_over(cells, Failing(), batches_ahead=0)
    batches = iter(loader)
    assert [len(next(batches)["index"]) for _ in range(2)] == [2, 2]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    loader.add_adatas(cells.without_extras())


# ---------------------------------------------------------------- several ranks

SIZES = {"chunk_size": 2, "preload_nchunks": 4, "batch_size": 4}
LABELS = pd.Categorical(["a"] * 61 + ["b"] * 60)


class Own(RandomSampler):
    """A subclass may share the rows out by itself."""


SAMPLERS_OF_ALL_ROWS = {
    "RandomSampler": lambda: RandomSampler(**SIZES),
    "RandomSampler, mask": lambda: RandomSampler(**SIZES, mask=slice(3, 30)),
    "SequentialSampler": lambda: SequentialSampler(**SIZES),
    "ClassSampler": lambda: ClassSampler(**SIZES, classes=LABELS, num_samples=20),
    "WeightedClassSampler": lambda: WeightedClassSampler(**SIZES, classes=LABELS, num_samples=20),
}
SAMPLERS_OF_A_SHARE = {
    "DistributedSampler": lambda: DistributedSampler(RandomSampler(**SIZES), dist_info="torch"),
    "subclass": lambda: Own(**SIZES),
    "of the user's own": lambda: Fixed(*windows(2)),
}


SECOND_RANK = """
import sys, torch
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
sys.stdin.read()
"""


@pytest.fixture
def two_ranks(tmp_path):
    """Make this process the first of two ranks; the second only joins, for reading asks nothing of it."""
    meeting = f"file://{tmp_path}/rendezvous"
    with subprocess.Popen([sys.executable, "-c", SECOND_RANK, meeting], stdin=subprocess.PIPE):
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=0, world_size=2, timeout=timedelta(minutes=2)
        )
        yield
        torch.distributed.destroy_process_group()


def told(loader: Loader) -> list[warnings.WarningMessage]:
    """What one pass says about ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(loader)
    return [w for w in caught if "ranks read the same rows" in str(w.message)]


def test_a_loader_whose_rows_all_ranks_read_says_so_once(cells: Cells, two_ranks):
    for kind, make in SAMPLERS_OF_ALL_ROWS.items():
        loader = loader_over(cells, make())
        (warning,) = told(loader)
        name = kind.split(",")[0]
        assert str(warning.message).startswith(f"All 2 ranks read the same rows: each runs {name} ")
        assert f'DistributedSampler({name}(...), dist_info="torch")' in str(warning.message)
        assert (warning.category, warning.filename) == (UserWarning, __file__)
        assert told(loader) == told(pickle.loads(pickle.dumps(loader))) == []
    for kind, make in SAMPLERS_OF_A_SHARE.items():
        assert told(loader_over(cells, make())) == [], kind


def test_a_single_process_is_told_nothing_about_ranks(cells: Cells, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # set, but this process has joined no group
    for make in SAMPLERS_OF_ALL_ROWS.values():
        assert told(loader_over(cells, make())) == []


def test_the_first_worker_of_a_dataloader_speaks_for_its_rank(cells: Cells, monkeypatch: pytest.MonkeyPatch):
    from annbatch._output import reader as module

    monkeypatch.setenv("WORLD_SIZE", "2")  # all that a spawned worker knows of the group
    for worker, n_told in [(0, 1), (1, 0)]:
        monkeypatch.setattr(module, "get_worker_info", lambda w=worker: WorkerInfo(w))
        assert len(told(loader_over(cells, RandomSampler(**SIZES)))) == n_told


class WorkerInfo:
    num_workers = 2

    def __init__(self, worker: int):
        self.id = worker
        self.seed = 7 + worker
