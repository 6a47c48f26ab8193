"""What can be wrong with a store, one :class:`Damage` each: how it is done, and which error must name it.

A victim is a small store of 24 full rows x 30 columns (720 entries, inner chunks of 64, four to a shard: Blosc only
copies what is shorter than 128 bytes). It is the second of a collection whose first store is healthy, so that a message
that names the wrong dataset is noticed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numcodecs
import numpy as np
import pytest

from annbatch._core import ops as _ops
from annbatch._core.ops import DataError
from support import stores
from support.oracle import Reference, load
from support.stores import ArrayLayout, Collection, Csr, CsrSpec, DatasetSpec, DenseSpec

if TYPE_CHECKING:
    from collections.abc import Callable

N_OBS, N_VAR = 24, 30
NNZ = N_OBS * N_VAR
CHUNK, SHARD = 64, 256
_SUB_CHUNKS = SHARD // CHUNK
_INDEX_BYTES = 16 * _SUB_CHUNKS + 4
HUGE = 2**60

# ---------------------------------------------------------------------------------------------- victims


def layout_of(victim: str) -> ArrayLayout:
    """Layout of the arrays of a victim: "sharded", "sharded start", or the codec of unsharded ones ("v2 <codec>")."""
    if victim.startswith("sharded"):
        where = "start" if victim.endswith("start") else "end"
        return ArrayLayout(3, (CHUNK,), (SHARD,), "blosc lz4 shuffle", index_location=where)
    if victim.startswith("v2 "):
        return ArrayLayout(2, (CHUNK,), codec=victim.removeprefix("v2 "), separator=".")
    return ArrayLayout(3, (CHUNK,), codec=victim)


def dataset_spec(victim: str, seed: int) -> DatasetSpec:
    """One store: X sparse, or with "dense" dense and sharded."""
    if victim == "dense":
        layout = ArrayLayout(3, (4, N_VAR), (8, N_VAR), "blosc lz4 shuffle")
        return DatasetSpec(N_OBS, 3, False, {"X": DenseSpec((N_OBS, N_VAR), False, "f4", seed, layout)})
    layout = layout_of(victim)
    arrays = {"indptr": ArrayLayout(layout.zarr_format, (5,)), "indices": layout, "data": layout}
    csr = CsrSpec((N_OBS, N_VAR), "full", False, "f4", "i4", "i8", seed, arrays)
    return DatasetSpec(N_OBS, layout.zarr_format, False, {"X": csr})


def write_victim(path: Path, victim: str) -> Collection:
    """A collection of a healthy store and the one to be damaged."""
    return stores.write_collection(path, [dataset_spec(victim, 1), dataset_spec(victim, 2)])


# ---------------------------------------------------------------------------------------------- tools


def chunk_file(dataset: Path, array: str = "X/data", number: int = 1) -> Path:
    """File of chunk (or shard) `number` along the first axis."""
    folder = dataset / array
    names = (f"c/{number}", f"c/{number}/0", f"{number}", f"{number}.0")
    return next(folder / name for name in names if (folder / name).is_file())


def rewrite(change: Callable[[bytearray], bytes | bytearray | None], *, array: str = "X/data", number: int = 1) -> Any:
    """A damage that changes the bytes of one chunk file."""

    def apply(dataset: Path) -> None:
        file = chunk_file(dataset, array, number)
        content = bytearray(file.read_bytes())
        changed = change(content)
        changed = content if changed is None else changed
        assert bytes(changed) != file.read_bytes(), "the damage changes nothing"
        file.write_bytes(changed)

    return apply


def shard_index(entry: int, offset: int, length: int, *, at_start: bool = False) -> Any:
    """Write entry `entry` of a shard's index, and the checksum that fits."""

    def change(content: bytearray) -> None:
        first = 0 if at_start else len(content) - _INDEX_BYTES
        struct.pack_into("<QQ", content, first + 16 * entry, offset, length)
        checksum = google_crc32c.value(bytes(content[first : first + _INDEX_BYTES - 4]))
        struct.pack_into("<I", content, first + _INDEX_BYTES - 4, checksum)

    return change


def inner_chunk(change: Callable[[bytearray], None]) -> Any:
    """Change the bytes of the first inner chunk of a shard whose index stands at the end."""

    def apply(content: bytearray) -> None:
        offset, length = struct.unpack_from("<QQ", content, len(content) - _INDEX_BYTES)
        chunk = content[offset : offset + length]
        change(chunk)
        content[offset : offset + length] = chunk

    return apply


