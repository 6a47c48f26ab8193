"""Damaged stores: a clear error that names dataset, array and chunk; no crash, hang or silent zeros; and it closes.

The damages themselves stand in `support/damages.py` and `support/damaged_metadata.py`. Each runs in this process; those that could
end a process (a signal, an abort, a stack overflow) run a second time in a child, so that the report survives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from annbatch._core import ops as _ops
from support.damaged_metadata import DAMAGED_METADATA
from support.damages import DAMAGED_CHUNKS, N_OBS, N_VAR, Damage, chunk_file, copied, error_of, write_victim
from support.oracle import Reference, load, opened, read_element
from support.processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

    from support.stores import Collection

pytestmark = pytest.mark.core

SAMPLINGS = {
    "sequential": {"kind": "sequential", "chunk_size": 4, "preload_nchunks": 2, "batch_size": 4},
    "random": {"kind": "random", "chunk_size": 2, "preload_nchunks": 6, "batch_size": 3},
}
VICTIMS = sorted({damage.victim for damage in (*DAMAGED_CHUNKS, *DAMAGED_METADATA)})


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Collection]:
    """Every kind of victim, whole."""
    root = tmp_path_factory.mktemp("victims")
    return {name: write_victim(root / str(i), name) for i, name in enumerate(VICTIMS)}


def _ids(damages: list[Damage]) -> list[str]:
    names = [f"{damage.name}{f' ({damage.victim})' if damage.opened else ''}" for damage in damages]
    assert len(set(names)) == len(names)
    return names


@pytest.mark.parametrize("victim", VICTIMS)
def test_undamaged_victims_are_read(victims: dict[str, Collection], victim: str) -> None:
    """The control: without damage nothing is raised."""
    reference = Reference(victims[victim].written, {"X": "torch"})
    for sampling in SAMPLINGS.values():
        with opened(victims[victim].config(sampling=sampling)) as state:
            reference.check_once(reference.epoch(state, 1))


@pytest.mark.parametrize("kind", list(SAMPLINGS))
@pytest.mark.parametrize("damage", DAMAGED_CHUNKS, ids=_ids(DAMAGED_CHUNKS))
def test_damaged_chunk(victims: dict[str, Collection], tmp_path: Path, damage: Damage, kind: str) -> None:
    damage.expect(error_of(copied(victims[damage.victim], tmp_path), damage, SAMPLINGS[kind]))


@pytest.mark.parametrize("damage", DAMAGED_METADATA, ids=_ids(DAMAGED_METADATA))
def test_damaged_metadata(victims: dict[str, Collection], tmp_path: Path, damage: Damage) -> None:
    damage.expect(error_of(copied(victims[damage.victim], tmp_path), damage, SAMPLINGS["sequential"]))


def test_the_rest_of_a_damaged_collection_is_still_read(victims: dict[str, Collection], tmp_path: Path) -> None:
    """After an error `start` begins an epoch like any other: rows of whole chunks arrive, damaged ones raise again."""
    collection = copied(victims["sharded"], tmp_path)
    chunk_file(collection.paths[1], number=2).write_bytes(b"")
    sampling = {**SAMPLINGS["sequential"], "mask": [0, N_OBS + 8]}
    reference = Reference(collection.written, {"X": "torch"})
    config = collection.config(sampling={"kind": "submitted"})
    with opened(config) as state:
        for rows, good in (([0, N_OBS], True), ([2 * N_OBS - 1], False), ([N_OBS + 1, 3], True)):
            _ops.start(state, 0)
            _ops.submit(state, torch.tensor(rows), torch.arange(len(rows)), torch.tensor([len(rows)]))
            _ops.finish(state)
            if good:
                assert [batch.tolist() for batch in reference.drain(state)] == [rows]
            else:
                with pytest.raises(_ops.DataError, match=r'X"?/data'):
                    load(state)
    with opened(collection.config(sampling=sampling)) as state:
        reference.check_once(reference.epoch(state), range(N_OBS + 8))


def test_a_store_that_grows_chunks_after_open_is_an_error_or_unchanged(
    victims: dict[str, Collection], tmp_path: Path
) -> None:
    """A chunk that was absent at open is fill value; that it appears later must not shift or mix anything."""
    collection = copied(victims["none"], tmp_path)
    chunk = chunk_file(collection.paths[1])
    content = chunk.read_bytes()
    chunk.unlink()
    reference = Reference.of(collection)  # with the fill value
    with opened(collection.config(sampling=SAMPLINGS["sequential"])) as state:
        chunk.write_bytes(content)
        reference.check_once(reference.epoch(state))


# ---------------------------------------------------------------------------------------------- in a child process

_CHILD = """
import sys
from pathlib import Path
import faulthandler; faulthandler.enable()
from annbatch._core import ops as _ops
from support.damages import DAMAGED_CHUNKS, copied, write_victim
from support.damaged_metadata import DAMAGED_METADATA
root = Path(sys.argv[1])
damages = [*DAMAGED_CHUNKS, *DAMAGED_METADATA]
whole, kept = {}, []
for i, damage in enumerate(damages):
    if damage.victim not in whole:
        whole[damage.victim] = write_victim(root / f"whole{len(whole)}", damage.victim)
    collection = copied(whole[damage.victim], root / str(i))
    print("at", damage.name, flush=True)
    if not damage.opened:
        damage.apply(collection.paths[1])
    try:
        state = _ops.open_state(collection.config(sampling={"kind": "random", "chunk_size": 2, "preload_nchunks": 6,
                                                           "batch_size": 3}))
        if damage.opened:
            damage.apply(collection.paths[1])
        kept.append(state)  # never closed: the interpreter ends while errors wait in the pipelines
        _ops.start(state, 0)
        while len(_ops.load(state)[0]):
            pass
    except Exception as error:
        print(type(error).__name__)
    else:
        print("nothing was raised")  # which the tests above judge: this one is about the process
