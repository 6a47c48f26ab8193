"""The demo's cells, written once: blood cells that ship with scanpy, and many with the sparsity of real counts."""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from importlib import resources
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from annbatch import DatasetCollection

if TYPE_CHECKING:
    from pathlib import Path


def pbmc_h5ad(folder: Path) -> Path:
    """Write, once, the 700 blood cells that ship inside scanpy as an h5ad file, and return its path.

    ``X`` holds log-normalised expression of 765 genes; ``obs["bulk_labels"]`` the cell types.
    """
    path = folder / "pbmc.h5ad"
    if not path.exists():
        source = resources.files("scanpy.datasets") / "10x_pbmc68k_reduced.h5ad"
        with resources.as_file(source) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of where old files keep their graphs
            original = ad.read_h5ad(file)
        cells = ad.AnnData(original.raw.X.tocsr(), obs=original.obs[["bulk_labels"]], var=original.raw.var[[]])
        part = path.with_suffix(".part")
        cells.write_h5ad(part, compression="gzip")
        part.rename(path)  # only a complete file gets the name that is looked for
    return path


def pbmc_collection(h5ad: Path) -> DatasetCollection:
    """Write, once, the blood cells as a shuffled collection of two datasets beside their file."""
    path = h5ad.with_suffix(".zarr")
    _convert([h5ad], path, n_obs_per_chunk=32, shard_size=128, dataset_size=350, shuffle_chunk_size=10)
    return DatasetCollection(path, mode="r")


def generated_h5ads(folder: Path, n_obs: int = 50_000, n_var: int = 20_000) -> tuple[list[Path], dict]:
    """Write, once, generated counts in four gzipped h5ad files: about 1,300 of 20,000 genes per cell, most counts 1.

    Returns
    -------
    The paths, and ``{"nnz", "sum"}``: how many values were written and what they add up to.
    """
    place = folder / f"generated-{n_obs}x{n_var}"
    if not place.exists():
        part = place.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted run has left
        part.mkdir()
        totals = {"nnz": 0, "sum": 0.0}
        with tqdm(total=n_obs, desc="generate and write", unit=" cells", ascii=True, ncols=100, file=sys.stdout) as bar:
            for number, adata in enumerate(_generated_adatas(n_obs, n_var, bar, totals)):
                adata.write_h5ad(part / f"dataset_{number}.h5ad", compression="gzip")
        (part / "totals.json").write_text(json.dumps(totals))
        part.rename(place)
    return sorted(place.glob("*.h5ad")), json.loads((place / "totals.json").read_text())


def generated_collection(h5ads: list[Path]) -> tuple[Path, float | None]:
    """Convert h5ad files, once, to a collection beside their folder; return its path and the seconds that this took."""
    path = h5ads[0].parent.with_suffix(".zarr")
    begin = time.perf_counter()
    converted = _convert(h5ads, path)
    return path, time.perf_counter() - begin if converted else None


def _convert(h5ads: list[Path], path: Path, **settings: int) -> bool:
    """Write a shuffled collection, unless there is one; say whether it was written."""
    if (path / "complete").exists():
        return False
    shutil.rmtree(path, ignore_errors=True)
    DatasetCollection(path).add_adatas(h5ads, rng=np.random.default_rng(0), **settings)
    (path / "complete").touch()
    return True


def _generated_adatas(n_obs: int, n_var: int, bar: tqdm, totals: dict):
    """Yield four AnnData objects of `n_obs` cells in all: expression is log-normal over genes, counts are Poisson."""
    rng = np.random.default_rng(0)
    mean = rng.lognormal(sigma=2.0, size=n_var).astype(np.float32)
    low, high = 1e-6, 1.0
    for _ in range(50):  # the sequencing depth at which 1,300 of 20,000 genes are seen in the average cell
        depth = (low * high) ** 0.5
        low, high = (depth, high) if -np.expm1(-mean * depth).sum() < 0.065 * n_var else (low, depth)
    var = pd.DataFrame(index=[f"gene-{i}" for i in range(n_var)])
    for dataset, n_cells in enumerate(np.diff([n_obs * i // 4 for i in range(5)])):
        blocks = []
        for n_rows in np.diff([*range(0, n_cells, 2_500), n_cells]):
            rate = mean * (depth * rng.lognormal(sigma=0.15, size=(n_rows, 1))).astype(np.float32)
            seen = sp.csr_matrix(rng.random(rate.shape, dtype=np.float32) < -np.expm1(-rate))
            rows = np.repeat(np.arange(n_rows), np.diff(seen.indptr))
            counts = 1 + rng.poisson(rate[rows, seen.indices]).astype(np.float32)
            blocks.append(sp.csr_matrix((counts, seen.indices, seen.indptr), shape=rate.shape))
            bar.update(int(n_rows))
        X = sp.vstack(blocks, format="csr")
        totals["nnz"] += X.nnz
        totals["sum"] += float(X.data.sum(dtype=np.float64))
        obs = pd.DataFrame({"dataset": str(dataset)}, index=[f"cell-{dataset}-{i}" for i in range(n_cells)])
        yield ad.AnnData(X, obs=obs, var=var)
