"""scvi-tools trains from annbatch as it does from scverse's package: `setup_annbatch`, unchanged."""

from __future__ import annotations

import logging
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

scvi = pytest.importorskip("scvi", reason="scvi-tools (Python >= 3.12) is not installed")

N_VAR = 30
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def adatas() -> list[ad.AnnData]:
    rng = np.random.default_rng(0)
    made = []
    for k, n_obs in enumerate((150, 90)):
        kinds = rng.integers(0, 3, n_obs)
        rates = np.array([[8 if gene % 3 == kind else 0.5 for gene in range(N_VAR)] for kind in kinds])
        obs = pd.DataFrame(
            {"batch": f"batch{k}", "cell_type": np.array(["B", "NK", "T"])[kinds], "age": rng.normal(size=n_obs)},
            index=[f"cell{k}_{i}" for i in range(n_obs)],
        )
        var = pd.DataFrame(index=[f"gene{i}" for i in range(N_VAR)])
        made.append(ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype("float32")), obs=obs, var=var))
    return made


@pytest.fixture(autouse=True)
def other_tests_keep_their_zarr():
    """scvi-tools sets the codec pipeline of the whole process."""
    with zarr.config.set({"codec_pipeline.path": zarr.config.get("codec_pipeline.path")}):
        yield


@pytest.fixture
def paths(adatas: list[ad.AnnData], tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for k, adata in enumerate(adatas):
        adata.write_h5ad(tmp_path / f"{k}.h5ad")
    return [str(tmp_path / f"{k}.h5ad") for k in range(len(adatas))]


SETUP = {"batch_key": "batch", "batch_size": 32, "chunk_size": 16, "preload_nchunks": 4, "preload_to_gpu": False}


def train(model, datamodule, **kwargs) -> pd.Series:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model.train(datamodule=datamodule, accelerator="cpu", enable_progress_bar=False, **kwargs)
    return model.history["elbo_train"].iloc[:, 0].astype(float)


def test_the_loader_is_ours():
    import annbatch

    assert hasattr(annbatch.Loader, "locate")


def test_scvi_trains_from_paths(paths: list[str], adatas: list[ad.AnnData]):
    datamodule = scvi.model.SCVI.setup_annbatch(paths=paths, **SETUP)
    assert (datamodule.n_obs, datamodule.n_vars, datamodule.n_batch) == (240, N_VAR, 2)
    model = scvi.model.SCVI(registry=datamodule.registry, n_latent=4)
    loss = train(model, datamodule, max_epochs=12, train_size=0.8, check_val_every_n_epoch=1)
    assert np.isfinite(loss).all()
    assert loss.iloc[-1] < loss.iloc[0] * 0.95
    assert np.isfinite(model.history["elbo_validation"].astype(float)).all().all()


def test_scvi_sees_every_cell_once_and_as_it_is(paths: list[str], adatas: list[ad.AnnData]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datamodule = scvi.model.SCVI.setup_annbatch(paths=paths, labels_key="cell_type", **SETUP)
    expected = np.concatenate([adata.X.toarray() for adata in adatas])
    kinds = np.concatenate([adata.obs["cell_type"] for adata in adatas])
    batches = list(datamodule)
    seen = np.concatenate([batch["X"].numpy() for batch in batches])
    labels = np.concatenate([batch["labels"].numpy()[:, 0] for batch in batches])
    order, order_expected = np.lexsort(seen.T), np.lexsort(expected.T)
    np.testing.assert_array_equal(seen[order], expected[order_expected])
    np.testing.assert_array_equal(datamodule.labels_mapping[labels[order]], kinds[order_expected])


def test_scvi_trains_from_memory(adatas: list[ad.AnnData]):
    datamodule = scvi.model.SCVI.setup_annbatch(adatas=adatas, **SETUP)
    model = scvi.model.SCVI(registry=datamodule.registry, n_latent=4)
    loss = train(model, datamodule, max_epochs=12)
    assert loss.iloc[-1] < loss.iloc[0] * 0.95


def test_scvi_reopens_a_collection(paths: list[str]):
    scvi.model.SCVI.setup_annbatch(paths=paths, collection_path="cells.zarr", **SETUP)
    datamodule = scvi.model.SCVI.setup_annbatch(collection_path="cells.zarr", rebuild=False, shuffle=True, **SETUP)
    model = scvi.model.SCVI(registry=datamodule.registry, n_latent=4)
    assert np.isfinite(train(model, datamodule, max_epochs=2, train_size=0.5)).all()


def test_scanvi_trains_with_covariates(paths: list[str]):
    datamodule = scvi.model.SCANVI.setup_annbatch(
        paths=paths, labels_key="cell_type", unlabeled_category="Unknown", continuous_covariate_keys=["age"], **SETUP
    )
    model = scvi.model.SCANVI(registry=datamodule.registry, n_latent=4)
    assert np.isfinite(train(model, datamodule, max_epochs=2)).all()
