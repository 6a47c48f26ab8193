"""torch.ops.annbatch as a caller meets it: epochs, threads, lifetimes, refusals."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
import zarr

from annbatch._core import errors, fakes
from annbatch._core import ops as _ops
from support.small import N_PCA, N_VAR

op = torch.ops.annbatch

SUBMITTED = {"kind": "submitted"}


def _json(config) -> str:
    return json.dumps(config)


def load_epoch(state: torch.Tensor) -> list[list[torch.Tensor]]:
    """Batches up to the end of the epoch that is under way, without the empty one."""
    batches = []
    while len((batch := _ops.load(state))[0]):
        batches.append(batch)
    return batches


def rows_of(batches) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


# ---- epochs ----------------------------------------------------------------------------------------------------------
def test_state_is_a_small_aligned_tensor_on_the_cpu(small):
    state = op.open(_json(small.config()), [])
    assert state.dtype == torch.int64
    assert state.device.type == "cpu"
    assert state.dim() == 1
    assert 2 <= len(state) <= 65536
    assert state.data_ptr() % 64 == 0
    assert state[1:].count_nonzero() == 0


def test_an_epoch_delivers_every_row_once(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 7)
    batches = load_epoch(state)
    rows = [row for batch in batches for row in small.check(batch)]
    assert sorted(rows) == list(range(small.n_obs))
    assert rows != sorted(rows)
    assert [len(batch[0]) for batch in batches] == [8] * 6 + [5]
    assert [t.dtype for t in batches[0]] == [torch.int64, torch.int32, torch.int32, torch.float32]


def test_the_end_stays_the_answer_until_start(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 7)
    first = rows_of(load_epoch(state))
    for _ in range(3):
        rows, indptr, indices, data = _ops.load(state)
        assert (len(rows), indptr.tolist(), len(indices), len(data)) == (0, [0], 0, 0)
        assert op.ready(state, 0)
    _ops.start(state, 8)
    second = rows_of(load_epoch(state))
    assert sorted(sum(second, [])) == sorted(sum(first, []))
    assert second != first


def test_auto_restart_gives_the_end_once_and_goes_on(small):
    state = _ops.open_state(small.config(auto_restart=True, seed=3))
    epochs = [rows_of(load_epoch(state)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(small.n_obs))
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_is_a_function_of_its_seed(small):
    orders = []
    for _ in range(2):
        state = _ops.open_state(small.config())
        for seed in (5, 2**64 - 1, -1):
            _ops.start(state, seed)
            orders.append(rows_of(load_epoch(state)))
    assert orders[:3] == orders[3:]
    assert orders[1] == orders[2], "-1 and 2**64 - 1 are the same 64 bits"
    assert orders[0] != orders[1]


@pytest.mark.parametrize("first_batch", [0, 3, 6, 7])
def test_an_epoch_can_begin_in_the_middle(small, first_batch):
    state = _ops.open_state(small.config())
    _ops.start(state, 5)
    whole = rows_of(load_epoch(state))
    _ops.start(state, 5, first_batch)
    assert rows_of(load_epoch(state)) == whole[first_batch:]


def test_start_in_the_middle_of_an_epoch_begins_anew(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 5)
    whole = rows_of(load_epoch(state))
    _ops.start(state, 4)
    _ops.load(state)
    _ops.start(state, 5)
    assert rows_of(load_epoch(state)) == whole


def test_several_elements_come_in_the_order_asked_for(small):
    state = _ops.open_state(small.config(elements=("obsm/pca", "X")))
    _ops.start(state, 1)
    for rows, pca, indptr, indices, data in load_epoch(state):
        np.testing.assert_array_equal(pca.numpy(), small.pca[rows.numpy()])
        small.check((rows, indptr, indices, data))
    assert [tuple(t.shape) for t in _ops.load(state)] == [(0,), (0, N_PCA), (1,), (0,), (0,)]


def test_submitted_batches(small):
    state = _ops.open_state(small.config(sampling=SUBMITTED))
    _ops.start(state, 0)
    assert not op.ready(state, 0)
    rows = torch.tensor([40, 2, 3, 4, 52])
    _ops.submit(state, rows, torch.tensor([4, 0, 0, 3, 1]), torch.tensor([3, 2]))
    _ops.submit(state, torch.tensor([7]), torch.tensor([0]), torch.tensor([1]))
    assert [small.check(_ops.load(state)) for _ in range(3)] == [[52, 40, 40], [4, 2], [7]]
    assert not op.ready(state, 0), "more may be submitted"
    _ops.finish(state)
    assert op.ready(state, 1000)
    assert len(_ops.load(state)[0]) == 0
    _ops.start(state, 0)
    _ops.submit(state, rows, torch.tensor([1]), torch.tensor([1]))
    assert small.check(_ops.load(state)) == [2]


def test_stream_reads_the_same_collection_and_keeps_it(small):
    state = _ops.open_state(small.config(sampling=None))
    streams = [_ops.stream(state, {"sampling": small.config()["sampling"]}) for _ in range(2)]
    _ops.stream(state, {"sampling": SUBMITTED})
    del state
    gc.collect()
    for stream in streams:
        _ops.start(stream, 5)
    first, second = (load_epoch(stream) for stream in streams)
    assert rows_of(first) == rows_of(second)
    for batch in first:
        small.check(batch)


# ---- what is said about a state --------------------------------------------------------------------------------------
def test_describe_stats_and_locate(small):
    state = _ops.open_state(small.config(elements=("X", "obsm/pca")))
    description = _ops.describe(state)
    assert description["n_obs"] == small.n_obs
    assert [d["n_obs"] for d in description["datasets"]] == [30, 23]
    assert [d["offset"] for d in description["datasets"]] == [0, 30]
    x, pca = description["elements"]
    assert (x["name"], x["kind"], x["dtype"], x["n_var"]) == ("X", "csr", "float32", N_VAR)
    assert x["nnz"] == np.count_nonzero(small.x)
    assert (pca["name"], pca["kind"], pca["tail"]) == ("obsm/pca", "dense", [N_PCA])
    assert description["n_batches"] == 7
    # left to the core, and more than two windows of this store
    assert description["memory_budget"] == _ops.stats(state)["memory_budget"] == 48 * 2**20
    asked = _ops.stream(state, {"sampling": None, "memory_budget": "10MB"})
    assert _ops.describe(asked)["memory_budget"] == _ops.stats(asked)["memory_budget"] == 10_000_000

    _ops.start(state, 5)
    load_epoch(state)
    stats = _ops.stats(state)
    assert stats["batches_delivered"] == 7
    assert stats["bytes_read"] > 0

    located = _ops.locate(state, torch.tensor([31, 0]))
    assert [entry["row"] for entry in located] == [31, 0]
    assert [entry["local_row"] for entry in located] == [1, 0]
    assert [entry["path"] for entry in located] == [small.paths[1], small.paths[0]]


def test_the_default_budget_is_two_windows_where_they_take_more(tmp_path):
    n, n_var = 5, 2**23
    zarr.create_array(tmp_path / "X", shape=(2 * n, n_var), chunks=(1, n_var), dtype="f4", fill_value=0)
    sampling = {"kind": "sequential", "chunk_size": n, "preload_nchunks": 1, "batch_size": 1}
    state = _ops.open_state({"datasets": [{"path": str(tmp_path)}], "elements": [{"name": "X"}], "sampling": sampling})
    _ops.start(state, 0)
    op.load(state)
    budget = _ops.stats(state)["memory_budget"]
    # row numbers and whole pages come on top
    assert 2 * n * n_var * 4 <= budget < 2 * n * n_var * 4 * 1.05
    _ops.close(state)


def test_layout_is_named_by_the_length_of_the_state(small):
    state = _ops.open_state(small.config(elements=("X", "obsm/pca")))
    again = _ops.open_state(small.config(elements=("X", "obsm/pca"), seed=4))
    other = _ops.open_state(small.config(elements=("obsm/pca", "X")))
    assert len(state) == len(again) != len(other)
    x, pca = fakes.layout(len(state))
    assert x == {"name": "X", "kind": "csr", "dtype": "float32", "index_dtype": "int32"}
    assert pca == {"name": "obsm/pca", "kind": "dense", "dtype": "float32", "tail": [N_PCA]}


# ---- threads and lifetimes -------------------------------------------------------------------------------------------
def test_threads_get_each_batch_once(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 7)
    expected = sorted(rows_of(load_epoch(state)))
    for _ in range(5):
        _ops.start(state, 7)
        got: list[list[int]] = []

        def consume(got=got):
            for batch in load_epoch(state):
                got.append(small.check(batch))

        threads = [threading.Thread(target=consume) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a thread waits although the epoch is over"
        assert sorted(got) == expected


def test_batches_outlive_the_state_and_return_their_buffers(small):
    state = _ops.open_state(small.config(batches_ahead=1))
    _ops.start(state, 7)
    batches = load_epoch(state)
    _ops.load(state)
    held = _ops.stats(state)["leases_out"]
    assert held >= len(batches)
    views = [batch[3][1:] for batch in batches[:2]]
    copies = [view.clone() for view in views]
    last = batches.pop()
    batches.clear()
    gc.collect()
    assert 0 < _ops.stats(state)["leases_out"] < held, "views keep their buffers, and only theirs"
    _ops.close(state)
    small.check(last)
    del state
    gc.collect()
    small.check(last)
    # the last reference dies on a thread that never saw the state
    box = [last, views]
    del last
    thread = threading.Thread(
        target=lambda: [torch.equal(*pair) for pair in zip(views, copies, strict=True)] and box.clear()
    )
    thread.start()
    thread.join()
    assert all(torch.equal(*pair) for pair in zip(views, copies, strict=True))


def test_a_dropped_state_stops_its_pipeline(small):
    for _ in range(20):
        state = _ops.open_state(small.config())
        _ops.start(state, 1)
        _ops.load(state)
        del state
    state = _ops.open_state(small.config())
    _ops.start(state, 1)
    assert len(load_epoch(state)) == 7


def test_buffers_are_read_in_place_and_kept_alive(small):
    import scipy.sparse as sp

    csr = sp.csr_matrix(small.x)
    buffers = [torch.from_numpy(a.copy()) for a in (csr.indptr, csr.indices, csr.data)]
    config = small.config(
        datasets=[
            {
                "name": "in memory",
                "sources": {"X": {"csr": {"indptr": 0, "indices": 1, "data": 2, "shape": list(csr.shape)}}},
            }
        ]
    )
    state = _ops.open_state(config, buffers)
    addresses = {b.data_ptr() for b in buffers}
    del buffers
    gc.collect()
    fresh = [torch.full((n,), -1, dtype=torch.int32) for n in (54, csr.nnz) for _ in range(50)]
    assert not addresses & {t.data_ptr() for t in fresh}, "the state lets go of memory it reads"
    _ops.start(state, 3)
    assert sorted(row for batch in load_epoch(state) for row in small.check(batch)) == list(range(small.n_obs))


# ---- states that are none --------------------------------------------------------------------------------------------
def _pickled(state):
    return pickle.loads(pickle.dumps(state))


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def _forged(state):
    forged = torch.zeros_like(state)
    forged[0] = state[0] + 1000
    return forged


CALLS = {
    "load": lambda state: op.load(state),
    "ready": lambda state: op.ready(state, 0),
    "start": lambda state: op.start(state, 1),
    "finish": lambda state: op.finish(state),
    "submit": lambda state: op.submit(state, *[torch.zeros(1, dtype=torch.int64)] * 3),
    "describe": lambda state: op.describe(state),
    "stats": lambda state: op.stats(state),
    "locate": lambda state: op.locate(state, torch.zeros(1, dtype=torch.int64)),
    "stream": lambda state: op.stream(state, "{}"),
    "close": lambda state: op.close(state),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "spoil",
    [torch.clone, copy.deepcopy, _pickled, _saved, _forged, torch.zeros_like, lambda s: s.double(), lambda s: s[None]],
    ids=["cloned", "deep-copied", "pickled", "saved", "forged", "zeros", "float", "matrix"],
)
def test_what_is_no_state_raises(small, spoil, call):
    state = _ops.open_state(small.config())
    _ops.start(state, 1)
    with pytest.raises(RuntimeError, match=r"^\[annbatch:(Closed|InvalidArgument)\] "):
        CALLS[call](spoil(state))
    small.check(_ops.load(state))


@pytest.mark.parametrize("call", [name for name in CALLS if name not in ("close", "stats", "describe")])
def test_a_closed_state_raises(small, call):
    state = _ops.open_state(small.config())
    _ops.start(state, 1)
    _ops.load(state)
    _ops.close(state)
    with pytest.raises(RuntimeError, match=r"^\[annbatch:Closed\] .*closed"):
        CALLS[call](state)


def test_closing_wakes_a_waiting_thread(small):
    state = _ops.open_state(small.config(sampling=SUBMITTED))
    _ops.start(state, 1)
    errors = []

    def wait():
        try:
            _ops.load(state)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    _ops.close(state)
    thread.join(5)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]


def test_a_forked_child_is_told_that_the_state_is_not_its_own(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 1)
    small.check(_ops.load(state))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # os._exit: nothing of pytest must run twice
        try:
            _ops.load(state)
            answer = "no error"
        except RuntimeError as error:
            answer = str(error)
        try:
            own = _ops.open_state(small.config())
            _ops.start(own, 1)
            answer += f" | {len(load_epoch(own))} batches of its own"
        except BaseException as error:
            answer += f" | {error!r}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "fork" in answer
    assert "7 batches of its own" in answer
    assert len(load_epoch(state)) == 6, "the parent goes on"


# ---- errors and devices ----------------------------------------------------------------------------------------------
def test_errors_have_the_class_of_their_kind(small, tmp_path):
    missing = small.config(datasets=[{"path": str(tmp_path / "none.zarr")}])
    with pytest.raises(FileNotFoundError, match=r"none\.zarr"):
        _ops.open_state(missing)
    with pytest.raises(RuntimeError, match=r"^\[annbatch:NotFound\] .*none\.zarr"):
        op.open(_json(missing), [])
    for kind, cls in errors.CLASSES.items():
        converted = errors.python_error(RuntimeError(f"[annbatch:{kind}] what\nhappened"))
        assert type(converted) is cls
        assert str(converted) == "what\nhappened"
    for text in ("of torch's own", "[annbatch:Unheard] of"):
        error = RuntimeError(text)
        assert errors.python_error(error) is error


def test_batches_on_other_devices(small):
    state = _ops.open_state(small.config())
    _ops.start(state, 5)
    whole = load_epoch(state)
    _ops.start(state, 5)
    small.check(_ops.load(state, device="cpu"))
    # the device without memory takes the way of every device that is not the CPU
    there = _ops.load(state, device="meta")
    assert {t.device.type for t in there} == {"meta"}
    assert [(t.shape, t.dtype) for t in there] == [(t.shape, t.dtype) for t in whole[1]]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device"):
            _ops.load(state, device="cuda")
    assert rows_of(load_epoch(state)) == rows_of(whole[2:]), "a refused device costs no batch"


def test_a_batch_that_cannot_be_copied_comes_again(small):
    """Where the copy to a device fails the rows are not lost: the next load has them, whatever its device."""

    @contextlib.contextmanager
    def memory_for(copies: int):
        left = copies

        def allocate(size, stride, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("out of memory on the device")
            return torch.empty(size, dtype=kwargs["dtype"], device="meta")

        library = torch.library.Library("aten", "IMPL")
        library.impl("empty_strided", allocate, "Meta", allow_override=True)
        try:
            yield
        finally:
            library._destroy()

    state = _ops.open_state(small.config())
    _ops.start(state, 5)
    whole = load_epoch(state)
    _ops.start(state, 5)
    for _ in range(2):
        with memory_for(2), pytest.raises(RuntimeError, match="batch is kept"):
            _ops.load(state, device="meta")
        assert _ops.ready(state, 0)
    assert rows_of(load_epoch(state)) == rows_of(whole)
    _ops.start(state, 5)
    with memory_for(0), pytest.raises(RuntimeError, match="batch is kept"):
        _ops.load(state, device="meta")
    _ops.start(state, 5)
    assert rows_of(load_epoch(state)) == rows_of(whole), "a new epoch does not begin with a batch of the old one"
    with memory_for(0), pytest.raises(RuntimeError, match="batch is kept"):
        _ops.start(state, 5)
        _ops.load(state, device="meta")
    _ops.close(state)
    with pytest.raises(RuntimeError, match="closed"):
        _ops.load(state)
