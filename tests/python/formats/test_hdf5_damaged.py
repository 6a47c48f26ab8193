"""Damaged, foreign and changing HDF5 files: an error that names file, dataset and chunk, and no crash or hang."""

from __future__ import annotations

import os
import re
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from annbatch._core import ops as _ops
from support.h5files import (
    DEFLATE,
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
from support.oracle import Reference, load, opened, streaming
from support.processes import run_python
from support.sampling import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.core

SEQUENTIAL = Plan(5, 3, 5).config("sequential")
GZIP = Layout(64, ((SHUFFLE,), (DEFLATE, 4)))


def _write(path: Path, layout: Layout = GZIP, **fields: Any) -> Path:
    with h5py.File(path, "w", **fields) as file:
        write_element(file, "X", count_csr(1), layout)
    return path


def _error(path: Path, element: str = "X", **fields: Any) -> str:
    """What opening and reading everything raises."""
    with (
        pytest.raises(Exception, match=r"\S") as raised,
        opened(config([path], (element,), sampling=SEQUENTIAL, **fields)) as s,
    ):
        _ops.start(s, 0)
        while len(load(s)[0]):
            pass
    assert not isinstance(raised.value, AssertionError), raised.value
    assert re.search("bug in annbatch", str(raised.value)) is None
    return str(raised.value)


def _replace_chunk(path: Path, number: int, change: Callable[[bytes], bytes], name: str = "X/data") -> None:
    with h5py.File(path, "r+") as file:
        dataset = file[name].id
        offset = dataset.get_chunk_info(number).chunk_offset
        mask, raw = dataset.read_direct_chunk(offset)
        dataset.write_direct_chunk(offset, change(raw), filter_mask=mask)


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :]


# ---------------------------------------------------------------------------------------------- chunks

