"""Batches on a CUDA device: the same bits as on the CPU, whatever streams, allocators and errors do meanwhile.

Needs a device; ``make gpu-bundle`` packs what a machine without Rust needs to run this.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse as sp

from annbatch import Loader
from annbatch._core import ops as _ops
from annbatch.transforms import Log1p, NormalizeTotal, SelectVar
from support.cells import densify, open_backed, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

N_OBS, N_VAR = 3_000, 500
SIZES = {
    "batch_size": 256,
    "chunk_size": 64,
    "preload_nchunks": 8,
    "shuffle": True,
    "return_index": True,
    "to": "torch",
}
STORED = ["bool", "uint8", "uint16", "int32", "int64", "float16", "float32", "float64"]
STRESS_SECONDS = float(os.environ.get("ANNBATCH_STRESS_SECONDS", "60"))

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"dense": True},
    "normalized": {"transform": [NormalizeTotal(1e4), Log1p()]},
    "dense bfloat16": {"transform": [NormalizeTotal(1e4), Log1p()], "dense": True, "dtype": "bfloat16"},
    "dense subset": {
        "transform": [SelectVar(np.arange(400)[::-2]), NormalizeTotal(1e4), Log1p(base=2)],
        "dense": True,
        "dtype": "float16",
    },
    "subset": {"transform": [SelectVar(np.arange(400)[::-2]), Log1p(base=2)], "dtype": "float16"},
}


def counts(dtype: str, *, real: bool = False) -> sp.csr_matrix:
    rng = np.random.default_rng(7)
    x = sp.random(N_OBS, N_VAR, 0.1, format="csr", random_state=7)
    x.data = rng.integers(1, 2 if dtype == "bool" else 250, x.nnz).astype(dtype)
    if real:
        x.data *= rng.random(x.nnz).astype(dtype)
    return x


class Stores:
    """Paths by what is stored, each written when it is first asked for."""

    def __init__(self, root: Path):
        self._root = root

    def __getitem__(self, name: str) -> Path:
        path = self._root / name
        return path if path.exists() else write(ad.AnnData(self._matrix(name)), path)

    @staticmethod
    def _matrix(name: str) -> sp.csr_matrix | np.ndarray:
        if name == "float16":
            return counts("float32").toarray().astype("float16")
        x = counts("float32" if name in ("large", "real", "mixed") else name, real=name == "real")
        if name == "large":  # values that do not fit a byte
            x.data[::1000] = 60_000
        if name == "mixed":  # a batch in four has one that fits no byte, or no two, where those before it did
            x.data[10 :: x.nnz // 3] = 300
            x.data[x.nnz // 2] = 70_000
        return x


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return Stores(tmp_path_factory.mktemp("gpu"))


def loader(path: Path, **options: Any) -> Loader:
    rng = np.random.default_rng(11)
    return Loader(**{**SIZES, "preload_to_gpu": False, "rng": rng, **options}).add_adata(open_backed(path))


def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x.crow_indices(), x.col_indices(), x.values()) if x.layout == torch.sparse_csr else (x,)


def assert_same(there: torch.Tensor, here: torch.Tensor, *, to_rounding: bool = False) -> None:
    assert there.is_cuda
    assert (there.dtype, there.shape, there.layout) == (here.dtype, here.shape, here.layout)
    for a, b in zip(parts(there), parts(here), strict=True):
        assert a.dtype == b.dtype
        if to_rounding and a.is_floating_point():
            torch.testing.assert_close(a.cpu(), b, rtol=2 * torch.finfo(a.dtype).eps, atol=0)
        else:
            assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))


def poison() -> None:
    """Leave no-numbers in the memory that torch's allocator gives next."""
    junk = [
        torch.full((n,), -1, dtype=torch.int8, device="cuda") for n in (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 24)
    ]
    torch.cuda.synchronize()
    del junk


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("stored", [*STORED, "large", "real", "mixed"])
def test_the_bits_are_those_of_the_cpu(stores: Stores, stored: str, options: dict[str, Any]) -> None:
    there, here = iter(loader(stores[stored], device="cuda", **options)), iter(loader(stores[stored], **options))
    n = 0
    while True:
        poison()
        a, b = next(there, None), next(here, None)
        if b is None:
            assert a is None
            break
        np.testing.assert_array_equal(a["index"], b["index"])
        # sums of what is not whole are added up in another order there, and logarithms in float64 are CUDA's
        to_rounding = "transform" in options and stored in ("float64", "real")
        assert_same(a["X"], b["X"], to_rounding=to_rounding)
        n += len(b["index"])
    assert n == N_OBS


