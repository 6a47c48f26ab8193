"""Splits never share a row, shares of ranks cover a split, and each row comes exactly once per pass."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from annbatch._splits.rows import RowSet
from annbatch._splits.sampler import RowSetSampler, WindowSizes, share, split_sampler
from annbatch._splits.splits import make_splits
from annbatch.samplers import RandomSampler, SequentialSampler

N_OBS = st.integers(1, 400)


@st.composite
def row_sets(draw, max_obs=300):
    """Sets with gaps of every kind: from a mask, a range, or single rows."""
    n_obs = draw(st.integers(1, max_obs))
    mask = np.array(draw(st.lists(st.booleans(), min_size=n_obs, max_size=n_obs)))
    if draw(st.booleans()):
        mask = np.repeat(mask, 7)
    mask[draw(st.integers(0, mask.size - 1))] = True
    return mask


def read(sampler, n_obs):
    """The batches of one pass as arrays of rows."""
    batches = []
    for request in sampler.sample(n_obs):
        rows = request["requests"]
        if isinstance(rows, list):
            rows = np.concatenate([np.arange(r.start, r.stop) for r in rows])
        assert np.sort(np.concatenate(request["splits"])).tolist() == list(range(rows.size))
        batches += [rows[split] for split in request["splits"]]
    return batches


# ---------------------------------------------------------------------------------------------------------- row sets


@given(row_sets())
def test_row_set_holds_its_rows(mask):
    rows = np.flatnonzero(mask)
    for made in (RowSet.from_mask(mask), RowSet.from_rows(np.random.default_rng(0).permutation(rows))):
        assert len(made) == rows.size
        assert made.rows().tolist() == rows.tolist()
        assert made.last == rows[-1]
        assert (made.contiguous is not None) == (rows[-1] - rows[0] + 1 == rows.size)


@given(row_sets(), st.data())
def test_part_of_a_row_set(mask, data):
    rows = np.flatnonzero(mask)
    first = data.draw(st.integers(0, rows.size))
    stop = data.draw(st.integers(first, rows.size))
    part = RowSet.from_mask(mask).part(first, stop)
    assert part.rows().tolist() == rows[first:stop].tolist()
    assert RowSet.from_mask(mask).rows(first, stop).tolist() == rows[first:stop].tolist()


@given(row_sets(60), row_sets(60))
def test_first_common_row(a, b):
    common = np.intersect1d(np.flatnonzero(a), np.flatnonzero(b))
    found = RowSet.from_mask(a).first_common(RowSet.from_mask(b))
    assert found == (common[0] if common.size else None)


def test_a_row_given_twice_is_refused():
    with pytest.raises(ValueError, match="row 4 appears more than once"):
        RowSet.from_rows(np.array([4, 2, 4]))


# ------------------------------------------------------------------------------------------------------------- splits


@settings(max_examples=200)
@given(
    n_obs=N_OBS,
    unit=st.sampled_from(["contiguous", "block", "row"]),
    block_rows=st.integers(1, 50),
    shares=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5)),
    seed=st.integers(0, 9),
)
def test_fractions_are_disjoint_and_exact(n_obs, unit, block_rows, shares, seed):
    n_obs += 100
    fractions = np.array(shares[:3]) / sum(shares)
    splits = make_splits(n_obs, fractions, unit=unit, block_rows=block_rows, seed=seed)
    counts = np.zeros(n_obs, int)
    for (name, rows), fraction in zip(splits.items(), fractions, strict=True):
        counts[rows.rows()] += 1
        assert abs(len(rows) - fraction * n_obs) <= 1, name
    assert counts.max() == 1
    if shares[3] == 0:
        assert counts.min() == 1
    again = make_splits(n_obs, fractions, unit=unit, block_rows=block_rows, seed=seed)
    assert [s.digest for s in again.values()] == [s.digest for s in splits.values()]


def test_blocks_stay_whole_and_the_seed_deals_them():
    splits = make_splits(1000, {"train": 0.5, "val": 0.5}, unit="block", block_rows=50, seed=1)
    assert all((np.diff(rows.rows().reshape(-1, 50), axis=1) == 1).all() for rows in splits.values())
    other = make_splits(1000, {"train": 0.5, "val": 0.5}, unit="block", block_rows=50, seed=2)
    assert splits["train"].digest != other["train"].digest


def test_contiguous_fractions_are_one_range_each():
    splits = make_splits(1000, (0.8, 0.1, 0.1), unit="contiguous")
    assert [s.contiguous for s in splits.values()] == [slice(0, 800), slice(800, 900), slice(900, 1000)]


@pytest.mark.parametrize(
    "split", [(0.8, 0.3), {"train": -0.1}, {"train": 0.5, "val": [1, 2]}, {}, {"valid": 0.5}, [0.1] * 4]
)
def test_nonsense_splits_are_refused(split):
    with pytest.raises(ValueError, match="split"):
        make_splits(100, split)


def test_a_split_without_rows_is_refused():
    with pytest.raises(ValueError, match="split 'val' has no rows out of 10"):
        make_splits(10, (0.99, 0.01))


def test_rows_may_be_masks_slices_and_numbers():
    mask = np.zeros(100, bool)
    mask[[1, 5, 50]] = True
    splits = make_splits(100, {"train": mask, "val": slice(90, None), "test": [7, 3], "predict": slice(None)})
    assert splits["train"].rows().tolist() == [1, 5, 50]
    assert splits["val"].contiguous == slice(90, 100)
    assert splits["test"].rows().tolist() == [3, 7]
    assert len(splits["predict"]) == 100


@pytest.mark.parametrize("rows", [slice(40, 60), [12, 49]])
def test_rows_in_two_splits_are_refused(rows):
    with pytest.raises(ValueError, match="splits 'train' and 'test' share rows, the first of which is 4"):
        make_splits(100, {"train": slice(0, 50) if isinstance(rows, slice) else [49, 3], "test": rows})


def test_masks_of_another_length_and_rows_out_of_range_are_refused():
    with pytest.raises(ValueError, match="the mask has 99 rows, the data 100"):
        make_splits(100, {"train": np.ones(99, bool)})
    with pytest.raises(ValueError, match="rows outside 0 to 99"):
        make_splits(100, {"train": [100]})
    with pytest.raises(ValueError, match="rows outside 0 to 99"):
        make_splits(100, {"train": [-1, 3]})


def test_refusals_name_the_split_and_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="split 'val' has rows outside 0 to 99: they go from -1 to 104"):
        make_splits(100, {"train": [3], "val": [104, -1, 5]})
    with pytest.raises(ValueError, match="split 'val': row 4 appears more than once"):
        make_splits(100, {"train": [3], "val": [4, 2, 4]})
    with pytest.raises(ValueError, match="share rows, the first of which is 2; give each row to one of them"):
        make_splits(100, {"train": [2, 3], "val": [2]})
    for split in (None, (0.5, 0.5), {"train": slice(0, 0)}):
        with pytest.raises(ValueError, match="no rows to split: the data have 0 observations"):
            make_splits(0, split)


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 30), min_size=3, max_size=30), seed=st.integers(0, 5))
def test_no_group_is_in_two_splits(sizes, seed):
    labels = pd.Series(np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)))
    splits = make_splits(labels.size, (0.6, 0.2, 0.2), labels=labels, seed=seed)
    groups = [set(labels[rows.rows()]) for rows in splits.values()]
    assert sum(map(len, groups)) == len(sizes)
    assert set.union(*groups) == set(range(len(sizes)))


def test_group_fractions_are_met_as_closely_as_groups_allow():
    labels = np.repeat(np.arange(50), 20)
    splits = make_splits(1000, (0.8, 0.1, 0.1), labels=labels)
    assert [len(rows) for rows in splits.values()] == [800, 100, 100]


def test_groups_by_name_and_missing_labels():
    labels = pd.Series(["a", "b", None, "c", "a", None], dtype="category")
    splits = make_splits(6, {"train": ["a", "c"], "test": "b"}, labels=labels)
    assert splits["train"].rows().tolist() == [0, 3, 4]
    assert splits["test"].rows().tolist() == [1]
    with pytest.raises(ValueError, match="names groups that no row has: \\['d'\\]"):
        make_splits(6, {"train": ["d"]}, labels=labels)
    with pytest.raises(ValueError, match="share rows"):
        make_splits(6, {"train": ["a"], "val": ["a", "b"]}, labels=labels)
    with pytest.raises(ValueError, match="2 groups cannot fill 3 splits"):
        make_splits(4, (0.5, 0.25, 0.25), labels=np.array([0, 0, 1, 1]))


# ------------------------------------------------------------------------------------------------- shares and samplers


@settings(max_examples=300)
@given(
    mask=row_sets(),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 20),
    drop=st.booleans(),
    turn=st.floats(0, 1),
)
def test_ranks_have_equally_many_batches_and_no_row_twice(mask, world_size, batch_size, drop, turn):
    rows = RowSet.from_mask(mask)
    enough = len(rows) // world_size // batch_size > 0 if drop else len(rows) >= world_size
    keywords = {"world_size": world_size, "batch_size": batch_size, "drop_last": drop, "turn": turn}
    if not enough:
        with pytest.raises(ValueError, match="rows"):
            share(rows, rank=0, **keywords)
        return
    sizes = WindowSizes(4, batch_size, batch_size)
    seen, n_batches = [], set()
    for rank in range(world_size):
        part, promised = share(rows, rank=rank, **keywords)
        sampler = RowSetSampler(part, *sizes, shuffle=True, drop_last=drop, n_batches=promised)
        batches = read(sampler, mask.size)
        assert len(batches) == promised == sampler.n_batches(mask.size)
        lengths = {len(batch) for batch in batches}
        assert max(lengths) <= max(batch_size, 2 if world_size > 1 else 1)
        assert not drop or lengths == {batch_size}
        n_batches.add(promised)
        seen += batches
    seen = np.concatenate(seen)
    assert len(n_batches) == 1
    assert np.unique(seen).size == seen.size
    assert np.isin(seen, rows.rows()).all()
    if drop:
        assert len(rows) - seen.size < world_size * batch_size
    else:
        assert seen.size == len(rows)


@settings(max_examples=100)
@given(row_sets(), st.integers(1, 9), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_row_set_sampler_reads_each_row_once(mask, chunk_size, preload_nchunks, per_window, shuffle):
    batch_size = chunk_size * preload_nchunks
    batch_size = max(d for d in range(1, per_window * 3) if batch_size % d == 0)
    rows = np.flatnonzero(mask)
    sampler = RowSetSampler(RowSet.from_mask(mask), chunk_size, preload_nchunks, batch_size, shuffle=shuffle)
    batches = read(sampler, mask.size)
    assert np.sort(np.concatenate(batches)).tolist() == rows.tolist()
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    if not shuffle:
        assert np.concatenate(batches).tolist() == rows.tolist()


def test_row_set_sampler_reads_neighbours_together():
    mask = np.tile(np.repeat([True, False], 10), 50)
    sampler = RowSetSampler(RowSet.from_mask(mask), 10, 4, 20, shuffle=True, rng=np.random.default_rng(0))
    for request in sampler.sample(mask.size):
        assert (np.diff(request["requests"].reshape(-1, 10), axis=1) == 1).all()


@pytest.mark.parametrize("n_obs", [103, 38])
def test_what_drop_last_leaves_out_differs_between_passes(n_obs):
    rng = np.random.default_rng(0)
    sampler = RowSetSampler(RowSet.from_range(0, n_obs), 10, 4, 20, shuffle=True, drop_last=True, rng=rng)
    left_out = [frozenset(range(n_obs)) - set(np.concatenate(read(sampler, n_obs)).tolist()) for _ in range(20)]
    assert {len(rows) for rows in left_out} == {n_obs % 20}
    assert len(set(left_out)) > 5


def test_row_set_sampler_checks_sizes_and_range():
    with pytest.raises(ValueError, match="batch_size"):
        RowSetSampler(RowSet.from_range(0, 9), 3, 2, 4)
    with pytest.raises(ValueError, match="Row 8 is out of range for n_obs=8"):
        next(RowSetSampler(RowSet.from_range(0, 9), 3, 2, 3).sample(8))


def test_contiguous_shares_are_read_natively():
    rows, sizes = RowSet.from_range(100, 1000), WindowSizes(10, 10, 20)
    keywords = {"rank": 1, "world_size": 2, "seed": 3}
    train = split_sampler(rows, sizes, shuffle=True, drop_last=True, **keywords)
    assert type(train) is RandomSampler
    assert type(split_sampler(rows, sizes, shuffle=False, drop_last=False, **keywords)) is SequentialSampler
    gaps = RowSet.from_mask(np.arange(1000) % 2 == 0)
    assert type(split_sampler(gaps, sizes, shuffle=True, drop_last=True, **keywords)) is RowSetSampler


@pytest.mark.parametrize("rows", [RowSet.from_range(3, 500), RowSet.from_mask(np.arange(500) % 3 > 0)])
def test_order_is_a_function_of_seed_and_epoch(rows):
    def order(seed, epoch):
        sampler = split_sampler(rows, WindowSizes(10, 10, 20), shuffle=True, drop_last=False, seed=seed, epoch=epoch)
        return np.concatenate(read(sampler, 500)).tolist()

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)
    assert sorted(order(1, 4)) == rows.rows().tolist()


def test_rows_left_out_on_ranks_change_from_epoch_to_epoch():
    def seen(epoch):
        ranks = (
            split_sampler(
                RowSet.from_range(0, 250), WindowSizes(10, 10, 100), shuffle=True, drop_last=True,
                rank=rank, world_size=2, epoch=epoch,
            )
            for rank in (0, 1)
        )  # fmt: skip
        return np.sort(np.concatenate([row for rank in ranks for row in read(rank, 250)]))

    epochs = [seen(epoch) for epoch in range(40)]
    assert all(rows.size == 200 == np.unique(rows).size for rows in epochs)
    assert np.unique(np.concatenate(epochs)).size > 230


class Reads(IterableDataset):
    """The row numbers that a sampler asks for, in whichever process it runs."""

    def __init__(self, sampler, n_obs):
        self.sampler, self.n_obs = sampler, n_obs

    def __iter__(self):
        yield from read(self.sampler, self.n_obs)


def test_workers_share_the_requests():
    sampler = RowSetSampler(RowSet.from_range(5, 200), 10, 2, 20, shuffle=True, rng=np.random.default_rng(1))
    batches = list(DataLoader(Reads(sampler, 200), batch_size=None, num_workers=2))
    assert np.sort(np.concatenate(batches)).tolist() == list(range(5, 200))
