"""What a loader yields: every batch against what anndata and scipy hold in memory."""

from __future__ import annotations

import gc
import re
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from scipy import sparse as sp

from annbatch import Loader
from annbatch.samplers import RandomSampler, SequentialSampler
from support.cells import (
    N_VAR,
    SIZES,
    Cells,
    check_batch,
    check_epoch,
    densify,
    in_memory_store,
    loader_over,
    make_adata,
    write,
    write_cells,
)


@pytest.fixture(scope="module")
def dense_cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return write_cells(tmp_path_factory.mktemp("dense"), dense=True)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_row_comes_once(cells: Cells, shuffle: bool, drop_last: bool):
    loader = loader_over(cells, shuffle=shuffle, drop_last=drop_last)
    batches = list(loader)
    assert len(batches) == len(loader) == (12 if drop_last else 13)
    rows = np.concatenate([check_batch(batch, cells) for batch in batches])
    assert len(rows) == len(np.unique(rows)) == (120 if drop_last else 121)
    assert [len(batch["index"]) for batch in batches[:12]] == [10] * 12
    assert (np.diff(rows) == 1).all() == (not shuffle)


def test_each_pass_has_an_order_of_its_own_and_seeds_repeat_it(cells: Cells):
    def orders(seed: int) -> list[np.ndarray]:
        loader = loader_over(cells, shuffle=True, rng=np.random.default_rng(seed))
        return [check_epoch(list(loader), cells) for _ in range(3)]

    first, second, third = orders(0)
    assert (first != second).any()
    assert (second != third).any()
    assert (first != third).any()
    for again, before in zip(orders(0), (first, second, third), strict=True):
        np.testing.assert_array_equal(again, before)
    assert (orders(1)[0] != first).any()


def test_mask_restricts_the_rows(cells: Cells):
    sampler = RandomSampler(**SIZES, mask=slice(30, 75))
    loader = Loader(batch_sampler=sampler, return_index=True).add_adatas(cells.without_extras())
    rows = np.concatenate([check_batch(batch, cells) for batch in loader])
    np.testing.assert_array_equal(np.sort(rows), np.arange(30, 75))
    sampler.mask = slice(0, 7)
    rows = np.concatenate([check_batch(batch, cells) for batch in loader])
    np.testing.assert_array_equal(np.sort(rows), np.arange(7))


def test_replacement_draws_the_number_asked_for(cells: Cells):
    sampler = RandomSampler(**SIZES, replacement=True, num_samples=300)
    loader = Loader(batch_sampler=sampler, return_index=True).add_adatas(cells.without_extras())
    rows = np.concatenate([check_batch(batch, cells) for batch in loader])
    assert len(rows) == 300


def test_a_sampler_may_be_assigned(cells: Cells):
    loader = loader_over(cells)
    loader._batch_sampler = SequentialSampler(4, 5, 20)
    assert loader.batch_sampler is loader._batch_sampler
    assert [len(batch["index"]) for batch in loader] == [20] * 6 + [1]


# ---------------------------------------------------------------- forms of batches


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "uint16", "int32", "uint32", "int64", "float32", "float64"])
@pytest.mark.parametrize("dense", [False, True])
def test_dtypes_are_kept(tmp_path, dtype: str, dense: bool):
    cells = write_cells(tmp_path, sizes=(23,), dense=dense, dtype=dtype)
    batch = next(iter(loader_over(cells)))
    check_batch(batch, cells)
    assert type(batch["X"]) is (np.ndarray if dense else sp.csr_matrix)
    assert batch["X"].dtype == dtype
    if not dense:
        assert batch["X"].indices.dtype == batch["X"].indptr.dtype == np.int32

    tensor = next(iter(loader_over(cells, to="torch")))["X"]
    widened = {"uint16": torch.int32, "uint32": torch.int64}
    assert tensor.dtype == widened.get(dtype, getattr(torch, dtype))
    assert tensor.layout == (torch.strided if dense else torch.sparse_csr)
    np.testing.assert_array_equal(densify(tensor), cells.dense()[:10])
    if not dense:
        assert tensor.crow_indices().dtype == tensor.col_indices().dtype == torch.int32


