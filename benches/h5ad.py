"""Batches straight from .h5ad files: this package and scDataset 0.3.0 on the same files, in turn.

    python benches/h5ad.py [--peers .venv-peers/bin/python] [--only SUBSTRING] [--pairs 3] [--record NAME]

One file of counts is written by anndata with gzip and one without compression, as it does by default. Windows of 16,384
rows, drawn in blocks of 64 or row by row, make batches of 64 sparse rows. Each measurement is a process of its own that
first checks what it reads (rows, entries, checksum) over one epoch, or over as many rows as fit into the time, which also
warms the page cache. A B A B …: ratios are formed pair by pair.

scDataset reads the backed sparse X of the file (`fetch_factor` 256, so that it fetches 16,384 rows), in its own process
and with two DataLoader workers; the better of the two counts.

What the form of the data costs is measured by this package against itself, in the same way: the unfiltered file against
the same counts in a collection, and two files with and without an outer join of their variables, of which each has 5,000
that the other lacks. It either keeps every file's order of variables, or sorts them by name as `anndata.concat` does. The
two are the same file twice.

`opening` is the time from `annbatch.open` of 100 files of 1,000 chunks per array until the core has listed them and rows can
be read, beyond what anndata takes to read obs of the same files, and to read var too, and to join them, in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import alone, command_line, comparison, machine, spread, write_record

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, FETCH = 64, 16_384


class Case(NamedTuple):
    form: str
    block: int
    n_files: int = 1
    join: str | None = None

    @property
    def name(self) -> str:
        files = f"two files, {self.join or 'no join'}, " if self.n_files > 1 else ""
        return f"{files}{self.form}, blocks of {self.block}"


CASES = [Case("gzip", 64), Case("unfiltered", 64), Case("gzip", 1), Case("unfiltered", 1)]
# against themselves
FORMS = [
    (Case("unfiltered", 64), Case("collection", 64)),
    *(
        (Case(form, 64, 2, join), Case(form, 64, 2))
        for form in ("gzip", "unfiltered")
        for join in ("order kept", "sorted by name")
    ),
]


# ---- in a process of its own -----------------------------------------------------------------------------------------
def write(arguments: argparse.Namespace) -> dict:
    """Write one file of counts."""
    import anndata as ad
    import numpy as np
    import scipy.sparse as sp

    from data import counts

    x = sp.vstack(list(counts(np.random.default_rng(0), *arguments.sizes)), format="csr")
    if arguments.case.form == "collection":
        import zarr

        from annbatch import write_sharded

        write_sharded(zarr.open_group(arguments.path, mode="w"), ad.AnnData(x))
    else:
        compression = None if arguments.case.form == "unfiltered" else arguments.case.form
        ad.AnnData(x).write_h5ad(arguments.path, compression=compression)
    return {}


def joined_columns(n_var: int, join: str) -> list:
    """Joined column of each variable of two files (int32 ``[n_var]`` each) that share all but 5,000 or a sixth of them."""
    import numpy as np
    import torch

    n_own = min(5_000, n_var // 6)
    numbers = np.arange(n_var + n_own)
    names = numbers.astype(str) if join == "sorted by name" else numbers
    places = np.argsort(np.argsort(names, kind="stable")).astype(np.int32)
    return [torch.from_numpy(places[first : first + n_var]) for first in (0, n_own)]


def ours(arguments: argparse.Namespace):
    """(rows, X) of batches, without end; of joined files each row with its own columns until an epoch is over."""
    import torch

    from annbatch._core import ops as _ops

    case = arguments.case
    sampling = {
        "kind": "random",
        "chunk_size": case.block,
        "preload_nchunks": FETCH // case.block,
        "batch_size": BATCH,
    }
    x, datasets = {"name": "X"}, [{"path": str(arguments.path)} for _ in range(case.n_files)]
    columns = joined_columns(arguments.sizes[1], case.join) if case.join else []
    for number in range(len(columns)):
        datasets[number]["columns"] = {"X": number}
        x["n_var"] = max(int(places.max()) for places in columns) + 1
    state = _ops.open_state({"elements": [x], "datasets": datasets, "sampling": sampling}, columns)
    n_var = _ops.describe(state)["elements"][0]["n_var"]
    own = torch.zeros(len(columns), n_var, dtype=torch.int32)
    for of_file, places in zip(own, columns, strict=True):
        of_file[places.long()] = torch.arange(len(places), dtype=torch.int32)
    epoch = 0
    while True:
        _ops.start(state, epoch)
        while len((batch := _ops.load(state))[0]):
            rows, indptr, indices, data = batch
            if epoch == 0 and case.join:
                files = torch.as_tensor(rows // arguments.sizes[0]).long().repeat_interleave(indptr.diff().long())
                indices = own[files, indices.long()]
            yield rows, torch.sparse_csr_tensor(indptr, indices, data, (len(rows), n_var), check_invariants=False)
        epoch += 1
        yield None


class Rows:
    """The sparse X of a file, with row numbers beside it; opened in the process that reads it."""

    def __init__(self, path: Path) -> None:
        self.path, self.x = path, None

    def __len__(self) -> int:
        import h5py

        with h5py.File(self.path) as file:
            return int(file["X"].attrs["shape"][0])

    def fetch(self, index):
        import anndata as ad
        import h5py

        if self.x is None:
            self.x = ad.io.sparse_dataset(h5py.File(self.path)["X"])
        return index, self.x[index]


def scdataset(arguments: argparse.Namespace):
    """(rows, X) of batches, without end, by scDataset."""
    import torch
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    def batch_of(fetched, places):
        rows, x = fetched[0][places], fetched[1][places]
        parts = map(torch.from_numpy, (x.indptr, x.indices, x.data))
        return torch.from_numpy(rows), torch.sparse_csr_tensor(*parts, size=x.shape, check_invariants=False)

    def parts_of(fetched, places):
        # what can cross from a worker
        rows, x = batch_of(fetched, places)
        return rows, (x.crow_indices(), x.col_indices(), x.values(), x.shape)

    dataset = scDataset(
        Rows(arguments.path),
        BlockShuffling(block_size=arguments.case.block),
        batch_size=BATCH,
        fetch_factor=FETCH // BATCH,
        fetch_callback=Rows.fetch,
        batch_callback=parts_of if arguments.workers else batch_of,
        seed=0,
    )
    loader = DataLoader(
        dataset, batch_size=None, num_workers=arguments.workers, persistent_workers=arguments.workers > 0
    )
    while True:
        for rows, x in loader:
            yield rows, torch.sparse_csr_tensor(*x[:3], size=x[3], check_invariants=False) if arguments.workers else x
        yield None


def speed(arguments: argparse.Namespace) -> dict:
    """Cells per second, and what an epoch (or its beginning) adds up to."""
    from data import Totals

    batches = (scdataset if arguments.peer else ours)(arguments)
    totals, start = Totals(), time.perf_counter()
    whole = False
    for batch in batches:
        if batch is None:
            whole = True
            break
        totals.add(batch[0], batch[1])
        if time.perf_counter() - start > 6 * arguments.seconds + 10:
            break
    answer = totals.answer() if whole else None
    # whole windows: what is read ahead of one is what the next begins with
    n_rows, start = 0, None
    for batch in batches:
        if start is None:
            if batch is not None:
                start = time.perf_counter()
            continue
        n_rows += 0 if batch is None else len(batch[0])
        spent = time.perf_counter() - start
        if spent > arguments.seconds and n_rows >= FETCH:
            return {"cells_per_s": n_rows / spent, "answer": answer}
    raise SystemExit("no batches")


N_FILES, N_CHUNKS = 100, 1_000


def write_files(paths: list[Path], n_var: int) -> None:
    """Write files of 1,000 cells: N_CHUNKS chunks per array of X, six columns of obs, the same variables in all."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd

    n_obs, n = 1_000, 500 * N_CHUNKS
    rng, genes = np.random.default_rng(0), [f"ENSG{gene:011}" for gene in range(n_var)]
    var = pd.DataFrame({"symbol": [f"gene {gene}" for gene in range(n_var)]}, index=genes)
    for k, path in enumerate(paths):
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(rng.choice(["B", "DC", "NK", "T"][: 3 + k % 2], n_obs)),
                "plate": pd.Categorical([f"plate {k % 14}"] * n_obs),
                "n_counts": rng.integers(0, 9_999, n_obs),
                "n_genes": rng.integers(0, 9_999, n_obs, dtype="i4"),
                "mitochondrial": rng.random(n_obs, dtype="f4"),
                "doublet": rng.random(n_obs) < 0.1,
            },
            index=[f"{k}_{cell}" for cell in range(n_obs)],
        )
        ad.AnnData(obs=obs, var=var).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            file.pop("X", None)
            group = file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_obs, n_var)})
            how = {"chunks": (n // N_CHUNKS,), "compression": "gzip"}
            group.create_dataset("data", data=np.ones(n, "f4"), **how)
            group.create_dataset("indices", data=np.arange(n, dtype="i4") % (n // n_obs), **how)
            group["indptr"] = np.arange(0, n + 1, n // n_obs)


def opening(arguments: argparse.Namespace) -> dict:
    """Seconds until files are ready to be read from, and those in which anndata reads obs, var too, and joins them."""
    import anndata as ad
    import h5py

    import annbatch

    folder = Path(arguments.path)
    paths = [folder / f"{k}.h5ad" for k in range(N_FILES)]
    if not paths[-1].exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_files(paths, arguments.sizes[1])

    def ready() -> None:
        loader = annbatch.open(paths)
        # the first that asks for chunks has the core list them
        loader.locate([0])
        loader.close()

    def annotations(*names: str) -> list:
        of_files = []
        for path in paths:
            with h5py.File(path) as file:
                of_files.append({name: ad.io.read_elem(file[name]) for name in names})
        return of_files

    def joined() -> None:
        ad.concat([ad.AnnData(**of_file) for of_file in annotations("obs", "var")], join="outer", merge="same")

    def seconds(task: Callable[[], object]) -> float:
        start = time.perf_counter()
        task()
        return time.perf_counter() - start

    tasks = (ready, partial(annotations, "obs"), partial(annotations, "obs", "var"), joined)
    for task in tasks:
        task()
    return {"seconds": [[seconds(task) for task in tasks] for _ in range(7)]}


TASKS = {"write": write, "speed": speed, "opening": opening}


# ---- all of them -----------------------------------------------------------------------------------------------------
def run(task: str, case: Case, path: Path, arguments: argparse.Namespace, workers: int | None = None) -> dict:
    """Run a task in a process of its own, scDataset's if `workers` is given; a quick one here, once one has run so."""
    if arguments.quick and arguments.process_made and workers is None:
        return TASKS[task](argparse.Namespace(**{**vars(arguments), "case": case, "path": path}))
    arguments.process_made = True
    given = ["--task", task, "--case", json.dumps(case), "--path", str(path), "--seconds", str(arguments.seconds)]
    given += ["--sizes", json.dumps(arguments.sizes)]
    if workers is None:
        return alone(__file__, *given)
    return alone(__file__, *given, "--peer", "--workers", str(workers), python=arguments.peers)


def stored(case: Case, arguments: argparse.Namespace) -> Path:
    """The file or store of a case, written if it is not there."""
    sizes = "_".join(map(str, arguments.sizes))
    ending = "zarr" if case.form == "collection" else "h5ad"
    path = arguments.data.resolve() / f"counts_{sizes}_{case.form}.{ending}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", flush=True)
        run("write", case, path, arguments)
    return path


def compare(case: Case, base: Case, arguments: argparse.Namespace) -> str:
    """This package on two forms of the same data."""
    paths = [stored(case, arguments), stored(base, arguments)]
    runs = [
        [run("speed", of, path, arguments) for of, path in zip((case, base), paths, strict=True)]
        for _ in range(arguments.pairs)
    ]
    answers = [result["answer"] for pair in runs for result in pair]
    if None in answers or any(answer != answers[0] for answer in answers):
        raise SystemExit(f"{case.name}: not the same (rows, entries, checksum) as {base.name}: {answers}")
    speeds = [[result["cells_per_s"] for result in pair] for pair in runs]
    cells = [case.name, *(spread(list(of)) for of in zip(*speeds, strict=True)), base.name]
    return f"| {' | '.join([*cells, spread([a / b for a, b in speeds], '.2f', 'x')])} |"


def measure(case: Case, arguments: argparse.Namespace) -> str:
    path = stored(case, arguments)
    mine, theirs, answers = [], [], []
    for _ in range(arguments.pairs):
        mine.append(run("speed", case, path, arguments))
        if arguments.peers:
            both = [run("speed", case, path, arguments, workers) for workers in (0, 2)]
            theirs.append(max(both, key=lambda result: result["cells_per_s"]))
            answers += [result["answer"] for result in both]
        answers.append(mine[-1]["answer"])
    if any(answer not in (None, mine[0]["answer"]) for answer in answers):
        raise SystemExit(f"{case.name}: not the same (rows, entries, checksum): {answers}")
    cells = [case.name, spread([m["cells_per_s"] for m in mine])]
    if theirs:
        cells.append(spread([t["cells_per_s"] for t in theirs]))
        ratios = [m["cells_per_s"] / t["cells_per_s"] for m, t in zip(mine, theirs, strict=True)]
        cells.append(spread(ratios, ".1f", "x"))
    return f"| {' | '.join(cells)} |"


def measure_opening(n_var: int, arguments: argparse.Namespace) -> str:
    arguments = argparse.Namespace(**{**vars(arguments), "sizes": (0, n_var, 0)})
    path = arguments.data.resolve() / f"opening_{N_FILES}_{N_CHUNKS}_{n_var}"
    runs = run("opening", CASES[0], path, arguments)["seconds"]
    ready, *others = zip(*runs, strict=True)
    names = ("anndata's reading of their obs", "of obs and var", "that and `anndata.concat`")
    parts = [
        f"Opening {N_FILES} files of {N_CHUNKS:,} chunks per array and {n_var:,} variables: {spread(ready, '.2f', ' s')}"
    ]
    for name, other in zip(names, others, strict=True):
        beyond = [mine - theirs for mine, theirs in zip(ready, other, strict=True)]
        parts.append(f"{name}: {spread(other, '.2f', ' s')}, beyond that: {spread(beyond, '.3f', ' s')}")
    return "; ".join(parts)


def main() -> None:
    takes = comparison(__doc__, "scDataset==0.3.0")
    takes.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    arguments = takes.parse_args()
    if arguments.task:
        arguments.case, arguments.sizes = Case(*json.loads(arguments.case)), json.loads(arguments.sizes)
        print(json.dumps(TASKS[arguments.task](arguments)))
        return
    arguments.sizes = (2_000, 2_000, 100) if arguments.quick else (40_000, 30_000, 1_621)
    arguments.process_made = False
    if arguments.quick:
        arguments.seconds, arguments.pairs = 0.2, 1
    print(machine(), flush=True)
    head = ["case", "ours, cells/s", *(["scDataset 0.3.0, cells/s", "ratio (min … max)"] if arguments.peers else [])]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case in CASES:
        if arguments.only not in case.name:
            continue
        table.append(measure(case, arguments))
        print(table[-1], flush=True)
    table += ["", "| case | cells/s | against, cells/s | | ratio (min … max) |", "|---" * 5 + "|"]
    for case, base in FORMS:
        if arguments.only in case.name:
            table.append(compare(case, base, arguments))
            print(table[-1], flush=True)
    if arguments.only in "opening" and not arguments.quick:
        for n_var in (2_000, 30_000):
            table += ["", measure_opening(n_var, arguments)]
            print(table[-1], flush=True)
    if arguments.record:
        about = f"`{command_line()}`; {arguments.sizes[0]:,} cells × {arguments.sizes[1]:,} genes"
        write_record(arguments.record, about, "\n".join(table))


if __name__ == "__main__":
    sys.exit(main())
