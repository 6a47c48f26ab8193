"""An epoch end to end: this package and scverse annbatch 0.3.1 on the same store, in turn.

    python benches/epoch.py [--peers .venv-peers/bin/python] [--cells 96000] [--pairs 3] [--record NAME]

The store is written once by the peer (its defaults: 64 rows per inner chunk, Blosc lz4 level 3 with shuffle), or by
this package where no peer is given. Each measurement is a process of its own that first reads one whole epoch untimed
(which warms the page cache and gives the row count and a checksum over (index, row sum) that both must agree on) and
then times whole epochs. A B A B …: ratios are formed pair by pair, so that a machine that slows down slows both. With each
pair goes the needed ceiling: bare decompression, by C-Blosc on as many threads, of the chunks that the windows need.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = [
    # name, chunk_size, preload_nchunks, batch_size
    ("sparse 256 x 64", 256, 64, 4096),
    ("sparse 512 x 32", 512, 32, 4096),
    ("sparse 32 x 256", 32, 256, 2048),
    ("sparse 1 x 16,384", 1, 16_384, 4096),
]
QUICK_CASES = [("sparse 64 x 16", 64, 16, 256)]
DATASET_CELLS = 40_000


def write_collection(path: Path, n_cells: int, n_genes: int, nnz_per_cell: int, seed: int = 0) -> None:
    """Write counts whose gene popularity falls like a power law, as in droplet data."""
    import anndata as ad
    import numpy as np
    import scipy.sparse as sp
    import zarr

    import annbatch

    rng = np.random.default_rng(seed)
    popularity = (np.arange(n_genes) + 10.0) ** -0.9
    rng.shuffle(popularity)
    cumulative = np.cumsum(popularity / popularity.sum())
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for number, first in enumerate(range(0, n_cells, DATASET_CELLS)):
        n = min(DATASET_CELLS, n_cells - first)
        indices, data, indptr = [], [], [0]
        for _ in range(n):
            draws = np.searchsorted(cumulative, rng.random(int(nnz_per_cell * rng.uniform(1.0, 2.2))))
            genes, counts = np.unique(np.minimum(draws, n_genes - 1), return_counts=True)
            indices.append(genes.astype(np.int32))
            data.append(counts.astype(np.float32))
            indptr.append(indptr[-1] + len(genes))
        x = sp.csr_matrix((np.concatenate(data), np.concatenate(indices), np.array(indptr)), shape=(n, n_genes))
        adata = ad.AnnData(X=x)
        adata.obs["batch"] = np.full(n, number)
        annbatch.write_sharded(group, adata, key=f"dataset_{number}")
    group.update_attributes({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})


def worker(arguments: argparse.Namespace) -> dict:
    """Read epochs of the collection in this process and say how long they took."""
    import resource

    import numpy as np
    import torch
    import zarr

    if arguments.zarrs:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    import annbatch

    def load_x_only(group):
        import anndata as ad

        return ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"]))

    loader = annbatch.Loader(
        chunk_size=arguments.chunk_size,
        preload_nchunks=arguments.preload_nchunks,
        batch_size=arguments.batch_size,
        shuffle=True,
        rng=np.random.default_rng(arguments.seed),
        return_index=True,
        to="torch",
        preload_to_gpu=False,
    ).use_collection(annbatch.DatasetCollection(arguments.collection, mode="r"), load_adata=load_x_only)

    rows, checksum, nnz = 0, 0, 0
    for batch in loader:
        x = batch["X"]
        rows += x.shape[0]
        nnz += x.values().numel()
        pointers = x.crow_indices().to(torch.int64)
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), x.values().double().cumsum(0)])
        columns = torch.cat([torch.zeros(1, dtype=torch.float64), x.col_indices().double().cumsum(0)])
        for sums in (cumulative, columns):
            per_row = (sums[pointers[1:]] - sums[pointers[:-1]]).round().to(torch.int64)
            checksum += int((per_row * (torch.from_numpy(np.asarray(batch["index"], dtype=np.int64)) % 1009 + 1)).sum())
    seconds = []
    while sum(seconds) < arguments.seconds or not seconds:
        start = time.perf_counter()
        n = sum(batch["X"].shape[0] for batch in loader)
        seconds.append(time.perf_counter() - start)
        if n != rows:
            raise SystemExit(f"an epoch had {n} rows, the first one {rows}")
    return {
        "rows": rows,
        "nnz": nnz,
        "checksum": checksum,
        "cells_per_s": rows / statistics.median(seconds),
        "epochs": len(seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "version": getattr(annbatch, "__version__", "?"),
    }


def run_worker(python: str, collection: Path, case: tuple, seconds: float, *, zarrs: bool) -> dict:
    name, chunk_size, preload_nchunks, batch_size = case
    command = [python, __file__, "--worker", "--collection", str(collection), "--seconds", str(seconds)]
    command += [
        "--chunk-size",
        str(chunk_size),
        "--preload-nchunks",
        str(preload_nchunks),
        "--batch-size",
        str(batch_size),
    ]
    # a PYTHONPATH that finds this package must not make the peer's process measure it too
    environment = {k: v for k, v in os.environ.items() if not (zarrs and k == "PYTHONPATH")}
    done = subprocess.run(
        command + (["--zarrs"] if zarrs else []), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: {python} failed\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if zarrs != (result["version"] == "0.3.1"):
        raise SystemExit(f"{python} runs annbatch {result['version']}, which is the wrong side of this comparison")
    return result


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def build_ceiling() -> str | None:
    """Path of the program that measures the needed ceiling (benches/ceiling.rs), if cargo is there to build it."""
    if shutil.which("cargo") is None:
        return None
    command = ["cargo", "bench", "--locked", "--bench", "ceiling", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    messages = map(json.loads, built.stdout.splitlines())
    return next(m["executable"] for m in messages if m.get("target", {}).get("name") == "ceiling" and m["executable"])


def ceiling_of(program: str, collection: Path, case: tuple, seconds: float) -> float:
    """Cells per second that bare decompression of the chunks needed would allow."""
    command = [program, str(collection), *map(str, case[1:]), str(seconds)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["cells_per_s"]


def compare(arguments: argparse.Namespace, collection: Path) -> str:
    lines = [
        "| case | ours, cells/s | annbatch 0.3.1, cells/s | ratio (min … max) | needed ceiling, cells/s | ours of it "
        "| peak MiB, ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    ceiling = None if arguments.quick else build_ceiling()
    for case in QUICK_CASES if arguments.quick else CASES:
        ours, theirs, ceilings = [], [], []
        for _ in range(arguments.pairs):
            if ceiling:
                ceilings.append(ceiling_of(ceiling, collection, case, min(arguments.seconds, 2.0)))
            ours.append(run_worker(sys.executable, collection, case, arguments.seconds, zarrs=False))
            if arguments.peers:
                theirs.append(run_worker(arguments.peers, collection, case, arguments.seconds, zarrs=True))
        answers = {(r["rows"], r["nnz"], r["checksum"]) for r in ours + theirs}
        if len(answers) != 1:
            raise SystemExit(f"{case[0]}: the loaders disagree about (rows, nnz, checksum): {answers}")
        speed = [r["cells_per_s"] for r in ours]
        row = f"| {case[0]}, batch {case[3]} | {statistics.median(speed):,.0f} ({min(speed):,.0f} … {max(speed):,.0f}) "
        if theirs:
            peer = [r["cells_per_s"] for r in theirs]
            ratios = [a / b for a, b in zip(speed, peer, strict=True)]
            row += f"| {statistics.median(peer):,.0f} ({min(peer):,.0f} … {max(peer):,.0f}) "
            row += f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} … {max(ratios):.2f}) "
        else:
            row += "| no peer | - "
        if ceilings:
            shares = [a / b for a, b in zip(speed, ceilings, strict=True)]
            row += f"| {statistics.median(ceilings):,.0f} "
            row += f"| {statistics.median(shares):.2f} ({min(shares):.2f} … {max(shares):.2f}) "
        else:
            row += "| - | - "
        peaks = [f"{max(r['peak_mib'] for r in side):,.0f}" if side else "-" for side in (ours, theirs)]
        row += f"| {' / '.join(peaks)} |"
        print(row, flush=True)
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of an environment with annbatch[zarrs,numba]==0.3.1 (make peers)")
    parser.add_argument("--cells", type=int, default=96_000)
    parser.add_argument("--genes", type=int, default=30_000)
    parser.add_argument("--nnz", type=int, default=1_621, help="draws per cell at least; entries come out near this")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed seconds per measurement at least")
    parser.add_argument(
        "--quick", action="store_true", help="a size that keeps this program from rotting, not a measurement"
    )
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--record", help="write benches/record/NAME.md")
    for name in ("--worker", "--write", "--zarrs"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collection", help=argparse.SUPPRESS)
    for name, default in (("--chunk-size", 256), ("--preload-nchunks", 64), ("--batch-size", 4096), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments)))
        return
    if arguments.quick:
        arguments.cells, arguments.genes, arguments.nnz, arguments.seconds, arguments.pairs = 4_000, 2_000, 100, 0.2, 1
    collection = arguments.data.resolve() / f"cells{arguments.cells}_genes{arguments.genes}_nnz{arguments.nnz}.zarr"
    if arguments.write:
        write_collection(collection, arguments.cells, arguments.genes, arguments.nnz)
        (collection / ".complete").touch()
        return
    if not (collection / ".complete").exists():
        print(f"writing {collection}", flush=True)
        command = [arguments.peers or sys.executable, __file__, "--write", "--data", str(arguments.data)]
        subprocess.run(
            [*command, "--cells", str(arguments.cells), "--genes", str(arguments.genes), "--nnz", str(arguments.nnz)],
            check=True,
        )
    print(machine(), flush=True)
    table = compare(arguments, collection)
    print("\n" + table)
    if arguments.record:
        record = Path(__file__).parent / "record" / f"{arguments.record}.md"
        record.parent.mkdir(exist_ok=True)
        header = f"# {arguments.record}\n\n{machine()}\n\n{arguments.cells:,} cells, {arguments.genes:,} genes, `{' '.join(sys.argv)}`\n\n"
        record.write_text(header + table + "\n")
        print(f"written: {record}")


if __name__ == "__main__":
    main()