print("all done", flush=True)
"""


def test_no_damage_ends_the_process(tmp_path: Path) -> None:
    """Every damage in one child, whose states stay open until it exits: it must exit by itself and in order."""
    done = run_python(_CHILD, tmp_path)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("all done")
    assert "panicked" not in done.stderr, done.stderr[-3000:]


_PIPES = """
import os, sys, threading
from pathlib import Path
from support.damaged_metadata import PIPED_METADATA
from support.damages import PIPED_CHUNKS, error_of, write_victim
sampling = {"kind": "sequential", "chunk_size": 4, "preload_nchunks": 2, "batch_size": 4}
wrong = []
def attempt(damage, path):
    try:
        damage.expect(error_of(write_victim(path, damage.victim), damage, sampling))
    except BaseException as error:
        wrong.append(f"{damage.name}: {error!r}")
for i, damage in enumerate([*PIPED_CHUNKS, *PIPED_METADATA]):
    thread = threading.Thread(target=attempt, args=(damage, Path(sys.argv[1]) / str(i)), daemon=True)
    thread.start()
    thread.join(5)
    if thread.is_alive():
        wrong.append(f"{damage.name}: still waiting after 5 s")
print(*wrong, sep="\\n", flush=True)
os._exit(len(wrong))
"""


def test_pipes_in_a_store_do_not_hang(tmp_path: Path) -> None:
    """Opening a pipe waits until somebody writes to it."""
    done = run_python(_PIPES, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


_FUZZ = """
import sys
import numpy as np
from pathlib import Path
import faulthandler; faulthandler.enable()
from annbatch._core import ops as _ops
from support.damages import N_VAR, chunk_file, plain, write_victim

