"""The demo (`make demo`): real cells train a classifier, then 50,000 generated cells stream past.

1. 700 blood cells that ship with scanpy are written as a sharded collection.
2. A classifier learns their types in a plain torch loop on ``torch.ops.annbatch.load``.
3. The same model learns under a Lightning ``Trainer``.
4. 50,000 generated cells are written once and streamed: cells/s, bytes/s, and how long the consumer waited.
5. A picture of it all is saved.

Exits with 1 if either model fails to beat guessing clearly, or if a value is lost in streaming.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from _classifiers import PLAIN_BAR, Curve, train_on_the_op, train_with_lightning
from _demo_cells import generated_collection, pbmc_collection
from _picture import save_picture
from annbatch import DatasetCollection, Loader

HELD_OUT = 0.2
MARGIN = 0.2  # how far beyond the share of the commonest type the accuracy must be


def say(text: str = "") -> None:
    """Print a line at once, so that it stands in order with the progress bars."""
    print(text, flush=True)


def classify(folder: Path) -> tuple[list[Curve], float]:
    """Train both ways on the blood cells; return the curves and the share of the commonest held-out type."""
    say("1. 700 blood cells (10x Genomics PBMC 68k, reduced; shipped with scanpy)")
    collection = pbmc_collection(folder)
    types = collection.obs(["bulk_labels"])["bulk_labels"].astype("category")
    labels = torch.from_numpy(types.cat.codes.to_numpy(dtype=np.int64))
    n_var = Loader().use_collection(collection).n_var
    n_train = round(len(labels) * (1 - HELD_OUT))
    guess = labels[n_train:].bincount().max().item() / (len(labels) - n_train)
    say(f"   {len(labels)} cells of {n_var} genes and {types.nunique()} types, in {folder / 'pbmc.zarr'}")
    say(f"   {n_train} to learn from; of the {len(labels) - n_train} held out {guess:.1%} are of the commonest type")

    say("\n2. A classifier in a plain torch loop on torch.ops.annbatch.load")
    paths = [str(folder / "pbmc.zarr" / group.basename) for group in collection]
    plain = train_on_the_op(paths, labels, n_var, n_train)
    say("\n3. The same through Lightning")
    lightning = train_with_lightning(collection, labels, n_var, n_train)
    return [plain, lightning], guess


def stream(collection: DatasetCollection, totals: dict) -> dict[str, float]:
    """Read every generated cell once in random order; return seconds, counts and the core's statistics."""
    loader = Loader(
        chunk_size=256, preload_nchunks=64, batch_size=4096, shuffle=True, rng=np.random.default_rng(0),
        to="torch", return_index=True, obs_columns=[],
    ).use_collection(collection)  # fmt: skip
    seen = np.zeros(loader.n_obs, dtype=np.int64)
    nnz, total, begin = 0, 0.0, time.perf_counter()
    with tqdm(total=loader.n_obs, desc="stream", unit=" cells", **PLAIN_BAR) as bar:
        for batch in loader:
            values = batch["X"].values()
            nnz += values.numel()
            total += values.sum(dtype=torch.float64).item()
            seen[batch["index"]] += 1
            bar.update(len(batch["index"]))
    seconds = time.perf_counter() - begin
    complete = bool((seen == 1).all()) and nnz == totals["nnz"] and total == totals["sum"]
    result = {**loader.stats(), "seconds": seconds, "cells": loader.n_obs, "nnz": nnz, "complete": complete}
    loader.close()
    return result


def report(result: dict[str, float]) -> None:
    """Print what streaming came to."""
    seconds, mib = result["seconds"], 2**20
    say(f"   cells              {result['cells']:>12,}   {result['cells'] / seconds:>14,.0f} per second")
    say(f"   stored values      {result['nnz']:>12,}   {result['nnz'] / seconds:>14,.0f} per second")
    for name, key in ("read from files", "bytes_read"), ("decompressed to", "bytes_decoded"):
        say(f"   {name:<18} {result[key] / mib:>8,.0f} MiB   {result[key] / mib / seconds:>10,.0f} MiB per second")
    wait = result["consumer_wait_ns"] / 1e9
    say(f"   consumer waited    {wait:>10.2f} s   {wait / seconds:>13.0%} of {seconds:.2f} s")
    say("   every cell came once and the values add up" if result["complete"] else "   CELLS OR VALUES WERE LOST")


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where data and picture are kept")
    parser.add_argument("--cells", type=int, default=50_000, help="number of generated cells")
    arguments = parser.parse_args()
    folder, begin = arguments.folder.resolve(), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
    torch.set_num_threads(1)  # the model is tiny; the other cores decode

    curves, guess = classify(folder)
    say()
    for curve in curves:
        say(f"   {curve.name:<17} held-out accuracy {curve.accuracy[-1]:.1%}, loss {curve.loss[-1]:.3f}")
    learnt = all(curve.accuracy[-1] > guess + MARGIN for curve in curves)
    say(
        f"   needed: more than {guess + MARGIN:.1%}, which is {MARGIN:.0%} beyond guessing: {'yes' if learnt else 'NO'}"
    )

    say(f"\n4. {arguments.cells:,} generated cells of 20,000 genes, written once, stream by")
    collection, totals = generated_collection(folder, arguments.cells)
    say("   (files that were just written or read are in the page cache: this is not the speed of a disk)")
    result = stream(collection, totals)
    report(result)

    say(f"\n5. Picture: {save_picture(folder / 'demo.png', curves, guess, result)}")
    passed = learnt and result["complete"]
    say(f"\n{'All is well' if passed else 'FAILED'} after {time.perf_counter() - begin:.0f} s.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
