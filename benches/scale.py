"""Cost against size: two stores of the same kind, one with a hundred times the rows, read batch by batch in turn.

    python benches/scale.py [--small 500000] [--large 50000000] [--pairs 7] [--record NAME]

Every row has three entries and chunks repeat, so that fifty million rows are written in seconds: chunks as
`annbatch.write_sharded` lays them out (64 rows each, Blosc lz4 level 3 with shuffle, shards of 1 GiB), of numbers that do
not compress. Time per batch is measured on epochs of `num_samples` rows drawn from the whole store, small, large, small,
large, …; ratios are formed pair by pair. Memory and the time to open are measured in a process of their own for each store.

Runs of rows that lie within 16 KiB of each other are read together. The smaller store is a few megabytes, so windows of
many runs touch most of it and cost few reads: there the ratio says how much reading everything saves, and no limit is
set. Windows of few runs find none to join in either store, and the larger one may cost at most 1.3 times as much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from common import alone, command_line, machine, parser, resident, write_record

CASES = [
    # chunk_size, preload_nchunks, batch_size, batches per epoch
    (1, 1, 1, 2000),
    (1, 8, 8, 1000),
    (64, 1, 64, 2000),
    (64, 8, 512, 300),
    (256, 8, 2048, 200),
    (512, 8, 4096, 100),
    (256, 64, 4096, 100),
    (512, 32, 4096, 100),
    (64, 64, 4096, 100),
    (1, 64, 64, 200),
    (1, 4096, 4096, 20),
]
QUICK_CASES = [(1, 8, 8, 20), (64, 8, 512, 5)]
FEW_RUNS = 8
ENTRIES_PER_ROW = 3
ROWS_PER_CHUNK = 64
CHUNK = ENTRIES_PER_ROW * ROWS_PER_CHUNK
"""Elements per inner chunk of data, indices and indptr alike, as anndata is told to cut them."""
N_VAR = 65_536
BYTES_PER_ROW = ENTRIES_PER_ROW * (4 + 2) + 8
SHARD = 2**30 // BYTES_PER_ROW * ENTRIES_PER_ROW // CHUNK * CHUNK
MAX_RATIO = 1.3


def different_chunks():
    """``(columns, values)``, both ``[256, 64, 3]``: chunk `i` of a store holds number ``i % 256`` of them."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (256, ROWS_PER_CHUNK, ENTRIES_PER_ROW)
    return rng.integers(N_VAR, size=shape).astype("<u2"), rng.random(shape).astype("<f4")


