"""Calls that scripts written for scverse annbatch 0.3.1 make, and what came of them there.

`CALLS` names each call; `outcome` runs one on whichever `annbatch` is installed and turns the result, the exception
and the warnings into JSON. `upstream_calls.json` holds the outcomes of annbatch 0.3.1 itself (with anndata 0.13.4,
zarr 3.4.2, NumPy 2.5.5, pandas 3.1.1, Python 3.12.1). It was written, and is rewritten, by running this file in an
environment that has that release and not this package:

    python tests/python/support/upstream_calls.py

The tests compare our outcomes with that file and need no upstream installed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch.utils.data
import zarr
from scipy import sparse as sp

from annbatch import DatasetCollection, samplers, write_sharded
from annbatch.abc import Sampler
from annbatch.utils import split_given_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TABLE = Path(__file__).with_suffix(".json")

CALLS: dict[str, Callable[[], Any]] = {}

# Warnings that annbatch gives, not the libraries under it.
_OUR_WARNINGS = ("Found ", "It is highly", "Loading h5ad", "Passing a seed", "Only `X`")


def call(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in CALLS, name
        CALLS[name] = function
        return function

    return register


def outcome(name: str) -> dict[str, Any]:
    """Run a call in an empty working directory."""
    result: dict[str, Any] = {"value": None, "error": None}
    before = Path.cwd()
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        os.chdir(folder)
        try:
            result["value"] = CALLS[name]()
        except Exception as error:
            result["error"] = [type(error).__name__, str(error)]
        finally:
            os.chdir(before)
    result["warnings"] = [
        [w.category.__name__, str(w.message), Path(w.filename) == Path(__file__)]
        for w in caught
        if str(w.message).startswith(_OUR_WARNINGS)
    ]
    return json.loads(json.dumps(result))


# ---------------------------------------------------------------------------------------------------------- samplers


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def requests_of(sampler: Sampler, n_obs: int) -> list[list[Any]]:
    """All requests of a pass: rows (start and stop of slices), and splits."""
    passed = [(request["requests"], request["splits"]) for request in sampler.sample(n_obs)]
    return [[_rows(rows), [np.asarray(split).tolist() for split in splits]] for rows, splits in passed]


def _rows(rows: Any) -> list[Any]:
    return [[int(row.start), int(row.stop)] if isinstance(row, slice) else int(row) for row in rows]


def two_passes(sampler: Sampler, n_obs: int) -> dict[str, Any]:
    return {
        "n_batches": sampler.n_batches(n_obs),
        "passes": [requests_of(sampler, n_obs) for _ in range(2)],
        "mask": str(sampler.mask),
        "properties": [sampler.batch_size, sampler.shuffle],
    }


CHUNKED = {
    "random": lambda: samplers.RandomSampler(4, 3, 6, rng=rng()),
    "random, partial chunk": lambda: samplers.RandomSampler(4, 3, 6, rng=rng(1)),
    "random, drop_last": lambda: samplers.RandomSampler(4, 3, 6, drop_last=True, rng=rng(2)),
    "random, mask": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(5, 37), rng=rng(3)),
    "random, open mask": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(7, None), rng=rng(3)),
    "random, chunks of 1": lambda: samplers.RandomSampler(1, 16, 8, rng=rng(4)),
    "random, chunk above n_obs": lambda: samplers.RandomSampler(100, 1, 10, rng=rng(5)),
    "random, num_samples": lambda: samplers.RandomSampler(4, 3, 6, num_samples=20, rng=rng(6)),
    "random, num_samples, drop_last": lambda: samplers.RandomSampler(
        4, 3, 6, num_samples=20, drop_last=True, rng=rng()
    ),
    "random, replacement": lambda: samplers.RandomSampler(4, 3, 6, replacement=True, num_samples=50, rng=rng(7)),
    "random, replacement, mask": lambda: samplers.RandomSampler(
        4, 3, 6, replacement=True, num_samples=70, mask=slice(10, 30), rng=rng(8)
    ),
    "random, replacement, drop_last": lambda: samplers.RandomSampler(
        4, 3, 6, replacement=True, num_samples=49, drop_last=True, rng=rng(9)
    ),
    "random, replacement, no num_samples": lambda: samplers.RandomSampler(4, 3, 6, replacement=True, rng=rng(9)),
    "random, replacement in a small range": lambda: samplers.RandomSampler(
        50, 1, 10, replacement=True, num_samples=30, rng=rng(1)
    ),
    "sequential": lambda: samplers.SequentialSampler(4, 3, 6),
    "sequential, drop_last": lambda: samplers.SequentialSampler(4, 3, 6, drop_last=True),
    "sequential, mask": lambda: samplers.SequentialSampler(4, 3, 6, mask=slice(3, 22)),
}
for label, make in CHUNKED.items():
    call(f"pass of 43: {label}")(lambda make=make: two_passes(make(), 43))
for n_obs in (1, 4, 6, 12, 24, 36):
    for kind in ("RandomSampler", "SequentialSampler"):
        for drop_last in (False, True):
            settings = {"rng": rng(n_obs)} if kind == "RandomSampler" else {}
            call(f"pass of {n_obs}: {kind}, drop_last={drop_last}")(
                lambda kind=kind, drop_last=drop_last, settings=settings, n_obs=n_obs: two_passes(
                    getattr(samplers, kind)(4, 3, 6, drop_last=drop_last, **settings), n_obs
                )
            )

REFUSED = {
    "chunk_size 0": lambda: samplers.RandomSampler(0, 3, 6),
    "preload_nchunks 0": lambda: samplers.SequentialSampler(4, 0, 6),
    "batch above window": lambda: samplers.RandomSampler(4, 3, 24),
    "batch not dividing window": lambda: samplers.RandomSampler(4, 3, 5),
    "num_samples 0": lambda: samplers.RandomSampler(4, 3, 6, num_samples=0),
    "mask step": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(0, 10, 2)),
    "mask negative": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(-3, None)),
    "mask empty": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(3, 3)),
    "rng bool": lambda: samplers.RandomSampler(4, 3, 6, rng=True),
    "rng text": lambda: samplers.RandomSampler(4, 3, 6, rng="0"),
    "rng legacy": lambda: samplers.RandomSampler(4, 3, 6, rng=np.random.RandomState(0)),
    "sequential rng": lambda: samplers.SequentialSampler(4, 3, 6, rng=rng()),
    "abstract": lambda: sorted(Sampler.__abstractmethods__),
    "mask past n_obs": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(0, 50)).validate(43),
    "mask starts past n_obs": lambda: samplers.RandomSampler(4, 3, 6, mask=slice(50, None)).validate(43),
    "n_obs 0": lambda: samplers.SequentialSampler(4, 3, 6).validate(0),
    "num_samples above range": lambda: samplers.RandomSampler(4, 3, 6, num_samples=44).validate(43),
    "replacement in too small a range": lambda: samplers.RandomSampler(
        4, 3, 6, replacement=True, num_samples=12, mask=slice(0, 3)
    ).validate(43),
    "sample validates": lambda: next(samplers.RandomSampler(4, 3, 6, mask=slice(0, 50)).sample(43)),
    "sample is lazy": lambda: type(samplers.RandomSampler(4, 3, 6, mask=slice(0, 50)).sample(43)).__name__,
    "seed as rng": lambda: two_passes(samplers.RandomSampler(4, 3, 6, rng=0), 43),
    "numpy seed as rng": lambda: two_passes(samplers.RandomSampler(4, 3, 6, rng=np.int64(3)), 43),
    "seed as rng of ClassSampler": lambda: two_passes(
        samplers.ClassSampler(4, 3, 6, classes=classes(), num_samples=20, rng=5), 40
    ),
}
for label, make in REFUSED.items():
    call(f"sampler: {label}")(make)


@call("sampler: mask and rng set later")
def _() -> Any:
    sampler = samplers.RandomSampler(4, 3, 6, rng=rng())
    sampler.mask = slice(8, 20)
    sampler.rng = rng(5)
    return two_passes(sampler, 43)


class Bare(Sampler):
    """A sampler as users write them: requests only, splits made by the base class."""

    def __init__(self, batch_size: int | None = 4, shuffle: bool | None = False) -> None:
        self._settings = (batch_size, shuffle)

    batch_size = property(lambda self: self._settings[0])
    shuffle = property(lambda self: self._settings[1])

    def n_batches(self, n_obs: int) -> int:
        return -(-n_obs // 4)

    def validate(self, n_obs: int) -> None:
        if n_obs < 10:
            raise ValueError("too few")

    def _sample(self, n_obs: int) -> Iterator[Any]:
        yield {"requests": [slice(6, 10), slice(0, 3)]}
        yield {"requests": [slice(3, 6)], "splits": [np.array([2, 0])]}


@call("custom sampler: splits made")
def _() -> Any:
    return requests_of(Bare(), 10)


@call("custom sampler: splits shuffled under np.random.seed")
def _() -> Any:
    np.random.seed(7)  # noqa: NPY002
    return requests_of(Bare(shuffle=True), 10)


call("custom sampler: no batch_size")(lambda: requests_of(Bare(batch_size=None), 10))
call("custom sampler: no shuffle")(lambda: requests_of(Bare(shuffle=None), 10))
call("custom sampler: own validation")(lambda: requests_of(Bare(), 9))
call("custom sampler: rng and mask by default")(lambda: [str(Bare().rng), str(Bare().mask)])


# ----------------------------------------------------------------------------------------------------- class samplers


def classes() -> pd.Categorical:
    """Runs of 12, 8, 10, 6 and 4 rows of classes a, b, a, c and b; class d is never seen."""
    return pd.Categorical.from_codes(np.repeat([0, 1, 0, 2, 1], [12, 8, 10, 6, 4]), categories=list("abcd"))


BY_CLASS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch is several chunks": {"sizes": (2, 6, 4)},
    "chunk is several batches": {"sizes": (4, 3, 2)},
    "coprime": {"sizes": (3, 4, 4)},
    "chunks of 1": {"sizes": (1, 12, 3)},
    "weights": {"class_weights": [5, 1, 0, 2]},
    "weight leaves short runs out": {"sizes": (6, 2, 4), "class_weights": [1, 0, 1, 0]},
    "mask": {"mask": slice(4, 28)},
    "open mask": {"mask": slice(12, None)},
    "drop_last": {"drop_last": True},
    "drop_last of everything": {"drop_last": True, "num_samples": 5},
    "fewer than a chunk": {"num_samples": 1},
}


def by_class(kind: str, sizes: tuple[int, int, int] = (4, 3, 6), **settings: Any) -> Sampler:
    settings = {"classes": classes(), "num_samples": 34, "rng": rng(), **settings}
    return getattr(samplers, kind)(*sizes, **settings)


for kind in ("ClassSampler", "WeightedClassSampler"):
    for label, given in BY_CLASS.items():
        call(f"{kind}: {label}")(lambda kind=kind, given=given: two_passes(by_class(kind, **given), 40))

BY_CLASS_REFUSED: dict[str, Callable[[], Any]] = {
    "classes of text": lambda: by_class("ClassSampler", classes=["a", "b"]),
    "missing class": lambda: by_class("ClassSampler", classes=pd.Categorical(["a", None] * 20)),
    "num_samples 0": lambda: by_class("ClassSampler", num_samples=0),
    "batch not dividing window": lambda: by_class("ClassSampler", sizes=(4, 3, 5)),
    "weights of another length": lambda: by_class("ClassSampler", class_weights=[1, 2]),
    "weights all zero": lambda: by_class("ClassSampler", class_weights=[0, 0, 0, 0]),
    "weights negative": lambda: by_class("ClassSampler", class_weights=[-1, 0, 0, 0]),
    "weights as Series": lambda: by_class("ClassSampler", class_weights=pd.Series([1, 2, 3, 4], index=list("abcd"))),
    "weights only of the absent class": lambda: by_class("ClassSampler", class_weights=[0, 0, 0, 1]),
    "runs too short": lambda: by_class("ClassSampler", sizes=(6, 2, 4)),
    "mask past the end": lambda: by_class("ClassSampler", mask=slice(0, 41)),
    "mask cuts a run short": lambda: by_class("ClassSampler", mask=slice(10, 30)),
    "rng bool": lambda: by_class("ClassSampler", rng=False),
    "validate another n_obs": lambda: by_class("ClassSampler").validate(41),
    "sample another n_obs": lambda: next(by_class("ClassSampler").sample(41)),
}
for label, make in BY_CLASS_REFUSED.items():
    call(f"class sampler: {label}")(make)


@call("class sampler: mask moved between passes")
def _() -> Any:
    sampler = by_class("ClassSampler")
    first = requests_of(sampler, 40)
    sampler.mask = slice(12, 30)
    return [first, requests_of(sampler, 40), str(sampler.mask)]


@call("class sampler: mask moved during a pass")
def _() -> Any:
    sampler = by_class("ClassSampler")
    requests = sampler.sample(40)
    next(requests)
    sampler.mask = slice(0, None)  # where it is
    sampler.mask = slice(12, 30)


@call("class sampler: mask moved after a pass was closed")
def _() -> Any:
    sampler = by_class("ClassSampler")
    requests = sampler.sample(40)
    next(requests)
    requests.close()
    sampler.mask = slice(12, 30)
    return str(sampler.mask)


@call("class sampler: mask refused leaves the old one")
def _() -> Any:
    sampler = by_class("ClassSampler")
    try:
        sampler.mask = slice(10, 30)
    except ValueError as error:
        return [str(error)[:60], str(sampler.mask), requests_of(sampler, 40)]


# --------------------------------------------------------------------------------------------------- clients' subclasses


class Following(samplers.ClassSampler):
    """For each batch of another sampler a batch of the same class from other rows, as clients pair two populations."""

    def __init__(self, leader: Sampler, *sizes: int, leader_classes: pd.Categorical, **settings: Any) -> None:
        n_batches = leader.n_batches(len(leader_classes))
        super().__init__(*sizes, num_samples=n_batches * sizes[2], drop_last=True, **settings)
        if absent := set(leader._rle_manager.codes.tolist()) - set(self._rle_manager.codes.tolist()):
            raise ValueError(f"nothing to follow classes {sorted(absent)} with")
        self._leader, self._leader_classes = leader, leader_classes

    def _iter_requests(self) -> Iterator[Any]:
        led: list[int] = []
        for request in self._leader.sample(len(self._leader_classes)):
            rows = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in request["requests"]])
            led += [self._leader_classes.codes[rows[split[0]]] for split in request["splits"]]
        per_batch = self._batch_size // self._chunk_size
        chunks = self._rle_manager.slices_from_classes(np.repeat(led, per_batch), self._rng)
        for first in range(0, len(chunks), self._preload_nchunks):
            window = chunks[first : first + self._preload_nchunks]
            splits = split_given_size(np.arange(len(window) * self._chunk_size), self._batch_size)
            for split in splits:
                self._rng.shuffle(split)
            yield {"requests": window, "splits": splits}


def other_classes() -> pd.Categorical:
    return pd.Categorical.from_codes(np.repeat([2, 0, 1, 3, 0], [10, 5, 9, 6, 5]), categories=list("abcd"))


def following(leader: Sampler, **settings: Any) -> Following:
    settings = {"classes": other_classes(), "leader_classes": classes(), "rng": rng(11), **settings}
    return Following(leader, 2, 6, 4, **settings)


@call("subclass: follows a copy of the other sampler")
def _() -> Any:
    leader = by_class("ClassSampler", sizes=(2, 6, 6), drop_last=True)
    follower = following(copy.deepcopy(leader))
    return [requests_of(follower, 35), requests_of(leader, 40), two_passes(follower, 35)]


@call("subclass: a deep copy draws what the original draws")
def _() -> Any:
    follower = following(by_class("WeightedClassSampler", sizes=(2, 6, 6)))
    requests_of(follower, 35)
    twin = copy.deepcopy(follower)
    return [requests_of(follower, 35), requests_of(twin, 35), twin.rng.bit_generator.state["state"]]


@call("subclass: moved to a mask")
def _() -> Any:
    follower = following(by_class("ClassSampler", sizes=(2, 6, 6), class_weights=[1, 1, 0, 0]))
    follower.mask = slice(8, 33)
    return [requests_of(follower, 35), drawable(follower)]


call("subclass: cannot follow")(lambda: following(by_class("ClassSampler"), class_weights=[1, 1, 0, 1]))
call("subclass: another n_obs")(lambda: requests_of(following(by_class("ClassSampler")), 36))


def drawable(sampler: Sampler) -> list[Any]:
    manager = sampler._rle_manager
    weights = [round(weight, 12) for weight in manager.weights.tolist()]
    types = [str(manager.codes.dtype), str(manager.weights.dtype)]
    return [manager.codes.tolist(), weights, types, int(manager.n_classes), str(manager.mask)]


for label, given in BY_CLASS.items():
    call(f"subclass: drawable classes, {label}")(lambda given=given: drawable(by_class("ClassSampler", **given)))


@call("subclass: chunks of given classes")
def _() -> Any:
    sampler = by_class("ClassSampler")
    drawn = [sampler._rle_manager.slices_from_classes(np.array([2, 0, 0, 1, 0]), rng(seed)) for seed in range(4)]
    return [_rows(chunks) for chunks in drawn]


call("subclass: chunks of a class without weight")(
    lambda: by_class("ClassSampler", class_weights=[1, 0, 1, 1])._rle_manager.slices_from_classes(
        np.array([0, 1]), rng()
    )
)
call("subclass: chunks of a class that is absent")(
    lambda: by_class("ClassSampler")._rle_manager.slices_from_classes(np.array([3]), rng())
)


@call("subclass: the range moved where the runs are kept")
def _() -> Any:
    sampler = by_class("ClassSampler")
    sampler._rle_manager.mask = slice(12, None)
    return [drawable(sampler), requests_of(sampler, 40), str(sampler.mask)]


@call("subclass: the range refused where the runs are kept")
def _() -> Any:
    sampler = by_class("ClassSampler")
    try:
        sampler._rle_manager.mask = slice(10, 30)
    except ValueError as error:
        return [str(error)[:60], drawable(sampler), requests_of(sampler, 40)]


@call("subclass: every other request of a weighted sampler")
def _() -> Any:
    class Half(samplers.WeightedClassSampler):
        def _iter_requests(self) -> Iterator[Any]:
            yield from list(super()._iter_requests())[::2]

    return two_passes(Half(4, 3, 6, classes=classes(), num_samples=34, rng=rng()), 40)


STEPS: dict[str, dict[str, Any]] = {
    "_compute_slices": {},
    "_compute_slices_with_replacement": {"replacement": True, "num_samples": 50},
    "_compute_slices_without_replacement": {},
}
for step, given in STEPS.items():

    @call(f"subclass: {step} reversed")
    def _(step: str = step, given: dict[str, Any] = given) -> Any:
        def reverse(self: Sampler, *args: Any, **kwargs: Any) -> Any:
            return getattr(samplers.RandomSampler, step)(self, *args, **kwargs)[::-1]

        kind = type("Reversed", (samplers.RandomSampler,), {step: reverse})
        return two_passes(kind(4, 3, 6, rng=rng(), **given), 40)


for step in ("_iter_from_slices", "_iter_from_slices_base"):

    @call(f"subclass: {step} without its first request")
    def _(step: str = step) -> Any:
        def shorten(self: Sampler, *args: Any, **kwargs: Any) -> Any:
            requests = getattr(samplers.RandomSampler, step)(self, *args, **kwargs)
            next(requests)
            yield from requests

        kind = type("Shortened", (samplers.RandomSampler,), {step: shorten})
        return two_passes(kind(4, 3, 6, rng=rng()), 43)


@call("subclass: resolved ranges and numbers of samples")
def _() -> Any:
    made = [CHUNKED[name]() for name in ("random, open mask", "random, num_samples", "sequential, mask")]
    steps = ("_resolve_start_stop", "_resolve_mask_size", "_resolve_num_samples")
    return [[getattr(sampler, step)(43) for step in steps] for sampler in made]


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """The plain protected attributes."""
    return {name: value for name, value in sorted(vars(sampler).items()) if isinstance(value, bool | int | None)}


EXAMPLES: dict[str, Callable[[], Sampler]] = {
    "RandomSampler": CHUNKED["random, replacement, drop_last"],
    "SequentialSampler": CHUNKED["sequential, mask"],
    "ClassSampler": lambda: by_class("ClassSampler", drop_last=True),
    "WeightedClassSampler": lambda: by_class("WeightedClassSampler"),
    "DistributedSampler": lambda: samplers.DistributedSampler(CHUNKED["random"](), dist_info=lambda: (1, 2)),
}
for kind, make in EXAMPLES.items():
    call(f"subclass: settings of {kind}")(lambda make=make: settings_of(make()))


def members() -> dict[str, list[str]]:
    """The names on each kind of sampler, protected ones included."""
    found = {kind: make() for kind, make in EXAMPLES.items()}
    return {
        kind: [name for name in dir(sampler) if not name.startswith(("__", "_abc"))] for kind, sampler in found.items()
    }


# -------------------------------------------------------------------------------------------------------- distributed


def shards(make: Callable[[], Sampler], n_obs: int, world: int, **settings: Any) -> Any:
    ranks = [samplers.DistributedSampler(make(), dist_info=lambda r=r: (r, world), **settings) for r in range(world)]
    return [two_passes(rank, n_obs) for rank in ranks]


call("distributed: random")(lambda: shards(CHUNKED["random"], 50, 3))
call("distributed: random, unequal")(lambda: shards(CHUNKED["random"], 50, 3, enforce_equal_batches=False))
call("distributed: sequential")(lambda: shards(CHUNKED["sequential"], 50, 2))
call("distributed: inner mask ignored")(lambda: shards(CHUNKED["sequential, mask"], 50, 2))
call("distributed: shard too small")(lambda: shards(CHUNKED["random"], 10, 3))
call("distributed: class sampler")(lambda: shards(lambda: by_class("ClassSampler", sizes=(2, 6, 4)), 40, 2))
call("distributed: unknown backend")(lambda: samplers.DistributedSampler(Bare(), dist_info="mpi"))
call("distributed: torch not initialised")(lambda: samplers.DistributedSampler(Bare(), dist_info="torch"))
call("distributed: info is keyword only")(lambda: samplers.DistributedSampler(Bare(), lambda: (0, 1)))
call("distributed: past n_obs")(
    lambda: samplers.DistributedSampler(CHUNKED["random"](), dist_info=lambda: (0, 2)).validate(0)
)


@call("distributed: n_batches during a pass, copy of the sampler")
def _() -> Any:
    inner = CHUNKED["random"]()
    sampler = samplers.DistributedSampler(inner, dist_info=lambda: (1, 2))
    requests = sampler.sample(50)
    next(requests)
    during = sampler.n_batches(50)
    inner.rng = rng(99)
    inner.mask = slice(0, 1)
    rest = [_rows(request["requests"]) for request in requests]
    return [during, sampler.n_batches(50), rest, str(inner.mask)]


# ------------------------------------------------------------------------------------------------- DataLoader workers


class Requests(torch.utils.data.IterableDataset):
    """The requests of a sampler, or its refusal, asked for in the workers of a DataLoader.

    A refusal is data here: an exception would leave the DataLoader's iterator to the garbage collector, and it then
    waits for its workers wherever that happens to run.
    """

    def __init__(self, sampler: Sampler, n_obs: int) -> None:
        self.sampler, self.n_obs = sampler, n_obs

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info().id
        try:
            for rows, splits in requests_of(self.sampler, self.n_obs):
                yield worker, rows, splits
        except (ValueError, NotImplementedError) as error:
            yield worker, type(error).__name__, str(error)[:60]


def in_workers(sampler: Sampler, n_obs: int = 43, num_workers: int = 2) -> Any:
    loader = torch.utils.data.DataLoader(
        Requests(sampler, n_obs), batch_size=None, num_workers=num_workers, multiprocessing_context="fork"
    )
    return sorted(loader, key=lambda item: item[0])


call("workers: random, drop_last")(lambda: in_workers(CHUNKED["random, drop_last"]()))
call("workers: batches of 1")(lambda: in_workers(samplers.RandomSampler(2, 4, 1, rng=rng())))
call("workers: one worker, sequential")(lambda: in_workers(CHUNKED["sequential"](), num_workers=1))
call("workers: sequential")(lambda: in_workers(CHUNKED["sequential"]()))
call("workers: replacement")(lambda: in_workers(CHUNKED["random, replacement, drop_last"]()))
call("workers: partial batches")(lambda: in_workers(CHUNKED["random"]()))
call("workers: class sampler")(lambda: in_workers(by_class("ClassSampler"), 40))


# -------------------------------------------------------------------------------------------------------- collections


def write_input(
    path: str, n_obs: int, seed: int, genes: str, *, dense: bool = False, stem: str | None = None, **columns: Any
) -> str:
    """Write an h5ad file of counts below 4, with a layer, an embedding and annotations."""
    draw = rng(seed)
    matrix = draw.integers(0, 4, (n_obs, len(genes))).astype("float32") * (draw.random((n_obs, len(genes))) < 0.4)
    matrix = matrix.astype("float32") if dense else sp.csr_matrix(matrix)
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(draw.choice(["B", "NK", "T"], n_obs), categories=["B", "NK", "T"]),
            "score": draw.random(n_obs),
            **{name: column(n_obs) for name, column in columns.items()},
        },
        index=[f"{stem or Path(path).stem}{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame({"position": [ord(gene) for gene in genes], "from": pd.Categorical([path] * len(genes))})
    var.index = list(genes)
    pca = draw.random((n_obs, 3)).astype("float32")
    ad.AnnData(X=matrix, obs=obs, var=var, layers={"double": matrix * 2}, obsm={"pca": pca}).write_h5ad(path)
    return path


def two_inputs(**settings: Any) -> list[str]:
    return [write_input("one.h5ad", 70, 1, "abcdef", **settings), write_input("two.h5ad", 50, 2, "fbcxa", **settings)]


def contents(collection: DatasetCollection) -> list[dict[str, Any]]:
    """What is stored, independent of the library versions that stored it."""
    return [stored(group) for group in collection]


def stored(group: zarr.Group) -> dict[str, Any]:
    adata = ad.io.read_elem(group)
    layout = {}
    for path in ("X/data", "X/indices", "X", "layers/double", "layers/double/data", "obsm/pca"):
        if path in group and isinstance(array := group[path], zarr.Array):
            layout[path] = [str(array.dtype), array.shape, array.chunks, array.shards, len(array.compressors)]
    return {
        "name": group.name,
        "obs_names": [*adata.obs_names[:3], _sha(list(adata.obs_names))],
        "var_names": list(adata.var_names),
        "var": {name: _sha([str(value) for value in adata.var[name]]) for name in adata.var.columns},
        "matrices": {
            name: _digest(matrix)
            for name, matrix in {
                "X": adata.X,
                **{f"layers/{k}": v for k, v in adata.layers.items() if k},
                **adata.obsm,
            }.items()
        },
        "obs": {name: _column(adata.obs[name]) for name in adata.obs.columns},
        "layout": layout,
        "raw": None if adata.raw is None else [list(adata.raw.var_names), _digest(adata.raw.X)],
        "others": [sorted(adata.uns), sorted(adata.obsp), sorted(adata.varm)],
    }


def _digest(matrix: Any) -> str:
    dense = np.asarray(matrix.todense() if sp.issparse(matrix) else matrix, dtype="float64")
    return f"{dense.shape} {hashlib.sha256(np.ascontiguousarray(dense).tobytes()).hexdigest()[:16]}"


def _column(column: pd.Series) -> list[Any]:
    """Categories (None if not categorical) and values."""
    categories = list(map(str, column.cat.categories)) if isinstance(column.dtype, pd.CategoricalDtype) else None
    values = [None if pd.isna(v) else (float(v) if isinstance(v, int | float | np.number) else str(v)) for v in column]
    if column.dtype.kind == "f":
        values = [None if v is None else round(v, 9) for v in values]
    return [categories, _sha(values)]


def _sha(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def created(inputs: list[str] | None = None, **settings: Any) -> DatasetCollection:
    settings = {"dataset_size": 70, "shuffle_chunk_size": 5, "rng": rng(), "n_obs_per_chunk": 7, **settings}
    collection = DatasetCollection("made.zarr")
    return collection.add_adatas(two_inputs() if inputs is None else inputs, **settings)


def frame_of(frame: pd.DataFrame) -> Any:
    return [_sha(list(frame.index)), {name: _column(frame[name]) for name in frame.columns}]


CREATED: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "in order": {"shuffle": False},
    "one dataset": {"dataset_size": 1000},
    "dataset of one block": {"dataset_size": 9},
    "grouped": {"groupby": "type"},
    "grouped by two": {"groupby": ["type", "score"], "dataset_size": 200},
    "var_subset": {"var_subset": ["f", "a", "q"]},
    "merge same": {"merge": "same"},
    "merge first": {"merge": "first"},
    "size of dataset in bytes": {"dataset_size": "6KB"},
    "rows per shard": {"shard_size": 16},
    # sparse matrices only: of a dense one that is a view, upstream counts the bytes of the Python object
    "size of shard in bytes": {"shard_size": "0.4 kb", "load_adata": lambda path: _only_x(path)},
    "tiny shards": {"shard_size": 1, "n_obs_per_chunk": 3},
    "no compression": {"zarr_compressor": ()},
}
for label, given in CREATED.items():
    call(f"create: {label}")(lambda given=given: contents(created(**given)))
call("create: dense")(lambda: contents(created([write_input("one.h5ad", 50, 1, "abcdef", dense=True)])))
call("create: dense of two")(lambda: contents(created(two_inputs(dense=True))))
call("create: from zarr")(lambda: contents(created([_as_zarr(path) for path in two_inputs()])))
call("create: from groups")(lambda: contents(created([zarr.open_group(_as_zarr(path)) for path in two_inputs()])))
call("create: names occur twice")(
    lambda: sorted(created([*two_inputs(), write_input("more_one.h5ad", 60, 3, "ab", stem="one")]).obs().index)[:160]
)
call("create: load_adata of matrices in memory")(lambda: contents(created(load_adata=ad.read_h5ad)))
call("create: load_adata drops")(lambda: contents(created(load_adata=_only_x)))
call("create: returns itself")(lambda: type(created()).__name__)
call("create: keys")(lambda: [created()._dataset_keys, [group.name for group in DatasetCollection("made.zarr")]])
call("create: marked")(lambda: [created().is_empty, dict(zarr.open_group("made.zarr").attrs)])


def _as_zarr(path: str) -> str:
    adata = ad.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(out := path.replace("h5ad", "zarr"))
    return out


def _only_x(path: str) -> ad.AnnData:
    lazy = ad.experimental.read_lazy(path)
    return ad.AnnData(X=lazy.X, obs=lazy.obs.to_memory()[["type"]], var=lazy.var.to_memory())


@call("create: everything of one input")
def _() -> Any:
    adata = ad.read_h5ad(write_input("one.h5ad", 40, 1, "abcdef"))
    adata.raw = adata.copy()
    adata = adata[:, ["b", "a"]].copy()
    adata.uns["note"] = {"x": 1}
    adata.obsp["near"] = sp.csr_matrix(np.eye(40, dtype="float32"))
    adata.varm["loadings"] = np.ones((2, 3), dtype="float32")
    adata.write_h5ad("full.h5ad")
    return contents(created(["full.h5ad"], dataset_size=20))


@call("create: raw of both inputs")
def _() -> Any:
    for path in two_inputs():
        adata = ad.read_h5ad(path)
        adata.raw = adata.copy()
        adata[:, ["f", "a"]].copy().write_h5ad(path)
    return contents(created(["one.h5ad", "two.h5ad"]))


@call("create: keys of inputs differ")
def _() -> Any:
    for path in two_inputs():
        adata = ad.read_h5ad(path)
        if path.startswith("one"):
            adata.raw = adata.copy()
            adata.obs["extra"] = 1.5
        else:
            del adata.layers["double"]
        adata.write_h5ad(path)
    return contents(created(["one.h5ad", "two.h5ad"]))


@call("add: shuffled")
def _() -> Any:
    created()
    added = write_input("three.h5ad", 45, 3, "xbaz")
    return contents(DatasetCollection("made.zarr").add_adatas([added], shuffle_chunk_size=5, rng=rng(1)))


@call("add: two, in order, grouped")
def _() -> Any:
    created(groupby="type")
    added = [write_input("three.h5ad", 45, 3, "xbaz"), write_input("four.h5ad", 33, 4, "abcdefx")]
    settings = {"shuffle_chunk_size": 6, "rng": rng(1), "groupby": "type", "shuffle": False}
    return contents(DatasetCollection("made.zarr").add_adatas(added, **settings))


call("add: blocks too few")(lambda: created().add_adatas(["two.h5ad"], shuffle_chunk_size=60))
call("add: grouped by what is not stored")(
    lambda: created(load_adata=_only_x).add_adatas(["two.h5ad"], shuffle_chunk_size=5, groupby="score")
)

COLLECTION_REFUSED: dict[str, Callable[[], Any]] = {
    "block above dataset": lambda: created(shuffle_chunk_size=80),
    "no columns to group by": lambda: created(groupby=[]),
    "column to group by twice": lambda: created(groupby=["type", "type"]),
    "column to group by absent": lambda: created(groupby="tissue"),
    "column to group by in one": lambda: created(
        [write_input("one.h5ad", 70, 1, "ab", batch=lambda n: [1] * n), write_input("two.h5ad", 50, 2, "ab")],
        groupby="batch",
    ),
    "column to group by of other categories": lambda: created(
        [
            write_input("one.h5ad", 70, 1, "ab", batch=lambda n: pd.Categorical(["x"] * n)),
            write_input("two.h5ad", 50, 2, "ab", batch=lambda n: pd.Categorical(["y"] * n)),
        ],
        groupby="batch",
    ),
    "column to group by categorical in one": lambda: created(
        [
            write_input("one.h5ad", 70, 1, "ab", batch=lambda n: pd.Categorical([1] * n)),
            write_input("two.h5ad", 50, 2, "ab", batch=lambda n: [1] * n),
        ],
        groupby="batch",
    ),
    "bytes of an object in memory": lambda: created(
        [ad.read_h5ad(path) for path in two_inputs()], load_adata=lambda adata: adata, dataset_size="1GB"
    ),
    "bytes of an element that is not stored": lambda: created(load_adata=_with_new_layer, dataset_size="1GB"),
    "neither group nor path": lambda: DatasetCollection(3),
    "h5ad in a group": lambda: DatasetCollection(zarr.open_group("made.zarr"), is_collection_h5ad=True),
    "absent, to read": lambda: DatasetCollection("made.zarr", mode="r"),
    "suffix": lambda: DatasetCollection("made").is_empty,
    "h5ad": lambda: DatasetCollection("made", is_collection_h5ad=True).is_empty,
}
for label, make in COLLECTION_REFUSED.items():
    call(f"collection: {label}")(lambda make=make: (lambda got: got if isinstance(got, bool) else None)(make()))


def _with_new_layer(path: str) -> ad.AnnData:
    adata = ad.read_h5ad(path)
    adata.layers["new"] = adata.X
    return adata


@call("collection: h5ad files")
def _() -> Any:
    collection = DatasetCollection("made", is_collection_h5ad=True)
    collection.add_adatas(two_inputs(), dataset_size=40, shuffle_chunk_size=5, rng=rng())
    names = sorted(path.name for path in Path("made").iterdir())
    return [names, collection.is_empty, frame_of(collection.obs(["type"])), collection.obs([]).shape]


call("collection: h5ad files iterated")(lambda: list(DatasetCollection("made", is_collection_h5ad=True)))
call("collection: h5ad files, keys")(lambda: DatasetCollection("made", is_collection_h5ad=True)._dataset_keys)
call("collection: obs")(lambda: frame_of(created().obs()))
call("collection: obs of some columns")(lambda: frame_of(created().obs(["score", "none", "type"])))
call("collection: obs of no columns")(lambda: list(created().obs([]).shape))
call("collection: obs of nothing")(lambda: list(DatasetCollection("made.zarr").obs().shape))


@call("collection: half written is empty")
def _() -> Any:
    created()
    group = zarr.open_group("made.zarr")
    group.attrs.clear()
    return DatasetCollection("made.zarr").is_empty


def written(shape: tuple[int, int] = (50, 6), key: str | None = "here", **settings: Any) -> Any:
    matrix = np.arange(shape[0] * shape[1], dtype="float32").reshape(shape) % 3
    adata = ad.AnnData(X=sp.csr_matrix(matrix), obsm={"pca": matrix}, layers={"double": matrix * 2})
    root = zarr.open_group("root.zarr", zarr_format=3)
    root.create_group("before")
    write_sharded(root, adata, key=key, **settings)
    root = zarr.open_group("root.zarr")
    return [sorted(root), stored(root if key is None else root[key])["layout"]]


call("write_sharded")(written)
call("write_sharded: at the root")(lambda: written(key=None))
call("write_sharded: small chunks, shards of rows")(lambda: written(n_obs_per_chunk=4, shard_size=10))
call("write_sharded: shards of bytes")(lambda: written(n_obs_per_chunk=4, shard_size="0.25 kb"))
call("write_sharded: no rows")(lambda: write_sharded(zarr.open_group("root.zarr"), ad.AnnData(X=sp.csr_matrix((0, 6)))))
call("write_sharded: no rows of a dense matrix")(
    lambda: write_sharded(zarr.open_group("root.zarr"), ad.AnnData(X=np.zeros((0, 6), dtype="float32")))
)


# --------------------------------------------------------------------------------------------------------- signatures

MODULES = (
    "annbatch",
    "annbatch.abc",
    "annbatch.samplers",
    "annbatch.samplers._utils",
    "annbatch.samplers._chunk_sampler",
    "annbatch.samplers._distributed_sampler",
    "annbatch.samplers._class_samplers",
    "annbatch.types",
    "annbatch.io",
    "annbatch.loader",
    "annbatch.utils",
    "annbatch.compat",
)


PRIVATE = {"_ChunkSampler", "_read_backed", "_spawn_worker_rng", "_dataset_keys"}


def signatures() -> dict[str, Any]:
    """What `MODULES` define or export: each name with its parameters, or None for what cannot be called."""
    found: dict[str, Any] = {}
    for module_name in MODULES:
        module = import_module(module_name)
        exported = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if (not name.startswith("_") or name in PRIVATE)
            and getattr(value, "__module__", module_name) == module_name
            and not inspect.ismodule(value)
            and name != "TYPE_CHECKING"
        ]
        for name in sorted(exported):
            value = getattr(module, name)
            found[f"{module_name}:{name}"] = parameters(value)
            for member, attribute in sorted(vars(value).items()) if inspect.isclass(value) else ():
                if not member.startswith("_") or member in PRIVATE or member == "__iter__":
                    found[f"{module_name}:{name}.{member}"] = parameters(attribute)
    return found


def parameters(value: Any) -> list[list[str]] | None:
    value = getattr(value, "__func__", value)
    if not callable(value):
        return None
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    return [[p.name, p.kind.name, _default(p.default)] for p in signature.parameters.values()]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if inspect.isfunction(value):
        return "function"
    if isinstance(value, tuple):
        return str([" ".join([type(codec).__name__, *map(_plain, _codec_settings(codec))]) for codec in value])
    return repr(value)


def _codec_settings(codec: Any) -> list[Any]:
    return [codec.cname, codec.clevel, codec.shuffle]


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))  # zarr 3.1 has enums where 3.4 has text


if __name__ == "__main__":
    from importlib.metadata import version

    assert version("annbatch") == "0.3.1", "this file records annbatch 0.3.1 itself"
    calls = {name: outcome(name) for name in CALLS}
    record = {"signatures": signatures(), "members": members(), "calls": calls}
    lines = [
        f"{json.dumps(section)}: {{\n"
        + ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in entries.items()
        )
        + "\n}"
        for section, entries in record.items()
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
