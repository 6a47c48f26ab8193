"""A small collection on disk, written by anndata, and what is in it, for tests of the ops."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

N_OBS = (30, 23)
N_VAR = 20
N_PCA = 3


@dataclass(frozen=True)
class SmallCollection:
    """Two datasets as one observation axis, and their contents in memory."""

    paths: tuple[str, ...]
    x: np.ndarray
    pca: np.ndarray

    @property
    def n_obs(self) -> int:
        return len(self.x)

    def config(self, *, elements: Sequence[str] = ("X",), **fields: Any) -> dict[str, Any]:
        """Configuration that reads `elements` in random batches of 8; `fields` replace its fields."""
        sampling = {"kind": "random", "chunk_size": 4, "preload_nchunks": 4, "batch_size": 8}
        return {
            "elements": [{"name": name} for name in elements],
            "datasets": [{"path": path} for path in self.paths],
            "sampling": sampling,
            **fields,
        }

    def check(self, batch: Sequence[torch.Tensor]) -> list[int]:
        """Rows of a batch of X, after comparing it with what was written."""
        rows, indptr, indices, data = batch
        csr = torch.sparse_csr_tensor(indptr, indices, data, size=(len(rows), N_VAR), check_invariants=True)
        np.testing.assert_array_equal(csr.to_dense().numpy(), self.x[rows.numpy()])
        return rows.tolist()


def write_small(folder: Path) -> SmallCollection:
    """Write two datasets with a sparse X of counts and a dense ``obsm/pca``."""
    rng = np.random.default_rng(0)
    paths, xs, pcas = [], [], []
    for k, n_obs in enumerate(N_OBS):
        x = (rng.integers(1, 9, (n_obs, N_VAR)) * (rng.random((n_obs, N_VAR)) < 0.3)).astype(np.float32)
        x[5] = 0
        pca = rng.standard_normal((n_obs, N_PCA)).astype(np.float32)
        adata = ad.AnnData(
            X=sp.csr_matrix(x),
            obs=pd.DataFrame(
                {"label": pd.Categorical(rng.choice(["a", "b", "c"], n_obs))},
                index=[f"cell_{k}_{i}" for i in range(n_obs)],
            ),
            var=pd.DataFrame(index=[f"gene_{j}" for j in range(N_VAR)]),
            obsm={"pca": pca},
        )
        path = folder / f"dataset_{k}.zarr"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the Zarr format it writes by default, which differs by release
            adata.write_zarr(path)
        paths.append(str(path))
        xs.append(x)
        pcas.append(pca)
    return SmallCollection(tuple(paths), np.concatenate(xs), np.concatenate(pcas))
