"""Batches of random stores equal what the slow reader takes from them, under every kind of sampling.

`test_random_stores` varies what lies on disk, the tests after it what is asked for. ``ANNBATCH_EXAMPLES=20`` makes
hypothesis draw twenty times as many examples, and others on each run; by default the examples are the same on each.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import stores
import torch
import zarr
from annbatch import _ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Reference, delivered_dtype, load, opened, read_element, same_values, streaming
from stores import ArrayLayout, Collection, Csr, CsrSpec, DatasetSpec, DenseSpec, SeededChooser

_MORE = int(os.environ.get("ANNBATCH_EXAMPLES", "1"))


def bounded(examples: int) -> settings:
    """Settings for a property test of about `examples` examples."""
    return settings(
        max_examples=examples * _MORE,
        derandomize=_MORE == 1,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


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
    collection = stores.write_collection(tmp_path, stores.draw_collection(SeededChooser(seed), most_datasets=2))
    for path, written in zip(collection.paths, collection.written, strict=True):
        for name, values in written.items():
            _assert_same(read_element(path, name), values)


def test_anndata_reads_what_was_written(tmp_path: Path) -> None:
    dataset = DatasetSpec(
        n_obs=23,
        zarr_format=3,
        consolidated=True,
        elements={
            "X": stores.draw_csr(SeededChooser(1), 23, 40, 3),
            "obsm/pca": stores.draw_dense(SeededChooser(2), (23, 5), 3),
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


@dataclass(frozen=True)
class Plan:
    """Sizes of a native sampling: `batch_size` divides `chunk_size * preload_nchunks`."""

    chunk_size: int
    preload_nchunks: int
    batch_size: int

    @property
    def window(self) -> int:
        """Rows of a preload window."""
        return self.chunk_size * self.preload_nchunks

    def config(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The sampling configuration."""
        sizes = {"chunk_size": self.chunk_size, "preload_nchunks": self.preload_nchunks, "batch_size": self.batch_size}
        return {"kind": kind, **sizes, **fields}


