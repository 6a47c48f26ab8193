"""Batches of random stores equal what the slow reader takes from them, under every kind of sampling.

`test_random_stores` varies what lies on disk, the tests after it what is asked for. ``ANNBATCH_EXAMPLES=20`` makes
hypothesis draw twenty times as many examples, and others on each run; by default the examples are the same on each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annbatch._core import ops as _ops
from support import drawing, stores
from support.oracle import Reference, load, opened, read_element, same_values, streaming
from support.sampling import Case, Plan, bounded, cases, plans
from support.stores import ArrayLayout, Csr, CsrSpec, DatasetSpec

pytestmark = pytest.mark.core

# ---------------------------------------------------------------------------------------------- the tools themselves


def _assert_same(got: Csr | np.ndarray, want: Csr | np.ndarray) -> None:
    if isinstance(want, np.ndarray):
        same_values(got, want)
        return
    assert got.shape == want.shape
    for name in ("indptr", "indices", "data"):
        same_values(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("seed", range(8))
def test_slow_reader_reads_what_was_written(tmp_path: Path, seed: int) -> None:
    collection = stores.write_collection(
        tmp_path, drawing.draw_collection(drawing.SeededChooser(seed), most_datasets=2)
    )
    for path, written in zip(collection.paths, collection.written, strict=True):
        for name, values in written.items():
            _assert_same(read_element(path, name), values)


def test_anndata_reads_what_was_written(tmp_path: Path) -> None:
    dataset = DatasetSpec(
        n_obs=23,
        zarr_format=3,
        consolidated=True,
        elements={
            "X": drawing.draw_csr(drawing.SeededChooser(1), 23, 40, 3),
            "obsm/pca": drawing.draw_dense(drawing.SeededChooser(2), (23, 5), 3),
        },
    )
    collection = stores.write_collection(tmp_path, [dataset], frames=True)
    adata = anndata.read_zarr(collection.paths[0])
    np.testing.assert_array_equal(adata.X.toarray(), collection.written[0]["X"].to_dense())
    np.testing.assert_array_equal(adata.obsm["pca"], collection.written[0]["obsm/pca"])


def test_slow_reader_notices_a_wrong_batch() -> None:
    rows = Csr(np.array([0, 1, 3]), np.array([4, 0, 2]), np.array([5, 6, 7], "f4"), (2, 5))
    reference = Reference([{"X": rows}], {"X": "torch"})
    good = [torch.tensor([1, 0]), *map(torch.tensor, (np.array([0, 2, 3], "i4"), np.array([0, 2, 4], "i4")))]
    assert reference.check_batch([*good, torch.tensor([6.0, 7.0, 5.0])]).tolist() == [1, 0]
    for wrong in ([6.0, 0.0, 5.0], [6.0, 7.0], [6, 7, 5]):
        with pytest.raises(AssertionError, match="element X"):
            reference.check_batch([*good, torch.tensor(wrong)])
    with pytest.raises(AssertionError, match="never delivered"):
        reference.check_once([np.array([1])])
    with pytest.raises(AssertionError, match="too often"):
        reference.check_once([np.array([1, 0, 0])])


# ---------------------------------------------------------------------------------------------- random stores


def _check_sizes(batches: list[np.ndarray], batch_size: int, n_rows: int) -> None:
    sizes = [len(rows) for rows in batches]
    assert sizes == [batch_size] * (n_rows // batch_size) + [n_rows % batch_size] * (n_rows % batch_size > 0)


@bounded(50)
@given(case=cases())
def test_random_stores(case: Case) -> None:
    """Sequential, random and submitted batches over one opened random store."""
    rng = np.random.default_rng(case.seed)
    ahead = {"batches_ahead": case.options.pop("batches_ahead")} if "batches_ahead" in case.options else {}
    with tempfile.TemporaryDirectory() as folder:
        collection = stores.write_collection(Path(folder), case.specs)
        reference = Reference.of(collection, case.elements)
        with opened(collection.config(case.elements, **case.options)) as parent:
            assert _ops.describe(parent)["n_obs"] == reference.n_obs
            with streaming(parent, {"sampling": case.plan.config("sequential"), **ahead}) as state:
                batches = reference.epoch(state, hold=True)
                np.testing.assert_array_equal(np.concatenate(batches), np.arange(reference.n_obs))
                _check_sizes(batches, case.plan.batch_size, reference.n_obs)
            with streaming(parent, {"sampling": case.plan.config("random"), **ahead}) as state:
                batches = reference.epoch(state, case.seed, hold=True)
                reference.check_once(batches)
                _check_sizes(batches, case.plan.batch_size, reference.n_obs)
            with streaming(parent, {"sampling": {"kind": "submitted"}, **ahead}) as state:
                _submit_and_check(reference, state, rng, n_submits=2)


def _submit_and_check(reference: Reference, state: torch.Tensor, rng: np.random.Generator, n_submits: int) -> None:
    """Submit random rows (with repetition, in any order) and expect exactly them, batch by batch."""
    _ops.start(state, 0)
    expected = []
    for _ in range(n_submits):
        rows = rng.integers(0, reference.n_obs, size=int(rng.integers(1, 30)))
        positions = rng.integers(0, len(rows), size=int(rng.integers(1, 40)))
        cuts = np.unique(rng.integers(1, len(positions) + 1, size=3))
        sizes = np.diff(np.concatenate([[0], cuts[cuts < len(positions)], [len(positions)]]))
        _ops.submit(state, *map(torch.from_numpy, (rows, positions, sizes)))
        expected += np.split(rows[positions], np.cumsum(sizes)[:-1])
    _ops.finish(state)
    batches = reference.drain(state)
    assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in expected]


def test_generator_reaches_its_corners() -> None:
    """Forty seeds hold every codec family, both formats, nested shards, turned arrays and each kind of element."""
    layouts: list[ArrayLayout] = []
    kinds = set()
    for seed in range(40):
        for spec in drawing.draw_collection(drawing.SeededChooser(seed)):
            for element in spec.elements.values():
                kinds.add(type(element).__name__ + str(len(element.shape)))
                layouts += element.layouts.values() if isinstance(element, CsrSpec) else [element.layout]
    assert kinds == {"CsrSpec2", "DenseSpec2", "DenseSpec4"}
    assert {layout.codec for layout in layouts} == set(stores.CODECS_V2) | set(stores.CODECS_V3)
    assert {layout.zarr_format for layout in layouts} == {2, 3}
    for name in ("big_endian", "transposed", "nested", "index_checksum", "v2_keys", "write_empty_chunks"):
        assert {getattr(layout, name) for layout in layouts} == {False, True}, name
    assert {layout.index_location for layout in layouts} == {"start", "end"}
    assert {layout.fill_value for layout in layouts} == {0, 1, None}


# ---------------------------------------------------------------------------------------------- what is asked for


@st.composite
def masks(draw: Any, n_obs: int = 110) -> tuple[int, int] | None:
    """A range of rows that is not empty, or None."""
    if draw(st.booleans()):
        return None
    start = draw(st.integers(0, n_obs - 1))
    return start, draw(st.integers(start + 1, n_obs))


@bounded(60)
@given(
    plan=plans(60), mask=masks(), drop_last=st.booleans(), seed=st.integers(-(2**63), 2**63 - 1), samples=st.booleans()
)
def test_random_sampling(
    parent: Any, reference: Reference, plan: Plan, mask: Any, drop_last: bool, seed: int, samples: bool
) -> None:
    start, stop = mask or (0, reference.n_obs)
    wanted = (stop - start + 1) // 2 if samples else None
    sampling = plan.config("random", mask=mask and list(mask), drop_last=drop_last, num_samples=wanted)
    n_rows = wanted or stop - start
    n_batches = n_rows // plan.batch_size if drop_last else -(-n_rows // plan.batch_size)
    with streaming(parent, {"sampling": sampling}) as state:
        batches = reference.epoch(state, seed)
        assert _ops.describe(state)["n_batches"] == n_batches == len(batches)
        again = reference.epoch(state, seed)
        tail = reference.epoch(state, seed, first_batch=n_batches // 2)
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in batches]
    assert [rows.tolist() for rows in tail] == [rows.tolist() for rows in batches[n_batches // 2 :]]
    rows = np.concatenate([np.zeros(0, int), *batches])
    assert len(set(rows.tolist())) == len(rows)
    assert ((rows >= start) & (rows < stop)).all()
    assert all(len(batch) == plan.batch_size for batch in batches[:-1])
    if drop_last:
        assert len(rows) == n_batches * plan.batch_size
    elif not samples:
        reference.check_once(batches, range(start, stop))
    _check_windows(rows, plan)


def _check_windows(rows: np.ndarray, plan: Plan) -> None:
    """Each preload window holds at most `preload_nchunks` runs of consecutive rows."""
    for first in range(0, len(rows) - plan.window + 1, plan.window):
        window = np.sort(rows[first : first + plan.window])
        assert 1 + int((np.diff(window) != 1).sum()) <= plan.preload_nchunks


def test_orders_differ_between_seeds_and_within_windows(parent: Any, reference: Reference) -> None:
    with streaming(parent, {"sampling": Plan(5, 4, 10).config("random")}) as state:
        orders = [np.concatenate(reference.epoch(state, seed)) for seed in (0, 1, 2, -1)]
    assert len({tuple(order) for order in orders}) == 4
    for order in orders:
        window = order[:20]
        assert (np.diff(window) == 1).sum() < 15, "rows within a window are not shuffled"
        assert np.ptp(window) > 20, "chunks of a window are not drawn from everywhere"


def test_seed_of_the_configuration_does_not_change_a_started_epoch(parent: Any, reference: Reference) -> None:
    orders = []
    for seed in (0, 7):
        with streaming(parent, {"sampling": Plan(5, 4, 10).config("random"), "seed": seed}) as state:
            orders.append(np.concatenate(reference.epoch(state, 3)).tolist())
    assert orders[0] == orders[1]


@bounded(25)
@given(plan=plans(60), mask=masks(), drop_last=st.booleans(), k=st.integers(0, 200))
def test_sequential_sampling(parent: Any, reference: Reference, plan: Plan, mask: Any, drop_last: bool, k: int) -> None:
    start, stop = mask or (0, reference.n_obs)
    sampling = plan.config("sequential", mask=mask and list(mask), drop_last=drop_last)
    n_rows = (stop - start) // plan.batch_size * plan.batch_size if drop_last else stop - start
    with streaming(parent, {"sampling": sampling}) as state:
        batches = reference.epoch(state)
        k = min(k, len(batches))
        tail = reference.epoch(state, first_batch=k)
    _check_sizes(batches, plan.batch_size, n_rows)
    assert [row for rows in batches for row in rows] == list(range(start, start + n_rows))
    assert [rows.tolist() for rows in tail] == [rows.tolist() for rows in batches[k:]]


@bounded(25)
@given(plan=plans(30), mask=masks(), drop_last=st.booleans(), seed=st.integers(0, 99), n=st.integers(1, 300))
def test_sampling_with_replacement(
    parent: Any, reference: Reference, plan: Plan, mask: Any, drop_last: bool, seed: int, n: int
) -> None:
    start, stop = mask or (0, reference.n_obs)
    n = n if stop - start >= plan.chunk_size else min(n, stop - start)  # more is refused: see test_damaged
    sampling = plan.config("random", mask=mask and list(mask), drop_last=drop_last, replacement=True, num_samples=n)
    with streaming(parent, {"sampling": sampling}) as state:
        batches = reference.epoch(state, seed)
        assert [r.tolist() for r in reference.epoch(state, seed)] == [r.tolist() for r in batches]
        tail = reference.epoch(state, seed, first_batch=len(batches) // 2)
    assert [rows.tolist() for rows in tail] == [rows.tolist() for rows in batches[len(batches) // 2 :]]
    assert len(batches) == (n // plan.batch_size if drop_last else -(-n // plan.batch_size))
    rows = np.concatenate([np.zeros(0, int), *batches])
    assert ((rows >= start) & (rows < stop)).all()


def test_replacement_repeats_rows(parent: Any, reference: Reference) -> None:
    with streaming(parent, {"sampling": Plan(1, 50, 50).config("random", replacement=True)}) as state:
        rows = np.concatenate(reference.epoch(state, 5))
    assert len(rows) == reference.n_obs
    assert len(set(rows.tolist())) < 95


@bounded(25)
@given(plan=plans(40), kind=st.sampled_from(["random", "sequential"]), parts=st.integers(1, 5), seed=st.integers(0, 99))
def test_parts_share_an_epoch(parent: Any, reference: Reference, plan: Plan, kind: str, parts: int, seed: int) -> None:
    """Part i of k delivers the batches of windows i, i + k, ... of the undivided epoch, in their order."""
    with streaming(parent, {"sampling": plan.config(kind)}) as state:
        whole = reference.epoch(state, seed)
    per_window = plan.window // plan.batch_size
    for part in range(parts):
        with streaming(parent, {"sampling": plan.config(kind, part=[part, parts])}) as state:
            batches = reference.epoch(state, seed)
        mine = [rows for i, rows in enumerate(whole) if i // per_window % parts == part]
        assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in mine]


@bounded(25)
@given(seed=st.integers(0, 2**31), n_submits=st.integers(0, 12))
def test_submitted_rows(parent: Any, reference: Reference, seed: int, n_submits: int) -> None:
    rng = np.random.default_rng(seed)
    with streaming(parent, {"sampling": {"kind": "submitted"}}) as state:
        _submit_and_check(reference, state, rng, n_submits)
        _submit_and_check(reference, state, rng, n_submits)


def test_submissions_while_batches_are_taken(parent: Any, reference: Reference) -> None:
    """A sampler that adapts: each request is made when the batch of the one before was seen."""
    with streaming(parent, {"sampling": {"kind": "submitted"}, "batches_ahead": 0}) as state:
        _ops.start(state, 0)
        row = 3
        for _ in range(10):
            _ops.submit(state, torch.tensor([row, row]), torch.tensor([1, 0]), torch.tensor([2]))
            rows = reference.check_batch(load(state))
            assert rows.tolist() == [row, row]
            row = (row * 7 + 1) % reference.n_obs
        assert not _ops.ready(state, 10), "nothing was submitted and the epoch is not finished"
        _ops.finish(state)
        assert reference.drain(state) == []


@pytest.mark.parametrize(
    ("rows", "positions", "sizes"),
    [
        ([0, 1], [0, 1], [2, 0]),  # a batch without rows would look like the end of the epoch
        ([0, 1], [0, 1], [3, -1]),
        ([0, 1], [0, 1], [1]),
        ([0, 1], [0, 1], [3]),
        ([0, 1], [0, 2], [2]),
        ([0, 1], [-1, 0], [2]),
        ([110], [0], [1]),
        ([-1], [0], [1]),
        ([0], [0], [2**62, 2**62, 2**62, 2**62, 1]),
    ],
)
def test_wrong_submissions_are_refused(
    parent: Any, reference: Reference, rows: list[int], positions: list[int], sizes: list[int]
) -> None:
    with streaming(parent, {"sampling": {"kind": "submitted"}}) as state:
        _ops.start(state, 0)
        with pytest.raises(ValueError, match=r"row|position|size"):
            _ops.submit(state, torch.tensor(rows), torch.tensor(positions), torch.tensor(sizes))
        _ops.submit(state, torch.tensor([5]), torch.tensor([0]), torch.tensor([1]))  # and nothing of it was kept
        _ops.finish(state)
        assert [batch.tolist() for batch in reference.drain(state)] == [[5]]


def test_end_of_epoch_stays_the_answer(parent: Any, reference: Reference) -> None:
    with streaming(parent, {"sampling": Plan(10, 1, 10).config("sequential")}) as state:
        reference.epoch(state)
        for _ in range(3):
            assert len(reference.check_batch(load(state))) == 0
        assert reference.epoch(state, first_batch=11) == []


def test_auto_restart_gives_one_end_and_the_next_epoch(parent: Any, reference: Reference) -> None:
    sampling = Plan(10, 2, 20).config("random")
    with streaming(parent, {"sampling": sampling, "auto_restart": True, "seed": 4}) as state:
        _ops.start(state, 4)
        epochs = [reference.drain(state) for _ in range(3)]
    for epoch in epochs:
        reference.check_once(epoch)
    assert len({tuple(np.concatenate(epoch)) for epoch in epochs}) == 3


def test_a_restart_forgets_the_epoch_before(parent: Any, reference: Reference) -> None:
    with streaming(parent, {"sampling": Plan(5, 2, 5).config("random")}) as state:
        whole = reference.epoch(state, 1)
        _ops.start(state, 2)
        reference.check_batch(load(state))
        assert [rows.tolist() for rows in reference.epoch(state, 1)] == [rows.tolist() for rows in whole]


def test_streams_of_one_collection_do_not_disturb_each_other(parent: Any, reference: Reference) -> None:
    config = {"sampling": Plan(5, 4, 10).config("random")}
    with streaming(parent, config) as one, streaming(parent, config) as two:
        _ops.start(one, 1)
        _ops.start(two, 2)
        batches: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for _ in range(11):
            for state, rows in zip((one, two), batches, strict=True):
                rows.append(reference.check_batch(load(state)))
    for rows in batches:
        reference.check_once(rows)