@pytest.mark.parametrize("to", [None, "torch"])
def test_half_precision(tmp_path, to: str | None):
    group = zarr.open_group(tmp_path / "half.zarr", mode="w").create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [3, 4]})
    arrays = {"data": ([0.5, 2, 3], "float16"), "indices": ([0, 1, 2], "uint16"), "indptr": ([0, 1, 1, 3], "int64")}
    for name, (values, dtype) in arrays.items():
        group.create_array(name, data=np.array(values, dtype))
    batch = next(iter(Loader(batch_size=4, to=to).add_dataset(ad.io.sparse_dataset(group))))["X"]
    # scipy's sparse matrices have no half precision
    assert batch.dtype == (np.float32 if to is None else torch.float16)
    np.testing.assert_array_equal(densify(batch), [[0.5, 0, 0, 0], [0, 0, 0, 0], [0, 2, 3, 0]])


@pytest.mark.parametrize("to", [None, "torch"])
def test_no_warning_comes_from_making_batches(cells: Cells, to: str | None):
    loader = loader_over(cells, to=to, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in loader:
            assert batch["X"].shape == (len(batch["obs"]), N_VAR)


def test_batches_without_entries(tmp_path):
    adata = ad.AnnData(sp.csr_matrix((30, N_VAR), dtype="float32"))
    path = write(adata, tmp_path / "empty.zarr")
    cells = Cells([adata], [path])
    for to in (None, "torch"):
        check_epoch(list(loader_over(cells, to=to)), cells)


@pytest.mark.parametrize("to", [None, "torch"])
def test_images(tmp_path, to: str | None):
    images = np.random.default_rng(0).integers(0, 256, (41, 3, 6, 5)).astype("uint8")
    stored = zarr.create_array(tmp_path / "images.zarr", data=images, chunks=(8, 3, 4, 5))
    loader = Loader(**SIZES, shuffle=True, return_index=True, to=to)
    loader.add_datasets([zarr.open_array(tmp_path / "images.zarr", mode="r"), stored])
    assert loader.n_var == 3
    seen = []
    for batch in loader:
        assert batch["X"].shape[1:] == (3, 6, 5)
        np.testing.assert_array_equal(np.asarray(batch["X"]), images[batch["index"] % 41])
        assert batch["obs"] is batch["var"] is None
        seen.append(batch["index"])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(82))


def test_dense(dense_cells: Cells):
    for to in (None, "torch"):
        check_epoch(list(loader_over(dense_cells, shuffle=True, to=to)), dense_cells)


def test_jax(cells: Cells, dense_cells: Cells):
    jax = pytest.importorskip("jax")
    for some in (cells, dense_cells):
        check_epoch(batches := list(loader_over(some, shuffle=True, to="jax")), some)
        kind = jax.Array if some is dense_cells else jax.experimental.sparse.CSR
        assert all(isinstance(batch["X"], kind) for batch in batches)


def test_zarr_formats_give_the_same(tmp_path, cells: Cells):
    paths = [write(adata, tmp_path / f"{k}.zarr", zarr_format=2) for k, adata in enumerate(cells.adatas)]
    check_epoch(list(loader_over(Cells(cells.adatas, paths), shuffle=True)), cells)


def test_promotion_over_datasets(tmp_path):
    adatas = [make_adata(20, 0, dtype="int16"), make_adata(20, 1, dtype="float32")]
    cells = Cells(adatas, [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)])
    loader = Loader(**SIZES, return_index=True)
    with pytest.warns(UserWarning, match=r"Adding dataset with dtype .* that differs from the existing dataset dtype"):
        loader.add_adatas(cells.without_extras())
    batches = list(loader)
    assert {batch["X"].dtype for batch in batches} == {np.result_type("int16", "float32")}
    check_epoch(batches, cells)


def test_zero_copy(cells: Cells):
    batch = next(iter(loader_over(cells)))
    assert not batch["X"].data.flags.owndata
    assert not batch["X"].indices.flags.owndata
    assert batch["X"].data.flags.writeable


# ---------------------------------------------------------------- in memory


