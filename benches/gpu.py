"""Batches on a CUDA device: how fast they come, what crosses the bus, and how long a training step waits for them.

    python benches/gpu.py [--peers .venv-peers/bin/python] [--quick] [--record NAME]

Everything on one store of counts and in turn: batches in host memory (what decoding allows here), CSR on the device,
normalized dense bfloat16 on the device, a page-locked copy by torch of as many bytes, and a GPU whose steps take
1.2 times what loading does. The peer is scverse annbatch 0.3.1 with cupy (``preload_to_gpu``). Copies are
timed by torch's profiler. What arrives is compared with what was written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from common import alone, command_line, parser, spread, write_record

# cells that are drawn, in how many datasets, copies of each, genes, draws of a cell at least (1,600 entries on average)
SIZES = (98_304, 16, 8, 30_000, 1_400)
QUICK_SIZES = (6_000, 2, 1, 2_000, 100)
BATCH = 4096


def write_dataset(path: str, number: int, copies: int, sizes: tuple[int, ...]) -> list[int]:
    """Draw the cells of a dataset, write them `copies` times as datasets of their own, and add up all of them."""
    import anndata as ad
    import numpy as np
    import torch
    import zarr

    import annbatch
    from data import Totals, as_tensor, counts

    torch.set_num_threads(1)
    totals = Totals()
    (x,) = counts(np.random.default_rng(number), *sizes)
    for copy in range(number * copies, (number + 1) * copies):
        # as the root of a store, so that processes have no metadata in common
        group = zarr.open_group(f"{path}/dataset_{copy}", mode="w", zarr_format=3)
        annbatch.write_sharded(group, ad.AnnData(x, obs={"batch": np.zeros(x.shape[0])}))
        totals.add(np.arange(x.shape[0]) + copy * x.shape[0], as_tensor(x))
    return totals.answer()


def store_of(data: Path, sizes: tuple[int, ...]) -> Path:
    """Write the store unless it is there, and beside it what it adds up to."""
    path = data / f"gpu_{'_'.join(map(str, sizes))}.zarr"
    answer = path.with_suffix(".json")
    if answer.exists():
        return path
    import zarr

    shutil.rmtree(path, ignore_errors=True)
    data.mkdir(parents=True, exist_ok=True)
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.update_attributes({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    n_cells, n_datasets, copies, n_genes, n_draws = sizes
    # new processes, for zarr and torch have threads; drawing cells takes longer than all that is measured
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        one = partial(write_dataset, str(path), copies=copies, sizes=(n_cells // n_datasets, n_genes, n_draws))
        answers = list(processes.map(one, range(n_datasets)))
    totals = [sum(each) for each in zip(*answers, strict=True)]
    answer.write_text(json.dumps([*totals[:2], totals[2] % 2**64]))
    return path


def loader_of(path: str, case: str):
    import anndata as ad
    import numpy as np

    import annbatch

    options = {"chunk_size": 256, "preload_nchunks": 64, "batch_size": BATCH, "shuffle": True, "return_index": True}
    options |= {"to": "torch", "rng": np.random.default_rng(0), "preload_to_gpu": case == "peer"}
    if case == "peer":
        import zarr

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    elif case != "host":
        options["device"] = "cuda"
    if case == "dense":
        from annbatch.transforms import Log1p, NormalizeTotal

        options |= {"transform": [NormalizeTotal(1e4), Log1p()], "dense": True, "dtype": "bfloat16"}
    collection = annbatch.DatasetCollection(path, mode="r")
    return annbatch.Loader(**options).use_collection(
        collection,
        load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"])),
    )


def measure(case: str, path: str, seconds: float) -> dict:
    import torch

    from data import Totals

    loader, totals, rows, n_bytes = loader_of(path, case), Totals(), 0, 0
    for batch in loader:
        x = batch["X"]
        rows += x.shape[0]
        n_bytes += x.values().numel() * 8 if x.layout == torch.sparse_csr else x.nbytes
        if case != "dense":
            # added up there, whoever brought it
            totals.add(batch["index"], x.cuda())

    def epoch() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for batch in loader:
            del batch
        torch.cuda.synchronize()
        return time.perf_counter() - start

    times = []
    while sum(times) < seconds:
        times.append(epoch())
    result = {"cells_per_s": rows / statistics.median(times), "delivered_bytes": n_bytes, "answer": totals.answer()}
    if case != "peer":
        result["stats"] = loader.stats()  # of the last epoch: each pass has statistics of its own
    if case in ("csr", "dense"):
        result["h2d_bytes"] = result["stats"]["h2d_bytes"]
        result |= copies(loader, result["h2d_bytes"]) | slow_consumer(loader, result["cells_per_s"])
    return result


def copies(loader, h2d_bytes: int) -> dict:
    """Bytes per second of our copies while they run, and of a page-locked copy of as many bytes by torch."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for batch in loader:
            del batch
        torch.cuda.synchronize()
    busy = sum(e.self_device_time_total for e in profiled.key_averages() if "Memcpy HtoD" in e.key) / 1e6
    n = max(1, h2d_bytes // max(1, loader.stats()["h2d_copies"]))
    host, there = torch.empty(n, dtype=torch.uint8, pin_memory=True), torch.empty(n, dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in (False, True):
        if timed:
            begin.record()
        for _ in range(50):
            there.copy_(host, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return {
        "h2d_bytes_per_s": loader.stats()["h2d_bytes"] / busy if busy else 0.0,
        "pinned_copy_bytes_per_s": 50 * n / (begin.elapsed_time(end) / 1e3),
    }


def slow_consumer(loader, cells_per_s: float) -> dict:
    """Part of its time that the GPU does no step, in a loop whose steps take 1.2 times what loading a batch does.

    As in training, a step is launched while the GPU does the one before, two ahead of it at most.
    """
    import torch

    def event():
        return torch.cuda.Event(enable_timing=True)

    begin, end = event(), event()
    torch.cuda._sleep(10**8)
    begin.record()
    torch.cuda._sleep(10**8)
    end.record()
    torch.cuda.synchronize()
    cycles = int(10**8 * 1.2 * BATCH / cells_per_s / (begin.elapsed_time(end) / 1e3))
    steps, asked, waits = [], time.perf_counter(), []
    for batch in loader:
        waits.append(time.perf_counter() - asked)
        del batch
        begin, end = event(), event()
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        steps.append((begin, end))
        if len(steps) > 2:
            steps[-3][1].synchronize()
        asked = time.perf_counter()
    torch.cuda.synchronize()
    # the first batch waits for a whole window, whatever the steps take
    busy = sum(begin.elapsed_time(end) for begin, end in steps[1:])
    return {
        "waits": 1 - busy / steps[0][1].elapsed_time(steps[-1][1]),
        "step_s": busy / 1e3 / (len(steps) - 1),
        "first_batch_s": waits[0],
        "host_per_batch_s": statistics.median(waits[1:]),
        "longest_host_s": max(waits[1:]),
        "core_waits_s": loader.stats()["consumer_wait_ns"] / 1e9,
    }


def ceiling_of(program: Path, path: Path, seconds: float) -> float:
    """Cells per second of bare decompression on all cores."""
    threads = str(len(os.sched_getaffinity(0)))
    command = [program.resolve(), path, "256", "64", str(BATCH), str(seconds), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["cells_per_s"]


def one_round(given: argparse.Namespace, path: Path, expected: list[int]) -> dict[str, dict]:
    """Every case once, each in a process of its own."""
    found = {"ceiling": {"cells_per_s": ceiling_of(given.ceiling, path, given.seconds)}} if given.ceiling else {}
    for case in ("host", "csr", "dense", *(["peer"] if given.peers else [])):
        python = str(given.peers) if case == "peer" else sys.executable
        found[case] = alone(__file__, "--measure", case, str(path), "--seconds", str(given.seconds), python=python)
        if case != "dense" and found[case]["answer"] != expected:
            raise SystemExit(f"{case} yielded {found[case]['answer']}, expected {expected}")
    return found


def table_of(rounds: list[dict[str, dict]]) -> list[str]:
    """Medians, smallest and largest, of the rounds."""

    def row(name: str, value, form: str = ".3g") -> str:
        return f"| {name} | {spread([value(found) for found in rounds], form)} |"

    def ratio(one: str, other: str) -> str:
        return row(f"{one} against {other}", lambda found: found[one]["cells_per_s"] / found[other]["cells_per_s"])

    cases = list(rounds[0])
    lines = ["| case | figure |", "|---|---|"]
    lines += [row(f"{case}, cells/s", lambda found, case=case: found[case]["cells_per_s"], ",.0f") for case in cases]
    lines += [ratio("csr", other) for other in ("ceiling", "host", "peer") if other in cases] + [ratio("dense", "csr")]
    for case in ("csr", "dense"):

        def of(one: str, other: str, case=case):
            return lambda found: found[case][one] / found[case][other]

        lines += [
            row(f"{case}: bus bytes of those delivered", of("h2d_bytes", "delivered_bytes")),
            row(f"{case}: bandwidth of copies of torch's", of("h2d_bytes_per_s", "pinned_copy_bytes_per_s")),
            row(f"{case}: the GPU waits, steps 20% slower than loading", lambda found, case=case: found[case]["waits"]),
            row(f"{case}: first batch, ms", lambda found, case=case: 1e3 * found[case]["first_batch_s"]),
        ]
    return lines


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--peers", type=Path, help="interpreter of an environment with the peer and cupy")
    arguments.add_argument(
        "--ceiling", type=Path, help="program that measures bare decompression (benches/ceiling.rs, built)"
    )
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--measure", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, seconds=given.seconds)))
        return
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    path = store_of(given.data, QUICK_SIZES if given.quick else SIZES)
    expected = json.loads(path.with_suffix(".json").read_text())
    # who has no more time ends this with SIGTERM: the rounds that are complete are told
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    rounds: list[dict[str, dict]] = []
    try:
        for _ in range(1 if given.quick else given.pairs):
            rounds.append(one_round(given, path, expected))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    except SystemExit as stopped:
        if not rounds:
            raise
        print(f"after {len(rounds)} rounds: {stopped}")
    table = "\n".join(table_of(rounds))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{table}")
    if given.record:
        write_record(given.record, f"{torch.cuda.get_device_name()}, `{command_line()}`", table)


if __name__ == "__main__":
    main()
