"""HDF5 files whose metadata was made to crash, hang or fill what reads it: each is an error that says what is wrong.

They are made from files that h5py wrote, by changing single fields and the checksums over them. libhdf5 by itself dies of
most of them, so they are read in another process.
"""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from support.h5files import SHUFFLE, Layout, check, random_csr, write_element
from support.processes import run_python

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.core

MASK = 2**32 - 1


def _rotated(n: int, by: int) -> int:
    return (n << by | n >> (32 - by)) & MASK


def checksum(data: bytes) -> int:
    """That of HDF5's metadata: Bob Jenkins' lookup3, ``hashlittle`` with an initial value of 0."""
    a = b = c = (0xDEADBEEF + len(data)) & MASK
    words = struct.unpack(f"<{-(-len(data) // 12) * 3}I", data.ljust(-(-len(data) // 12) * 12, b"\0"))
    for i in range(0, len(words) - 3, 3):
        a, b, c = (a + words[i]) & MASK, (b + words[i + 1]) & MASK, (c + words[i + 2]) & MASK
        for by in (4, 6, 8, 16, 19, 4):
            a = (a - c) & MASK ^ _rotated(c, by)
            c = (c + b) & MASK
            a, b, c = b, c, a
    a, b, c = (a + words[-3]) & MASK, (b + words[-2]) & MASK, (c + words[-1]) & MASK
    for by in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _rotated(b, by)) & MASK
        a, b, c = b, c, a
    return b


class Forged:
    """A file whose fields can be changed."""

    def __init__(self, path: Path) -> None:
        self.raw = bytearray(path.read_bytes())

    def find(self, signature: bytes, kind: int | None = None, level: int | None = None) -> int:
        """Where the first structure of its sort lies."""
        at = -1
        while True:
            at = self.raw.index(signature, at + 1)
            if (kind is None or self.raw[at + 4] == kind) and (level is None or self.raw[at + 5] == level):
                return at

    def get(self, at: int, form: str) -> int:
        return int(struct.unpack_from("<" + form, self.raw, at)[0])

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.raw, at, *values)

    def seal(self, at: int, n: int) -> None:
        """Writes the checksum behind the `n` bytes at `at`, which was right before."""
        self.put(at + n, "I", checksum(bytes(self.raw[at : at + n])))


def _sealed(file: Forged, at: int, n: int, *changes: tuple[int, str, int]) -> None:
    assert file.get(at + n, "I") == checksum(bytes(file.raw[at : at + n])), "where the checksum lies"
    for offset, form, value in changes:
        file.put(at + offset, form, value)
    file.seal(at, n)


# ---------------------------------------------------------------------------------------------- what is changed


def _sparse(path: Path, layout: Layout, **fields: Any) -> None:
    with h5py.File(path, "w", **fields) as file:
        write_element(file, "X", random_csr(1, 40, 30), layout)


def _dense(path: Path, n: int = 600, *, grows: int = 0, chunks: tuple[int, int] = (1, 1), **fields: Any) -> None:
    """A dataset of `n` rows of two, of which so many dimensions can grow."""
    with h5py.File(path, "w", libver=fields.pop("libver", "latest")) as file:
        shape = (n, 2)
        largest = (None,) * grows + shape[grows:]
        values = np.arange(2 * n, dtype="f4").reshape(shape)
        file.create_dataset("X", data=values, chunks=chunks, maxshape=largest, **fields)


CHILDREN = 24 + 32
"""Of a node of chunks of a tree of version 1, in two dimensions: each behind its key."""
STEP = 32 + 8


def _tree(change: Callable[[Forged, int, int], None], n: int = 6000) -> Callable[[Path], Forged]:
    """A tree of version 1, of which the root and its first child are changed."""

    def make(path: Path) -> Forged:
        _dense(path, n, libver="earliest")
        file = Forged(path)
        root = file.find(b"TREE", 1, 2)
        change(file, root, file.get(root + CHILDREN, "Q"))
        return file

    return make


def _group_for_chunks(path: Path) -> Forged:
    """The address of the chunks is that of the tree of the group."""
    _dense(path, 4, libver="earliest")
    file = Forged(path)
    chunks, group = file.find(b"TREE", 1), file.find(b"TREE", 0)
    header = file.raw.index(chunks.to_bytes(8, "little"))
    file.put(header, "Q", group)
    return file


def _heap(offset: int, form: str, value: int) -> Callable[[Path], Forged]:
    def make(path: Path) -> Forged:
        _sparse(path, Layout(16))
        file = Forged(path)
        file.put(file.find(b"GCOL") + offset, form, value)
        return file

    return make


def _heap_free(path: Path) -> Forged:
    """The free space at the end of the collection has no bytes."""
    _sparse(path, Layout(16))
    file = Forged(path)
    heap = file.find(b"GCOL")
    at = heap + 16
    while file.get(at, "H"):
        at += 16 + -(-file.get(at + 8, "Q") // 8) * 8
    assert file.get(at + 8, "Q") == heap + 4096 - at
    file.put(at + 8, "Q", 0)
    return file


def _tree2(
    signature: bytes, n: int, *changes: tuple[int, str, int], self_at: int | None = None
) -> Callable[[Path], Forged]:
    """The structure of a tree of version 2; its own address goes to `self_at`."""

    def make(path: Path) -> Forged:
        _dense(path, grows=2)
        file = Forged(path)
        at = file.find(signature)
        own = () if self_at is None else ((self_at, "Q", at),)
        _sealed(file, at, n, *changes, *own)
        return file

    return make


def _internal(change: Callable[[Forged, int, int], tuple[int, str, int]]) -> Callable[[Path], Forged]:
    """The root of a tree of version 2; `change` gets its address and where its pointers begin."""

    def make(path: Path) -> Forged:
        _dense(path, grows=2)
        file = Forged(path)
        header, at = file.find(b"BTHD"), file.find(b"BTIN")
        assert file.get(header + 16, "Q") == at
        n = file.get(header + 24, "H")
        pointers = 6 + 24 * n
        _sealed(file, at, pointers + 9 * (n + 1), change(file, at, pointers))
        return file

    return make


def _array(
    signature: bytes, n: int, *changes: tuple[int, str, int], grows: int = 0, **fields: Any
) -> Callable[[Path], Forged]:
    def make(path: Path) -> Forged:
        _dense(path, grows=grows, chunks=(1, 2), **fields)
        file = Forged(path)
        _sealed(file, file.find(signature), n, *changes)
        return file

    return make


def _shared_block(path: Path) -> Forged:
    """Two blocks of an extensible array, of other sizes, lie at one place."""
    _dense(path, grows=1, chunks=(1, 2))
    file = Forged(path)
    at = file.find(b"EAIB")
    first = 14 + 4 * 8
    _sealed(file, at, first + (6 + 25) * 8, (first + 5 * 8, "Q", file.get(at + first, "Q")))
    return file


def _attributes(signature: bytes, n: int, *changes: tuple[int, str, int]) -> Callable[[Path], Forged]:
    """The heap or the tree of attributes that do not lie with their object."""

    def make(path: Path) -> Forged:
        _dense(path, 4)
        with h5py.File(path, "r+", libver="latest") as file:
            for i in range(20):
                file["X"].attrs[f"attribute {i}"] = "text" * 10
            file["X"].attrs["encoding-type"] = "array"
        file = Forged(path)
        _sealed(file, file.find(signature), n, *changes)
        return file

    return make


def _messages(file: Forged, at: int) -> tuple[int, dict[int, int]]:
    """Of the object header at `at`: where its messages end, and where the body of each type of them begins."""
    if file.raw[at : at + 4] == b"OHDR":
        flags = file.raw[at + 5]
        step, size_at, size_bytes = (
            (6 if flags & 4 else 4),
            at + 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1),
            1 << (flags & 3),
        )
        begin, form = size_at + size_bytes, "BH"
        end = begin + int.from_bytes(file.raw[size_at:begin], "little")
    else:
        begin, step, form = at + 16, 8, "HH"
        end = begin + file.get(at + 8, "I")
    found = {}
    while begin + step <= end:
        kind, n = struct.unpack_from("<" + form, file.raw, begin)
        found[kind] = begin + step
        begin += step + n
    return end, found


def _headers(file: Forged, path: Path, name: str) -> int:
    with h5py.File(path) as opened:
        return h5py.h5o.get_info(opened[name].id).addr


def _layout(n_dims_at: int, n_dims: int, libver: str, name: str = "X/indices") -> Callable[[Path], Forged]:
    """The chunks of a dataset of one dimension have `n_dims`, that of an element among them."""

    def make(path: Path) -> Forged:
        if name == "X":
            with h5py.File(path, "w", libver=libver) as file:
                file.create_dataset("X", data=np.ones(40, "f4"), chunks=(16,))
        else:
            _sparse(path, Layout(16), libver=libver)
        file = Forged(path)
        at = _headers(file, path, name)
        end, found = _messages(file, at)
        assert file.raw[found[LAYOUT] + n_dims_at] == 2
        file.put(found[LAYOUT] + n_dims_at, "B", n_dims)
        if libver == "latest":
            file.seal(at, end - at)
        return file

    return make


def _continued(libver: str) -> Callable[[Path], Forged]:
    """The header of ``X`` goes on where it begins."""

    def make(path: Path) -> Forged:
        _dense(path, 4, libver=libver)
        with h5py.File(path, "r+", libver=libver) as file:
            file["X"].attrs["encoding-type"] = "array"
        file = Forged(path)
        at = _headers(file, path, "X")
        end, found = _messages(file, at)
        new = libver == "latest"
        body = found[ATTRIBUTE]
        file.put(body - (4 if new else 8), "B" if new else "H", CONTINUATION)
        begin = end - at if new else end - at - 16
        file.put(body, "QQ", at if new else at + 16, begin + 4 if new else begin)
        if new:
            file.seal(at, end - at)
        return file

    return make


ATTRIBUTE, LAYOUT, CONTINUATION = 0xC, 0x8, 0x10
TWO = "to which another one points"
HOSTILE: dict[str, tuple[Callable[[Path], Forged], str]] = {
    "a node is its own child": (_tree(lambda f, root, _: f.put(root + CHILDREN, "Q", root)), TWO),
    "a node is its own grandchild": (_tree(lambda f, root, child: f.put(child + CHILDREN, "Q", root)), TWO),
    "a node is there twice": (_tree(lambda f, root, child: f.put(root + CHILDREN + STEP, "Q", child)), TWO),
    "a child of a wrong level": (_tree(lambda f, _, child: f.put(child + 5, "B", 9)), "is of level 9"),
    "a node of another kind": (_tree(lambda f, root, _: f.put(root + 4, "B", 0)), "a node of kind 0"),
    "a child beyond the end": (_tree(lambda f, root, _: f.put(root + CHILDREN, "Q", 1 << 40)), "points to byte"),
    "a group's tree for chunks": (_group_for_chunks, "a node of kind 0"),
    "free space of no bytes among texts": (_heap_free, "a text of 0 bytes"),
    "a text that wraps around": (_heap(16 + 8, "Q", 2**64 - 16), "a text of 18446744073709551600 bytes"),
    "a text of more than there are": (_heap(16 + 8, "Q", 5000), "a text of 5000 bytes"),
    "texts of more than the file": (_heap(8, "Q", 1 << 40), "1099511627776 bytes of texts"),
    "a deep tree": (_tree2(b"BTHD", 34, (12, "H", 65535)), "a depth of 65535"),
    "huge nodes": (_tree2(b"BTHD", 34, (6, "I", 2**32 - 1)), "nodes of 4294967295 bytes"),
    "tiny nodes": (_tree2(b"BTHD", 34, (6, "I", 12)), "nodes of 12 bytes"),
    "short records": (_tree2(b"BTHD", 34, (10, "H", 1)), "records of 1 bytes"),
    "records of another kind": (_tree2(b"BTHD", 34, (5, "B", 5)), "kind 5"),
    "more records than there is room for": (_tree2(b"BTHD", 34, (24, "H", 65535)), "a node of 65535 records"),
    "a node of version 2 is its own child": (_internal(lambda _, at, pointers: (pointers, "Q", at)), TWO),
    "a child with too many records": (_internal(lambda _, __, pointers: (pointers + 8, "B", 255)), "255 records"),
    "a fixed array of many": (_array(b"FAHD", 24, (8, "Q", 1 << 40)), "1099511627776 elements"),
    "a fixed array of single bytes": (_array(b"FAHD", 24, (6, "B", 1)), "elements of 1 bytes"),
    "a fixed array of filtered chunks": (_array(b"FAHD", 24, (5, "B", 1)), "kind 1"),
    "an extensible array of many": (_array(b"EAHD", 68, (44, "Q", 1 << 31), grows=1), "2147483648 elements"),
    "an extensible array of more than it can have": (_array(b"EAHD", 68, (44, "Q", 1 << 60), grows=1), "array of 2"),
    "an extensible array of single bytes": (_array(b"EAHD", 68, (6, "B", 1), grows=1), "elements of 1 bytes"),
    "blocks of no elements": (_array(b"EAHD", 68, (9, "B", 0), grows=1), "0 to a block"),
    "a block of an array is there twice": (_shared_block, TWO),
    "the tree of attributes has other records": (_attributes(b"BTHD", 34, (5, "B", 1)), "kind 1"),
    "attributes that objects share": (_attributes(b"BTLF", 6 + 17 * 21, (6 + 8, "B", 2)), "objects share"),
    "a heap of more rows than it can have": (_attributes(b"FRHP", 142, (140, "H", 0x8000)), "32768 rows"),
    "a heap without blocks": (_attributes(b"FRHP", 142, (110, "H", 0)), "rows of 0 blocks"),
    "chunks of no dimensions": (_layout(3, 0, "latest"), "chunks of shape [], with"),
    "chunks of no dimensions in X": (_layout(3, 0, "latest", "X"), "chunks of shape [], with"),
    "chunks of more dimensions": (_layout(2, 3, "earliest"), "in a dataset of 1"),
    "a header that goes on where it begins": (_continued("earliest"), "cannot be read"),
    "a new header that goes on where it begins": (_continued("latest"), "cannot be read"),
    "a heap with filters": (_attributes(b"FRHP", 142, (7, "H", 8)), "rows of 4 blocks"),
}

CODE = """
import json, resource, sys
from annbatch._core import ops as _ops
from support.h5files import config
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
sampling = {"kind": "sequential", "chunk_size": 4, "preload_nchunks": 1, "batch_size": 4}
for path in sys.argv[1:]:
    error = None
    try:
        state = _ops.open_state(config([path], sampling=sampling), ())
        _ops.close(state)
    except (RuntimeError, TypeError) as raised:
        error = str(raised)
    print(json.dumps([path, error]), flush=True)
"""


def _errors(paths: list[Path]) -> dict[str, str | None]:
    """What opening each raises, in a process that may not have much more memory."""
    done = run_python(CODE, *paths)
    errors = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, f"exit code {done.returncode} after {len(errors)} files: {done.stderr[-2000:]}"
    return errors


def test_files_made_to_crash_their_reader(tmp_path: Path) -> None:
    paths = []
    for name, (make, _) in HOSTILE.items():
        path = tmp_path / f"{name}.h5ad"
        file = make(path)
        path.write_bytes(file.raw)
        paths.append(path)
    errors = _errors(paths)
    wrong = []
    for (name, (_, expected)), path in zip(HOSTILE.items(), paths, strict=True):
        error = errors[str(path)] or ""
        # of what could be right the error says what helps
        told = ("the file is damaged" in error) != ("write the" in error)
        if not (told and all(part in error for part in (expected, str(path), "array X"))):
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
@pytest.mark.parametrize("grows", [0, 1, 2])
@pytest.mark.parametrize("filtered", [False, True])
def test_large_indexes_of_every_kind(tmp_path: Path, libver: str, grows: int, filtered: bool) -> None:
    """The control: what is refused above is nothing that libhdf5 writes. Six thousand chunks fill nodes and blocks below
    the first ones of each index."""
    path = tmp_path / "a.h5ad"
    fields = {"compression": "gzip", "shuffle": True} if filtered else {}
    _dense(
        path,
        6000,
        grows=grows,
        chunks=(1, 2),
        libver=("earliest" if libver == "earliest" else (libver, libver)),
        **fields,
    )
    check([path])


def test_many_attributes_and_links(tmp_path: Path) -> None:
    """Those that lie in trees and heaps of their own."""
    path = tmp_path / "a.h5ad"
    for libver in ("earliest", "latest"):
        with h5py.File(path, "w", libver=libver) as file:
            for i in range(2000):
                file.create_group(f"group {i}")
            write_element(file, "X", random_csr(1, 40, 30), Layout(16, ((SHUFFLE,),)))
            for i in range(300):
                file["X"].attrs[f"attribute {i}"] = f"{i} " * 300
        check([path])


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8)])
def test_addresses_of_other_sizes(tmp_path: Path, sizes: tuple[int, int]) -> None:
    path = tmp_path / "a.h5ad"
    plist = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    plist.set_sizes(*sizes)
    plist.set_userblock(1024)
    with h5py.File(h5py.h5f.create(str(path).encode(), h5py.h5f.ACC_TRUNC, plist)) as file:
        write_element(file, "X", random_csr(1, 40, 30), Layout(1))
    check([path])


