"""Batches of elements of every dtype, from memory and disk, under budgets, and of stores made by hand."""

from __future__ import annotations

import re
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import example, given
from hypothesis import strategies as st

from annbatch._core import ops as _ops
from support import stores
from support.oracle import Reference, delivered_dtype, load, opened, streaming
from support.sampling import Case, Plan, bounded, cases
from support.stores import ArrayLayout, Collection, Csr, CsrSpec, DatasetSpec, DenseSpec

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


# pairs promoted one after the other would give float32 and float64: NumPy weighs all of them at once
@example(stored=["i1", "u1", "f2"], seed=0)
@example(stored=["u2", "i1", "f4"], seed=0)
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
    # the core says what one batch takes (its memory comes in pages), and serves the epoch with exactly that
    too_little = {**config, "memory_budget": _batch_bytes(reference, free) // 2, "batches_ahead": ahead}
    with streaming(parent, too_little) as state, pytest.raises(MemoryError, match="memory_budget") as refused:
        reference.epoch(state, 9)
    budget = int(re.search(r"needs (\d+) bytes", str(refused.value))[1])
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
    assert [entry["dataset"] for entry in found] == ["ds2", "ds0", "ds0", "ds1", "ds2"]
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


_INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("index", _INTEGERS)
@pytest.mark.parametrize("pointer", _INTEGERS)
def test_row_pointers_and_column_indices_of_every_integer_type(
    tmp_path: Path, pointer: str, index: str, in_memory: bool
) -> None:
    csr = Csr(np.array([0, 3, 3, 5]), np.array([0, 2, 126, 1, 3]), np.arange(1, 6, dtype="f4"), (3, 127))
    buffers = [csr.indptr.astype(pointer), csr.indices.astype(index), csr.data]
    if in_memory:
        source = {"csr": {"indptr": 0, "indices": 1, "data": 2, "shape": [3, 127]}}
    else:
        root = zarr.open_group(tmp_path, mode="w", zarr_format=3)
        layouts = dict.fromkeys(("indptr", "indices", "data"), ArrayLayout(3, (2,)))
        stores.write_csr(root, "X", csr, CsrSpec((3, 127), "", False, "f4", index, pointer, 0, layouts))
        source = {"path": str(tmp_path / "X")}
    config = {
        "elements": [{"name": "X"}],
        "datasets": [{"sources": {"X": source}}],
        "sampling": Plan(2, 2, 2).config("random"),
    }
    reference = Reference([{"X": csr}], {"X": "torch"})
    with opened(config, [torch.from_numpy(array) for array in buffers] if in_memory else []) as state:
        reference.check_once(reference.epoch(state, 1))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("pointers", "columns", "said"),
    [
        (np.array([0, 2**63, 3], "u8"), None, f"X/indptr: row pointer 1 is {2**63}; expected .* below 2\\^63"),
        (np.array([0, 2, 2**64 - 1], "u8"), None, "X/indptr: row pointer 2 is 18446744073709551615"),
        (np.array([0, -1, 3], "i1"), None, "X/indptr: row pointer 1 is -1"),
        (np.array([0, 200, 3], "u1"), None, "X/indptr: row pointers decrease: 200 at 1 and then 3 at 2"),
        (np.array([0.0, 2.0, 3.0]), None, "row pointers have type float64; expected a type of integers"),
        (None, np.array([0, 2**64 - 1, 1], "u8"), "row 0: a column index .* n_var = 4 .* 18446744073709551615"),
        (None, np.array([0, 2**32, 1], "u8"), "row 0: a column index .* n_var = 4"),
        (None, np.array([0, 3, 4], "u2"), "row 1: a column index .* n_var = 4"),
        (None, np.array([0, 3, -1], "i2"), "row 1: a column index is negative"),
        (None, np.array([0.0, 2.0, 1.0]), "column indices have type float64; expected a type of integers"),
    ],
)
def test_row_pointers_and_column_indices_that_do_not_fit_are_named(
    tmp_path: Path, pointers: np.ndarray | None, columns: np.ndarray | None, said: str, in_memory: bool
) -> None:
    pointers = np.array([0, 2, 3]) if pointers is None else pointers
    columns = np.array([0, 2, 1]) if columns is None else columns
    buffers = [pointers, columns, np.ones(3, "f4")]
    if in_memory:
        source = {"csr": {"indptr": 0, "indices": 1, "data": 2, "shape": [2, 4]}}
    else:
        attributes = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [2, 4]}
        group = zarr.open_group(tmp_path, mode="w").create_group("X", attributes=attributes)
        for name, array in zip(("indptr", "indices", "data"), buffers, strict=True):
            group.create_array(name, data=array)
        source = {"path": str(tmp_path / "X")}
    config = {
        "elements": [{"name": "X"}],
        "datasets": [{"name": "mine", "sources": {"X": source}}],
        "sampling": Plan(2, 1, 2).config("sequential"),
    }
    lent = [torch.from_numpy(array) for array in buffers] if in_memory else []
    with pytest.raises((ValueError, TypeError, _ops.DataError), match=f'"mine".*{said}'), opened(config, lent) as state:
        _ops.start(state, 0)
        load(state)


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
