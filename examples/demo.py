"""The demo (`make demo`): real cells train a classifier, then 50,000 generated cells stream past.

1. 700 blood cells that ship with scanpy lie in an h5ad file.
2. A classifier learns their types straight from it, in a plain torch loop on ``torch.ops.annbatch.load``.
3. The file is converted to a shuffled collection, and the same model learns under a Lightning ``Trainer``.
4. 50,000 generated cells stream from the h5ad files that they are in, then from a collection made of these: cells/s of
   both, bytes/s, and how long the consumer waited.
5. A picture of it all is saved.

Exits with 1 if either model fails to beat guessing clearly, or if a value is lost in streaming.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import torch
from tqdm import tqdm

import annbatch
from _classifiers import PLAIN_BAR, Curve, train_on_the_op, train_with_lightning
from _demo_cells import generated_collection, generated_h5ads, pbmc_collection, pbmc_h5ad
from _picture import save_picture

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = 0.2
MARGIN = 0.2  # how far beyond the share of the commonest type the accuracy must be


def say(text: str = "") -> None:
    """Print a line at once, so that it stands in order with the progress bars."""
    print(text, flush=True)


def classify(folder: Path) -> tuple[list[Curve], float]:
    """Train both ways on the blood cells; return the curves and the share of the commonest held-out type."""
    say("1. 700 blood cells (10x Genomics PBMC 68k, reduced; shipped with scanpy)")
    h5ad = pbmc_h5ad(folder)
    cells = ad.read_h5ad(h5ad, backed="r")  # X stays in the file
    labels = type_numbers(cells.obs["bulk_labels"])
    n_train = round(len(labels) * (1 - HELD_OUT))
    guess = labels[n_train:].bincount().max().item() / (len(labels) - n_train)
    say(f"   {len(labels)} cells of {cells.n_vars} genes and {len(labels.unique())} types, in {h5ad}")
    say(f"   {n_train} to learn from; of the {len(labels) - n_train} held out {guess:.1%} are of the commonest type")

    say("\n2. A classifier straight from the h5ad file, in a plain torch loop on torch.ops.annbatch.load")
    plain = train_on_the_op([str(h5ad)], labels, cells.n_vars, n_train)
    say("\n3. The file as a shuffled collection, and the same through Lightning")
    collection = pbmc_collection(h5ad)
    labels = type_numbers(collection.obs(["bulk_labels"])["bulk_labels"])
    lightning = train_with_lightning(collection, labels, cells.n_vars, n_train)
    return [plain, lightning], guess


def type_numbers(types: pd.Series) -> torch.Tensor:
    """Cell types as numbers, int64 [n_obs]."""
    return torch.from_numpy(types.astype("category").cat.codes.to_numpy(dtype=np.int64))


def stream(paths: list[Path], totals: dict) -> dict[str, float]:
    """Read every generated cell once in random order; return seconds, counts and the core's statistics."""
    loader = annbatch.open(
        paths, chunk_size=256, preload_nchunks=64, batch_size=4096, rng=np.random.default_rng(0),
        to="torch", return_index=True, obs_columns=[],
    )  # fmt: skip
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

    say(f"\n4. {arguments.cells:,} generated cells of 20,000 genes stream by")
    h5ads, totals = generated_h5ads(folder, arguments.cells)
    say("   (files that were just written or read are in the page cache: this is not the speed of a disk)")
    say(f"   straight from {len(h5ads)} gzipped h5ad files:")
    direct = stream(h5ads, totals)
    report(direct)
    collection, seconds = generated_collection(h5ads)
    say(f"   converted to a shuffled collection {'before' if seconds is None else f'in {seconds:.1f} s'}:")
    result = stream([collection], totals)
    report(result)
    speeds = [r["cells"] / r["seconds"] for r in (direct, result)]
    say(
        f"   h5ad {speeds[0]:,.0f} cells/s, collection {speeds[1]:,.0f} cells/s: {speeds[1] / speeds[0]:.1f} times as fast"
    )

    say(f"\n5. Picture: {save_picture(folder / 'demo.png', curves, guess, result)}")
    passed = learnt and direct["complete"] and result["complete"]
    say(f"\n{'All is well' if passed else 'FAILED'} after {time.perf_counter() - begin:.0f} s.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