def test_a_file_with_an_image_of_the_cache(tmp_path: Path) -> None:
    """libhdf5 would take structures from it that it does not read one by one."""

    class Image(ctypes.Structure):
        """`H5AC_cache_image_config_t`."""

        _fields_ = (
            ("version", ctypes.c_int),
            ("generate_image", ctypes.c_bool),
            ("save_resize_status", ctypes.c_bool),
            ("entry_ageout", ctypes.c_int),
        )

    libraries = Path(h5py.__file__).parent.parent.glob("h5py.libs/libhdf5-*")
    set_image = next((getattr(ctypes.CDLL(str(path)), "H5Pset_mdc_image_config", None) for path in libraries), None)
    if set_image is None:
        pytest.skip("h5py is not of a wheel that brings libhdf5")
    set_image.argtypes = (ctypes.c_int64, ctypes.c_void_p)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_LATEST, h5py.h5f.LIBVER_LATEST)
    assert set_image(access.id, ctypes.byref(Image(1, True, False, -1))) >= 0
    path = tmp_path / "a.h5ad"
    with h5py.File(h5py.h5f.create(str(path).encode(), h5py.h5f.ACC_TRUNC, fapl=access)) as file:
        write_element(file, "X", random_csr(1, 40, 30), Layout(16))
    assert b"MDCI" in path.read_bytes()
    error = _errors([path])[str(path)] or ""
    assert all(part in error for part in (str(path), "metadata cache image", "h5repack")), error
    assert "damaged" not in error, error


