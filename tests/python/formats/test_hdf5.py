"""Batches read from HDF5 files equal what h5py reads, however the files were written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from annbatch._core import ops as _ops
from support.h5files import (
    DEFLATE,
    DTYPES,
    FILTERS,
    FLETCHER32,
    LZF,
    SHUFFLE,
    Layout,
    check,
    config,
    count_csr,
    create,
    random_csr,
    read_element,
    write_array,
    write_element,
)
from support.oracle import Reference, opened, streaming
from support.processes import run_python
from support.sampling import Plan, bounded
from support.stores import Csr, random_values

pytestmark = pytest.mark.core

# ---------------------------------------------------------------------------------------------- how data is stored


@pytest.mark.parametrize("name", FILTERS)
def test_filters(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", random_csr(1), FILTERS[name])
        write_element(file, "layers/counts", count_csr(2, 40, 300), FILTERS[name], index="i8")
        layout = FILTERS[name]
        square = Layout(layout.chunks and (9, 5), layout.filters, layout.keywords)
        write_element(file, "obsm/pca", random_values(np.random.default_rng(3), "f8", (40, 12), blocky=False), square)
    check([tmp_path / "a.h5ad"], ("X", "layers/counts", "obsm/pca"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "name", ["none", "contiguous", "shuffle", "shuffle, gzip", "gzip, shuffle", "blosc lz4, shuffled"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_both_byte_orders(tmp_path: Path, dtype: str, name: str, order: str) -> None:
    layout = FILTERS[name]
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", random_csr(4, dtype=dtype), layout, order=order, index="u2")
        dense = random_values(np.random.default_rng(5), dtype, (40, 3), blocky=False)
        write_element(
            file, "obsm/a", dense, Layout(layout.chunks and (16, 2), layout.filters, layout.keywords), order=order
        )
    check([tmp_path / "a.h5ad"], ("X", "obsm/a"))


@pytest.mark.parametrize("index", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_types_of_column_indices(tmp_path: Path, index: str) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", random_csr(4), FILTERS["shuffle, gzip"], index=index, order=">")
    check([tmp_path / "a.h5ad"])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("pointer", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_types_of_row_pointers(tmp_path: Path, pointer: str, order: str) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", random_csr(4, 10), FILTERS["shuffle, gzip"], pointer=pointer, order=order)
        write_element(file, "layers/some", random_csr(5, 10), Layout(), pointer=pointer, index=pointer, order=order)
    check([tmp_path / "a.h5ad"], ("X", "layers/some"))


_BITS = {"u1": h5py.h5t.STD_B8LE, "u2": h5py.h5t.STD_B16LE, "u4": h5py.h5t.STD_B32LE, "u8": h5py.h5t.STD_B64LE}


def _write_bits(group: h5py.Group, name: str, values: np.ndarray, chunks: tuple[int, ...] | None) -> None:
    """As HDF5.jl writes Bool, and bitfields of more bytes."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks is not None:
        plist.set_chunk(chunks)
        plist.set_deflate(4)
    dtype, space = _BITS[values.dtype.str[1:]], h5py.h5s.create_simple(values.shape)
    dataset = h5py.h5d.create(group.id, name.encode(), dtype, space, plist)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values), dtype)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", _BITS)
def test_bitfields_are_integers_as_in_h5py(tmp_path: Path, dtype: str, chunked: bool) -> None:
    bits = np.random.default_rng(6).integers(0, 2, (40, 7)).astype(dtype)
    csr = random_csr(7, dtype=dtype)
    csr.data[:] %= 2**7
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        _write_bits(file, "X", bits, (9, 4) if chunked else None)
        write_element(file, "layers/some", csr, Layout())
        del file["layers/some/data"]
        _write_bits(file["layers/some"], "data", csr.data, (31,) if chunked else None)
    np.testing.assert_array_equal(read_element(tmp_path / "a.h5ad", "X"), bits)
    check([tmp_path / "a.h5ad"], ("X", "layers/some"))


