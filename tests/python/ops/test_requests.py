"""Requests that cannot be met: configurations, sizes, rows and buffers are refused by name, and none is paid for.

`test_op_arguments.py` has what the ops check before the core sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from annbatch._core import ops as _ops
from support import stores
from support.oracle import Reference, load, opened
from support.processes import run_python
from support.stores import ArrayLayout, Collection, DatasetSpec, DenseSpec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """One store of 48 dense rows."""
    spec = DatasetSpec(48, 3, False, {"X": DenseSpec((48, 3), False, "f4", 1, ArrayLayout(3, (10, 3)))})
    return stores.write_collection(tmp_path_factory.mktemp("healthy"), [spec])


def _config(healthy: Collection, *path: object, value: object = None) -> dict:
    """A good configuration with the field at `path` set (with `...` for a value: deleted)."""
    config = healthy.config(sampling={"kind": "random", "chunk_size": 6, "preload_nchunks": 2, "batch_size": 4})
    where = config
    for key in path[:-1]:
        where = where[key]
    if value is ...:
        del where[path[-1]]
    elif path:
        where[path[-1]] = value
    return config


_CSR = {"csr": {"indptr": 0, "indices": 1, "data": 2, "shape": [2, 3]}}

REFUSED_FIELDS: list[tuple[tuple[object, ...], object, str]] = [
    (("surprise",), 1, "surprise"),
    (("sampling", "surprise"), 1, "surprise"),
    (("elements", 0, "surprise"), 1, "surprise"),
    (("datasets", 0, "surprise"), 1, "surprise"),
    (("datasets", 0, "sources"), {"X": {"surprise": 1}}, "surprise"),
    (("datasets", 0, "sources"), {"layers/other": {"path": "/nowhere"}}, "layers/other"),
    (("datasets", 0, "sources"), {"X": {"path": "/x", "dense": {"data": 0}}}, "sources|X|path|dense"),
    (("datasets", 0, "sources"), {"X": {"dense": {"data": 0}}}, "buffer"),
    (("datasets", 0, "sources"), {"X": _CSR}, "buffer"),
    (("datasets",), ..., "datasets"),
    (("datasets",), [], "datasets"),
    (("datasets", 0, "path"), ..., "path"),
    (("datasets", 0, "path"), 5, "path|string"),
    (("elements",), ..., "elements"),
    (("elements",), [], "elements"),
    (("elements",), [{"name": "X"}, {"name": "X"}], "X"),
    (("elements", 0, "dtype"), "floaty", "floaty"),
    (("elements", 0, "dtype"), "int8", "int8"),
    (("sampling",), "random", "sampling"),
    (("sampling", "kind"), "shuffled", "shuffled"),
    (("sampling", "kind"), ..., "kind"),
    (("sampling", "batch_size"), 0, "batch_size"),
    (("sampling", "batch_size"), -1, "sampling|batch_size"),
    (("sampling", "batch_size"), 2.5, "batch_size|integer|float"),
    (("sampling", "batch_size"), "4", "batch_size|string"),
    (("sampling", "batch_size"), 2**64, "sampling|batch_size"),
    (("sampling", "batch_size"), 13, "batch_size"),
    (("sampling", "batch_size"), 5, "batch_size"),
    (("sampling", "chunk_size"), 0, "chunk_size"),
    (("sampling", "preload_nchunks"), 0, "preload_nchunks"),
    (("sampling", "preload_nchunks"), -3, "sampling|preload_nchunks"),
    (("sampling", "mask"), [5, 5], "mask"),
    (("sampling", "mask"), [9, 3], "mask"),
    (("sampling", "mask"), [0, 49], "mask"),
    (("sampling", "mask"), [-1, 9], "sampling|mask"),
    (("sampling", "mask"), [1, 2, 3], "mask|length"),
    (("sampling", "num_samples"), 0, "num_samples"),
    (("sampling", "num_samples"), 49, "num_samples"),
    (("sampling", "part"), [2, 2], "part"),
    (("sampling", "part"), [0, 0], "part"),
    (("sampling", "part"), [-1, 2], "sampling|part"),
    (("sampling", "replacement"), "yes", "replacement|bool"),
    (("threads",), 0, "threads"),
    (("threads",), -1, "threads"),
    (("threads",), 10**9, "threads"),
    (("io_depth",), 0, "io_depth"),
    (("batches_ahead",), -1, "batches_ahead"),
    (("memory_budget",), 0, "memory_budget"),
    (("memory_budget",), -5, "memory_budget"),
    (("memory_budget",), "two gigabytes", "memory_budget|two gigabytes"),
    (("auto_restart",), 3, "auto_restart|bool"),
    (("seed",), "x", "seed|string"),
]


@pytest.mark.parametrize(("path", "value", "says"), REFUSED_FIELDS)
def test_wrong_configurations_are_refused_by_name(
    healthy: Collection, path: tuple[object, ...], value: object, says: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        _ops.close(_ops.open_state(_config(healthy, *path, value=value)))


@pytest.mark.parametrize(
    "sampling",
    [
        {"kind": "submitted", "batch_size": 4},
        {"kind": "submitted", "mask": [0, 5]},
        {"kind": "sequential", "chunk_size": 4, "preload_nchunks": 2, "batch_size": 4, "replacement": True},
        {"kind": "random", "chunk_size": 20, "preload_nchunks": 1, "batch_size": 4, "replacement": True,
         "mask": [0, 9], "num_samples": 30},
    ],
)  # fmt: skip
def test_contradictory_sampling_is_refused(healthy: Collection, sampling: dict) -> None:
    with pytest.raises(ValueError, match=r"batch_size|mask|replacement|chunk_size"):
        _ops.close(_ops.open_state(healthy.config(sampling=sampling)))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{} {}", "\ud800".encode("utf-8", "replace").decode(), "[" * 10**5]
)
def test_configurations_that_are_no_json_are_refused(text: str) -> None:
    with pytest.raises(RuntimeError, match=r"\[annbatch:InvalidConfig\]"):
        torch.ops.annbatch.open(text, [])


@pytest.mark.parametrize("sizes", [(2**62, 1, 2**62), (2**40, 2**40, 1), (1, 2**62, 2**62), (2**31, 2**31, 2**62)])
@pytest.mark.parametrize("kind", ["random", "sequential"])
def test_absurd_sizes_are_refused_or_work(healthy: Collection, sizes: tuple[int, int, int], kind: str) -> None:
    chunk_size, preload_nchunks, batch_size = sizes
    sampling = {"kind": kind, "chunk_size": chunk_size, "preload_nchunks": preload_nchunks, "batch_size": batch_size}
    try:
        state = _ops.open_state(healthy.config(sampling=sampling))
    except (ValueError, MemoryError) as error:
        assert "chunk_size" in str(error) or "batch_size" in str(error)
        return
    reference = Reference.of(healthy)
    try:
        reference.check_once(reference.epoch(state))
    finally:
        _ops.close(state)


def test_absurd_replacement_is_refused_or_lazy(healthy: Collection) -> None:
    """2^62 rows with replacement: an endless epoch may begin, but not be drawn in advance."""
    sampling = {"kind": "random", "chunk_size": 4, "preload_nchunks": 1, "batch_size": 4, "replacement": True}
    try:
        state = _ops.open_state(healthy.config(sampling={**sampling, "num_samples": 2**62}))
    except (ValueError, MemoryError) as error:
        assert "num_samples" in str(error)
        return
    try:
        reference = Reference.of(healthy)
        _ops.start(state, 0)
        assert len(reference.check_batch(load(state))) == 4
    finally:
        _ops.close(state)


_ENDLESS = """
import sys
from pathlib import Path
from annbatch._core import ops as _ops
from support.damages import write_victim
collection = write_victim(Path(sys.argv[1]), "none")
for exponent in (33, 40, 60):
    sampling = {"kind": "random", "chunk_size": 1, "preload_nchunks": 2**exponent, "batch_size": 2**10,
                "replacement": True, "num_samples": 2**exponent}
    try:
        state = _ops.open_state(collection.config(sampling=sampling))
        _ops.start(state, 0)
        _ops.load(state)
    except (ValueError, MemoryError) as error:
        message = str(error)
        assert "preload_nchunks" in message or "num_samples" in message or "window" in message, message
    else:
        sys.exit(f"a window of 2^{exponent} rows was drawn")