def read(config):
    state = _ops.open_state(config)
    try:
        _ops.start(state, 0)
        while len((batch := _ops.load(state))[0]):
            rows, indptr, indices, data = (tensor.numpy() for tensor in batch)
            # an undetected flip may change a column number, but never to one that does not exist
            assert len(indices) == len(data) == indptr[-1]
            assert ((indices >= 0) & (indices < N_VAR)).all(), indices
    finally:
        _ops.close(state)

for victim in ("sharded", "blosc lz4 shuffle", "blosc zstd bitshuffle", "zstd", "gzip"):
    collection = write_victim(Path(sys.argv[1]) / victim, victim)
    sampling = {"kind": "sequential", "chunk_size": 16, "preload_nchunks": 3, "batch_size": 48}
    config = collection.config(sampling=sampling)
    file = chunk_file(collection.paths[1], "X/indices", 0)
    whole = file.read_bytes()
    rng = np.random.default_rng(3)
    # every byte of the header and, of a shard, of the index, and a choice of the rest
    index = range(len(whole) - 68, len(whole)) if victim == "sharded" else ()
    places = sorted({*range(20), *index, *rng.integers(0, len(whole), 30).tolist()})
    raised = 0
    for place in places:
        for value in {0xFF, whole[place] ^ (1 << int(rng.integers(8)))}:
            damaged = bytearray(whole)
            damaged[place] = value
            file.write_bytes(damaged)
            print(victim, "byte", place, "=", value, flush=True)
            try:
                read(config)
            except (_ops.DataError, OSError, MemoryError) as error:
                raised += 1
                assert "ds1" in plain(error) and "X/indices" in plain(error), plain(error)
    assert raised > 10, (victim, raised)
"""


def test_no_flipped_byte_ends_the_process(tmp_path: Path) -> None:
    """Bytes of chunks inverted one at a time: an error, or a batch that is still a CSR matrix of `n_var` columns."""
    done = run_python(_FUZZ, tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert "panicked" not in done.stderr, done.stderr[-3000:]


_CLAIMS = """
import resource, sys
from pathlib import Path
from annbatch._core import ops as _ops
from support.damages import metadata, plain, write_victim

def claim(document):
    grid = document["chunk_grid"]["configuration"] if "chunk_grid" in document else document
    grid["chunk_shape" if "chunk_grid" in document else "chunks"] = [2**30]

def touched_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for victim in ("none", "blosc lz4 shuffle", "zstd", "gzip", "bz2", "v2 zlib"):
    collection = write_victim(Path(sys.argv[1]) / victim, victim)
    metadata(claim)(collection.paths[1])
    before = touched_mib()
    sampling = {"kind": "sequential", "chunk_size": 24, "preload_nchunks": 2, "batch_size": 24}
    try:
        state = _ops.open_state(collection.config(sampling=sampling))
        _ops.start(state, 0)
        while len(_ops.load(state)[0]):
            pass
    except (_ops.DataError, MemoryError, ValueError) as error:
        assert "ds1" in plain(error) and "X/data" in plain(error), plain(error)
    else:
        sys.exit(f"{victim}: chunks of 4 GiB in a file of some bytes were believed")
    if touched_mib() - before > 512:
        sys.exit(f"{victim}: {touched_mib() - before} MiB were touched for a chunk of some bytes")
"""


def test_a_claimed_size_is_not_paid_for(tmp_path: Path) -> None:
    """Metadata that speaks of chunks of 4 GiB where 256 bytes are stored: an error, before the memory is touched."""
    done = run_python(_CLAIMS, tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]


_EMPTY_DENSE = """
import re, resource, sys
import zarr
from annbatch._core import ops as _ops

def batch_of(path, shape, chunks, n):
    zarr.create_array(path + "/X", shape=shape, chunks=chunks, dtype="u1", compressors=None, fill_value=0)
    sampling = {"kind": "random", "chunk_size": 1, "preload_nchunks": n, "batch_size": n}
    state = _ops.open_state({"datasets": [{"path": path, "name": "ds"}], "elements": [{"name": "X"}], "sampling": sampling})
    _ops.start(state, 0)
    return _ops.load(state)