def write_store(path: Path, n_obs: int) -> None:
    """Write ``X`` of `n_obs` rows, the shards by hand: zarr takes minutes to encode a million chunks."""
    import google_crc32c
    import numpy as np
    import zarr
    from numcodecs import Blosc
    from zarr.codecs import BloscCodec

    shutil.rmtree(path, ignore_errors=True)
    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    x = root.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_obs, N_VAR]})
    blosc = Blosc("lz4", clevel=3, shuffle=Blosc.SHUFFLE)

    def write(name: str, dtype: str, n: int, encoded_chunks) -> None:
        # a shard is no longer than its array
        shard = min(SHARD, -(-n // CHUNK) * CHUNK)
        x.create_array(
            name,
            shape=(n,),
            dtype=dtype,
            chunks=(CHUNK,),
            shards=(shard,),
            compressors=BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),
        )
        for number, first in enumerate(range(0, n, shard)):
            n_stored = -(-(min(first + shard, n) - first) // CHUNK)
            index = np.full((shard // CHUNK, 2), 2**64 - 1, dtype="<u8")
            target = path / "X" / name / "c" / str(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                at = 0
                for chunk in range(n_stored):
                    encoded = encoded_chunks(first + chunk * CHUNK)
                    index[chunk] = at, len(encoded)
                    at += file.write(encoded)
                pairs = index.tobytes()
                file.write(pairs + google_crc32c.value(pairs).to_bytes(4, "little"))

    columns, values = different_chunks()
    encoded_columns, encoded_values = ([blosc.encode(chunk) for chunk in chunks] for chunks in (columns, values))
    write("data", "float32", n_obs * ENTRIES_PER_ROW, lambda first: encoded_values[first // CHUNK % 256])
    write("indices", "uint16", n_obs * ENTRIES_PER_ROW, lambda first: encoded_columns[first // CHUNK % 256])
    steps = np.arange(CHUNK, dtype="<i8") * ENTRIES_PER_ROW
    write("indptr", "int64", n_obs + 1, lambda first: blosc.encode(steps + first * ENTRIES_PER_ROW))
    # read back by somebody else
    rng = np.random.default_rng(0)
    pointers, stored = zarr.open_array(path / "X" / "indptr"), zarr.open_array(path / "X" / "data")
    for row in [0, n_obs - 1, *rng.integers(n_obs, size=3).tolist()]:
        begin, end = pointers[row], pointers[row + 1]
        expected = values[row // ROWS_PER_CHUNK % 256, row % ROWS_PER_CHUNK]
        if (begin, end) != (3 * row, 3 * row + 3) or stored[begin:end].tolist() != expected.tolist():
            raise SystemExit(f"row {row} was not written as it should be")
    (path / ".complete").touch()


def open_store(path: Path, buffers=()):
    from annbatch._core import ops as _ops

    return _ops.open_state({"elements": [{"name": "X"}], "datasets": [{"path": str(path)}]}, list(buffers))


def measure_open(arguments: argparse.Namespace) -> dict:
    """Open a store, once for the page cache and the threads' own memory and then measured."""
    from annbatch._core import ops as _ops

    path = Path(arguments.measure_open)
    # Only files are warmed here: the core would keep what it frees, and the next open would seem to cost nothing.
    for file in (path / "X" / "indptr").rglob("*"):
        if file.is_file():
            file.read_bytes()
    _ops.close(open_store(arguments.warm))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident(), time.perf_counter()
    state = open_store(path)
    seconds = time.perf_counter() - start
    after, peak = resident(), resident("VmHWM")
    n_obs = _ops.describe(state)["n_obs"]
    return {
        "n_obs": n_obs,
        "seconds": seconds,
        "bytes_per_row": (after - before) / n_obs,
        "peak_bytes_per_row": (peak - before) / n_obs,
        "process_mib": after / 2**20,
    }


def measure_loader(arguments: argparse.Namespace) -> dict:
    """Memory of a whole process that trains from the store: a Loader without obs, in the middle of an epoch."""
    import anndata as ad
    import zarr

    import annbatch.samplers

    start = time.perf_counter()
    x = ad.io.sparse_dataset(zarr.open_group(arguments.measure_loader, mode="r")["X"])
    loader = annbatch.Loader(
        batch_sampler=annbatch.samplers.RandomSampler(1, 64, 64), preload_to_gpu=False, to="torch"
    ).add_dataset(x)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    for _ in range(20):
        next(batches)
    return {"process_mib": resident() / 2**20, "first_batch_s": first}


def check(batch) -> None:
    """Hold a batch against what was written."""
    rows, indptr, columns, values = (tensor.numpy() for tensor in batch)
    for got, expected in zip((columns, values), different_chunks(), strict=True):
        wanted = expected[rows // ROWS_PER_CHUNK % 256, rows % ROWS_PER_CHUNK]
        if indptr[-1] != wanted.size or (got.reshape(wanted.shape) != wanted).any():
            raise SystemExit(f"wrong batch of rows {rows}")


def epoch(state, case: tuple, seed: int, *, checked: bool = False) -> tuple[float, dict]:
    """Seconds per batch of an epoch of the case, and the counters of the whole."""
    from annbatch._core import ops as _ops

    chunk_size, preload, batch_size, n_batches = case
    sampling = {
        "kind": "random",
        "chunk_size": chunk_size,
        "preload_nchunks": preload,
        "batch_size": batch_size,
        "num_samples": batch_size * n_batches,
    }
    stream = _ops.stream(state, {"sampling": sampling})
    start = time.perf_counter()
    _ops.start(stream, seed)
    seen = 0
    while (batch := _ops.load(stream))[0].numel() > 0:
        seen += batch[0].numel()
        if checked:
            check(batch)
    seconds = time.perf_counter() - start
    stats = _ops.stats(stream)
    _ops.close(stream)
    if seen != batch_size * n_batches:
        raise SystemExit(f"{seen} rows delivered, {batch_size * n_batches} asked for")
    return seconds / n_batches, stats


def repeated(state, case: tuple, seed: int, seconds: float) -> tuple[float, dict]:
    """Seconds per batch over as many epochs as fill the given time, and the counters of the last."""
    times = []
    while not times or sum(times) * case[3] < seconds:
        time_per_batch, stats = epoch(state, case, seed + len(times))
        times.append(time_per_batch)
    return statistics.mean(times), stats


def compare(small: Path, large: Path, arguments: argparse.Namespace) -> tuple[list[str], list[float]]:
    lines = [
        "| chunk_size x preload, batch | small, ms per batch | large, ms per batch | ratio (min … max) | chunks per batch | reads per batch | KiB read per batch |",
        "|---|---|---|---|---|---|---|",
    ]
    states = {"small": open_store(small), "large": open_store(large)}
    ratios_of_cases = []
    for case in QUICK_CASES if arguments.quick else CASES:
        for state in states.values():  # also reads the shards' indexes
            epoch(state, case, 0, checked=True)
        times, stats = {"small": [], "large": []}, {}
        for pair in range(arguments.pairs):
            for name, state in states.items():
                seconds, stats[name] = repeated(state, case, 1000 * (pair + 1), arguments.seconds)
                times[name].append(seconds * 1e3)
        ratios = [there / here for here, there in zip(times["small"], times["large"], strict=True)]
        if case[1] <= FEW_RUNS:
            ratios_of_cases.append(statistics.median(ratios))
        per_batch = [
            " / ".join(f"{stats[name][counter] / case[3] / unit:,.1f}" for name in states)
            for counter, unit in (("chunks_decoded", 1), ("reads", 1), ("bytes_read", 1024))
        ]
        here, there = statistics.median(times["small"]), statistics.median(times["large"])
        row = f"| {case[0]} x {case[1]}, {case[2]} | {here:.3f} | {there:.3f} "
        row += f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) | {' | '.join(per_batch)} |"
        print(row, flush=True)
        lines.append(row)
    return lines, ratios_of_cases


def main() -> None:
    takes = parser(__doc__)
    takes.add_argument("--small", type=int, default=500_000)
    takes.add_argument("--large", type=int, default=50_000_000)
    takes.add_argument("--pairs", type=int, default=7)
    takes.add_argument("--seconds", type=float, default=0.4, help="timed seconds per measurement at least")
    for name in ("--measure-open", "--measure-loader", "--warm"):
        takes.add_argument(name, help=argparse.SUPPRESS)
    arguments = takes.parse_args()
    if arguments.measure_open:
        print(json.dumps(measure_open(arguments)))
        return
    if arguments.measure_loader:
        print(json.dumps(measure_loader(arguments)))
        return
    if arguments.quick:
        arguments.small, arguments.large, arguments.pairs, arguments.seconds = 5_000, 100_000, 1, 0.0
    stores = [arguments.data.resolve() / f"scale_{n}.zarr" for n in (arguments.small, arguments.large)]
    for path, n in zip(stores, (arguments.small, arguments.large), strict=True):
        if not (path / ".complete").exists():
            print(f"writing {path}", flush=True)
            write_store(path, n)
    print(machine(), flush=True)
    lines = [
        "| rows | open, s | core, bytes per row | at its peak | process, MiB | Loader: first batch after, s | Loader process, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in stores[arguments.quick :]:
        opened = alone(__file__, "--measure-open", str(path), "--warm", str(stores[0]))
        loader = alone(__file__, "--measure-loader", str(path))
        lines.append(
            f"| {opened['n_obs']:,} | {opened['seconds']:.3f} | {opened['bytes_per_row']:.2f} "
            f"| {opened['peak_bytes_per_row']:.2f} | {opened['process_mib']:,.0f} "
            f"| {loader['first_batch_s']:.2f} | {loader['process_mib']:,.0f} |"
        )
    print("\n".join(lines), flush=True)
    comparison, ratios = compare(*stores, arguments)
    table = "\n".join([*lines, "", *comparison])
    if arguments.record:
        about = f"{arguments.small:,} and {arguments.large:,} rows of {ENTRIES_PER_ROW} entries, in 64-row chunks, "
        about += f"`{command_line()}`; pairs of numbers are small / large"
        write_record(arguments.record, about, table)
    if not arguments.quick and max(ratios) > MAX_RATIO:
        raise SystemExit(
            f"a batch of the large store costs {max(ratios):.2f} times one of the small; at most {MAX_RATIO}"
        )


if __name__ == "__main__":
    main()