def test_entries_of_one_column_are_added_up_in_rows_of_any_order(tmp_path: Path) -> None:
    x = counts("float32")
    x.indices = np.random.default_rng(3).integers(0, 40, x.nnz, dtype=x.indices.dtype)
    x.has_canonical_format = False
    path = write(ad.AnnData(x), tmp_path / "odd")
    options = {"transform": [NormalizeTotal(1e4), Log1p()], "dense": True}
    for a, b in zip(loader(path, device="cuda", **options), loader(path, **options), strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        assert_same(a["X"], b["X"])


def test_integer_values_cross_the_bus_as_bytes(stores: Stores) -> None:
    def bytes_per_entry(stored: str) -> float:
        data = loader(stores[stored], device="cuda")
        nnz = sum(batch["X"].values().numel() for batch in data)
        return data.stats()["h2d_bytes"] / nnz

    # int32 columns and float32 values are 8; a tenth is row pointers and row numbers
    assert bytes_per_entry("float32") <= 0.45 * 8 + 0.4
    assert bytes_per_entry("real") <= 0.76 * 8 + 0.4


def test_values_that_are_wider_than_those_before_them(stores: Stores) -> None:
    """They are scattered as bytes until one does not fit; that batch alone is put together again."""
    data = loader(stores["mixed"], device="cuda", shuffle=False, batches_ahead=1)
    for there, here in zip(data, loader(stores["mixed"], shuffle=False), strict=True):
        assert_same(there["X"], here["X"])
    assert 1 <= data.stats()["batches_widened"] <= 4


def test_transforms_are_done_on_the_device_from_bytes(stores: Stores) -> None:
    plain, dense = (
        loader(stores["float32"], device="cuda", **TRANSFORMS[name]) for name in ("plain", "dense bfloat16")
    )
    for _batches in zip(plain, dense, strict=True):
        pass
    assert dense.stats()["h2d_bytes"] == plain.stats()["h2d_bytes"]
    assert dense.stats()["h2d_ns"] > 0


@pytest.mark.parametrize("to_device", ["cuda", "cuda:0", 0])
def test_ways_to_name_the_device(stores: Stores, to_device: Any) -> None:
    batch = next(iter(loader(stores["float32"], device=to_device)))
    assert batch["X"].device == torch.device("cuda:0")
    assert batch["index"].dtype == np.int64


def test_a_consumer_on_a_stream_of_its_own(stores: Stores) -> None:
    here = {tuple(b["index"]): b["X"] for b in loader(stores["float32"])}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        kept = [(tuple(b["index"]), b["X"].to_dense().sum(1)) for b in loader(stores["float32"], device="cuda")]
    side.synchronize()
    for index, sums in kept:
        torch.testing.assert_close(sums.cpu(), here[index].to_dense().sum(1))


def test_several_loaders_at_once(stores: Stores) -> None:
    names = ["float32", "uint16", "int64"]
    loaders = [loader(stores[name], device="cuda") for name in names]
    seen: dict[str, list[int]] = {name: [] for name in names}
    for batches in itertools.zip_longest(*loaders):
        for name, batch in zip(names, batches, strict=True):
            seen[name].extend(batch["index"].tolist())
            expected = counts(name)[batch["index"]].toarray()
            np.testing.assert_array_equal(densify(batch["X"]), expected.astype(densify(batch["X"]).dtype))
    assert all(sorted(rows) == list(range(N_OBS)) for rows in seen.values())


def test_a_consumer_that_captures_a_graph(stores: Stores) -> None:
    """The step is a CUDA graph over static buffers; loading goes on around its capture and its replays."""
    options = {"device": "cuda", "dense": True, "drop_last": True}
    static = torch.zeros(256, N_VAR, device="cuda")
    weight = torch.rand(N_VAR, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    batches = iter(loader(stores["float32"], **options))
    first = next(batches)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        static.copy_(first["X"])
        static @ weight
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = static @ weight
    for batch in itertools.chain([first], batches):
        static.copy_(batch["X"])
        graph.replay()
        expected = torch.from_numpy(counts("float32")[batch["index"]].toarray()) @ weight.cpu()
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-2)


def test_compiled_steps(stores: Stores) -> None:
    adata = open_backed(stores["float32"])
    config = {
        "datasets": [{"path": str(stores["float32"])}],
        "elements": [{"name": "X"}],
        "sampling": {"kind": "sequential", "chunk_size": 100, "preload_nchunks": 10, "batch_size": 500},
        "device": 0,
    }
    state = _ops.open_state(config)

    @torch.compile(fullgraph=True)
    def step(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, indptr, _indices, data = torch.ops.annbatch.load(state, device="cuda:0")
        return rows, torch.segment_reduce(data, "sum", offsets=indptr.long())

    _ops.start(state, 0)
    expected = densify(adata.X[:]).sum(1)
    for begin in range(0, N_OBS, 500):
        rows, sums = step(state)
        assert rows.is_cuda and rows.tolist() == list(range(begin, begin + 500))
        np.testing.assert_allclose(sums.cpu(), expected[begin : begin + 500], rtol=1e-5)
    assert torch.ops.annbatch.load(state, device="cuda:0")[0].numel() == 0
    with pytest.raises(RuntimeError, match="no device"):
        torch.ops.annbatch.load(state)
    _ops.close(state)


def _epochs(path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    data = loader(path, device="cuda", **options)
    while True:
        yield from data


@pytest.mark.slow
def test_stress(stores: Stores) -> None:
    """Kernels on other streams, tensors freed at random, every batch verified, for a minute."""
    rng = np.random.default_rng(0)
    reference = counts("float32").toarray().sum(1)
    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
    held: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = []
    checked = 0
    deadline = time.monotonic() + STRESS_SECONDS
    for batch in _epochs(stores["float32"]):
        stream = streams[rng.integers(len(streams))]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            busy = torch.rand(512, 512, device="cuda")
            for _ in range(rng.integers(4)):
                busy = busy @ busy / 512
            sums = batch["X"].to_dense().sum(1)
        for part in parts(batch["X"]):
            part.record_stream(stream)
        held.append((batch["index"], sums, batch["X"]))
        while len(held) > rng.integers(1, 12):
            index, sums, x = held.pop(rng.integers(len(held)))
            torch.cuda.synchronize()
            np.testing.assert_allclose(sums.cpu().numpy(), reference[index], rtol=1e-5)
            np.testing.assert_allclose(x.to_dense().sum(1).cpu().numpy(), reference[index], rtol=1e-5)
            checked += 1
        if time.monotonic() > deadline:
            break
    assert checked > 50


def test_memory_does_not_grow(stores: Stores) -> None:
    data = loader(stores["float32"], device="cuda")
    seen = []
    for _ in range(5):
        for batch in data:
            del batch
        gc.collect()
        torch.cuda.synchronize()
        stats = data.stats()
        free, _ = torch.cuda.mem_get_info()
        seen.append((torch.cuda.memory_allocated(), free))
        # a batch is a block of 1 MiB; how many of the four there may be were needed depends on who was faster
        assert stats["staging_bytes"] <= 4 << 20
        # at the end of a pass the last batches may not yet have been let go: five at most, of less than 100 KiB
        assert stats["leased_bytes"] <= 1 << 20
    assert {allocated for allocated, _ in seen[1:]} == {seen[1][0]}
    assert seen[-1][1] >= seen[1][1] - (32 << 20)


def test_a_batch_that_finds_no_memory_is_kept(stores: Stores) -> None:
    config = {
        "datasets": [{"path": str(stores["float32"])}],
        "elements": [{"name": "X", "transform": {"dense": True}}],
        "sampling": {"kind": "sequential", "chunk_size": 100, "preload_nchunks": 10, "batch_size": 1000},
        "device": 0,
    }
    state = _ops.open_state(config)
    _ops.start(state, 0)
    held = [_ops.load(state, "cuda")]
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(max(1e-6, torch.cuda.memory_reserved() / total))
    hoard = []
    try:
        with pytest.raises(torch.OutOfMemoryError):
            while True:  # no segment of torch's has room for as much as a batch
                hoard.append(torch.empty(2_000_000, dtype=torch.uint8, device="cuda"))
        with pytest.raises(RuntimeError, match=r"found no memory on the GPU.*is kept"):
            _ops.load(state, "cuda")
        with pytest.raises(RuntimeError, match=r"found no memory on the GPU"):
            _ops.load(state, "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del hoard
    while len(held) < 3:
        held.append(_ops.load(state, "cuda"))
    assert not len(_ops.load(state, "cuda")[0])
    for number, (rows, x) in enumerate(held):
        assert rows.tolist() == list(range(1000 * number, 1000 * (number + 1)))
        np.testing.assert_array_equal(x.cpu().numpy(), counts("float32")[rows.cpu().numpy()].toarray())
    _ops.close(state)


def test_a_damaged_chunk_is_an_error_at_its_batch(tmp_path: Path) -> None:
    path = write(ad.AnnData(counts("float32").toarray()), tmp_path / "damaged")
    chunks = sorted((path / "X/c").iterdir(), key=lambda p: int(p.name))
    data = loader(path, device="cuda", shuffle=False)
    (chunks[-1] / "0").write_bytes(b"damaged")
    seen = 0
    with pytest.raises((_ops.DataError, OSError), match="X"):
        for batch in data:
            seen += len(batch["index"])
    assert seen >= 2_000


def test_closing_and_dropping_in_the_middle(stores: Stores) -> None:
    for turn in range(10):
        data = loader(stores["float32"], device="cuda")
        batches = iter(data)
        kept = [next(batches)["X"] for _ in range(turn % 4)]
        if turn % 2:
            data.close()
        del data, batches
        gc.collect()
        assert all(torch.isfinite(x.values()).all() for x in kept)


def test_upstreams_argument(stores: Stores) -> None:
    data = Loader(**{**SIZES, "preload_to_gpu": True}).add_adata(open_backed(stores["uint16"]))
    for batch in data:
        assert batch["X"].is_cuda
        assert batch["X"].dtype == torch.float64  # cupy's sparse matrices know bool, float32 and float64
    assert data.stats()["h2d_batches"] > 0


def test_cupy_arrays(stores: Stores) -> None:
    pytest.importorskip("cupy")
    for batch in loader(stores["float32"], device="cuda", to=None):
        np.testing.assert_array_equal(batch["X"].toarray().get(), counts("float32")[batch["index"]].toarray())
    for batch in loader(stores["float32"], device="cuda", to=None, dense=True):
        np.testing.assert_array_equal(batch["X"].get(), counts("float32")[batch["index"]].toarray())
