"""An epoch end to end: this package and scverse annbatch 0.3.1 on the same data, in turn.

    python benches/epoch.py [--peers .venv-peers/bin/python] [--only SUBSTRING] [--pairs 3] [--record NAME]

Stores are written once by the peer with its defaults (64 rows per inner chunk, Blosc lz4 level 3 with shuffle), or by
this package where no peer is given: counts as sparse CSR, images as a dense element of four axes, genotypes as a dense
matrix. Each measurement is a process of its own that first reads one whole epoch untimed (which warms the page cache
and gives row count, entries and a checksum, which must be those of what was written) and then times whole epochs.
A B A B …: ratios are formed pair by pair, so that a machine that slows down slows both. With each pair goes the needed
ceiling: bare decompression, by C-Blosc on as many threads, of the chunks that the windows need; and the same by our own
decoders, which is what reading and delivering would have to cost nothing for.

Peak memory is that of further processes, which read one epoch and nothing else. Ours is also given beyond that of a
Python that has imported torch and beyond the memory budget.

Two cases are of another kind. `memory` reads a scipy matrix in memory, against scipy's own indexing of the same rows on
one core and against a bare copy of as many bytes per row by all cores. `slow` gives every batch to a consumer that needs
1.2 times as long as the loader alone: what part of its time does it wait for batches?
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import alone, command_line, comparison, machine, resident, spread, write_record


class Case(NamedTuple):
    kind: str
    """`stored`, `memory` or `slow`."""
    store: str
    chunk_size: int
    preload_nchunks: int
    batch_size: int

    @property
    def name(self) -> str:
        kind = "" if self.kind == "stored" else f"{self.kind}, "
        return f"{kind}{self.store} {self.chunk_size} x {self.preload_nchunks:,}, batch {self.batch_size:,}"


CASES = [
    Case("stored", "sparse", 256, 64, 4096),
    Case("stored", "sparse", 512, 32, 4096),
    Case("stored", "sparse", 32, 256, 2048),
    Case("stored", "sparse", 1, 16_384, 4096),
    Case("stored", "images", 64, 32, 256),
    Case("stored", "images", 1, 512, 256),
    # a row is 200 kB, a chunk 12.8 MB, a window 102 MB
    Case("stored", "genotypes", 64, 8, 128),
    Case("stored", "genotypes", 1, 512, 128),
    Case("memory", "sparse", 1, 16_384, 4096),
    Case("slow", "sparse", 256, 64, 4096),
]
QUICK_CASES = [
    Case("stored", "sparse", 64, 16, 256),
    Case("stored", "images", 16, 8, 64),
    Case("memory", "sparse", 1, 1024, 256),
    Case("slow", "sparse", 64, 16, 256),
]
ELEMENTS = {"sparse": "X", "images": "obsm/image", "genotypes": "X"}
"""What is read of each store."""
SIZES = {"sparse": (96_000, 30_000, 1_621), "images": (32_768,), "genotypes": (4_096, 200_000)}
QUICK_SIZES = {"sparse": (4_000, 2_000, 100), "images": (512,)}


# ---- stores ----------------------------------------------------------------------------------------------------------
def answer_beside(path: Path) -> Path:
    """File with what an epoch of a store must add up to, written when the store is complete."""
    return path.with_suffix(".json")


def write(arguments: argparse.Namespace) -> dict:
    """Write a store and beside it what an epoch of it must add up to."""
    import anndata as ad
    import numpy as np
    import zarr

    import annbatch
    from data import MAKERS, Totals, as_tensor

    path, element = Path(arguments.path), ELEMENTS[arguments.case.store]
    group = zarr.open_group(path, mode="w", zarr_format=3)
    totals, first = Totals(), 0
    for number, x in enumerate(MAKERS[arguments.case.store](np.random.default_rng(0), *arguments.sizes)):
        n = x.shape[0]
        elements = {"X": x} if element == "X" else {"obsm": {"image": x}}
        adata = ad.AnnData(obs={"batch": np.full(n, number)}, **elements)
        annbatch.write_sharded(group, adata, key=f"dataset_{number}")
        totals.add(np.arange(first, first + n), as_tensor(x))
        first += n
    group.update_attributes({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    answer_beside(path).write_text(json.dumps(totals.answer()))
    return {}


# ---- in a process of its own -----------------------------------------------------------------------------------------
def open_loader(arguments: argparse.Namespace):
    """Open the loader of a case; for the kind `memory` also the matrix that it reads."""
    import numpy as np
    import zarr

    if arguments.peer:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    import anndata as ad

    import annbatch

    case = arguments.case
    loader = annbatch.Loader(
        chunk_size=case.chunk_size,
        preload_nchunks=case.preload_nchunks,
        batch_size=case.batch_size,
        shuffle=True,
        rng=np.random.default_rng(0),
        return_index=True,
        to="torch",
        preload_to_gpu=False,
    )
    collection = annbatch.DatasetCollection(arguments.path, mode="r")
    if case.kind == "memory":
        matrix = ad.io.read_elem(next(iter(collection))["X"])
        # what scipy makes of them in any matrix of its own: a copy of as many bytes is then what is delivered
        matrix.indices, matrix.indptr = matrix.indices.astype("int32"), matrix.indptr.astype("int32")
        return loader.add_dataset(matrix), matrix
    if case.store == "sparse":
        # obs goes with it, as in training
        return loader.use_collection(
            collection,
            load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"])),
        ), None
    # arrays rather than AnnData: the peer takes more than two axes only so
    return loader.add_datasets([group[ELEMENTS[case.store]] for group in collection]), None


def repeated(read, seconds: float) -> list[float]:
    """Seconds that each of as many calls as fill the given time took, at least one."""
    times = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return times


def speed(arguments: argparse.Namespace) -> dict:
    """Read epochs, the first one to check it, and say how fast they were."""
    import numpy as np

    import annbatch
    from data import Totals

    loader, matrix = open_loader(arguments)
    totals, indexes = Totals(), []
    for batch in loader:
        totals.add(batch["index"], batch["X"])
        indexes.append(np.array(batch["index"]))

    def epoch() -> None:
        n = sum(batch["X"].shape[0] for batch in loader)
        if n != totals.rows:
            raise SystemExit(f"an epoch had {n} rows, the first one {totals.rows}")

    times = repeated(epoch, arguments.seconds)
    result = {
        "answer": totals.answer(),
        "cells_per_s": totals.rows / statistics.median(times),
        "version": getattr(annbatch, "__version__", "?"),
    }
    if arguments.case.kind == "memory":
        result |= index_in_memory(matrix, indexes, arguments.seconds)
    if arguments.case.kind == "slow":
        result |= wait_of_slow_consumer(loader, arguments.case, result["cells_per_s"], arguments.seconds)
    return result


def index_in_memory(matrix, indexes: list, seconds: float) -> dict:
    """Cells per second of the same batches by scipy, and of a copy of as many bytes; and what they must add up to."""
    import torch

    from data import Totals, as_tensor

    expected = Totals()
    expected.add(range(matrix.shape[0]), as_tensor(matrix))

    def by_scipy() -> None:
        for index in indexes:
            matrix[index]

    # rows of equal length, the mean of the matrix's: index_select copies those with memcpy on all threads
    bytes_per_row = (matrix.data.nbytes + matrix.indices.nbytes) // matrix.shape[0]
    rows = torch.randint(2**62, (matrix.shape[0], bytes_per_row // 8))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    copies = [(torch.from_numpy(index), torch.empty(len(index), rows.shape[1], dtype=rows.dtype)) for index in indexes]

    def by_copy() -> None:
        for index, out in copies:
            torch.index_select(rows, 0, index, out=out)

    by_copy()
    n = matrix.shape[0]
    return {
        "expected": expected.answer(),
        "scipy": n / statistics.median(repeated(by_scipy, seconds)),
        "copy": n / statistics.median(repeated(by_copy, seconds)),
    }


def wait_of_slow_consumer(loader, case: Case, cells_per_s: float, seconds: float) -> dict:
    """Shares of its time that a consumer waits, from the second window of an epoch on: in all, and for batches not ready."""
    first_window = case.chunk_size * case.preload_nchunks // case.batch_size
    called = waited = spent = 0.0
    while spent < seconds:
        batches = iter(loader)
        for number in itertools.count():
            if number == first_window:
                waited -= loader.stats()["consumer_wait_ns"] / 1e9
            start = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            if batch is not None:
                time.sleep(1.2 * batch["X"].shape[0] / cells_per_s)
            if number >= first_window:
                called += got - start
                spent += time.perf_counter() - start
            if batch is None:
                break
        waited += loader.stats()["consumer_wait_ns"] / 1e9
    return {"calling": called / spent, "waiting": waited / spent}


def peak(arguments: argparse.Namespace) -> dict:
    """Read one epoch and nothing else; bytes of this process at most."""
    loader, _ = open_loader(arguments)
    for _ in loader:
        pass
    budget = 0 if arguments.peer else loader.stats()["memory_budget"]
    return {"peak": resident("VmHWM"), "budget": budget}


def bare(_: argparse.Namespace) -> dict:
    """Bytes of a Python that has imported torch."""
    import torch  # noqa: F401

    return {"peak": resident("VmHWM")}


TASKS = {"write": write, "speed": speed, "peak": peak, "bare": bare}


# ---- all of them -----------------------------------------------------------------------------------------------------
@dataclass
class Measured:
    case: Case
    ours: list[dict]
    theirs: list[dict]
    ceilings: list[dict]
    """Cells per second of bare decoding, by C-Blosc and by our own decoders."""
    peaks: list[int]
    """Bytes, of ours and of theirs where there are any."""
    beyond: int | None
    """Bytes of our peak beyond a bare Python with torch and beyond the memory budget; none where more is held."""


def build_ceiling() -> str | None:
    """Path of the program that measures the needed ceiling (benches/ceiling.rs), if cargo is there to build it."""
    if shutil.which("cargo") is None:
        return None
    command = ["cargo", "bench", "--locked", "--bench", "ceiling", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    messages = map(json.loads, built.stdout.splitlines())
    return next(m["executable"] for m in messages if m.get("target", {}).get("name") == "ceiling" and m["executable"])


def ceiling_of(program: str, path: Path, case: Case, seconds: float) -> dict:
    """Cells per second that bare decompression of the chunks needed would allow."""
    command = [program, path, *case[2:], seconds, len(os.sched_getaffinity(0)), ELEMENTS[case.store]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run(task: str, python: str, case: Case, path: Path, arguments: argparse.Namespace) -> dict:
    """Run a task of this program with the given interpreter, which is the peer's unless it is this one.

    A quick run has no time for processes: importing torch and anndata takes each of them seconds.
    """
    is_peer = python != sys.executable
    if arguments.quick and not is_peer and task != "bare":
        return TASKS[task](
            argparse.Namespace(
                case=case, path=path, sizes=arguments.sizes_of[case.store], seconds=arguments.seconds, peer=False
            )
        )
    # a PYTHONPATH that finds this package must not make the peer's process measure it too
    environment = {name: value for name, value in os.environ.items() if not (is_peer and name == "PYTHONPATH")}
    given = ["--task", task, "--case", json.dumps(case), "--path", str(path), "--seconds", str(arguments.seconds)]
    given += ["--sizes", json.dumps(arguments.sizes_of[case.store]), *(["--peer"] if is_peer else [])]
    result = alone(__file__, *given, python=python, environment=environment)
    if is_peer != (result.get("version", "0.3.1" if is_peer else "") == "0.3.1"):
        raise SystemExit(f"{python} runs annbatch {result['version']}, which is the wrong side of this comparison")
    return result


def measure(case: Case, path: Path, ceiling: str | None, arguments: argparse.Namespace) -> Measured:
    pythons = [sys.executable]
    if arguments.peers and case.kind != "slow":
        pythons.append(arguments.peers)
    sides, ceilings = [[] for _ in pythons], []
    for _ in range(arguments.pairs):
        if ceiling and case.kind == "stored":
            ceilings.append(ceiling_of(ceiling, path, case, min(arguments.seconds, 2.0)))
        for python, side in zip(pythons, sides, strict=True):
            side.append(run("speed", python, case, path, arguments))
    ours, theirs = sides[0], sides[1] if len(sides) > 1 else []
    expected = ours[0].get("expected") or json.loads(answer_beside(path).read_text())
    for result in ours + theirs:
        if result["answer"] != expected:
            raise SystemExit(f"{case.name}: (rows, entries, checksum) are {expected}, but delivered {result}")
    peaks = [run("peak", python, case, path, arguments) for python in pythons]
    # the matrix of `memory` is neither torch's nor the budget's; a quick run has had other cases in the same process
    counts = case.kind != "memory" and not arguments.quick
    beyond = peaks[0]["peak"] - peaks[0]["budget"] - arguments.bare if counts else None
    return Measured(case, ours, theirs, ceilings, [p["peak"] for p in peaks], beyond)


def of(results: list[dict], what: str = "cells_per_s") -> list[float]:
    return [result[what] for result in results]


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def row(m: Measured) -> str:
    mine, peer = of(m.ours), of(m.theirs)
    cells = [m.case.name, spread(mine)]
    cells += [spread(peer), spread(ratios(mine, peer), ".2f", "x")] if peer else ["-", "-"]
    bare, own = of(m.ceilings), of(m.ceilings, "own_cells_per_s")
    cells += [spread(bare), spread(ratios(mine, bare), ".2f"), spread(own)] if m.ceilings else ["-", "-", "-"]
    cells += [" / ".join(f"{p / 2**20:,.0f}" for p in m.peaks)]
    cells += ["-" if m.beyond is None else f"{m.beyond / 2**20:,.0f}"]
    return f"| {' | '.join(cells)} |"


def note(m: Measured) -> str | None:
    """What is measured only in cases of this kind."""
    if m.case.kind == "memory":
        against = (("scipy's indexing on one core", "scipy"), ("a bare copy by all cores", "copy"))
        parts = [
            f"{name}: {spread(of(m.ours, key))} cells/s, ours {spread(ratios(of(m.ours), of(m.ours, key)), '.2f')} of it"
            for name, key in against
        ]
        return f"- {m.case.name}: {'; '.join(parts)}"
    if m.case.kind == "slow":
        shares = [spread(of(m.ours, key), ".1%") for key in ("waiting", "calling")]
        return (
            f"- {m.case.name}: a consumer of 1.2 times the loader's time waits {shares[0]} of its own for batches, "
            f"and spends {shares[1]} in `next`, which makes the dictionary and its tensors too"
        )
    return None


def draw(results: list[Measured], path: Path) -> None:
    """Draw a bar for each side, a small chart for each case: their speeds are of different magnitudes."""
    import matplotlib as mpl

    mpl.use("svg")
    # the same numbers give the same file, and text stays text
    mpl.rcParams |= {"svg.hashsalt": path.name, "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    figure, charts = plt.subplots(len(results), 1, figsize=(8, 1.1 * len(results) + 0.5), squeeze=False)
    for chart, m in zip(charts[:, 0], results, strict=True):
        bars = {"this": of(m.ours), "annbatch 0.3.1": of(m.theirs), "needed ceiling": of(m.ceilings)}
        if m.case.kind == "memory":
            bars |= {"scipy, one core": of(m.ours, "scipy"), "bare copy, all cores": of(m.ours, "copy")}
        bars = {name: values for name, values in bars.items() if values}
        medians = [statistics.median(values) for values in bars.values()]
        colours = ["tab:blue", *["tab:gray"] * (len(bars) - 1)]
        drawn = chart.barh(list(bars), medians, color=colours)
        chart.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=3, fontsize=8)
        chart.set_title(f"{m.case.name}, cells/s", loc="left", fontsize=9)
        chart.set_xlim(0, 1.15 * max(medians))
        chart.invert_yaxis()
        chart.tick_params(labelsize=8)
        chart.xaxis.set_visible(False)
        chart.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"written: {path}")


def main() -> None:
    takes = comparison(__doc__, "annbatch[zarrs,numba]==0.3.1")
    arguments = takes.parse_args()
    if arguments.task:
        arguments.case, arguments.sizes = Case(*json.loads(arguments.case)), json.loads(arguments.sizes)
        print(json.dumps(TASKS[arguments.task](arguments)))
        return
    if arguments.quick:
        arguments.seconds, arguments.pairs = 0.2, 1
    arguments.sizes_of = QUICK_SIZES if arguments.quick else SIZES
    cases = [case for case in (QUICK_CASES if arguments.quick else CASES) if arguments.only in case.name]
    if not cases:
        raise SystemExit(f"no case has {arguments.only!r} in its name")
    ceiling = None if arguments.quick else build_ceiling()
    print(machine(), flush=True)
    table = [
        "| case | ours, cells/s | annbatch 0.3.1, cells/s | ratio (min … max) | needed ceiling, cells/s | ours of it "
        "| our decoders alone, cells/s | peak MiB, ours / theirs | ours beyond torch and budget, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    results, notes = [], []
    arguments.bare = run("bare", sys.executable, cases[0], arguments.data, arguments)["peak"]
    for case in cases:
        path = arguments.data.resolve() / f"{case.store}_{'_'.join(map(str, arguments.sizes_of[case.store]))}.zarr"
        if not answer_beside(path).exists():
            print(f"writing {path}", flush=True)
            run("write", arguments.peers or sys.executable, case, path, arguments)
        results.append(measure(case, path, ceiling, arguments))
        table.append(row(results[-1]))
        notes += filter(None, [note(results[-1])])
        print(table[-1], note(results[-1]) or "", sep="\n", flush=True)
    text = "\n".join([*table, "", *notes])
    print("\n" + text)
    if arguments.record:
        stores = {case.store: " × ".join(f"{n:,}" for n in arguments.sizes_of[case.store]) for case in cases}
        about = f"`{command_line()}`; " + ", ".join(f"{store}: {sizes}" for store, sizes in stores.items())
        record = write_record(arguments.record, about, f"{text}\n\n![cells per second]({arguments.record}.svg)")
        draw([m for m in results if m.case.kind != "slow"] or results, record.with_suffix(".svg"))


if __name__ == "__main__":
    main()