@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csr_array])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_csr_in_memory(cells: Cells, make: type, index_dtype: str):
    matrices = [make(adata.X.copy()) for adata in cells.adatas]
    for matrix in matrices:
        matrix.indices = matrix.indices.astype(index_dtype)
        matrix.indptr = matrix.indptr.astype(index_dtype)
    loader = Loader(**SIZES, shuffle=True, return_index=True)
    loader.add_datasets(matrices, obs=[adata.obs for adata in cells.adatas])
    assert loader.dataset_type is make
    batches = list(loader)
    check_epoch(batches, cells)
    assert all(type(batch["X"]) is sp.csr_matrix for batch in batches)


def test_csr_in_memory_may_be_unsorted_and_longer_than_its_indptr(cells: Cells):
    matrix = cells.adatas[0].X.copy()
    for first, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        for part in (matrix.indices, matrix.data):
            part[first:end] = part[first:end][::-1].copy()
    matrix = sp.csr_matrix(
        (np.append(matrix.data, [9, 9]), np.append(matrix.indices, [0, 1]), matrix.indptr), shape=matrix.shape
    )
    matrix.has_sorted_indices = False
    loader = Loader(**SIZES, return_index=True).add_dataset(matrix)
    for batch in loader:
        np.testing.assert_array_equal(batch["X"].toarray(), cells.dense()[batch["index"]])


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x, id="plain"),
        pytest.param(np.asfortranarray, id="fortran"),
        pytest.param(lambda x: np.repeat(x, 2, axis=1)[:, ::2], id="strided"),
        pytest.param(lambda x: x.astype(x.dtype.newbyteorder()), id="swapped"),
        pytest.param(lambda x: np.frombuffer(b"\0" + x.tobytes(), "u1")[1:].view(x.dtype).reshape(x.shape), id="odd"),
    ],
)
def test_arrays_in_memory(dense_cells: Cells, view):
    arrays = [view(adata.X) for adata in dense_cells.adatas]
    loader = Loader(**SIZES, shuffle=True, return_index=True).add_datasets(arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(loader)
    check_epoch(batches, dense_cells)
    assert {batch["X"].dtype for batch in batches} == {np.dtype("float32")}


def test_memory_is_used_in_place(dense_cells: Cells):
    array = dense_cells.adatas[0].X.copy()
    loader = Loader(**SIZES).add_dataset(array)
    list(loader)
    array[:] = 5
    assert all((batch["X"] == 5).all() for batch in loader)


@pytest.mark.parametrize("dense", [False, True])
def test_memory_store(cells: Cells, dense_cells: Cells, dense: bool):
    some = dense_cells if dense else cells
    datasets = []
    for adata in some.adatas:
        root = in_memory_store(adata.X)
        datasets.append(root["X"] if dense else ad.io.sparse_dataset(root["X"]))
    loader = Loader(**SIZES, shuffle=True, return_index=True).add_datasets(datasets)
    check_epoch(list(loader), some)


def test_strings_cannot_be_read():
    loader = Loader(batch_size=1).add_dataset(np.array([["a"], ["b"]]))
    with pytest.raises(TypeError, match="dtype <U1"):
        next(iter(loader))


# ---------------------------------------------------------------- layers, obsm, obs


@pytest.mark.parametrize("to", [None, "torch"])
def test_several_elements(cells: Cells, to: str | None):
    loader = Loader(**SIZES, shuffle=True, return_index=True, to=to, layers=["doubled"], obsm=["spots", "pca"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loader.add_adatas(cells.backed())
    batches = list(loader)
    check_epoch(batches, cells)
    for batch in batches:
        assert list(batch) == ["X", "obs", "var", "index", "layers", "obsm"]
        assert list(batch["layers"]) == ["doubled"]
        assert list(batch["obsm"]) == ["spots", "pca"]


def test_a_batch_has_four_keys(cells: Cells):
    batch = next(iter(Loader(**SIZES).add_adatas(cells.without_extras())))
    assert isinstance(batch, dict)
    assert list(batch) == ["X", "obs", "var", "index"]
    assert batch["index"] is None
    pd.testing.assert_frame_equal(batch["var"], cells.adatas[0].var)


def test_obs_is_none_without_columns(cells: Cells):
    loader = Loader(**SIZES).add_adatas([ad.AnnData(adata.X) for adata in cells.without_extras()])
    assert loader._obs is None
    assert next(iter(loader))["obs"] is None


def test_obs_columns(cells: Cells):
    loader = loader_over(cells, obs_columns=["score", "cell_type"])
    assert [list(obs.columns) for obs in loader._obs] == [["score", "cell_type"]] * 3
    check_epoch(list(loader), cells)
    assert loader_over(cells, obs_columns=[])._obs is None
    with pytest.raises(KeyError, match="mood"):
        loader_over(cells, obs_columns=["mood"])


def test_obs_as_codes(cells: Cells):
    loader = loader_over(cells, obs="codes", shuffle=True)
    categories = loader.obs_categories
    assert list(categories["cell_type"]) == ["B", "NK", "T"]
    for batch in loader:
        obs, expected = batch["obs"], cells.obs.iloc[batch["index"]]
        assert list(obs) == list(expected.columns)
        for name in ("cell_type", "donor"):
            assert obs[name].dtype == torch.int64
            assert list(categories[name][obs[name].numpy()]) == list(expected[name])
        for name in ("depth", "score"):
            np.testing.assert_array_equal(obs[name].numpy(), expected[name].to_numpy())


# ---------------------------------------------------------------- passes


def test_several_passes_at_once(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    passes = [iter(loader) for _ in range(3)]
    collected = list(zip(*passes, strict=True))
    for batches in zip(*collected, strict=True):
        check_epoch(list(batches), cells)


def test_batches_outlive_everything(cells: Cells):
    loader = loader_over(cells, shuffle=True, to="torch")
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == 5:
            break
    loader.close()
    del loader
    rows = np.concatenate([check_batch(batch, cells) for batch in batches])
    assert len(np.unique(rows)) == 50


def test_a_whole_epoch_may_be_held_under_a_tiny_budget(cells: Cells):
    # enough for one batch, whose buffers are whole pages
    loader = loader_over(cells, shuffle=True, memory_budget=20_000)
    check_epoch(list(loader), cells)
    with pytest.raises(MemoryError, match="memory_budget of 1 bytes is too small") as refused:
        list(loader_over(cells, memory_budget=1))
    # the number it names is the number that does
    needed = int(re.search(r"at least (\d+)", str(refused.value))[1])
    check_epoch(list(loader_over(cells, memory_budget=needed)), cells)
    with pytest.raises(MemoryError, match="too small"):
        list(loader_over(cells, memory_budget=needed - 1))


@pytest.mark.parametrize("budget", ["2GB", "0.5 GiB", "100000", 2**40, np.int64(10**6)])
def test_forms_of_a_budget(cells: Cells, budget):
    check_epoch(list(loader_over(cells, shuffle=True, memory_budget=budget)), cells)


@pytest.mark.parametrize("budget", ["2 gigs", -1, 0, 1.5, "-1GB"])
def test_budgets_that_are_none(cells: Cells, budget):
    with pytest.raises((ValueError, TypeError), match=r"memory_budget|1\.5"):
        next(iter(loader_over(cells, memory_budget=budget)))


def test_the_next_window_is_read_while_the_consumer_is_busy(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    batches = iter(loader)
    first = next(batches)
    deadline = time.monotonic() + 20
    # two batches make a window: four ready means that one beyond the current window was read and decoded
    while loader.stats()["batches_ready"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = loader.stats()
    assert stats["batches_delivered"] == 1
    assert stats["batches_ready"] >= 4
    check_epoch([first, *batches], cells)


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("shards", [(300, 8, 512), None], ids=["shards", "objects"])
@pytest.mark.parametrize(
    ("cname", "shuffle", "dtype", "noise"),
    [
        ("lz4", "shuffle", "u1", 0),
        ("lz4", "shuffle", "u2", 200),
        ("lz4hc", "noshuffle", "f4", 9),
        ("zstd", "shuffle", "f4", 0),
        ("zlib", "shuffle", "i8", 50),
        # nothing that could be compressed: stored as it is, without blocks
        ("lz4", "shuffle", "u1", 256),
        ("lz4", "bitshuffle", "u2", 200),
        ("zstd", "bitshuffle", "u1", 9),
        # left to C-Blosc
        ("blosclz", "shuffle", "u2", 200),
    ],
)
def test_of_chunks_that_are_known_only_blocks_are_read(
    tmp_path: Path, cname: str, shuffle: str, dtype: str, noise: int, shards: tuple[int, ...] | None, direct_io: bool
):
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 200, (300, 8, 32)), 16, axis=2)
    images = (images + (rng.integers(0, noise, images.shape) if noise else 0)).astype(dtype)
    # two chunks beside each other, of 300 KB to 2.4 MB
    array = zarr.create_array(
        tmp_path / "images.zarr",
        shape=images.shape,
        dtype=dtype,
        chunks=(150, 4, 512),
        shards=shards,
        compressors=zarr.codecs.BloscCodec(cname=cname, shuffle=shuffle, clevel=3),
    )
    array[:] = images
    loader = Loader(chunk_size=1, preload_nchunks=2, batch_size=2, shuffle=True, return_index=True, direct_io=direct_io)
    loader.add_dataset(array)
    bytes_read = []
    for _ in range(2):
        rows = []
        for batch in loader:
            np.testing.assert_array_equal(batch["X"], images[batch["index"]])
            rows.extend(batch["index"])
        assert sorted(rows) == list(range(300))
        bytes_read.append(loader.stats()["bytes_read"])
    stored = sum(file.stat().st_size for file in (tmp_path / "images.zarr").rglob("*") if file.is_file())
    # 150 windows of two rows: half of them lie in all four chunks, half in two
    times_all = bytes_read[1] / stored
    reads_all = cname == "blosclz" or noise == 256
    assert times_all > 100 if reads_all else times_all < 80


def test_statistics_stand_after_the_pass(cells: Cells):
    loader = loader_over(cells)
    assert loader.stats() == {}
    n_batches = len(list(loader))
    assert loader.stats()["batches_delivered"] == n_batches
    assert loader.stats()["bytes_read"] > 0


def test_statistics_are_documented(cells: Cells):
    loader = loader_over(cells, shuffle=True, direct_io=True)
    check_epoch(list(loader), cells)
    stats = loader.stats()
    assert [name for name in stats if f"``{name}``" not in Loader.stats.__doc__] == []
    assert stats["batches_undelivered"] == stats["decode_queued"] == 0
    assert stats["bytes_read"] % 4096 == 0 or stats["direct_reads_refused"] > 0
    assert stats["active_ns"] > 0


@pytest.mark.parametrize("own_sampler", [False, True])
def test_a_profile_shows_what_was_loaded(cells: Cells, own_sampler: bool):
    class Own(SequentialSampler):
        _native_sampling = None

    loader = (
        loader_over(cells) if not own_sampler else Loader(batch_sampler=Own(**SIZES)).add_adatas(cells.without_extras())
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        n_batches = len(list(loader))
    events = [event for event in profile.events() if event.name.startswith("annbatch.")]
    loads = [event for event in events if event.name == "annbatch.load"]
    # a native pass also takes the end of the epoch
    assert len(loads) == n_batches + (not own_sampler)
    marks = [
        re.fullmatch(r"annbatch\.batch rows=(\d+) bytes=(\d+)", event.name) for event in events if event not in loads
    ]
    assert sum(int(mark[1]) for mark in marks) == 121
    assert sum(int(mark[2]) for mark in marks) >= loader.stats()["rows_delivered"] * 8


def test_a_profiler_that_is_off_costs_nothing(cells: Cells, monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    check_epoch(list(loader_over(cells)), cells)


def test_an_exception_in_the_training_ends_the_pass_and_lets_go_of_all(cells: Cells):
    loader = loader_over(cells, shuffle=True)
    check_epoch(list(loader), cells)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            for n, _batch in enumerate(loader):
                1 // (3 - n)
        gc.collect()
        assert loader.stats()["batches_delivered"] == 4
        assert not any("annbatch-driver" in name for name in threads_of_this_process())
        check_epoch(list(loader), cells)


def threads_of_this_process() -> list[str]:
    tasks = Path("/proc/self/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []


def test_a_fault_windows_ahead_comes_when_its_batch_does(tmp_path):
    n = 400
    counts = sp.random(n, N_VAR, density=0.5, format="csr", dtype="float32", random_state=0)
    with ad.settings.override(zarr_write_format=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(tmp_path / "d.zarr", mode="w", zarr_format=3)
        ad.io.write_elem(group, "X", counts, dataset_kwargs={"chunks": (100,), "shards": None, "compressor": None})
    loader = Loader(**SIZES, return_index=True).add_dataset(ad.io.sparse_dataset(group["X"]))
    assert len(list(loader)) == n // 10
    damaged = max((tmp_path / "d.zarr/X/data/c").iterdir(), key=lambda path: int(path.name))
    whole = damaged.read_bytes()
    # the files are open and listed as they were
    damaged.write_bytes(whole[:10])
    seen = []
    with pytest.raises(OSError, match="truncated") as failure:
        for batch in loader:
            seen.append(batch["index"])
            time.sleep(0.005)
    rows = np.concatenate(seen)
    np.testing.assert_array_equal(rows, np.arange(len(rows)))
    assert len(rows) >= 200
    for part in ("d.zarr", "X/data", "chunk [", f"bytes 0..{len(whole)}"):
        assert part in str(failure.value)
    damaged.write_bytes(whole)
    assert len(list(loader)) == n // 10


@pytest.mark.parametrize(
    "limits",
    [
        {"batches_ahead": 0},
        {"batches_ahead": 3},
        {"memory_budget": "1MB"},
        {"memory_budget": 10**9},
        {"threads": 1},
        {"direct_io": True},
    ],
)
def test_limits_change_no_batch(cells: Cells, limits: dict):
    plain = loader_over(cells, shuffle=True, rng=np.random.default_rng(3))
    limited = loader_over(cells, shuffle=True, rng=np.random.default_rng(3), **limits)
    np.testing.assert_array_equal(check_epoch(list(limited), cells), check_epoch(list(plain), cells))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_preload_to_gpu(cells: Cells, dense_cells: Cells):
    for some in (cells, dense_cells):
        batches = list(loader_over(some, shuffle=True, to="torch", preload_to_gpu=True))
        assert {batch["X"].device.type for batch in batches} == {"cuda"}
        check_epoch([{**batch, "X": batch["X"].cpu()} for batch in batches], some)


def test_close_ends_passes_and_the_loader_can_go_on(cells: Cells):
    loader = loader_over(cells)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(RuntimeError):
        list(batches)
    check_epoch(list(loader), cells)


def test_failure_of_the_consumer_ends_the_pass(cells: Cells):
    loader = loader_over(cells)
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            1 / 0  # noqa: B018
    loader.add_adatas(cells.without_extras())
    assert loader.n_obs == 2 * cells.n_obs
    assert sum(len(batch["index"]) for batch in loader) == 2 * cells.n_obs


def test_adding_after_a_pass_is_seen_by_the_next(cells: Cells):
    first, *others = cells.without_extras()
    loader = Loader(**SIZES, shuffle=True, return_index=True).add_adata(first)
    assert sum(len(batch["index"]) for batch in loader) == first.n_obs
    loader.add_adatas(others)
    check_epoch(list(loader), cells)


def test_locate(cells: Cells):
    loader = loader_over(cells)
    rows = [0, 36, 37, 120, 37]
    places = loader.locate(rows)
    assert [place["row"] for place in places] == rows
    assert [place["dataset"] for place in places] == [0, 0, 1, 2, 1]
    assert [place["local_row"] for place in places] == [0, 36, 0, 63, 0]
    assert [place["obs_name"] for place in places] == list(cells.obs.index[rows])
    assert [place["path"] for place in places] == [str(cells.paths[place["dataset"]] / "X") for place in places]
    assert all("X" in place["chunks"] for place in places)
    with pytest.raises(IndexError, match="121"):
        loader.locate([121])


def test_deleted_file_is_an_error_and_the_loader_closes(tmp_path):
    cells = write_cells(tmp_path, sizes=(30,))
    loader = loader_over(cells)
    for file in sorted((cells.paths[0] / "X" / "data").rglob("*"), reverse=True):
        if file.is_file():
            file.unlink()
    with pytest.raises((OSError, RuntimeError), match="data"):
        list(loader)
    loader.close()