CHUNKS: dict[str, tuple[Layout, Callable[[bytes], bytes], str]] = {
    "a damaged deflate stream": (GZIP, _flip(20), "deflated stream"),
    "no deflate stream": (GZIP, lambda raw: b"x" * len(raw), "deflated stream"),
    "a truncated deflate stream": (GZIP, lambda raw: raw[:-5], "deflated stream"),
    "bytes behind a deflate stream": (GZIP, lambda raw: raw + b"abc", "bytes follow"),
    "an empty chunk": (GZIP, lambda raw: b"\0", "deflated stream"),
    "a wrong fletcher32": (Layout(64, ((FLETCHER32,),)), _flip(20), "wrong checksum: fletcher32"),
    "a wrong fletcher32 of gzip": (Layout(64, ((DEFLATE, 4), (FLETCHER32,))), _flip(20), "wrong checksum: fletcher32"),
    "a chunk shorter than its checksum": (
        Layout(64, ((FLETCHER32,),)),
        lambda raw: raw[:2],
        "shorter than its checksum",
    ),
    "a damaged lzf stream": (
        Layout(64, keywords={"compression": "lzf"}),
        lambda raw: b"\xff\xff\xff" + raw,
        "beginning",
    ),
    "a truncated lzf stream": (
        Layout(64, keywords={"compression": "lzf"}),
        lambda raw: raw[:-3],
        "truncated|expected 256",
    ),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_damaged_chunks(tmp_path: Path, name: str) -> None:
    layout, change, expected = CHUNKS[name]
    path = _write(tmp_path / "a.h5ad", layout)
    _replace_chunk(path, 2, change)
    error = _error(path)
    assert re.search(expected, error) and "damaged" in error, error
    for part in ('dataset "ds0"', "X/data", str(path), "chunk [2]"):
        assert part in error, error


@pytest.mark.parametrize("n", [63, 65, 1, 100_000])
@pytest.mark.parametrize("filters", [((DEFLATE, 4),), ((SHUFFLE,), (DEFLATE, 4)), ((LZF, 4, 0x105, 256),)])
def test_chunks_that_inflate_to_a_wrong_size(tmp_path: Path, filters: Any, n: int) -> None:
    path = _write(tmp_path / "a.h5ad", Layout(64, filters))
    with h5py.File(tmp_path / "b", "w") as file:
        other = write_array(file, "x", np.ones(n, "f4"), Layout(n, filters))
        _, raw = other.id.read_direct_chunk((0,))
    _replace_chunk(path, 1, lambda _: raw)
    error = _error(path)
    assert re.search("expected 256|more than was expected|before its beginning", error), error
    assert "X/data" in error and "chunk [1]" in error and str(path) in error


def test_the_rest_of_a_damaged_file_is_still_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad")
    x = read_element(path, "X")
    _replace_chunk(path, 3, lambda _: b"nothing")
    rows = int(np.searchsorted(x.indptr, 3 * 64, side="right")) - 1
    with opened(config([path], sampling={**SEQUENTIAL, "mask": [0, rows]})) as state:
        reference = Reference([{"X": x}], {"X": "torch"})
        reference.check_once(reference.epoch(state), range(rows))


def _patch(path: Path, old: bytes, new: bytes, count: int = 1) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == count, f"{raw.count(old)} times"
    path.write_bytes(raw.replace(old, new))


def test_a_chunk_beyond_the_end(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad", Layout(64))
    with h5py.File(path) as file:
        address = file["X/data"].id.get_chunk_info(2).byte_offset
    _patch(path, address.to_bytes(8, "little"), (1 << 40).to_bytes(8, "little"))
    error = _error(path)
    for part in ("X/data", str(path), "chunk [2]", str(1 << 40), "truncated or damaged"):
        assert part in error, error


def test_contiguous_data_beyond_the_end(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad", Layout())
    with h5py.File(path) as file:
        data = file["X/data"]
        # as the header has them
        address, size = (n.to_bytes(8, "little") for n in (data.id.get_offset(), data.nbytes))
    _patch(path, address + size, (1 << 40).to_bytes(8, "little") + size)
    error = _error(path)
    assert "X/data" in error and str(path) in error and "damaged" in error, error


def test_an_unfiltered_chunk_that_is_too_short(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad", Layout(64))
    with h5py.File(path, "r+") as file:
        values = file["X/data"][...]
        del file["X/data"]
        data = create(file["X"], "data", values.shape, "f4", Layout(64))
        data.id.write_direct_chunk((128,), values[128:192].tobytes()[:100])
    error = _error(path)
    assert "X/data" in error and "chunk [2]" in error and "100 bytes, expected 256" in error and str(path) in error, (
        error
    )


@pytest.mark.parametrize("layout", [GZIP, Layout()])
@pytest.mark.parametrize("n", [1 << 40, 1 << 60])
def test_claims_of_many_elements(tmp_path: Path, layout: Layout, n: int) -> None:
    """Nothing is stored of them."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", np.array([n - 1, 5])
        create(group, "data", (n,), "f4", Layout(64, ((DEFLATE, 4),)))
        create(group, "indices", (n,), "i4", Layout(64, ((DEFLATE, 4),)))
        create(group, "indptr", (n,), "i8", Layout(64, ((DEFLATE, 4),)))
        create(file, "dense", (n // 8, 2), "f4", Layout(layout.chunks, layout.filters))
    error = _error(path)
    assert re.search("claims|impossible size", error) and str(path) in error, error


def test_a_claim_of_one_huge_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="latest") as file:
        dataset = create(file, "X", (1, 1 << 29), "f8", Layout((1, 1 << 29), ((DEFLATE, 4),)))
        dataset.id.write_direct_chunk((0, 0), b"abc")
    error = _error(path)
    assert re.search("cannot hold|memory", error), error


# ---------------------------------------------------------------------------------------------- files


def test_what_is_no_hdf5_file(tmp_path: Path) -> None:
    for name, content in {"text": b"hello" * 1000, "empty": b"", "short": b"\x89HDF\r\n\x1a\n"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        error = _error(path)
        assert str(path) in error and re.search("no HDF5 file|cannot be opened", error), error
    assert "anndata" in _error(tmp_path / "text")
    assert "not found" in _error(tmp_path / "none.h5ad")


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, share: float, libver: str) -> None:
    path = _write(tmp_path / "a.h5ad", libver=libver)
    os.truncate(path, int(path.stat().st_size * share))
    error = _error(path)
    assert str(path) in error and "shorter than it should be" in error, error


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="latest") as file:
        write_element(file, "X", count_csr(1), GZIP)
        file.flush()
        error = _error(path)
        assert str(path) in error and "being written" in error, error
    check([path])


def test_damaged_bytes_anywhere(tmp_path: Path) -> None:
    """Any byte of a small file changed (some of them, but for `make test-long`): it is read, or it is an error; nothing else."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="latest") as file:
        write_element(file, "X", random_csr(1, 12, 9), Layout(16, ((SHUFFLE,), (DEFLATE, 4))))
    code = """
    import os, sys
    from pathlib import Path
    from annbatch._core import ops as _ops
    from support.h5files import config
    path = Path(sys.argv[1])
    whole = path.read_bytes()
    stride = 3 if "ANNBATCH_EXAMPLES" in os.environ else 17
    sampling = {"kind": "sequential", "chunk_size": 4, "preload_nchunks": 1, "batch_size": 4}
    read = 0
    for at in range(0, len(whole), stride):
        for bits in (0x01, 0x80, 0xff):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1:])
            state = None
            try:
                state = _ops.open_state(config([path], sampling=sampling), ())
                _ops.start(state, 0)
                while len(_ops.load(state)[0]):
                    pass
                read += 1
            except (RuntimeError, ValueError, TypeError, OSError) as error:
                assert "bug in annbatch" not in str(error), (at, bits, error)
            if state is not None:
                _ops.close(state)
    print(read)
    """
    done = run_python(code, path, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


# ---------------------------------------------------------------------------------------------- what is refused


def _csc(file: h5py.File) -> None:
    group = file.create_group("X")
    group.attrs["encoding-type"], group.attrs["shape"] = "csc_matrix", (4, 4)


def _external_link(file: h5py.File) -> None:
    file["X"] = h5py.ExternalLink("elsewhere.h5", "/X")


def _soft_link_out(file: h5py.File) -> None:
    file["out"] = h5py.ExternalLink(str(Path(file.filename).with_name("elsewhere.h5")), "/")
    file["X"] = h5py.SoftLink("/out/X")


def _external_storage(file: h5py.File) -> None:
    file.create_dataset("X", (4, 4), "f4", external=[("raw.bin", 0, 64)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 4), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "X", (4, 4))
    file.create_virtual_dataset("X", layout)


def _of_type(dtype: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.create_dataset("X", (4, 4), dtype)


def _bfloat16(file: h5py.File) -> None:
    dtype = h5py.h5t.IEEE_F32LE.copy()
    dtype.set_fields(15, 7, 8, 0, 7)
    dtype.set_size(2)
    dtype.set_ebias(127)
    h5py.h5d.create(file.id, b"X", dtype, h5py.h5s.create_simple((4, 4)))


def _szip_like(number: int) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((2, 2))
        plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 4)), plist)

    return write


def _scale_offset(file: h5py.File) -> None:
    file.create_dataset("X", (4, 4), "i4", chunks=(2, 2), scaleoffset=3)


REFUSED: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "csc": (_csc, "tocsr"),
    "external link": (_external_link, "link out of"),
    "soft link to an external link": (_soft_link_out, "link out of"),
    "external storage": (_external_storage, "another file"),
    "virtual dataset": (_virtual, "virtual dataset"),
    "strings": (_of_type(h5py.string_dtype()), "has elements of a text type.*astype"),
    "fixed strings": (_of_type("S4"), "has elements of a text type of 4 bytes; expected.*astype"),
    "compound": (_of_type([("a", "f4"), ("b", "i4")]), "has elements of a compound type of 8 bytes; expected.*astype"),
    "variable length": (_of_type(h5py.vlen_dtype(np.dtype("f4"))), "has elements of a variable-length type.*astype"),
    "enumeration": (_of_type(h5py.enum_dtype({"a": 0, "b": 1})), "has elements of an enumeration type of .*astype"),
    "complex": (_of_type("c8"), "has elements of a comp(ound|lex) type of 8 bytes; expected.*astype"),
    "long double": (_of_type("g"), r"has elements of a floating-point type of 16 bytes \(80 bits\); expected.*astype"),
    "bfloat16": (_bfloat16, "has elements of a floating-point type of 2 bytes; expected.*astype"),
    "opaque": (_of_type("V3"), "has elements of an opaque type of 3 bytes; expected.*astype"),
    "array": (_of_type(np.dtype(("f4", (2,)))), "has elements of an array type of 8 bytes; expected.*astype"),
    "reference": (_of_type(h5py.ref_dtype), "has elements of a reference type of 8 bytes; expected.*astype"),
    "null": (lambda file: file.create_dataset("X", data=h5py.Empty("f4")), "holds nothing"),
    "scalar": (lambda file: file.create_dataset("X", data=3.0), "scalar"),
    "one dimension": (lambda file: file.create_dataset("X", data=np.ones(4)), "at least two dimensions"),
    "an encoding that holds nothing": (
        lambda file: file.create_dataset("X", (4, 4)).attrs.create("encoding-type", h5py.Empty(h5py.string_dtype())),
        "encoding-type",
    ),
    "an encoding of several texts": (
        lambda file: file.create_dataset("X", (4, 4)).attrs.create("encoding-type", ["array", "array"]),
        "encoding-type",
    ),
    "an encoding of no letters": (
        lambda file: file.create_dataset("X", (4, 4)).attrs.create("encoding-type", ""),
        'encoding-type ""',
    ),
    "a plain group": (lambda file: file.create_group("X"), "encoding-type"),
    "a link that leads nowhere": (lambda file: file.__setitem__("X", h5py.SoftLink("/none")), "not found"),
    "nothing": (lambda file: None, "not found"),
    "a missing part": (
        lambda file: write_element(file, "X", count_csr(1), GZIP) or file.__delitem__("X/indptr"),
        "X/indptr",
    ),
    "a group for a part": (
        lambda file: (
            write_element(file, "X", count_csr(1), GZIP),
            file.__delitem__("X/data"),
            file.create_group("X/data"),
        ),
        "is a group",
    ),
    "bzip2": (_szip_like(307), r"307 \(bzip2\).*write_h5ad"),
    "blosc2": (_szip_like(32026), r"32026 \(blosc2\).*convert it to Zarr"),
    "scaleoffset": (_scale_offset, r"6 \(scaleoffset\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["X"] = np.ones((4, 4), "f4")
    write, expected = REFUSED[name]
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        write(file)
    error = _error(path)
    assert re.search(expected, error) and 'dataset "ds0"' in error and "X" in error, error


def test_soft_links_within_the_file_are_followed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["layers/same"] = h5py.SoftLink("/X")
    check([path], ("X", "layers/same"))


def _index_of_chunks(path: Path, n: int) -> tuple[bytearray, int]:
    """The bytes of a file whose dense X has `n` chunks of one row, and where the node of its index is."""
    with h5py.File(path, "w", libver="earliest") as file:
        x = file.create_dataset("X", shape=(n, 1), maxshape=(None, 1), chunks=(1, 1), dtype="u1")
        x[:] = 7
    content = bytearray(path.read_bytes())
    return content, next(at for at in range(len(content)) if content[at : at + 5] == b"TREE\x01")


# of a node: 24 bytes, then for each child a key of 8 bytes and three offsets, and its address
_NODE, _KEY, _CHILD = 24, 8 + 3 * 8, 8


def test_a_chunk_that_is_listed_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    content, node = _index_of_chunks(path, 4)
    second = node + _NODE + _KEY + _CHILD
    struct.pack_into("<Q", content, second + 8, 0)
    path.write_bytes(content)
    error = _error(path)
    assert str(path) in error and "lists chunk [0, 0] twice" in error, error


def test_an_index_of_more_chunks_than_the_file_can_hold(tmp_path: Path) -> None:
    """Nodes whose children are all the same one: each level has as many chunks again for each of its entries."""
    path = tmp_path / "a.h5ad"
    content, node = _index_of_chunks(path, 64)
    size = _NODE + 64 * (_KEY + _CHILD) + _KEY
    child = len(content)
    content += content[node : node + size]
    for level in (1, 2, 3):
        made = b"TREE" + struct.pack("<BBHqq", 1, level, 64, -1, -1)
        made += b"".join(struct.pack("<IIQQQQ", 1, 0, row, 0, 0, child) for row in range(64))
        made += struct.pack("<IIQQQ", 1, 0, 64, 0, 0)
        if level == 3:
            content[node : node + len(made)] = made
        else:
            child = len(content)
            content += made
    # the end of the file, as its superblock says it
    struct.pack_into("<Q", content, 40, len(content))
    path.write_bytes(content)
    error = _error(path)
    assert str(path) in error and "to which another one points" in error, error


def test_row_pointers_in_a_chunk_of_which_nothing_is_stored(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        n = len(file["X/indptr"])
        del file["X/indptr"]
        file["X"].create_dataset("indptr", shape=(n,), maxshape=(None,), chunks=(2**29 - 1,), dtype="i8")
    error = _error(path)
    assert "indptr" in error and f"claims {(2**29 - 1) * 8} bytes" in error, error


# ---------------------------------------------------------------------------------------------- texts

_PLACE = struct.Struct("<IQI")


def _texts_file(path: Path, longest: int = 3_000) -> tuple[bytearray, int, int]:
    """The bytes of a file of 300 texts, where the last says that it lies, and where its collection begins, first in which it is."""
    with h5py.File(path, "w") as file:
        texts = file.create_dataset("texts", (300,), h5py.string_dtype())
        texts[299] = "a" * longest
        texts[:299] = [f"text {i}" for i in range(299)]
        place = texts.id.get_offset() + 299 * _PLACE.size
    raw = bytearray(path.read_bytes())
    _, collection, number = _PLACE.unpack_from(raw, place)
    assert raw[collection:].startswith(b"GCOL") and number == 1
    return raw, place, collection


def _place(change: Callable[[int, int, int], tuple[int, int, int]]) -> Callable[[bytearray, int, int], None]:
    return lambda raw, at, _: _PLACE.pack_into(raw, at, *change(*_PLACE.unpack_from(raw, at)))


def _same_places(raw: bytearray, place: int, _: int) -> None:
    raw[place - 299 * 16 : place + 16] = raw[place : place + 16] * 300


TEXTS: dict[str, tuple[Callable[[bytearray, int, int], None], str]] = {
    "longer than it is": (
        _place(lambda n, at, number: (n + 1, at, number)),
        "a text of 3001 bytes is 3000 where it lies",
    ),
    "of no such number": (_place(lambda n, at, _: (n, at, 60_000)), "there is no text 60000 in the collection"),
    "of number 0": (_place(lambda n, at, _: (n, at, 0)), "there is no text 0 in the collection"),
    "beyond the end": (_place(lambda n, at, number: (n, 1 << 40, number)), "texts at byte 1099511627776 of a file of"),
    "at the largest address": (
        _place(lambda n, _, number: (n, 2**64 - 1, number)),
        "texts at byte 18446744073709551615",
    ),
    "within a collection": (_place(lambda n, at, number: (n, at + 8, number)), "no texts at byte"),
    "all of them the same": (_same_places, "texts that are longer than the file"),
    "version": (lambda raw, _, at: struct.pack_into("<B", raw, at + 4, 2), "no texts at byte"),
    "bytes of a collection": (
        lambda raw, _, at: struct.pack_into("<Q", raw, at + 8, 1 << 40),
        "1099511627776 bytes of texts",
    ),
    "bytes of a text": (
        lambda raw, _, at: struct.pack_into("<Q", raw, at + 24, 1 << 40),
        "a text of 1099511627776 bytes",
    ),
    "bytes of a text, all": (lambda raw, _, at: struct.pack_into("<Q", raw, at + 24, 2**64 - 1), "a text of"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_damaged_texts(name: str, tmp_path: Path) -> None:
    path, (change, says) = tmp_path / "a.h5", TEXTS[name]
    raw, place, collection = _texts_file(path)
    change(raw, place, collection)
    path.write_bytes(raw)
    with pytest.raises(_ops.DataError, match=rf"^/texts \(.*a.h5\): {says}.*; the file is damaged$"):
        _ops.texts(str(path), "/texts")


def test_a_text_with_a_zero_byte_in_it(tmp_path: Path) -> None:
    """Which h5py ends there."""
    path = tmp_path / "a.h5"
    raw, _, collection = _texts_file(path)
    raw[collection + 40] = 0
    path.write_bytes(raw)
    with pytest.raises(TypeError, match="has a text with a zero byte in it"):
        _ops.texts(str(path), "/texts")
    with h5py.File(path) as file:
        assert file["texts"][299] == b"a" * 8


def test_texts_in_collections_that_overlap(tmp_path: Path) -> None:
    raw, place, collection = _texts_file(tmp_path / "a.h5", 3 << 20)
    # the long text holds one collection within the other, each as long as what is left
    for i in range(100):
        at = collection + 32 + 4096 * i
        raw[at : at + 8] = b"GCOL\1\0\0\0"
        n = len(raw) - at
        struct.pack_into("<QHHIQ", raw, at + 8, n, 1, 1, 0, n - 32)
        _PLACE.pack_into(raw, place - 16 * i, n - 32, at, 1)
    (tmp_path / "a.h5").write_bytes(raw)
    with pytest.raises(_ops.DataError, match=r"bytes of texts, where .* are left"):
        _ops.texts(str(tmp_path / "a.h5"), "/texts")


def test_short_texts_among_long_ones(tmp_path: Path) -> None:
    """The core would hold the long ones, too, which libhdf5 does not."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        names, docs = (file.create_dataset(name, (1_300,), h5py.string_dtype()) for name in ("names", "docs"))
        for k in range(1_300):
            names[k], docs[k] = f"{k}", "d" * 60_000
    with pytest.raises(_ops.DataError, match=r"^/names \(.*a.h5\): the texts lie far apart$"):
        _ops.texts(str(tmp_path / "a.h5"), "/names")
    assert len(_ops.texts(str(tmp_path / "a.h5"), "/docs")) == 1_300 * 60_001


def test_many_texts_that_were_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        names = file.create_dataset("names", (1 << 30,), h5py.string_dtype(), chunks=(1 << 12,))
        names[: 1 << 12] = ["a"] * (1 << 12)
    with pytest.raises(TypeError, match="has 1073741824 texts in a file of"):
        _ops.texts(str(tmp_path / "a.h5"), "/names")


def test_claims_of_many_texts(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("texts", (1 << 40,), h5py.string_dtype(), chunks=(1000,))
    with pytest.raises(_ops.DataError, match="claims 17592186044416 bytes, but only 0 are stored"):
        _ops.texts(str(tmp_path / "a.h5"), "/texts")


def test_damaged_bytes_anywhere_of_texts(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.h5", np.random.default_rng(0)
    raw, place, collection = _texts_file(path)
    # where headers of texts are, and what says where texts lie
    places = [*range(place - 299 * 16, place + 16), *range(collection, len(raw))]
    read = 0
    for at in rng.choice(places, 600, replace=False):
        damaged = bytearray(raw)
        damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            texts = _ops.texts(str(path), "/texts")
        except (_ops.DataError, TypeError) as error:
            assert "a.h5" in str(error) and "bug" not in str(error)
        else:
            assert texts.count(b"\0") == 300
            read += 1
    assert 100 < read < 600


# ---------------------------------------------------------------------------------------------- changes while open


@pytest.mark.parametrize("change", ["replaced", "rewritten", "truncated", "removed"])
def test_a_file_that_changes_after_it_was_opened(tmp_path: Path, change: str) -> None:
    """Reading goes on from a handle that is still open, with the same rows, or it is an error: never other rows."""
    path, other = _write(tmp_path / "a.h5ad"), tmp_path / "b.h5ad"
    with h5py.File(other, "w") as file:
        write_element(file, "X", count_csr(2), GZIP)
    reference = Reference([{"X": read_element(path, "X")}], {"X": "torch"})
    with opened(config([path])) as parent:
        # the handle that opening left is closed by many others
        many = [tmp_path / f"many{i}.h5ad" for i in range(1100)]
        for file in many:
            with h5py.File(file, "w") as made:
                made["X"] = np.ones((1, 1), "f4")
        with opened(config(many, sampling=Plan(1, 1100, 1100).config("sequential"))) as state:
            _ops.start(state, 0)
            load(state)
        if change == "replaced":
            other.rename(path)
        elif change == "rewritten":
            path.write_bytes(other.read_bytes())
        elif change == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
        with streaming(parent, {"sampling": SEQUENTIAL}) as state, pytest.raises(Exception, match=r"\S") as raised:
            reference.epoch(state)
        error = str(raised.value)
        expected = "not found" if change == "removed" else "replaced or changed after it was opened"
        assert expected in error and str(path) in error and "X/" in error, error


def test_forks_while_files_are_opened(tmp_path: Path) -> None:
    """A child opens files too, or is told why it cannot: it never waits for a thread that it does not have."""
    paths = [_write(tmp_path / f"{i}.h5ad") for i in range(20)]
    code = """
    import os, signal, sys, threading, warnings
    warnings.simplefilter("ignore")
    from annbatch._core import ops as _ops
    from support.h5files import config
    paths, stop = sys.argv[1:], threading.Event()
    def openings():
        while not stop.is_set():
            _ops.close(_ops.open_state(config(paths), ()))
    thread = threading.Thread(target=openings)
    thread.start()
    seen = set()
    for _ in range(60):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                _ops.open_state(config(paths[:2]), ())
                os._exit(10)
            except RuntimeError as error:
                os._exit(11 if "this process was forked" in str(error) else 12)
        seen.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    thread.join()
    assert seen <= {10, 11}, seen
    print(sorted(seen))
    """
    done = run_python(code, *paths, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "11" in done.stdout


def test_openings_from_many_threads(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"{i}.h5ad") for i in range(8)]
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for i in range(10):
                path = paths[(first + i) % 8]
                with h5py.File(path) as file:
                    shape = file["X/data"].shape
                with opened(config([path, paths[first]])) as state:
                    assert _ops.describe(state)["elements"][0]["nnz"] == 2 * shape[0]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_scipy_agrees(tmp_path: Path) -> None:
    """The control: what these tests write is what scipy reads."""
    path = _write(tmp_path / "a.h5ad")
    with h5py.File(path) as file:
        parts = [file["X"][name][...] for name in ("data", "indices", "indptr")]
        matrix = sp.csr_matrix(tuple(parts), shape=tuple(file["X"].attrs["shape"]))
    np.testing.assert_array_equal(matrix.toarray(), count_csr(1).to_dense())