for number, (shape, chunks, n, expected) in enumerate([
    ((10, 2**33), (1, 1), 10, "memory|chunks"),             # 2^36 chunks
    ((10, 2**24), (1, 1), 10, "chunks"),                    # 2^28 chunks of one byte, in 160 MiB
    ((10, 2**41), (1, 2**39), 10, "memory"),                # few chunks, more bytes than any machine has
    ((64, 2**16), (1, 1), 64, "touches 4194304 chunks; expected at most 2097152"),
    ((2**28, 2**17), (2**28, 1), 4096, "touches.*chunks"),  # 2^17 chunks, each read in 4,096 parts
]):
    try:
        batch_of(f"{sys.argv[1]}/{number}", shape, chunks, n)
    except ValueError as error:
        assert "batch_size" in str(error) and re.search(expected, str(error)), str(error)
    else:
        sys.exit(f"{shape} in {chunks}: a batch came")
# a task each, which count as bytes
rows, batch = batch_of(f"{sys.argv[1]}/ones", (16, 2**14), (1, 1), 16)
assert batch.shape == (16, 2**14) and not batch.any()
# many stretches per row: walked, not listed
rows, batch = batch_of(f"{sys.argv[1]}/last", (10, 2**20, 2), (1, 2**20, 1), 10)
assert batch.shape == (10, 2**20, 2) and not batch.any()
if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 > 1500:
    sys.exit("memory was paid for claims")
"""


def test_dense_metadata_without_a_byte_on_disk(tmp_path: Path) -> None:
    """Shapes that no file backs: too many chunks or bytes for one batch are refused, and not planned first."""
    done = run_python(_EMPTY_DENSE, tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]


@pytest.mark.parametrize("node", ["", "c"])
def test_links_in_a_circle_are_refused_not_walked(victims: dict[str, Collection], tmp_path: Path, node: str) -> None:
    """Names that a chunk could have, linked back to the directory above: 2^40 paths for who follows them."""
    collection = copied(victims["dense"], tmp_path)
    folder = collection.paths[1] / "X" / node
    for name in ("1000", "1001", "1002"):
        (folder / name).symlink_to(".", target_is_directory=True)
    (folder / "elsewhere").symlink_to(".", target_is_directory=True)
    with pytest.raises(OSError, match=r"ds1.*100\d.*links back"):
        _ops.open_state(collection.config(sampling=SAMPLINGS["random"]))


def test_chunk_keys_of_an_unknown_form_are_refused(victims: dict[str, Collection], tmp_path: Path) -> None:
    """Chunks under keys that are not understood would all pass for fill values."""
    import json

    collection = copied(victims["none"], tmp_path)
    document = collection.paths[1] / "X/data/zarr.json"
    content = json.loads(document.read_text())
    content["chunk_key_encoding"] = {"name": "default_suffix", "configuration": {"suffix": ".bin"}}
    document.write_text(json.dumps(content))
    with pytest.raises((TypeError, ValueError, _ops.DataError), match=r"ds1.*default_suffix"):
        _ops.open_state(collection.config(sampling=SAMPLINGS["random"]))


def test_explicit_dtype_that_does_not_hold_the_stored_one_is_refused(victims: dict[str, Collection]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"float16.*float32|float32.*float16"):
        _ops.close(_ops.open_state(victims["none"].config({"X": "float16"}, sampling=SAMPLINGS["random"])))


def test_slow_reader_agrees_that_victims_are_whole(victims: dict[str, Collection]) -> None:
    for collection in victims.values():
        for path, written in zip(collection.paths, collection.written, strict=True):
            got, want = read_element(path, "X"), written["X"]
            if isinstance(want, np.ndarray):
                np.testing.assert_array_equal(got, want)
            else:
                assert got.shape == (N_OBS, N_VAR)
                np.testing.assert_array_equal(got.data, want.data)
