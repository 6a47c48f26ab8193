"""AnnData objects whose genes differ from one to the next, and what a loader over them should yield."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse as sp

from support.cells import densify

if TYPE_CHECKING:
    from annbatch import Loader

GENES = [f"gene{k:02}" for k in range(30)]
"""In alphabetical order, which is the one that a union of different names has."""


def make(n_obs: int, genes: list[str], seed: int, *, dense: bool = False, dtype: str = "float32") -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = (rng.integers(1, 50, (n_obs, len(genes))) * (rng.random((n_obs, len(genes))) < 0.4)).astype(dtype)
    categories = ["B", "T", "NK"][: 2 + seed % 2]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(rng.choice(categories, n_obs), categories=categories), "depth": counts.sum(1)},
        # the same names in each file
        index=[f"cell{k}" for k in range(n_obs)],
    )
    if seed % 2:
        obs["doublet"] = rng.random(n_obs) < 0.5
    var = pd.DataFrame({"symbol": [gene.upper() for gene in genes], "mean": rng.random(len(genes))}, index=genes)
    adata = ad.AnnData(counts if dense else sp.csr_matrix(counts), obs=obs, var=var)
    adata.layers["doubled"] = counts * 2 if dense else sp.csr_matrix(counts * 2)
    adata.obsm["pca"] = rng.normal(size=(n_obs, 3))
    return adata


def shuffled(genes: list[str], seed: int) -> list[str]:
    return [str(gene) for gene in np.random.default_rng(seed).permutation(genes)]


CASES = {
    "same": [GENES, GENES],
    "same, in another order": [GENES, GENES[::-1]],
    "sorted": [GENES[:20], GENES[5:]],
    "unsorted": [shuffled(GENES[:20], 1), shuffled(GENES[5:], 2), shuffled(GENES[8:12], 3)],
    "one within the other": [GENES, shuffled(GENES[3:9], 4)],
    "one": [shuffled(GENES, 5)],
}


def concat(adatas: list[ad.AnnData], join: str) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ad.concat(adatas, join=join, merge="same", fill_value=0)


def in_order(loader: Loader) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(loader)


def check(loader: Loader, expected: ad.AnnData, layer: str | None = None) -> None:
    """Compare every batch of a loader with the rows of one AnnData."""
    x = densify(expected.X if layer is None else expected.layers[layer])
    pd.testing.assert_frame_equal(loader.var, expected.var)
    assert (loader.n_obs, loader.n_var) == expected.shape
    seen = []
    for batch in in_order(loader):
        np.testing.assert_array_equal(densify(batch["X"]), x[batch["index"]])
        if sp.issparse(batch["X"]):
            # not the flag, which scipy would set
            assert all(np.all(np.diff(row.indices) > 0) for row in batch["X"])
        pd.testing.assert_frame_equal(batch["obs"], expected.obs.iloc[batch["index"]])
        assert batch["var"] is loader.var
        seen.extend(batch["index"])
    assert sorted(seen) == list(range(expected.n_obs))