@st.composite
def plans(draw: Any, most_rows: int = 40) -> Plan:
    """A plan whose window is at most `most_rows` rows."""
    chunk_size = draw(st.integers(1, most_rows))
    preload = draw(st.integers(1, max(1, most_rows // chunk_size)))
    window = chunk_size * preload
    return Plan(chunk_size, preload, draw(st.sampled_from([n for n in range(1, window + 1) if window % n == 0])))


@dataclass
class Case:
    """One random store and how it is read."""

    specs: list[DatasetSpec]
    elements: dict[str, str]
    plan: Plan
    seed: int
    options: dict[str, Any]


@st.composite
def cases(draw: Any) -> Case:
    """Random stores, the elements in random order with dtype requests, sizes and options."""
    specs = stores.draw_collection(stores.HypothesisChooser(draw))
    names = draw(st.permutations(list(specs[0].elements)))
    options = {
        "threads": draw(st.sampled_from([None, 1, 3])),
        "io_depth": draw(st.sampled_from([None, 1, 2])),
        "batches_ahead": draw(st.sampled_from([None, 0, 1, 2])),
    }
    elements = {name: draw(st.sampled_from(["torch", "native"])) for name in names}
    return Case(specs, elements, draw(plans()), draw(st.integers(0, 2**31)), options)


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
        for spec in stores.draw_collection(SeededChooser(seed)):
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


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three stores, 71 + 1 + 38 rows: X sharded, unsharded and of format 2, layers/counts beside it, obsm dense."""
    specs = []
    for i, (n_obs, zarr_format) in enumerate([(71, 3), (1, 2), (38, 3)]):
        sharded = ArrayLayout(3, (13,), (39,), "blosc lz4 shuffle")
        flat = ArrayLayout(zarr_format, (17,), codec="zstd", separator=".")
        layout = sharded if i == 0 else flat
        csr = dict.fromkeys(("indptr", "indices", "data"), layout)
        specs.append(
            DatasetSpec(
                n_obs,
                zarr_format,
                consolidated=False,
                elements={
                    "X": CsrSpec((n_obs, 30), "any", False, "f4", "i4", "i8", i, csr),
                    "layers/counts": CsrSpec((n_obs, 30), "sparse", False, "u2", "u1", "i4", i + 9, csr),
                    "obsm/pca": DenseSpec((n_obs, 5), False, "f4", i, ArrayLayout(zarr_format, (7, 3))),
                },
            )
        )
    return stores.write_collection(tmp_path_factory.mktemp("fixed"), specs)


@pytest.fixture(scope="module")
def reference(collection: Collection) -> Reference:
    """The rows of `collection`."""
    return Reference.of(collection)


@pytest.fixture(scope="module")
def parent(collection: Collection) -> Any:
    """`collection`, opened once for the whole file."""
    with opened(collection.config()) as state:
        yield state


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


# ---------------------------------------------------------------------------------------------- elements and dtypes


@pytest.mark.parametrize("elements", [["obsm/pca"], ["layers/counts", "X"], ["obsm/pca", "X", "layers/counts"]])
def test_elements_come_in_the_order_asked_for(collection: Collection, elements: list[str]) -> None:
    reference = Reference.of(collection, elements)
    with opened(collection.config(elements, sampling=Plan(8, 3, 12).config("random"))) as state:
        reference.check_once(reference.epoch(state, 1))
        described = _ops.describe(state)
    assert [element["name"] for element in described["elements"]] == elements
    assert described["n_obs"] == reference.n_obs
    assert [dataset["n_obs"] for dataset in described["datasets"]] == [71, 1, 38]
    assert [dataset["offset"] for dataset in described["datasets"]] == [0, 71, 72]


@bounded(40)
@given(stored=st.lists(st.sampled_from(stores.DATA_DTYPES), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_dtypes_are_promoted_as_numpy_does(stored: list[str], seed: int) -> None:
    """Datasets of other dtypes, in memory: "native", "torch" and every explicit dtype that holds them all."""
    rng = np.random.default_rng(seed)
    arrays = [stores.random_values(rng, dtype, (4, 3), blocky=False) for dtype in stored]
    datasets = [{"name": f"memory{i}", "sources": {"X": {"dense": {"data": i}}}} for i in range(len(arrays))]
    kinds = [np.dtype(dtype) for dtype in stored]
    for request in ("native", "torch", *(np.dtype(name).name for name in stores.DATA_DTYPES)):
        holds = request in ("native", "torch") or all(np.can_cast(kind, request, "safe") for kind in kinds)
        config = {
            "elements": [{"name": "X", "dtype": request}],
            "datasets": datasets,
            "sampling": Plan(4, 1, 4).config("sequential"),
        }
        buffers = [torch.from_numpy(array) for array in arrays]
        if not holds:
            with pytest.raises((TypeError, ValueError), match=request):
                _ops.open_state(config, buffers)
            continue
        reference = Reference([{"X": array} for array in arrays], {"X": request})
        with opened(config, buffers) as state:
            (described,) = _ops.describe(state)["elements"]
            assert described["dtype"] == delivered_dtype(kinds, request).name
            assert described["stored_dtypes"] == [kind.name for kind in kinds]
            reference.check_once(reference.epoch(state))


def test_uint64_beyond_int64_is_an_error_not_a_negative_number() -> None:
    values = torch.from_numpy(np.array([[1], [2**63]], np.uint64))
    config = {
        "elements": [{"name": "X"}],
        "datasets": [{"name": "memory0", "sources": {"X": {"dense": {"data": 0}}}}],
        "sampling": Plan(2, 1, 2).config("sequential"),
    }
    with opened(config, [values]) as state:
        _ops.start(state, 0)
        with pytest.raises((_ops.DataError, ValueError), match=r"9223372036854775808|uint64|int64"):
            load(state)


# ---------------------------------------------------------------------------------------------- in memory


def _lend(values: Csr | np.ndarray, buffers: list[torch.Tensor], index: str, indptr: str) -> dict[str, Any]:
    """Put an element's arrays into `buffers`; the source that names them."""
    first = len(buffers)
    if isinstance(values, np.ndarray):
        buffers.append(torch.from_numpy(values))
        return {"dense": {"data": first}}
    arrays = (values.indptr.astype(indptr), values.indices.astype(index), values.data)
    buffers.extend(map(torch.from_numpy, arrays))
    return {"csr": {"indptr": first, "indices": first + 1, "data": first + 2, "shape": list(values.shape)}}


@bounded(25)
@given(case=cases(), on_disk=st.lists(st.booleans(), min_size=5, max_size=5))
def test_sources_in_memory_and_on_disk(case: Case, on_disk: list[bool]) -> None:
    """Some datasets in memory, some on disk, and elements of one dataset in either place."""
    with tempfile.TemporaryDirectory() as folder:
        names = list(case.elements)
        collection = stores.write_collection(Path(folder), case.specs[:3])
        reference = Reference.of(collection, case.elements)
        config = collection.config(case.elements, sampling=case.plan.config("random"))
        buffers: list[torch.Tensor] = []
        for i, (dataset, written) in enumerate(zip(config["datasets"], collection.written, strict=True)):
            lent = names if not on_disk[i] else names[1:]
            elements = collection.specs[i].elements
            dataset["sources"] = {
                name: _lend(written[name], buffers, getattr(elements[name], "index_dtype", ""), "i8") for name in lent
            }
            if not on_disk[i]:
                del dataset["path"]
        with opened(config, buffers) as state:
            del buffers
            reference.check_once(reference.epoch(state, case.seed, hold=True))


def test_an_element_may_lie_elsewhere(collection: Collection) -> None:
    """`path` of a source: layers/counts is served from the X group of the same store."""
    config = collection.config(["layers/counts"], sampling=Plan(9, 2, 6).config("random"))
    for dataset in config["datasets"]:
        dataset["sources"] = {"layers/counts": {"path": str(Path(dataset["path"]) / "X")}}
    reference = Reference(
        [{"layers/counts": written["X"]} for written in collection.written], {"layers/counts": "torch"}
    )
    with opened(config) as state:
        reference.check_once(reference.epoch(state, 3))


# ---------------------------------------------------------------------------------------------- running ahead


def _batch_bytes(reference: Reference, batches: list[np.ndarray]) -> int:
    """Bytes of the largest batch."""
    largest = 0
    for rows in batches:
        size = 8 * len(rows)
        for element in reference.elements:
            values = element.take([reference.locate(row) for row in rows])
            size += values.nbytes if isinstance(values, np.ndarray) else values.data.nbytes + 8 * len(values.indices)
        largest = max(largest, size)
    return largest


@pytest.mark.parametrize("ahead", [None, 0, 1])
def test_a_whole_epoch_is_held_under_a_budget_of_one_batch(
    parent: Any, reference: Reference, ahead: int | None
) -> None:
    config = {"sampling": Plan(5, 4, 10).config("random")}
    with streaming(parent, config) as state:
        free = reference.epoch(state, 9)
    budget = _batch_bytes(reference, free)
    with streaming(parent, {**config, "memory_budget": budget, "batches_ahead": ahead}) as state:
        held = reference.epoch(state, 9, hold=True)
    assert [rows.tolist() for rows in held] == [rows.tolist() for rows in free], "a budget must not change the order"


def test_the_next_window_is_read_while_the_consumer_works(parent: Any, reference: Reference) -> None:
    """One batch is taken, nothing more is asked for, and yet batches of later windows become ready."""
    with streaming(parent, {"sampling": Plan(5, 2, 5).config("sequential"), "batches_ahead": 4}) as state:
        _ops.start(state, 0)
        first = load(state)
        deadline = time.monotonic() + 20
        while (stats := _ops.stats(state))["batches_ready"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stats["batches_ready"] >= 4 and stats["windows_planned"] >= 2, stats
        assert stats["batches_delivered"] == 1
        reference.check_batch(first)
        assert len(reference.drain(state)) == 21


def test_statistics_count_bytes_and_chunks(collection: Collection) -> None:
    """One pass over unsharded raw chunks reads each byte once."""
    with tempfile.TemporaryDirectory() as folder:
        layout = ArrayLayout(3, (10, 4), write_empty_chunks=True)
        spec = DatasetSpec(40, 3, False, {"X": DenseSpec((40, 4), False, "f4", 1, layout)})
        raw = stores.write_collection(Path(folder), [spec])
        with opened(raw.config(sampling=Plan(10, 2, 20).config("sequential"))) as state:
            reference = Reference.of(raw)
            reference.check_once(reference.epoch(state))
            stats = _ops.stats(state)
    assert stats["bytes_read"] == 40 * 4 * 4
    assert stats["chunks_decoded"] == 4
    assert stats["batches_delivered"] >= 2


def test_default_stores_take_the_fast_path(collection: Collection, parent: Any, reference: Reference) -> None:
    with streaming(parent, {"sampling": Plan(10, 2, 20).config("random")}) as state:
        reference.epoch(state, 0)
        assert _ops.stats(state)["chunks_general_path"] == 0


def test_locate_names_the_store_and_the_row(parent: Any, collection: Collection, reference: Reference) -> None:
    found = _ops.locate(parent, torch.tensor([109, 0, 70, 71, 72]))
    assert [entry["row"] for entry in found] == [109, 0, 70, 71, 72]
    assert [entry["dataset"] for entry in found] == [2, 0, 0, 1, 2]
    assert [entry["local_row"] for entry in found] == [37, 0, 70, 0, 0]
    assert [entry["path"] for entry in found] == [str(collection.paths[i]) for i in (2, 0, 0, 1, 2)]
    csr = collection.written[2]["X"]
    first, last = found[0]["chunks"]["X"]["data"]
    assert csr.indptr[38] > csr.indptr[37], "the row was meant to hold entries"
    assert (first, last) == (csr.indptr[37] // 17, (csr.indptr[38] - 1) // 17)


# ---------------------------------------------------------------------------------------------- by hand


def _snappy(raw: bytes, typesize: int) -> bytes:
    """A Blosc frame of one block in the format snappy, of literals only (numcodecs cannot write snappy).

    https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst and
    https://github.com/google/snappy/blob/main/format_description.txt
    """
    length, varint = len(raw), b""
    while True:
        varint += bytes([length & 0x7F | (0x80 if length > 0x7F else 0)])
        length >>= 7
        if not length:
            break
    literals = b"".join(bytes([60 << 2, len(raw[i : i + 256]) - 1]) + raw[i : i + 256] for i in range(0, len(raw), 256))
    stream = varint + literals
    block = struct.pack("<i", len(stream)) + stream
    do_not_split, snappy_format = 0x10, 2 << 5
    header = struct.pack(
        "<BBBBIII", 2, 1, do_not_split | snappy_format, typesize, len(raw), len(raw), 16 + 4 + len(block)
    )
    return header + struct.pack("<i", 20) + block


def test_blosc_snappy(tmp_path: Path) -> None:
    layout = ArrayLayout(2, (64, 7), codec="none", write_empty_chunks=True, separator=".")
    spec = DatasetSpec(100, 2, False, {"X": DenseSpec((100, 7), False, "f4", 3, layout)})
    collection = stores.write_collection(tmp_path, [spec])
    reference = Reference.of(collection)
    array = collection.paths[0] / "X"
    for chunk in array.glob("[0-9]*"):
        chunk.write_bytes(_snappy(chunk.read_bytes(), 4))
    metadata = array / ".zarray"
    blosc = '{"id": "blosc", "cname": "snappy", "clevel": 5, "shuffle": 0, "blocksize": 0}'
    text = metadata.read_text()
    assert '"compressor": null' in text
    metadata.write_text(text.replace('"compressor": null', f'"compressor": {blosc}'))
    with opened(collection.config(sampling=Plan(10, 2, 20).config("random"))) as state:
        reference.check_once(reference.epoch(state, 0))


def test_rows_with_unsorted_columns_keep_their_entries(tmp_path: Path) -> None:
    """AnnData does not promise sorted columns; the same entries must arrive, in whichever order."""
    root = zarr.open_group(tmp_path / "dataset_0.zarr", mode="w", zarr_format=3)
    csr = Csr(np.array([0, 3, 3, 5]), np.array([4, 0, 2, 3, 1]), np.arange(1, 6, dtype="f4"), (3, 5))
    layouts = dict.fromkeys(("indptr", "indices", "data"), ArrayLayout(3, (2,)))
    stores.write_csr(root, "X", csr, CsrSpec((3, 5), "", False, "f4", "i4", "i8", 0, layouts))
    collection = Collection([tmp_path / "dataset_0.zarr"], [{"X": csr}])
    with opened(collection.config(sampling=Plan(3, 1, 3).config("sequential"))) as state:
        _ops.start(state, 0)
        rows, indptr, indices, data = (tensor.numpy() for tensor in load(state))
    got = Csr(indptr.astype(np.int64), indices.astype(np.int64), data, (3, 5))
    np.testing.assert_array_equal(got.to_dense(), csr.to_dense()[rows])


def test_an_element_without_entries_or_with_one_row(tmp_path: Path) -> None:
    csr = dict.fromkeys(("indptr", "indices", "data"), ArrayLayout(3, (4,), (8,), "blosc lz4 shuffle"))
    specs = [
        DatasetSpec(n_obs, 3, False, {"X": CsrSpec((n_obs, 6), pattern, False, "f4", "i4", "i8", 0, csr)})
        for n_obs, pattern in [(3, "empty"), (1, "full"), (0, "empty"), (2, "empty")]
    ]
    collection = stores.write_collection(tmp_path, specs)
    reference = Reference.of(collection)
    with opened(collection.config(sampling=Plan(2, 2, 2).config("random"))) as state:
        reference.check_once(reference.epoch(state, 0))