"""


def test_windows_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    """A preload window of 2^33 rows or more, drawn with replacement from few: refused, not begun."""
    done = run_python(_ENDLESS, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_start_beyond_the_end_is_refused_or_the_end(healthy: Collection) -> None:
    with opened(_config(healthy)) as state:
        with pytest.raises(ValueError, match="first_batch"):
            _ops.start(state, 0, -1)
        try:
            _ops.start(state, 0, 2**62)
        except ValueError as error:
            assert "first_batch" in str(error)
        else:
            assert len(load(state)[0]) == 0


@pytest.mark.parametrize("rows", [[48], [-1], [2**62]])
def test_locate_refuses_rows_that_do_not_exist(healthy: Collection, rows: list[int]) -> None:
    with opened(_config(healthy)) as state, pytest.raises(ValueError, match=str(rows[0])):
        _ops.locate(state, torch.tensor(rows))


def test_submitting_to_a_native_sampling_is_refused(healthy: Collection) -> None:
    with opened(_config(healthy)) as state:
        _ops.start(state, 0)
        with pytest.raises((ValueError, RuntimeError), match="submit"):
            _ops.submit(state, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))


# ---------------------------------------------------------------------------------------------- buffers

_INDPTR, _INDICES, _DATA = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("buffers", "shape", "says"),
    [
        ([_INDPTR, _INDICES, _DATA], [3, 3], "indptr"),
        ([_INDPTR, _INDICES, _DATA], [2, 2], "2|column|n_var"),
        ([_INDPTR, _INDICES, _DATA], [2, -3], "shape|sources"),
        ([_INDPTR, _INDICES, _DATA], [2], "shape|sources"),
        ([_INDPTR, _INDICES[:2], _DATA], [2, 3], "indices"),
        ([_INDPTR, _INDICES, _DATA[:2]], [2, 3], "data"),
        ([_INDPTR.float(), _INDICES, _DATA], [2, 3], "indptr"),
        ([_INDPTR, _INDICES.float(), _DATA], [2, 3], "indices"),
        ([_INDPTR.flip(0), _INDICES, _DATA], [2, 3], "indptr"),
        ([_INDPTR + 1, _INDICES, _DATA], [2, 3], "indptr|row pointer"),
        ([torch.tensor([0, 2**62, 3]), _INDICES, _DATA], [2, 3], "indptr"),
        ([_INDPTR, _INDICES - 1, _DATA], [2, 3], "-1|column|indices"),
        ([_INDPTR, _INDICES.reshape(3, 1), _DATA], [2, 3], "indices"),
        # read as unsigned, a narrow -1 is a column that exists
        ([_INDPTR, _INDICES.to(torch.int8) - 1, _DATA], [2, 300], "-1|column|indices"),
        ([_INDPTR, _INDICES.to(torch.int16) - 1, _DATA], [2, 70_000], "-1|column|indices"),
        ([_INDPTR, _INDICES.to(torch.int32) - 1, _DATA], [2, 2**33], "-1|column|indices"),
        ([_INDPTR, _INDICES, _DATA.to(torch.complex64)], [2, 3], "complex|dtype"),
        ([_INDPTR, _INDICES, _DATA.to(torch.bfloat16)], [2, 3], "bfloat16|dtype"),
        ([_INDPTR, _INDICES], [2, 3], "buffer"),
    ],
)
def test_wrong_buffers_are_refused(buffers: list[torch.Tensor], shape: list[int], says: str) -> None:
    """At open, or when the rows are taken: never as a read out of bounds."""
    config = {
        "elements": [{"name": "X"}],
        "datasets": [{"name": "memory0", "sources": {"X": {"csr": {**_CSR["csr"], "shape": shape}}}}],
        "sampling": {"kind": "sequential", "chunk_size": 2, "preload_nchunks": 1, "batch_size": 2},
    }
    with pytest.raises((ValueError, TypeError, _ops.DataError), match=says), opened(config, buffers) as state:
        _ops.start(state, 0)
        load(state)
