"""Samplers: the order scverse annbatch 0.3.1 gives, and what holds for any sizes."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st

from annbatch.abc import Sampler
from annbatch.samplers import ClassSampler, DistributedSampler, RandomSampler, SequentialSampler, WeightedClassSampler
from annbatch.samplers._chunk_sampler import _ChunkSampler
from annbatch.utils import split_given_size
from support import upstream, upstream_calls


def pass_numbers(kind: str) -> list[str]:
    return [name for name in upstream.table()["calls"] if name.startswith(kind)]


@pytest.mark.parametrize("name", pass_numbers("pass of "))
def test_passes_are_those_of_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("name", upstream.names("sampler", "custom sampler"))
def test_calls_answer_as_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("name", upstream.names("ClassSampler", "WeightedClassSampler", "class sampler"))
def test_class_samplers_answer_as_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("name", upstream.names("distributed"))
def test_distributed_sampler_answers_as_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("name", upstream.names("workers"))
def test_dataloader_workers_get_what_upstream_gives(name):
    upstream.check(name)


# ------------------------------------------------------------------------------------------------- any sizes at all


@st.composite
def chunked(draw):
    """A chunk sampler and a number of observations it accepts."""
    chunk_size, preload = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    window = chunk_size * preload
    batch_size = draw(st.sampled_from([size for size in range(1, window + 1) if window % size == 0]))
    n_obs = draw(st.integers(1, 120))
    start = draw(st.integers(0, n_obs - 1))
    mask = draw(st.sampled_from([None, slice(start, None), slice(start, draw(st.integers(start + 1, n_obs)))]))
    n_range = n_obs if mask is None else (mask.stop or n_obs) - mask.start
    given = {"drop_last": draw(st.booleans()), "mask": mask}
    if draw(st.booleans()):
        return SequentialSampler(chunk_size, preload, batch_size, **given), n_obs
    given |= {"rng": np.random.default_rng(draw(st.integers(0, 99)))}
    kind = draw(st.sampled_from(["once", "some", "replacement"]))
    if kind == "some":
        given |= {"num_samples": draw(st.integers(1, n_range))}
    elif kind == "replacement":
        most = 300 if n_range >= chunk_size else n_range
        given |= {"replacement": True, "num_samples": draw(st.integers(1, most))}
    return RandomSampler(chunk_size, preload, batch_size, **given), n_obs


def drawn(sampler: Sampler, n_obs: int) -> tuple[list[np.ndarray], list[int]]:
    """Rows of every batch, and the number of rows of every window."""
    batches, windows = [], []
    for request in sampler.sample(n_obs):
        rows = np.concatenate([np.arange(s.start, s.stop) for s in request["requests"]])
        windows.append(rows.size)
        batches += [rows[split] for split in request["splits"]]
    return batches, windows


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chunked())
def test_a_pass_keeps_its_promises(case):
    sampler, n_obs = case
    start, stop = sampler._resolve_start_stop(n_obs)
    batches, windows = drawn(sampler, n_obs)
    assert len(batches) == sampler.n_batches(n_obs)
    assert all(batch.size == sampler.batch_size for batch in batches[:-1])
    assert all(0 < batch.size <= sampler.batch_size for batch in batches)
    assert all(size == sampler._in_memory_size for size in windows[:-1])
    rows = np.concatenate([*batches, np.empty(0, dtype=int)])
    assert ((rows >= start) & (rows < stop)).all()
    if not sampler._replacement:
        assert np.unique(rows).size == rows.size
        if sampler._num_samples is None and not sampler._drop_last:
            assert rows.size == stop - start
    if sampler._drop_last:
        assert all(batch.size == sampler.batch_size for batch in batches)
    if not sampler.shuffle:
        assert (rows == np.arange(start, start + rows.size)).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_class_batches_hold_one_class(data):
    lengths = data.draw(st.lists(st.integers(4, 12), min_size=1, max_size=8))
    codes = np.repeat(np.arange(len(lengths)) % 3, lengths)
    classes = upstream_calls.pd.Categorical.from_codes(codes, categories=["x", "y", "z"])
    chunk_size = data.draw(st.integers(1, 4))
    preload = data.draw(st.sampled_from([2, 4, 6]))
    batch_size = data.draw(
        st.sampled_from([chunk_size * preload // d for d in (1, 2) if chunk_size * preload % d == 0])
    )
    n_samples = data.draw(st.integers(1, 60))
    given = {"classes": classes, "num_samples": n_samples, "rng": np.random.default_rng(data.draw(st.integers(0, 9)))}
    for kind in (ClassSampler, WeightedClassSampler):
        sampler = kind(chunk_size, preload, batch_size, **given)
        batches, _ = drawn(sampler, codes.size)
        assert len(batches) == sampler.n_batches(codes.size) == math.ceil(n_samples / batch_size)
        assert sum(batch.size for batch in batches) == n_samples
        if kind is ClassSampler:
            assert all(np.unique(codes[batch]).size == 1 for batch in batches)


def test_class_weights_are_followed():
    classes = upstream_calls.classes()
    for kind in (ClassSampler, WeightedClassSampler):
        sampler = kind(
            2, 4, 8, classes=classes, num_samples=40_000, class_weights=[6, 3, 1, 0], rng=np.random.default_rng(0)
        )
        rows = np.concatenate(drawn(sampler, 40)[0])
        shares = np.bincount(classes.codes[rows], minlength=4) / rows.size
        assert shares == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.02)


def test_replacement_drops_only_the_partial_batch():
    # 25 rows are two chunks of 10 and a half one, and five whole batches of 5; annbatch 0.3.1 fails with
    # "generator raised StopIteration" after the fourth
    sampler = RandomSampler(10, 2, 5, replacement=True, num_samples=25, drop_last=True, rng=np.random.default_rng(0))
    assert len(drawn(sampler, 100)[0]) == sampler.n_batches(100) == 5


def test_sizes_below_one_are_refused():
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 2, -2)):
        with pytest.raises(ValueError, match="must be greater than 1"):
            RandomSampler(*sizes)


REMEDIES = {
    "batch above window": (lambda: RandomSampler(2, 3, 7), "Lower batch_size"),
    "batch size": (lambda: RandomSampler(4, 3, 5), r"fits is 4; batch_size=5 fits with a preload_nchunks .* of 5\."),
    "batch size of common factors": (lambda: RandomSampler(6, 3, 4), r"fits is 3; .* that is a multiple of 2\."),
    "size 0": (lambda: RandomSampler(0, 3, 5), "the smallest allowed is 1"),
    "mask with a step": (lambda: RandomSampler(1, 1, 1, mask=slice(0, 9, 3)), "one range without gaps"),
    "mask before the first": (lambda: RandomSampler(1, 1, 1, mask=slice(-3, 9)), r"Got slice\(-3, 9, None\)"),
    "mask from the end": (lambda: RandomSampler(1, 1, 1, mask=slice(0, -3)), "both count from the first observation"),
    "mask of text": (lambda: RandomSampler(1, 1, 1, mask="0:9"), "must be a slice .*, got str"),
    "mask past the end": (
        lambda: RandomSampler(1, 1, 1, mask=slice(9, None)).validate(9),
        "9 observations none is left to sample: choose a mask",
    ),
    "no rows": (lambda: SequentialSampler(1, 1, 1).validate(0), "0 observations none .*: add data that have rows"),
    "num_samples": (lambda: RandomSampler(1, 1, 1, num_samples=9).validate(8), "replacement=True"),
    "rng": (lambda: RandomSampler(1, 1, 1, rng="0"), r"np\.random\.default_rng\(seed\)"),
    "classes": (lambda: upstream_calls.by_class("ClassSampler", classes=["a"]), r"pd\.Categorical\(labels\)"),
    "weights": (
        lambda: upstream_calls.by_class("ClassSampler", class_weights=[0] * 4),
        r"None of the 4 for \['a', 'b'",
    ),
    "class": (
        lambda: upstream_calls.by_class("ClassSampler", class_weights=[0, 0, 0, 1]),
        "Widen the mask, or give a class in it a positive weight",
    ),
    "shard": (
        lambda: shard(RandomSampler(4, 3, 6), 1, 3).n_batches(10),
        "10 observations do not give each of 3 ranks one batch of 6: use fewer ranks, a smaller batch_size or enforce",
    ),
    "shard of rows": (
        lambda: next(shard(RandomSampler(4, 3, 6), 1, 3, enforce_equal_batches=False).sample(2)),
        "2 observations do not give each of 3 ranks one row: use fewer ranks",
    ),
    "splits": (lambda: next(upstream_calls.Bare(batch_size=None).sample(10)), r"Bare\.batch_size is None"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_refusals_say_what_was_got_and_what_to_do(case):
    make, said = REMEDIES[case]
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def test_the_sizes_a_refusal_names_fit():
    for chunk_size, preload, batch_size, preload_that_fits, batch_size_that_fits in [(4, 3, 5, 5, 4), (6, 3, 4, 2, 3)]:
        RandomSampler(chunk_size, preload, batch_size_that_fits)
        RandomSampler(chunk_size, 2 * preload_that_fits, batch_size)


# ----------------------------------------------------------------------------------------------------- custom samplers


class ByIndex(Sampler):
    """Asks for rows by number, and leaves the splitting to the base class."""

    batch_size = 3
    shuffle = False

    def n_batches(self, n_obs):
        return math.ceil(n_obs / 3)

    def validate(self, n_obs):
        pass

    def _sample(self, n_obs):
        yield {"requests": np.arange(n_obs)[::-1]}


def test_integer_requests_get_splits():
    (request,) = ByIndex().sample(7)
    assert [split.tolist() for split in request["splits"]] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_seeded_sampler_shuffles_its_splits_reproducibly():
    def splits():
        sampler = ByIndex()
        sampler.rng = np.random.default_rng(3)
        type(sampler).shuffle = True
        try:
            return [split.tolist() for split in next(sampler.sample(20))["splits"]]
        finally:
            type(sampler).shuffle = False

    assert splits() == splits()
    assert sorted(sum(splits(), [])) == list(range(20))


def test_closing_a_pass_runs_the_cleanup_of_a_custom_sampler():
    closed = []

    class Watched(ByIndex):
        def _sample(self, n_obs):
            self.running = self._endless(n_obs)  # held here too: no reference count does the closing
            return self.running

        def _endless(self, n_obs):
            try:
                while True:
                    yield {"requests": np.arange(n_obs)}
            finally:
                closed.append(True)

    sampler = Watched()
    requests = sampler.sample(5)
    next(requests)
    assert not closed
    requests.close()
    assert closed


def test_subclasses_may_replace_one_step():
    class Reversed(SequentialSampler):
        def _compute_slices(self, n_obs, rng):
            return super()._compute_slices(n_obs, rng)[::-1]

    batches, _ = drawn(Reversed(2, 2, 2), 8)
    assert [batch.tolist() for batch in batches] == [[6, 7], [4, 5], [2, 3], [0, 1]]
    assert Reversed(2, 2, 2)._native_sampling(8) is None


def test_an_integer_seed_warns_at_the_line_that_gave_it():
    class Deep(RandomSampler):
        def __init__(self, seed):
            super().__init__(2, 2, 2, rng=seed)  # the line that gives it to annbatch

    for make in (lambda: RandomSampler(2, 2, 2, rng=1), lambda: Deep(np.int32(1))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make()
        assert [(w.category, w.filename) for w in caught] == [(FutureWarning, __file__)]
    with pytest.raises(TypeError, match="got bool"):
        RandomSampler(2, 2, 2, rng=True)


def test_samplers_survive_pickling_and_copying():
    for sampler in (RandomSampler(2, 3, 2, rng=np.random.default_rng(5)), upstream_calls.by_class("ClassSampler")):
        n_obs = getattr(sampler, "_n_obs", 19)
        twins = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)]
        expected = upstream_calls.requests_of(sampler, n_obs)
        assert all(upstream_calls.requests_of(twin, n_obs) == expected for twin in twins)


# -------------------------------------------------------------------------------------------------------- distributed


def shard(inner: Sampler, rank: int, world: int, **settings) -> DistributedSampler:
    return DistributedSampler(inner, dist_info=lambda: (rank, world), **settings)


def test_shards_tile_the_masked_range():
    ranks = [shard(SequentialSampler(2, 3, 3), rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.mask = slice(10, 42)
    rows = [np.concatenate(drawn(rank, 50)[0]) for rank in ranks]
    assert [rows_of_rank.size for rows_of_rank in rows] == [9, 9, 9]  # 32 // 3 is 10, and 9 are whole batches
    assert (np.concatenate(rows) == np.arange(10, 37)).all()
    assert [rank.n_batches(50) for rank in ranks] == [3, 3, 3]
    ranks[0].mask = slice(10, 60)
    with pytest.raises(ValueError, match="exceeds loader n_obs"):
        next(ranks[0].sample(50))


def test_passes_of_one_shard_may_overlap():
    sampler = shard(upstream_calls.by_class("ClassSampler", sizes=(2, 6, 4)), 1, 2)
    first, second = sampler.sample(40), sampler.sample(40)
    next(first), next(second)
    first.close()  # the second still runs on the shard
    assert sampler.n_batches(40) == 9
    list(second)
    assert sampler._sampler.mask == slice(0, 40)


def test_the_generator_of_a_shard_can_be_read_and_set():
    rng = np.random.default_rng(1)
    ranks = [shard(RandomSampler(2, 3, 2, rng=rng), rank, 2) for rank in range(2)]
    assert ranks[0].rng.random() != ranks[1].rng.random()
    ranks[0].rng = np.random.default_rng(8)
    ranks[1].rng = np.random.default_rng(8)
    assert ranks[0]._draw_epoch_seed() == ranks[1]._draw_epoch_seed()


def test_torch_names_the_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        sampler = DistributedSampler(SequentialSampler(2, 2, 2), dist_info="torch")
    finally:
        torch.distributed.destroy_process_group()
    assert sampler.n_batches(9) == 4


# ------------------------------------------------------------------------------------------- DataLoader workers, again


def test_workers_without_a_share_yield_nothing():
    sampler = RandomSampler(10, 1, 5, drop_last=True, rng=np.random.default_rng(0))
    batches = upstream_calls.in_workers(sampler, n_obs=10)
    assert [worker for worker, _, _ in batches] == [0]


def test_workers_share_num_samples():
    sampler = RandomSampler(2, 4, 4, num_samples=24, drop_last=True, rng=np.random.default_rng(0))
    requests = upstream_calls.in_workers(sampler, n_obs=64)
    n_batches = [sum(len(splits) for worker, _, splits in requests if worker == w) for w in range(2)]
    assert n_batches == [3, 3]
    rows = [start for _, rows, _ in requests for start, _ in rows]
    assert len(rows) == len(set(rows))


# --------------------------------------------------------------------------------------------- described to the core

PLAIN = {
    "kind": "random",
    "chunk_size": 4,
    "preload_nchunks": 3,
    "batch_size": 6,
    "drop_last": False,
    "mask": [0, 43],
    "replacement": False,
    "num_samples": None,
}


def test_stock_samplers_describe_their_pass():
    sampler = RandomSampler(np.int64(4), 3, 6, rng=np.random.default_rng(0))
    before = copy.deepcopy(sampler.rng.bit_generator.state)
    assert json.loads(json.dumps(sampler._native_sampling(43))) == PLAIN
    assert sampler.rng.bit_generator.state == before
    sampler.mask = slice(5, None)
    assert sampler._native_sampling(43) == {**PLAIN, "mask": [5, 43]}
    sequential = SequentialSampler(4, 3, 6, drop_last=True, mask=slice(1, 9))
    assert sequential._native_sampling(43) == {**PLAIN, "kind": "sequential", "drop_last": True, "mask": [1, 9]}
    drawing = RandomSampler(4, 3, 6, replacement=True, num_samples=np.int64(100))
    assert drawing._native_sampling(43) == {**PLAIN, "replacement": True, "num_samples": 100}


def test_a_described_pass_is_validated():
    too_many = RandomSampler(4, 3, 6, num_samples=44)
    for sampler in (too_many, shard(too_many, 0, 1)):
        with pytest.raises(ValueError, match="cannot exceed the observation range"):
            sampler._native_sampling(43)
    with pytest.raises(ValueError, match="exceeds loader n_obs"):
        RandomSampler(4, 3, 6, mask=slice(0, 50))._native_sampling(43)
    with pytest.raises(ValueError, match=r"must be < mask\.stop"):
        shard(RandomSampler(4, 3, 6), 0, 3)._native_sampling(10)


def test_only_unmodified_samplers_are_described(monkeypatch):
    class Subclass(RandomSampler):
        pass

    assert Subclass(4, 3, 6)._native_sampling(43) is None
    assert _ChunkSampler(4, 3, 6)._native_sampling(43) is None
    assert upstream_calls.by_class("ClassSampler")._native_sampling(40) is None
    assert ByIndex()._native_sampling(43) is None
    for name in ("_sample", "sample", "_compute_slices"):
        sampler = RandomSampler(4, 3, 6)
        setattr(sampler, name, getattr(sampler, name))
        assert sampler._native_sampling(43) is None
        with monkeypatch.context() as patched:
            patched.setattr(_ChunkSampler, name, lambda self, n_obs, **kwargs: iter(()))
            assert RandomSampler(4, 3, 6)._native_sampling(43) is None
            assert SequentialSampler(4, 3, 6)._native_sampling(43) is None
    assert RandomSampler(4, 3, 6)._native_sampling(43) is not None


def test_shards_of_stock_samplers_are_described():
    sampler = shard(RandomSampler(4, 3, 6, mask=slice(3, 9), rng=np.random.default_rng(0)), 1, 3)
    assert sampler._native_sampling(43) == {**PLAIN, "mask": [12, 24]}
    assert sampler._sampler.mask == slice(0, None)
    sampler.mask = slice(0, 22)
    assert sampler._native_sampling(43) == {**PLAIN, "mask": [6, 12]}
    assert shard(ByIndex(), 0, 2)._native_sampling(43) is None
    sampler._shard_mask = lambda n_obs: slice(0, 6)
    assert sampler._native_sampling(43) is None

    class Subclass(DistributedSampler):
        pass

    assert Subclass(RandomSampler(4, 3, 6), dist_info=lambda: (0, 2))._native_sampling(43) is None


def test_epoch_seeds_come_from_the_generator():
    seeds = [RandomSampler(4, 3, 6, rng=np.random.default_rng(s))._draw_epoch_seed() for s in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    sampler = RandomSampler(4, 3, 6, rng=np.random.default_rng(1))
    assert len({sampler._draw_epoch_seed() for _ in range(100)}) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert ByIndex()._draw_epoch_seed() != ByIndex()._draw_epoch_seed()


def test_pieces_of_a_split_are_views_unless_copied():
    array = np.arange(7)
    assert [piece.tolist() for piece in split_given_size(array, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(np.shares_memory(piece, array) for piece in split_given_size(array, 3))
    assert not any(np.shares_memory(piece, array) for piece in split_given_size(array, 3, copy=True))
    assert [piece.size for piece in split_given_size(np.arange(0), 3)] == [0]
