"""Small AnnData objects, written to disk, with what a loader over them should yield.

For the tests of the Python package: everything goes through anndata's own writer, and the reference is what anndata
and scipy hold in memory. (Stores that only the core's tests need are made in `stores.py`.)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import zarr
from scipy import sparse as sp

from annbatch import Loader
from annbatch.utils import load_all_aligned

if TYPE_CHECKING:
    from pathlib import Path

N_VAR = 11
SIZES = {"batch_size": 10, "chunk_size": 4, "preload_nchunks": 5}


def make_adata(n_obs: int, seed: int, *, dense: bool = False, dtype: Any = "float32") -> ad.AnnData:
    """A random AnnData of `n_obs` cells: some without counts, a layer, two obsm entries, four columns of obs."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 100, (n_obs, N_VAR)) * (rng.random((n_obs, N_VAR)) < 0.4)
    counts[rng.random(n_obs) < 0.1] = 0
    counts = counts.astype(dtype)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B", "NK", "T"], n_obs), categories=["B", "NK", "T"]),
            "donor": [f"donor{k}" for k in rng.integers(0, 3, n_obs)],
            "depth": rng.integers(0, 1000, n_obs),
            "score": rng.normal(size=n_obs),
        },
        index=[f"cell{seed}_{k}" for k in range(n_obs)],
    )
    var = pd.DataFrame(index=[f"gene{k}" for k in range(N_VAR)])
    adata = ad.AnnData(counts if dense else sp.csr_matrix(counts), obs=obs, var=var)
    adata.layers["doubled"] = sp.csr_matrix(counts * 2)
    adata.obsm["pca"] = rng.normal(size=(n_obs, 3)).astype("float32")
    adata.obsm["spots"] = sp.csr_matrix(rng.integers(0, 3, (n_obs, 4)).astype("int64"))
    return adata


def write(adata: ad.AnnData, path: Path, zarr_format: int = 3) -> Path:
    """Write `adata` as a Zarr store; returns `path`."""
    with ad.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_zarr(path, chunks=(7, adata.n_vars) if not sp.issparse(adata.X) else None)
    return path


def in_memory_store(matrix: Any) -> zarr.Group:
    """A Zarr store in memory whose ``X`` is `matrix`."""
    root = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.io.write_elem(root, "X", matrix)
    return root


def open_backed(path: Path) -> ad.AnnData:
    """Open a store with its matrices left on disk."""
    return load_all_aligned(zarr.open_group(path, mode="r"))


@dataclass
class Cells:
    """Datasets in memory, and the same on disk."""

    adatas: list[ad.AnnData]
    paths: list[Path]

    @property
    def n_obs(self) -> int:
        return sum(adata.n_obs for adata in self.adatas)

    @property
    def obs(self) -> pd.DataFrame:
        return pd.concat([adata.obs for adata in self.adatas])

    def backed(self) -> list[ad.AnnData]:
        return [open_backed(path) for path in self.paths]

    def without_extras(self) -> list[ad.AnnData]:
        """The backed datasets with X, obs and var only: nothing for a loader to warn about."""
        return [ad.AnnData(X=adata.X, obs=adata.obs, var=adata.var) for adata in self.backed()]

    def dense(self, name: str = "X") -> np.ndarray:
        """One element of all rows, dense."""
        parts = [adata.X if name == "X" else _element(adata, name) for adata in self.adatas]
        return np.concatenate([part.toarray() if sp.issparse(part) else np.asarray(part) for part in parts])


def write_cells(root: Path, sizes: tuple[int, ...] = (37, 20, 64), **kwargs: Any) -> Cells:
    """Write one store per size below `root`."""
    adatas = [make_adata(n_obs, seed, **kwargs) for seed, n_obs in enumerate(sizes)]
    return Cells(adatas, [write(adata, root / f"{k}.zarr") for k, adata in enumerate(adatas)])


def _element(adata: ad.AnnData, name: str) -> Any:
    group, _, key = name.partition("/")
    return getattr(adata, group)[key]


def loader_over(cells: Cells, **settings: Any) -> Loader:
    """A loader over X, obs and var of the cells, in batches of 10 that say which rows they have."""
    return Loader(**{"return_index": True, **SIZES, **settings}).add_adatas(cells.without_extras())


def densify(matrix: Any) -> np.ndarray:
    """Any matrix a batch may hold as a NumPy array."""
    if sp.issparse(matrix):
        # scipy leaves contradictory arrays alone until they are used
        matrix.check_format(full_check=True)
        return matrix.toarray()
    if isinstance(matrix, torch.Tensor):
        if matrix.layout == torch.sparse_csr:
            parts = matrix.crow_indices(), matrix.col_indices(), matrix.values()
            matrix = torch.sparse_csr_tensor(*parts, size=matrix.shape, check_invariants=True).to_dense()
        return matrix.cpu().numpy()
    if hasattr(matrix, "todense"):
        return np.asarray(matrix.todense())
    return np.asarray(matrix)


def check_batch(batch: dict[str, Any], cells: Cells) -> np.ndarray:
    """Compare a batch with the rows it says it has; returns these."""
    rows = batch["index"]
    assert rows.dtype == np.int64
    assert rows.ndim == 1
    np.testing.assert_array_equal(densify(batch["X"]), cells.dense()[rows])
    for group in ("layers", "obsm"):
        for name, matrix in batch.get(group, {}).items():
            np.testing.assert_array_equal(densify(matrix), cells.dense(f"{group}/{name}")[rows])
    if isinstance(batch["obs"], pd.DataFrame):
        pd.testing.assert_frame_equal(batch["obs"], cells.obs.iloc[rows][list(batch["obs"].columns)])
    return rows


def check_epoch(batches: list[dict[str, Any]], cells: Cells) -> np.ndarray:
    """Check every batch of a pass that should have each row once; returns the rows in their order."""
    rows = np.concatenate([check_batch(batch, cells) for batch in batches])
    np.testing.assert_array_equal(np.sort(rows), np.arange(cells.n_obs))
    return rows