@pytest.mark.parametrize("chunks", [(1, 1), (7, 3), (40, 12), (3, 100), (13, 12), None])
@pytest.mark.parametrize("filters", [(), ((SHUFFLE,), (DEFLATE, 1))])
def test_chunk_shapes_of_dense_arrays(tmp_path: Path, chunks: Any, filters: Any) -> None:
    filters = filters if chunks else ()
    rng = np.random.default_rng(6)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", random_values(rng, "f4", (40, 12), blocky=False), Layout(chunks, filters))
        cube = Layout(chunks and (*chunks, 2), filters)
        write_element(file, "obsm/cube", random_values(rng, "i2", (40, 12, 3), blocky=False), cube)
    check([tmp_path / "a.h5ad"], ("X", "obsm/cube"))


def test_rows_of_contiguous_arrays_across_their_pieces(tmp_path: Path) -> None:
    """Pieces are of 65,536 elements: rows begin in one and end in another, and the last piece is short."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(0, 9000, 50)
    indices = np.concatenate([np.sort(rng.choice(10_000, n, replace=False)) for n in lengths]).astype(np.int64)
    data = rng.standard_normal(len(indices)).astype("f4")
    csr = Csr(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), indices, data, (50, 10_000))
    assert len(data) > 3 * 65_536
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", csr, Layout())
        write_element(file, "obsm/wide", rng.standard_normal((50, 30_000)), Layout())
    stats = check([tmp_path / "a.h5ad"], ("X", "obsm/wide"))
    assert stats["chunks_decoded"] > 0 and stats["bytes_decoded"] == 0


def test_unfiltered_rows_read_exactly_their_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    n, per_row = 400, 5000
    indices = np.concatenate([np.sort(rng.choice(20_000, per_row, replace=False)) for _ in range(n)])
    data = rng.standard_normal(n * per_row).astype("f4")
    csr = Csr(np.arange(n + 1) * per_row, indices, data, (n, 20_000))
    rows = np.arange(0, n, 40)
    for name, layout in {"chunks": Layout(16_000), "contiguous": Layout()}.items():
        path = tmp_path / f"{name}.h5ad"
        with h5py.File(path, "w") as file:
            write_element(file, "X", csr, layout)
        with opened(config([path], sampling={"kind": "submitted"})) as state:
            _ops.start(state, 0)
            _ops.submit(state, torch.from_numpy(rows), torch.arange(len(rows)), torch.tensor([len(rows)]))
            _ops.finish(state)
            Reference([{"X": csr}], {"X": "torch"}).drain(state)
            stats = _ops.stats(state)
            assert stats["bytes_read"] == len(rows) * per_row * 8
            assert stats["bytes_decoded"] == 0


def test_compact_and_empty_datasets(tmp_path: Path) -> None:
    empty = Csr(np.zeros(11, np.int64), np.zeros(0, np.int64), np.zeros(0, "f4"), (10, 5))
    for i, layout in enumerate([Layout(), Layout(4), Layout(4, ((SHUFFLE,), (DEFLATE, 4))), Layout(compact=True)]):
        with h5py.File(tmp_path / f"{i}.h5ad", "w") as file:
            write_element(file, "X", empty, layout)
            write_element(file, "layers/some", random_csr(9, 10, 20), Layout(compact=True), order="><"[i % 2])
            write_element(file, "obsm/none", np.zeros((10, 0), "f4"), Layout())
            write_element(file, "obsm/small", np.arange(30.0).reshape(10, 3), Layout(compact=True))
    check([tmp_path / f"{i}.h5ad" for i in range(4)], ("X", "layers/some", "obsm/none", "obsm/small"))


@pytest.mark.parametrize("fill", [None, 0, 5])
@pytest.mark.parametrize("filters", [(), ((SHUFFLE,), (DEFLATE, 4))])
def test_chunks_that_were_never_written(tmp_path: Path, fill: Any, filters: Any) -> None:
    rng = np.random.default_rng(10)
    csr = random_csr(11, 200, 60)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", csr, FILTERS["gzip"])
        del file["X/data"]
        data = create(file["X"], "data", csr.data.shape, ">f4", Layout(16, filters, fill=fill))
        for i in rng.permutation(len(csr.data) // 16)[::3]:
            data[16 * i : 16 * i + 16] = csr.data[16 * i : 16 * i + 16]
        dense = create(file, "obsm/a", (200, 7), "i2", Layout((32, 3), filters, fill=fill))
        dense[70:80, 2:4] = 3
        create(file, "obsm/nothing", (200, 4), "f8", Layout(None if not filters else (10, 4), filters, fill=fill))
    if fill == 5 and not filters:
        assert (read_element(tmp_path / "a.h5ad", "obsm/nothing") == 5).all()
    check([tmp_path / "a.h5ad"], ("X", "obsm/a", "obsm/nothing"))


def test_chunks_that_skipped_filters(tmp_path: Path) -> None:
    """Each chunk of two arrays skipped other filters; lzf does so by itself for what it cannot compress."""
    import zlib

    rng = np.random.default_rng(12)
    csr = random_csr(13, 300, 60)
    n = len(csr.data) // 32 * 32
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        write_element(file, "X", csr, FILTERS["gzip"])
        for name, values in (("data", csr.data), ("indices", csr.indices.astype("i4"))):
            del file[f"X/{name}"]
            dataset = create(file["X"], name, values.shape, values.dtype, Layout(32, ((SHUFFLE,), (DEFLATE, 4))))
            dataset[n:] = values[n:]
            for i in range(0, n, 32):
                mask = int(rng.integers(0, 4))
                raw = values[i : i + 32].tobytes()
                if not mask & 1:
                    raw = np.frombuffer(raw, "u1").reshape(32, 4).T.tobytes()
                if not mask & 2:
                    raw = zlib.compress(raw)
                # bits beyond the filters mean nothing
                dataset.id.write_direct_chunk((i,), raw, filter_mask=mask | (1 << 9))
        noise = rng.integers(0, 256, (300, 64)).astype("u1")
        noise[100:200] = 1
        write_element(file, "obsm/noise", noise, Layout((25, 64), keywords={"compression": "lzf"}))
        info = [file["obsm/noise"].id.get_chunk_info(i) for i in range(12)]
        assert {chunk.filter_mask for chunk in info} == {0, 1}
    check([tmp_path / "a.h5ad"], ("X", "obsm/noise"))


@pytest.mark.parametrize("userblock", [512, 4096])
@pytest.mark.parametrize("name", ["none", "contiguous", "shuffle, gzip"])
def test_user_blocks(tmp_path: Path, userblock: int, name: str) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        write_element(file, "X", random_csr(14), FILTERS[name])
        write_element(file, "layers/c", random_csr(15), Layout(compact=True))
    with path.open("r+b") as raw:
        raw.write(b"#!" + b"x" * (userblock - 2))
    check([path], ("X", "layers/c"))


@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "v112", "v114", "latest"])
def test_versions_of_the_format(tmp_path: Path, libver: str) -> None:
    """Chunk indexes of every kind: b-trees of both versions, single chunks, implicit, fixed and extensible arrays."""
    with h5py.File(tmp_path / "a.h5ad", "w", libver=(libver, "latest")) as file:
        write_element(file, "X", random_csr(16, 300, 60), FILTERS["shuffle, gzip"])
        write_element(file, "layers/none", random_csr(17, 300, 60), FILTERS["none"])
        write_element(file, "layers/one", random_csr(18, 300, 60), FILTERS["one chunk"])
        write_element(file, "layers/contiguous", random_csr(19, 300, 60), Layout())
        for name, most in (("extensible", (None, 7)), ("b-tree", (None, None))):
            values = np.random.default_rng(20).standard_normal((300, 7))
            keywords = {"chunks": (11, 3), "compression": "gzip"}
            file.create_dataset(f"obsm/{name}", data=values, maxshape=most, **keywords)
            file.create_dataset(f"obsm/{name}, unfiltered", data=values, maxshape=most, chunks=(11, 3))
        names = ("X", *(f"{group}/{name}" for group in ("layers", "obsm") for name in file[group]))
    assert len(names) == 8
    check([tmp_path / "a.h5ad"], names)


def test_datasets_that_shrank_and_grew(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        data = file.create_dataset("X", data=np.arange(500.0).reshape(100, 5), maxshape=(None, None), chunks=(8, 2))
        data.resize((37, 3))
        data.resize((60, 4))
    check([tmp_path / "a.h5ad"])


@st.composite
def layouts(draw: Any) -> Layout:
    """Any chunk length and up to four filters in any order."""
    chunks = draw(st.sampled_from([None, 1, 2, 7, 16, 100, 5000]))
    filters = st.sampled_from([(DEFLATE, 1), (DEFLATE, 6), (SHUFFLE,), (FLETCHER32,), (LZF,)])
    drawn = draw(st.lists(filters, max_size=4)) if chunks else []
    # h5py's lzf wants to know what it cannot know behind a filter that changes the length
    usable = [f for i, f in enumerate(drawn) if f[0] != LZF or all(g[0] == SHUFFLE for g in drawn[:i])]
    return Layout(chunks, tuple(usable))


@bounded(60)
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from(["i4", "i8", "u2"]),
    order=st.sampled_from("<>"),
    libver=st.sampled_from(["earliest", "latest"]),
    n_obs=st.integers(1, 80),
    n_var=st.integers(1, 40),
    blocky=st.booleans(),
    seed=st.integers(0, 1000),
    n_files=st.integers(1, 2),
)
def test_random_files(
    layout: Layout,
    dtype: str,
    index: str,
    order: str,
    libver: str,
    n_obs: int,
    n_var: int,
    blocky: bool,
    seed: int,
    n_files: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.h5ad" for i in range(n_files)]
        for i, path in enumerate(paths):
            rng = np.random.default_rng(seed + i)
            with h5py.File(path, "w", libver=libver) as file:
                csr = random_csr(seed + i, n_obs + i, n_var, dtype, blocky=blocky)
                write_element(file, "X", csr, layout, order=order, index=index)
                dense = random_values(rng, dtype, (n_obs + i, 5), blocky=blocky)
                square = Layout(layout.chunks and (layout.chunks, 2), layout.filters)
                write_element(file, "obsm/a", dense, square, order=order)
        check(paths, ("X", "obsm/a"))


# ---------------------------------------------------------------------------------------------- texts


def _texts(path: Path, name: str = "/texts") -> list[bytes]:
    texts = _ops.texts(str(path), name)
    assert texts.endswith(b"\0")
    return texts[:-1].split(b"\0")


@bounded(60)
@given(
    chunks=st.sampled_from([None, 1, 2, 7, 100, 5000]),
    # libhdf5 lists a shuffle, and has every chunk skip it
    keywords=st.sampled_from([{}, {"shuffle": True}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]),
    encoding=st.sampled_from(["utf-8", "ascii"]),
    libver=st.sampled_from(["earliest", "latest"]),
    userblock=st.sampled_from([0, 512]),
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=60
    ),
    repeats=st.sampled_from([1, 40]),
    long=st.sampled_from([0, 4_090, 70_000]),
    seed=st.integers(0, 1000),
)
def test_texts_are_those_that_h5py_reads(
    chunks: int | None,
    keywords: dict[str, Any],
    encoding: str,
    libver: str,
    userblock: int,
    texts: list[str],
    repeats: int,
    long: int,
    seed: int,
) -> None:
    rng, values = np.random.default_rng(seed), np.array([text.encode() for text in texts * repeats], object)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with h5py.File(path, "w", libver=libver, userblock_size=userblock) as file:
            # both in the same collections
            layout = Layout(chunks, keywords=keywords if chunks else {})
            both = [
                create(file, name, (len(values) + 2,), h5py.string_dtype(encoding), layout) for name in ("texts", "b")
            ]
            for start in range(0, len(values), 7):
                part = slice(start, min(start + 7, len(values)))
                for dataset in both:
                    dataset[part] = values[part]
            # what was there leaves a gap; the last is never written
            for place in rng.integers(len(values) + 1, size=5):
                both[0][place] = b"z" * int(rng.integers(1 + long))
        with h5py.File(path) as file:
            for name in ("texts", "b"):
                assert _texts(path, f"/{name}") == list(file[name][...])


@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "says"),
    [
        ("S4", (3,), Layout(), "text type of 4 bytes; expected text of variable length"),
        ("f4", (3,), Layout(), "floating-point type of 4 bytes; expected text of variable length"),
        (h5py.vlen_dtype("u1"), (3,), Layout(), "variable-length type of 16 bytes; expected text"),
        (h5py.string_dtype(), (3, 2), Layout(), "texts in 2 dimensions; expected one"),
        (h5py.string_dtype(), (), Layout(), "texts in 0 dimensions; expected one"),
        (h5py.string_dtype(), (3,), Layout(compact=True), "texts in its header"),
    ],
)
def test_what_the_core_does_not_read_as_texts(
    dtype: Any, shape: tuple[int, ...], layout: Layout, says: str, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        create(file, "texts", shape, dtype, layout)
    with pytest.raises(TypeError, match=rf"^texts \(.*a.h5\).*{says}"):
        _ops.texts(str(tmp_path / "a.h5"), "texts")


def test_texts_with_another_one_for_what_was_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("texts", (3,), h5py.string_dtype(), fillvalue="none")
    with pytest.raises(TypeError, match="never written"):
        _ops.texts(str(tmp_path / "a.h5"), "texts")


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8)])
def test_texts_at_addresses_of_other_sizes(sizes: tuple[int, int], tmp_path: Path) -> None:
    path, plist = tmp_path / "a.h5", h5py.h5p.create(h5py.h5p.FILE_CREATE)
    plist.set_sizes(*sizes)
    with h5py.File(h5py.h5f.create(str(path).encode(), h5py.h5f.ACC_TRUNC, plist)) as file:
        file["texts"] = ["b", "", "a" * 300]
    if sizes[0] == 8:
        assert _texts(path) == [b"b", b"", b"a" * 300]
    else:
        with pytest.raises(TypeError, match="addresses of other than 8 bytes"):
            _texts(path)


# ---------------------------------------------------------------------------------------------- what anndata writes


def _adata(seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.random(90, 50, 0.2, "csr", dtype="f4", random_state=rng)
    adata = anndata.AnnData(x, layers={"counts": x.astype("i8"), "dense": x.toarray()})
    adata.obsm["pca"] = rng.standard_normal((90, 4))
    adata.raw = adata.copy()
    return adata[:, :30].copy()


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("dense", [(), ("X", "raw/X")])
def test_files_that_anndata_writes(tmp_path: Path, compression: Any, dense: Any) -> None:
    path = tmp_path / "a.h5ad"
    _adata().write_h5ad(path, compression=compression, as_dense=dense)
    check([path], ("X", "layers/counts", "layers/dense", "obsm/pca"))
    check([path], ("raw/X",))


def test_encodings_before_anndata_0_7(tmp_path: Path) -> None:
    """Sparse groups with the attributes of h5sparse, dense datasets with none, `raw.X` beside `X`."""
    path, csr = tmp_path / "a.h5ad", count_csr(21, 40, 30)
    with h5py.File(path, "w") as file:
        for name in ("X", "raw.X"):
            write_element(file, name, csr, FILTERS["gzip"], index="i4")
            attributes = file[name].attrs
            del attributes["encoding-type"], attributes["encoding-version"], attributes["shape"]
            # h5sparse wrote bytes, which h5py stores as texts of fixed length
            attributes["h5sparse_format"] = "csr" if name == "X" else np.bytes_("csr")
            attributes["h5sparse_shape"] = np.array(csr.shape)
        write_array(file, "dense", csr.to_dense(), Layout((9, 9)))
    check([path], ("X", "dense"))
    reference = Reference([{"raw/X": csr}], {"raw/X": "torch"})
    with opened(config([path], ("raw/X",), sampling=Plan(4, 2, 4).config("random"))) as state:
        reference.check_once(reference.epoch(state, 1))


def test_old_encodings_are_those_that_anndata_reads(tmp_path: Path) -> None:
    """The control of the test before: anndata takes such a file, and reads the same."""
    path, csr = tmp_path / "a.h5ad", count_csr(21, 40, 30)
    with h5py.File(path, "w") as file:
        write_element(file, "X", csr, FILTERS["gzip"])
        attributes = file["X"].attrs
        del attributes["encoding-type"], attributes["encoding-version"], attributes["shape"]
        attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", np.array(csr.shape)
        np.testing.assert_array_equal(anndata.io.read_elem(file["X"]).toarray(), csr.to_dense())


def test_elements_of_several_files_in_one_dataset(tmp_path: Path) -> None:
    """A source names file and place; a file and the directory of a Zarr store stand side by side."""
    one, two, zarr = tmp_path / "1.h5ad", tmp_path / "2.h5ad", tmp_path / "a.zarr"
    adata = _adata()
    adata.write_h5ad(one)
    with h5py.File(two, "w") as file:
        write_element(file, "deep/down/matrix", count_csr(22, 90, 30), FILTERS["shuffle, gzip"])
    adata.write_zarr(zarr)
    place = {"hdf5": {"file": str(two), "path": "/deep/down/matrix"}}
    settings = {
        "elements": [{"name": "X"}, {"name": "other"}],
        "datasets": [{"path": str(path), "sources": {"other": place}} for path in (one, zarr)],
        "sampling": Plan(4, 3, 6).config("random"),
    }
    x, other = read_element(one, "X"), read_element(two, "deep/down/matrix")
    reference = Reference([{"X": x, "other": other}] * 2, {"X": "torch", "other": "torch"})
    with opened(settings) as state:
        reference.check_once(reference.epoch(state, 3))


def test_a_file_that_h5py_has_open(tmp_path: Path) -> None:
    """Two copies of libhdf5 in one process: h5py reads, and has open for reading, what is being streamed."""
    path = tmp_path / "a.h5ad"
    _adata().write_h5ad(path, compression="gzip")
    reference = Reference([{"X": read_element(path, "X")}], {"X": "torch"})
    with h5py.File(path) as file, opened(config([path])) as parent:
        before = file["X/data"][...]
        with streaming(parent, {"sampling": Plan(4, 3, 6).config("random")}) as state:
            reference.check_once(reference.epoch(state, 3))
            np.testing.assert_array_equal(file["X/data"][...], before)
        with h5py.File(path) as again:
            np.testing.assert_array_equal(again["X/data"][...], before)


@pytest.mark.parametrize("direct_io", [False, True])
def test_more_files_than_may_be_open(tmp_path: Path, direct_io: bool) -> None:
    """900 files under a limit of 256: opened, and read at random."""
    code = """
    import resource, sys
    import h5py, numpy as np
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    from annbatch._core import ops as _ops
    from support.h5files import Layout, config, write_element
    folder, direct_io = sys.argv[1], sys.argv[2] == "True"
    paths = [f"{folder}/{i}.h5ad" for i in range(900)]
    for i, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file["X"] = np.full((2, 3), i, "i4")
    sampling = {"kind": "random", "chunk_size": 1, "preload_nchunks": 600, "batch_size": 600}
    state = _ops.open_state(config(paths, sampling=sampling, direct_io=direct_io), ())
    _ops.start(state, 0)
    seen = 0
    for _ in range(3):
        rows, x = _ops.load(state)
        assert (x.numpy() == rows.numpy()[:, None] // 2).all()
        seen += len(rows)
    assert seen == 1800 and len(_ops.load(state)[0]) == 0
    _ops.close(state)
    """
    done = run_python(code, tmp_path, direct_io)
    assert done.returncode == 0, done.stderr[-2000:]