@pytest.mark.parametrize("name", ["TREESHREW_", "GCOL_", "FRHP"])
def test_names_that_begin_like_structures(tmp_path: Path, name: str) -> None:
    """libhdf5 reads long collections of texts in two parts, of which the second begins with any text.

    Texts of one length fill collections alike, so that with each length one of them stands at the border.
    """
    path = tmp_path / "a.h5ad"
    for n_bytes in range(len(name) + 4, 26):
        names = [name + f"{i:x}".rjust(n_bytes - len(name), "_") for i in range(1500)]
        with h5py.File(path, "w") as file:
            file["names"] = names
            write_element(file, "X", random_csr(1, 40, 30), Layout(16))
            # in a collection of names
            del file["X"].attrs["encoding-type"]
            file["X"].attrs["encoding-type"] = "csr_matrix"
        check([path])


def test_types_within_types(tmp_path: Path) -> None:
    """libhdf5 calls itself for each: eight thousand fit into a header, which h5py takes long to make (`make test-long`)."""
    path = tmp_path / "a.h5ad"
    make = """
    import os, sys, threading, h5py
    def make():
        nested = h5py.h5t.NATIVE_INT8.copy()
        for _ in range(8150 if "ANNBATCH_EXAMPLES" in os.environ else 3000):
            nested = h5py.h5t.vlen_create(nested)
        with h5py.File(sys.argv[1], "w", libver="latest") as file:
            h5py.h5d.create(file.id, b"X", nested, h5py.h5s.create_simple((1,)))
    threading.stack_size(1 << 28)
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    """
    made = run_python(make, path)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "variable-length type of 16 bytes" in (_errors([path])[str(path)] or "")


def test_texts_of_large_letters(tmp_path: Path) -> None:
    """libhdf5 allocates their length times the size that the file gives a letter."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="v108") as file:
        file.create_dataset("X", data=np.ones((4, 2), "f4")).attrs["encoding-type"] = "array"
    file = Forged(path)
    at = _headers(file, path, "X")
    end, found = _messages(file, at)
    letter = file.raw.index(b"\x10\0\0\0\x01\0\0\0", found[ATTRIBUTE])
    file.put(letter + 4, "I", 0xFF000001)
    file.seal(at, end - at)
    path.write_bytes(file.raw)
    assert "has encoding-type null" in (_errors([path])[str(path)] or "")