def patch(layout: str, *values: int, at: int) -> Callable[[bytearray], None]:
    """Overwrite bytes at an offset."""
    return lambda content: struct.pack_into(layout, content, at, *values)


def fill(start: int, byte: int = 0xFF) -> Callable[[bytearray], None]:
    """Overwrite everything from `start`."""

    def change(content: bytearray) -> None:
        content[start:] = bytes([byte]) * (len(content) - start)

    return change


def metadata(change: Callable[[dict[str, Any]], Any], node: str = "X/data") -> Any:
    """A damage that edits the metadata of a node (format 3: zarr.json; format 2: .zarray)."""

    def apply(dataset: Path) -> None:
        file = next(f for f in (dataset / node / "zarr.json", dataset / node / ".zarray") if f.exists())
        document = json.loads(file.read_text())
        changed = change(document)
        file.write_text(json.dumps(document if changed is None else changed))

    return apply


def metadata_text(text: str | bytes, node: str = "X/data") -> Any:
    """A damage that replaces the metadata of a node."""
    return lambda dataset: (dataset / node / "zarr.json").write_bytes(text.encode() if isinstance(text, str) else text)


def set_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Assign one value deep inside a document."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Delete one key deep inside a document."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def both(*changes: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Several changes in turn."""

    def change(target: Any) -> None:
        for one in changes:
            one(target)

    return change


def values(array: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Any:
    """A damage that rewrites the values of an array, in a valid array (perhaps of another length or dtype)."""

    def apply(dataset: Path) -> None:
        import zarr

        root = zarr.open_group(dataset, mode="r+")
        old = np.asarray(root[array][...])
        new = change(old)
        new = old if new is None else new
        parent, _, leaf = array.rpartition("/")
        attributes = dict(root[array].attrs)
        del root[array]
        group = root[parent] if parent else root
        created = group.create_array(leaf, data=new, chunks=tuple(max(1, min(16, n)) for n in new.shape))
        created.attrs.update(attributes)

    return apply


def assign(position: int, value: int) -> Callable[[np.ndarray], None]:
    """Set one element."""

    def change(array: np.ndarray) -> None:
        array[position] = value

    return change


def remove(node: str) -> Any:
    """A damage that deletes a node."""
    return lambda dataset: shutil.rmtree(dataset / node) if node else shutil.rmtree(dataset)


def replace_by(make: Callable[[Path], Any], array: str = "X/data", number: int = 1) -> Any:
    """A damage that puts something that is no file in the place of a chunk."""

    def apply(dataset: Path) -> None:
        file = chunk_file(dataset, array, number)
        file.unlink()
        make(file)

    return apply


def other_n_var(dataset: Path) -> None:
    """A whole store of another width."""
    csr = Csr(np.arange(4), np.array([0, 30, 31]), np.ones(3, "f4"), (3, 32))
    import zarr

    root = zarr.open_group(dataset, mode="w", zarr_format=3)
    layouts = dict.fromkeys(("indptr", "indices", "data"), ArrayLayout(3, (4,)))
    stores.write_csr(root, "X", csr, CsrSpec((3, 32), "", False, "f4", "i4", "i8", 0, layouts))


def to_dense(dataset: Path) -> None:
    """X as a dense array, where the other store has a sparse one."""
    import zarr

    root = zarr.open_group(dataset, mode="r+")
    del root["X"]
    stores.write_dense(root, "X", np.ones((N_OBS, N_VAR), "f4"), ArrayLayout(3, (5, 5)))


# ---------------------------------------------------------------------------------------------- the list


def plain(error: BaseException) -> str:
    """What an error says, without quotation marks: `array "X"/data` and `array "X/data"` are equally clear."""
    return str(error).replace('"', "")


MISSING = (FileNotFoundError,)
IN_DATA = ("ds1", r"X/data")


@dataclass(frozen=True)
class Damage:
    """One damage: `apply` it to the second store of `victim`; reading must raise one of `raises`, saying all of `says`.

    `says` are regular expressions, matched without regard to case. `opened` damages happen after the store was opened.
    """

    name: str
    apply: Callable[[Path], Any]
    says: tuple[str, ...]
    raises: tuple[type[BaseException], ...] = (DataError,)
    victim: str = "sharded"
    opened: bool = False

    def expect(self, error: BaseException) -> None:
        """Check the class and the words of what was raised."""
        message = plain(error)
        assert isinstance(error, self.raises), f"{type(error).__name__}: {message}"
        for words in self.says:
            if words == "ds1":  # its label, or its path
                words = r"ds1|dataset_1\.zarr"
            assert re.search(words, message, re.IGNORECASE), f"{words!r} is missing from: {message}"


def copied(whole: Collection, path: Path) -> Collection:
    """Copy a collection, links as links."""
    paths = [shutil.copytree(store, path / store.name, symlinks=True) for store in whole.paths]
    return Collection(list(map(Path, paths)), whole.written)


def error_of(collection: Collection, damage: Damage, sampling: dict[str, Any]) -> BaseException:
    """The error that reading raises; batches that arrive before it must be right."""
    reference = Reference(collection.written, {"X": "torch"})
    if not damage.opened:
        damage.apply(collection.paths[1])
    try:
        state = _ops.open_state(collection.config(sampling=sampling))
    except Exception as error:
        return error
    try:
        if damage.opened:
            damage.apply(collection.paths[1])
        _ops.start(state, 1)
        with pytest.raises(Exception, match="") as raised:
            assert reference.drain(state) is None, "the damage was not noticed, or only as the end of the epoch"
        if isinstance(raised.value, AssertionError):
            raise raised.value
        with pytest.raises(type(raised.value)):  # an error is no end: it stays until the next start
            load(state)
        assert _ops.describe(state)["n_obs"] == reference.n_obs
        assert _ops.stats(state)["batches_delivered"] >= 0
    finally:
        _ops.close(state)
    with pytest.raises(RuntimeError, match="closed"):
        _ops.load(state)
    return raised.value


def _chunk_damages() -> list[Damage]:
    chunk = (*IN_DATA, r"(chunk|shard).*\d")
    half = lambda content: content[: len(content) // 2]  # noqa: E731
    damages = [
        Damage("shard cut in half", rewrite(half), chunk),
        Damage("shard shorter than its index", rewrite(lambda content: content[:10]), (*chunk, "10")),
        Damage("empty shard", rewrite(lambda content: bytearray()), chunk),
        Damage("shard of zeros", rewrite(lambda content: bytes(len(content))), chunk),
        Damage("wrong checksum of the index", rewrite(patch("<B", 0xAA, at=-1)), (*chunk, "crc32c|checksum")),
        Damage("index changed under its checksum", rewrite(patch("<B", 0x55, at=-20)), (*chunk, "crc32c|checksum")),
        Damage(
            "shard is a directory", replace_by(lambda file: file.mkdir()), (*IN_DATA, r"director"), (DataError, OSError)
        ),
        Damage("shard is a link to itself", replace_by(lambda f: f.symlink_to(f)), IN_DATA, (DataError, OSError)),
    ]
    for victim in ("none", "blosc lz4 shuffle", "v2 zlib"):
        no_file = (DataError, OSError)
        damages += [
            Damage(
                f"{victim}: chunk is a directory",
                replace_by(lambda f: f.mkdir()),
                (*IN_DATA, r"director"),
                no_file,
                victim,
            ),
            Damage(
                f"{victim}: chunk is a broken link",
                replace_by(lambda f: f.symlink_to("gone")),
                IN_DATA,
                no_file,
                victim,
            ),
        ]
    for start in (False, True):
        victim = "sharded start" if start else "sharded"
        entries = {
            "past the end": (10**6, 50),
            "longer than the shard": (0, 10**6),
            "overflowing": (2**64 - 2, 100),
            "overflowing when added": (2**63, 2**63 + 1),
            "half missing (offset)": (2**64 - 1, 50),
            "half missing (length)": (0, 2**64 - 1),
            "of no bytes": (0, 0),
        }
        for name, (offset, length) in entries.items():
            change = rewrite(shard_index(2, offset, length, at_start=start))
            damages.append(Damage(f"index entry {name}, {victim}", change, chunk, victim=victim))
        damages.append(Damage(f"{victim} cut", rewrite(lambda content: content[:-30]), chunk, victim=victim))
    return damages


def _codec_damages() -> list[Damage]:
    chunk = (*IN_DATA, r"(chunk|shard).*\d")
    blosc = {
        "version": patch("<B", 99, at=0),
        "no typesize": patch("<B", 0, at=3),
        "unknown compressor": patch("<B", 0xE0, at=2),
        "fewer bytes": patch("<I", 128, at=4),
        "no bytes": patch("<I", 0, at=4),
        "more bytes": patch("<I", 512, at=4),
        "2 GiB of bytes": patch("<I", 2**31 - 1, at=4),
        "4 GiB of bytes": patch("<I", 2**32 - 1, at=4),
        "no blocks": patch("<I", 0, at=8),
        "huge blocks": patch("<I", 2**32 - 1, at=8),
        "short frame": patch("<I", 17, at=12),
        "long frame": patch("<I", 10**6, at=12),
        "huge frame": patch("<I", 2**32 - 1, at=12),
        "body of 0xff": fill(16),
    }
    # random f4 do not compress, and a body that is stored as it is cannot be wrong: so the indices, which do compress
    said, indices = ("ds1", "X/indices", r"(chunk|shard).*\d"), "X/indices"
    damages = []
    for name, change in blosc.items():
        for victim in ("sharded", "blosc lz4 shuffle", "v2 blosc lz4 shuffle"):
            change_file = inner_chunk(change) if victim == "sharded" else change
            apply = rewrite(change_file, array=indices)
            damages.append(Damage(f"Blosc header or body: {name}, {victim}", apply, said, victim=victim))
    frames = {
        "of fewer elements": lambda content: numcodecs.Blosc().encode(np.arange(32, dtype="i4")),
        "of more elements": lambda content: numcodecs.Blosc().encode(np.arange(100, dtype="i4")),
        "cut within its header": lambda content: content[:9],
    }
    for name, frame in frames.items():
        damages.append(Damage(f"Blosc frame {name}", rewrite(frame, array=indices), said, victim="blosc lz4 shuffle"))
    for codec in ("zstd", "gzip", "zstd+checksum", "bz2", "zlib", "v2 zstd", "v2 gzip", "v2 zlib", "v2 bz2"):
        damages += [
            Damage(
                f"{codec}: cut",
                rewrite(lambda content: content[: len(content) // 2], array=indices),
                said,
                victim=codec,
            ),
            Damage(f"{codec}: header", rewrite(patch("<I", 0, at=0), array=indices), said, victim=codec),
            Damage(f"{codec}: body", rewrite(fill(12), array=indices), said, victim=codec),
            Damage(f"{codec}: empty", rewrite(lambda content: bytearray(), array=indices), said, victim=codec),
        ]
    for codec in ("crc32c", "adler32", "fletcher32", "zstd, crc32c", "blosc, crc32c", "v2 adler32", "v2 fletcher32"):
        damages.append(Damage(f"{codec}: flipped bit", rewrite(flip(5), array=indices), said, victim=codec))
    for victim in ("none", "v2 none"):
        damages += [
            Damage(f"{victim}: cut", rewrite(lambda content: content[:-1]), (*chunk, "256", "255"), victim=victim),
            Damage(f"{victim}: empty", rewrite(lambda content: bytearray()), chunk, victim=victim),
            Damage(f"{victim}: longer", rewrite(lambda content: content + b"abc"), chunk, victim=victim),
        ]
    return damages


def flip(at: int) -> Callable[[bytearray], None]:
    """Invert one byte."""

    def change(content: bytearray) -> None:
        content[at] ^= 0xFF

    return change


def _after_open_damages() -> list[Damage]:
    gone = (DataError, OSError)
    damages = []
    for victim in ("sharded", "none"):
        damages += [
            Damage("deleted after open", lambda ds: chunk_file(ds).unlink(), IN_DATA, gone, victim, opened=True),
            Damage("shortened after open", rewrite(lambda c: c[:20]), IN_DATA, gone, victim, opened=True),
            Damage("emptied after open", rewrite(lambda c: bytearray()), IN_DATA, gone, victim, opened=True),
            Damage("array deleted after open", remove("X/data"), IN_DATA, gone, victim, opened=True),
            Damage("store deleted after open", remove(""), ("ds1",), gone, victim, opened=True),
        ]
    return damages


DAMAGED_CHUNKS = [*_chunk_damages(), *_codec_damages(), *_after_open_damages()]

PIPED_CHUNKS = [
    Damage(f"{victim}: chunk is a pipe", replace_by(os.mkfifo), IN_DATA, (DataError, OSError), victim)
    for victim in ("sharded", "none", "blosc lz4 shuffle")
]
"""Opening a pipe waits for a writer: these run in a child only, where a hang can be ended."""
