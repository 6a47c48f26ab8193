"""Cells for the examples: counts in which each cell type has marker genes, written as a small collection."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from annbatch import DatasetCollection, write_sharded

if TYPE_CHECKING:
    from collections.abc import Iterable


def labelled_cells(n_obs: int, seed: int, n_var: int = 200, n_types: int = 4, extras: bool = False) -> ad.AnnData:
    """Return Poisson counts; with `extras` also ``layers["log"]`` and ``obsm["size"]``."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, n_types, n_obs)
    rate = np.where(np.arange(n_var) % 10 == kind[:, None], 0.6, 0.3)
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(kind, list("ABCD")[:n_types]), "donor": rng.integers(0, 12, n_obs)},
        index=[f"cell-{seed}-{i}" for i in range(n_obs)],
    )
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene-{i}" for i in range(n_var)]))
    if extras:
        adata.layers["log"] = counts.log1p().tocsr()
        adata.obsm["size"] = np.asarray(counts.sum(axis=1))
    return adata


def write_collection(path: Path, adatas: Iterable[ad.AnnData]) -> DatasetCollection:
    """Write AnnData objects as a collection of sharded stores, one dataset each; rows stay in their order."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        for i, adata in enumerate(adatas):
            write_sharded(group, adata, key=f"dataset_{i}")
    group.update_attributes({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    return DatasetCollection(path, mode="r")


def small_collection(folder: str | Path, extras: bool = False) -> DatasetCollection:
    """Write two datasets of 2,000 labelled cells each as ``cells.zarr`` in `folder`."""
    return write_collection(Path(folder) / "cells.zarr", (labelled_cells(2000, seed, extras=extras) for seed in (0, 1)))
