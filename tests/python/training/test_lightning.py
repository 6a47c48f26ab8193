"""The Lightning data module with a real Trainer: rows, order, options, checkpoints, and two ranks over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

import annbatch
from annbatch import DatasetCollection, Loader, write_sharded
from annbatch._splits.loader import SplitLoader
from annbatch.samplers import RandomSampler, SequentialSampler

pl = pytest.importorskip("lightning.pytorch")
AnnbatchDataModule = annbatch.lightning.AnnbatchDataModule

pytestmark = pytest.mark.filterwarnings("ignore:Only `X`, `obs`, and `var` are kept")

N_OBS = (230, 170)
N_ALL = sum(N_OBS)
N_VAR = 30
SIZES = {"chunk_size": 5, "preload_nchunks": 8, "batch_size": 20, "return_index": True}


def make_adata(n_obs, seed):
    rng = np.random.default_rng(seed)
    matrix = sp.random(n_obs, N_VAR, 0.3, format="csr", random_state=seed, dtype=np.float32)
    obs = pd.DataFrame(
        {"donor": pd.Categorical(rng.choice(list("abcdefgh"), n_obs)), "age": rng.integers(0, 90, n_obs)},
        index=[f"cell-{seed}-{i}" for i in range(n_obs)],
    )
    pca = rng.normal(size=(n_obs, 4)).astype(np.float32)
    return ad.AnnData(matrix, obs=obs, layers={"counts": (matrix * 7).tocsr()}, obsm={"pca": pca})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A collection of two datasets, the stores of its datasets, and what is in them."""
    path = tmp_path_factory.mktemp("lightning") / "collection.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3)
    adatas = [make_adata(n, seed) for seed, n in enumerate(N_OBS)]
    for i, adata in enumerate(adatas):
        write_sharded(group, adata, n_obs_per_chunk=16, shard_size=64, key=f"dataset_{i}")
    group.update_attributes({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    return path, [path / f"dataset_{i}" for i in range(len(N_OBS))], adatas


@pytest.fixture
def collection(stores):
    return stores[0]


def rows_of(batches):
    return np.concatenate([np.asarray(batch["index"]) for batch in batches])


def check_values(batches, adatas):
    X, obs = sp.vstack([a.X for a in adatas]).toarray(), pd.concat([a.obs for a in adatas])
    for batch in batches:
        rows = np.asarray(batch["index"])
        assert batch["X"].layout is torch.sparse_csr
        np.testing.assert_array_equal(batch["X"].to_dense().numpy(), X[rows])
        assert batch["obs"].index.tolist() == obs.index[rows].tolist()
        assert batch["obs"]["age"].tolist() == obs["age"].to_numpy()[rows].tolist()


class Recorder(pl.LightningModule):
    """A linear model that notes the rows of each step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(N_VAR, 1)
        self.seen = {"train": [], "val": [], "test": []}

    def loss(self, batch, stage):
        self.seen[stage].append(np.asarray(batch["index"]))
        return self.layer(batch["X"].to_dense()).square().mean()

    def training_step(self, batch, _):
        return self.loss(batch, "train")

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch, "val"), batch_size=len(batch["index"]))

    def test_step(self, batch, _):
        self.log("test_loss", self.loss(batch, "test"), batch_size=len(batch["index"]))

    def predict_step(self, batch, _):
        return torch.as_tensor(np.asarray(batch["index"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def trainer(path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {} if "callbacks" in options else {"enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(accelerator="cpu", default_root_dir=path, **{**quiet, **checkpoints, **options})


# ------------------------------------------------------------------------------------------------- rows of the stages


@pytest.mark.parametrize("unit", ["block", "row", "contiguous"])
def test_every_row_of_a_split_once_and_none_of_another(stores, unit):
    data = AnnbatchDataModule(stores[0], split=(0.7, 0.2, 0.1), split_unit=unit, **SIZES)
    data.setup()
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    seen = []
    for name, loader in loaders.items():
        batches = list(loader)
        assert len(batches) == len(loader)
        check_values(batches, stores[2])
        rows = rows_of(batches)
        assert np.sort(rows).tolist() == data.rows(name).tolist()
        assert (rows.tolist() == sorted(rows)) == (name != "train")
        seen.append(rows)
    assert [rows.size for rows in seen] == [280, 80, 40]
    assert np.sort(np.concatenate(seen)).tolist() == list(range(N_ALL))
    assert rows_of(data.predict_dataloader()).tolist() == list(range(N_ALL))
    data.teardown()


def test_contiguous_splits_use_the_native_samplers(collection):
    data = AnnbatchDataModule(collection, split=(0.5, 0.5), split_unit="contiguous", **SIZES)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert type(data.loader("train").batch_sampler) is RandomSampler
    assert type(data.loader("val").batch_sampler) is SequentialSampler
    data.teardown()


@pytest.mark.parametrize("unit", ["block", "contiguous"])
def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides(collection, unit):
    def epochs(seed):
        data = AnnbatchDataModule(collection, split=(0.9, 0.1), split_unit=unit, seed=seed, **SIZES)
        loader = data.train_dataloader()
        return [rows_of(loader).tolist() for _ in range(3)]

    first = epochs(0)
    assert first == epochs(0)
    assert first[0] != first[1] != first[2] != first[0]
    assert first[0] != epochs(1)[0]


def test_no_donor_in_two_splits(stores):
    data = AnnbatchDataModule(stores[0], split=(0.6, 0.2, 0.2), split_by="donor", obs_columns=["age"], seed=3, **SIZES)
    donors = pd.concat([a.obs["donor"] for a in stores[2]]).to_numpy()
    sets = [set(donors[data.rows(name)]) for name in ("train", "val", "test")]
    assert sum(map(len, sets)) == 8
    assert set.union(*sets) == set("abcdefgh")
    assert list(next(iter(data.test_dataloader()))["obs"].columns) == ["age"]
    parts = AnnbatchDataModule(
        stores[1], split=(0.6, 0.2, 0.2), split_by="donor", obs_columns=["age"], seed=3, **SIZES
    )  # fmt: skip
    assert [parts.rows(name).tolist() for name in ("train", "val")] == [data.rows(n).tolist() for n in ("train", "val")]
    assert list(next(iter(parts.val_dataloader()))["obs"].columns) == ["age"]
    named = AnnbatchDataModule(stores[0], split={"train": ["a", "b"], "val": ["c"]}, split_by="donor", **SIZES)
    assert set(donors[rows_of(named.train_dataloader())]) == {"a", "b"}
    assert set(donors[rows_of(named.val_dataloader())]) == {"c"}


def test_masks(collection):
    mask = np.random.default_rng(0).random(N_ALL) < 0.5
    data = AnnbatchDataModule(collection, split={"train": mask, "val": ~mask, "predict": [3, 399, 4]}, **SIZES)
    assert np.sort(rows_of(data.train_dataloader())).tolist() == np.flatnonzero(mask).tolist()
    assert rows_of(data.val_dataloader()).tolist() == np.flatnonzero(~mask).tolist()
    assert rows_of(data.predict_dataloader()).tolist() == [3, 4, 399]
    with pytest.raises(ValueError, match="splits 'train' and 'val' share rows, the first of which is"):
        AnnbatchDataModule(collection, split={"train": mask, "val": mask}, **SIZES).setup()


# ------------------------------------------------------------------------------------------------ sources and options


def test_sources_of_every_kind(stores):
    path, parts, adatas = stores
    group = zarr.open_group(path, mode="r")
    for source in (
        path, str(path), group, DatasetCollection(path, mode="r"), parts, [group["dataset_0"], parts[1]], adatas,
        Loader(to="torch", return_index=True).add_adatas(adatas),
    ):  # fmt: skip
        options = {k: v for k, v in SIZES.items() if not (isinstance(source, Loader) and k == "return_index")}
        data = AnnbatchDataModule(source, split=(0.5, 0.5), **options)
        data.prepare_data()
        batches = list(data.train_dataloader()) + list(data.val_dataloader())
        check_values(batches, adatas)
        assert np.sort(rows_of(batches)).tolist() == list(range(N_ALL))
        data.teardown()


def test_a_source_for_each_stage(stores):
    _, parts, adatas = stores
    data = AnnbatchDataModule(train=parts[0], val=adatas[1], **SIZES)
    assert np.sort(rows_of(data.train_dataloader())).tolist() == list(range(N_OBS[0]))
    assert rows_of(data.val_dataloader()).tolist() == list(range(N_OBS[1]))
    assert data.rows("val").tolist() == list(range(N_OBS[1]))
    with pytest.raises(ValueError, match="there is no 'test' split"):
        data.test_dataloader()


def test_ready_loaders_keep_their_order(stores):
    _, _, adatas = stores
    sampler = RandomSampler(5, 8, 20, mask=slice(10, 110), rng=np.random.default_rng(5))
    ready = Loader(batch_sampler=sampler, to="torch", return_index=True).add_adatas(adatas)
    data = AnnbatchDataModule(train=ready)
    seen = rows_of(data.train_dataloader())
    assert np.sort(seen).tolist() == list(range(10, 110))
    sampler.rng = np.random.default_rng(5)  # copies of a loader draw from the one sampler
    assert rows_of(ready).tolist() == seen.tolist()
    data.teardown()
    assert rows_of(ready).size == 100  # the caller's own loader is not closed


def test_ready_loaders_are_shared_between_ranks_within_their_mask(stores):
    sampler = RandomSampler(5, 8, 20, mask=slice(10, 130))
    ready = Loader(batch_sampler=sampler, to="torch", return_index=True).add_adatas(stores[2])
    val = Loader(chunk_size=5, preload_nchunks=8, batch_size=20, to="torch", return_index=True).add_adatas(stores[2])
    ranks = [AnnbatchDataModule(train=ready, val=val, dist_info=lambda rank=rank: (rank, 3)) for rank in range(3)]
    train = [rows_of(data.train_dataloader()) for data in ranks]
    assert np.sort(np.concatenate(train)).tolist() == list(range(10, 130))
    lengths = {len(data.val_dataloader()) for data in ranks}
    assert len(lengths) == 1
    assert np.concatenate([rows_of(data.val_dataloader()) for data in ranks]).tolist() == list(range(N_ALL))


def test_options_reach_the_loader(stores):
    data = AnnbatchDataModule(
        stores[0],
        split=(0.8, 0.2),
        layers=["counts"],
        obsm=["pca"],
        obs_columns=["age"],
        stage_options={"val": {"batch_size": 40, "obsm": []}},
        **SIZES,
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["X"].shape == (20, N_VAR)
    np.testing.assert_allclose(batch["layers"]["counts"].to_dense(), batch["X"].to_dense() * 7, rtol=1e-6)
    pca = np.concatenate([a.obsm["pca"] for a in stores[2]])
    np.testing.assert_array_equal(batch["obsm"]["pca"], pca[np.asarray(batch["index"])])
    batch = next(iter(data.val_dataloader()))
    assert batch["X"].shape == (40, N_VAR)
    assert not batch.get("obsm")
    assert sp.issparse(next(iter(AnnbatchDataModule(stores[0], to=None, **SIZES).train_dataloader()))["X"])
    data.teardown()


def test_drop_last_is_for_training_unless_told(collection):
    data = AnnbatchDataModule(collection, split=(0.7625, 0.2375), drop_last=True, **SIZES)
    assert [rows_of(loader()).size for loader in (data.train_dataloader, data.val_dataloader)] == [300, 95]
    told = AnnbatchDataModule(
        collection, split=(0.7625, 0.2375), stage_options={"val": {"drop_last": True, "shuffle": True}}, **SIZES
    )
    assert [rows_of(loader()).size for loader in (told.train_dataloader, told.val_dataloader)] == [305, 80]


def test_arguments_that_contradict_each_other(stores):
    path, _, adatas = stores
    ready = Loader(to="torch").add_adatas(adatas)
    for keywords, message in [
        ({}, "needs data"),
        ({"train": path, "split": (0.5, 0.5)}, "split and split_by divide data"),
        ({"data": path, "split": {"val": 0.5}, "val": path}, "'val' is given both"),
        ({"data": path, "rng": 3}, "rng cannot be passed to AnnbatchDataModule: the order comes from seed"),
        ({"data": path, "batch_sampler": 3}, "batch_sampler cannot be passed"),
        ({"data": path, "stage_options": {"valid": {}}}, "no stage 'valid'"),
        ({"train": ready, "stage_options": {"train": {"batch_size": 2}}}, "controlled by the ready Loader"),
        ({"data": ready, "to": "torch"}, "controlled by the Loader passed as data"),
    ]:
        with pytest.raises(ValueError, match=message):
            AnnbatchDataModule(**keywords)
    with pytest.raises(TypeError, match="no_such_option"):
        AnnbatchDataModule(path, no_such_option=1).setup()
    with pytest.raises(KeyError, match="no_such_column"):
        AnnbatchDataModule(path, split=(0.5, 0.5), split_by="no_such_column").setup()


def test_stores_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no store at .*nowhere.zarr"):
        AnnbatchDataModule(tmp_path / "nowhere.zarr").prepare_data()
    (tmp_path / "cells.h5ad").touch()
    with pytest.raises(OSError, match=r"cells\.h5ad cannot be opened as HDF5"):
        AnnbatchDataModule(tmp_path / "cells.h5ad").setup()


def test_h5ad_files_are_split_as_stores_are(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (60, 7)).astype(np.float32)
    obs = pd.DataFrame({"donor": np.repeat(list("abcdef"), 10)}, index=[f"cell{k}" for k in range(60)])
    ad.AnnData(sp.csr_matrix(x), obs=obs).write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    data = AnnbatchDataModule(
        tmp_path / "cells.h5ad",
        split=(0.5, 0.5),
        split_by="donor",
        batch_size=5,
        chunk_size=5,
        preload_nchunks=2,
        return_index=True,
    )
    data.setup()
    parts = []
    for batches in (data.train_dataloader(), data.val_dataloader()):
        rows = np.concatenate([batch["index"] for batch in batches])
        for batch in batches:
            np.testing.assert_array_equal(batch["X"].to_dense(), x[batch["index"]])
        parts.append(set(rows.tolist()))
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(60))
    assert not {obs["donor"].iloc[row] for row in parts[0]} & {obs["donor"].iloc[row] for row in parts[1]}


# --------------------------------------------------------------------------------------------------------- the Trainer


def test_trainer_fits_validates_tests_and_predicts(collection, tmp_path):
    data = AnnbatchDataModule(collection, split=(0.7, 0.2, 0.1), **SIZES)
    model = Recorder()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, datamodule=data)
    assert len(model.seen["train"]) == 2 * 14
    epochs = [np.concatenate(model.seen["train"][i * 14 : (i + 1) * 14]) for i in range(2)]
    assert all(np.sort(epoch).tolist() == data.rows("train").tolist() for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    model.seen["val"].clear()
    run.validate(model, datamodule=data, verbose=False)
    assert np.concatenate(model.seen["val"]).tolist() == data.rows("val").tolist()
    run.test(model, datamodule=data, verbose=False)
    assert np.concatenate(model.seen["test"]).tolist() == data.rows("test").tolist()
    assert torch.cat(run.predict(model, datamodule=data)).tolist() == list(range(N_ALL))


def test_trainer_fits_without_a_validation_split(collection, tmp_path):
    model = Recorder()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, datamodule=AnnbatchDataModule(collection, **SIZES))
    assert np.sort(np.concatenate(model.seen["train"])).tolist() == list(range(N_ALL))
    with pytest.raises(ValueError, match="there is no 'val' split"):
        run.validate(model, datamodule=AnnbatchDataModule(collection, **SIZES), verbose=False)


def test_stores_are_closed_after_training_and_after_a_failure(collection, tmp_path):
    data = AnnbatchDataModule(collection, split=(0.5, 0.5), **SIZES)
    trainer(tmp_path, max_epochs=1).fit(Recorder(), datamodule=data)
    assert data._loaders == {} == data._bases

    class Fails(Recorder):
        def training_step(self, batch, number):
            if number == 3:
                raise RuntimeError("out of ideas")
            return super().training_step(batch, number)

    with pytest.raises(RuntimeError, match="out of ideas"):
        trainer(tmp_path, max_epochs=1).fit(Fails(), datamodule=data)
    assert data._loaders == {}
    assert rows_of(data.val_dataloader()).size == 200


@pytest.mark.parametrize("unit", ["block", "contiguous"])
def test_a_resumed_run_continues_with_the_next_epoch(collection, tmp_path, unit):
    def make():
        return Recorder(), AnnbatchDataModule(collection, split=(0.7, 0.3), split_unit=unit, seed=7, **SIZES)

    whole, data = make()
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=data)

    begun, data = make()
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1)
    trainer(tmp_path, max_epochs=2, callbacks=[saver]).fit(begun, datamodule=data)
    resumed, data = make()
    data._seed = 1  # a seed forgotten on resuming: the checkpoint's is used, for order and split
    trainer(tmp_path, max_epochs=3).fit(resumed, datamodule=data, ckpt_path=saver.best_model_path)
    assert [r.tolist() for r in begun.seen["train"] + resumed.seen["train"]] == [
        r.tolist() for r in whole.seen["train"]
    ]


def test_state_is_the_running_epoch_until_its_last_batch(collection):
    def make():
        return AnnbatchDataModule(collection, split=(0.7, 0.3), seed=7, **SIZES)

    data = make()
    loader = data.train_dataloader()
    running = iter(loader)
    assert data.state_dict()["epoch"] == 0
    first = [next(running)["index"].tolist() for _ in range(5)]
    assert data.state_dict()["epoch"] == 0
    resumed = make()
    resumed.load_state_dict(data.state_dict())
    assert [b["index"].tolist() for b in resumed.train_dataloader()][:5] == first
    for _ in range(len(loader) - 5):
        next(running)
    assert data.state_dict()["epoch"] == 1  # though the generator has not been asked for its end
    stopped = iter(loader)
    next(stopped)
    assert data.state_dict()["epoch"] == 1
    stopped.close()
    assert data.state_dict()["epoch"] == 2  # given up by the consumer, who should not see its batches again


def test_another_split_than_the_checkpoint_is_warned_about(collection):
    state = AnnbatchDataModule(collection, split=(0.7, 0.3), **SIZES).state_dict()
    other = AnnbatchDataModule(collection, split=(0.5, 0.5), **SIZES)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match="rows that were trained on may now be in another split"):
        other.train_dataloader()
    same = AnnbatchDataModule(collection, split=(0.7, 0.3), **SIZES)
    same.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*in another split")
        same.train_dataloader()


def test_batches_move_to_a_device_with_their_csr_tensors(collection):
    data = AnnbatchDataModule(collection, obsm=["pca"], obs="codes", obs_columns=["donor"], **SIZES)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["X"].device.type == "meta"
    assert moved["X"].layout is torch.sparse_csr
    assert moved["obsm"]["pca"].device.type == "meta"
    assert moved["obs"]["donor"].device.type == "meta"
    assert batch["X"].device.type == "cpu"
    assert list(moved) == list(batch)
    kept = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    torch.testing.assert_close(kept["X"].to_dense(), batch["X"].to_dense())


def test_moving_a_batch_does_not_make_its_obs(collection):
    data = AnnbatchDataModule(collection, **SIZES)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert batch._make_obs is not None
    assert moved["obs"].index.tolist() == batch["obs"].index.tolist()


def test_split_loader_says_so_when_batches_are_missing(collection):
    loader = AnnbatchDataModule(collection, **SIZES).train_dataloader()
    assert isinstance(loader, SplitLoader)
    loader._n_batches += 1
    with pytest.raises(RuntimeError, match="ended after fewer than 21 batches"):
        list(loader)


def test_a_split_loader_is_not_to_be_wrapped_in_a_dataloader(collection):
    module = AnnbatchDataModule(collection, split=(0.8, 0.2), **SIZES)
    for batch_size in (None, 1, 4):
        with pytest.raises(TypeError, match=r"data loader already.*batch_size=None"):
            next(iter(torch.utils.data.DataLoader(module.train_dataloader(), batch_size=batch_size)))


# ------------------------------------------------------------------------------------------------- several processes


def test_three_ranks_share_every_split(collection):
    def rank_data(rank, **options):
        return AnnbatchDataModule(
            collection, split=(0.7, 0.3), dist_info=lambda: (rank, 3), **{**SIZES, **options}
        )  # fmt: skip

    for options, n_train in ({}, 240), ({"drop_last": False}, 280):
        ranks = [rank_data(rank, **options) for rank in range(3)]
        train = [list(data.train_dataloader()) for data in ranks]
        assert len({len(batches) for batches in train}) == 1
        seen = np.concatenate([rows_of(batches) for batches in train])
        assert seen.size == n_train == np.unique(seen).size
        assert np.isin(seen, ranks[0].rows("train")).all()
        val = [list(data.val_dataloader()) for data in ranks]
        assert len({len(batches) for batches in val}) == 1
        assert np.concatenate([rows_of(b) for b in val]).tolist() == ranks[0].rows("val").tolist()


DDP_SCRIPT = """
import json, sys
import numpy as np
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_lightning import Recorder, SIZES, trainer
from annbatch.lightning import AnnbatchDataModule

torch.set_num_threads(1)
collection, out = Path(sys.argv[1]), Path(sys.argv[2])
data = AnnbatchDataModule(collection, split={"train": 0.7, "val": 0.2025, "test": 0.0975}, **SIZES)
model = Recorder()
run = trainer(out, max_epochs=2, devices=2, strategy="ddp")
run.fit(model, datamodule=data)
weights = model.layer.weight.detach().sum().item()
assert run.world_size == 2 and torch.distributed.get_backend() == "gloo"
run.test(model, datamodule=data, verbose=False)
predictions = run.predict(model, datamodule=data)
seen = {stage: [rows.tolist() for rows in batches] for stage, batches in model.seen.items()}
seen["predict"] = [rows.tolist() for rows in predictions]
seen["weights"] = weights
(out / f"rank{run.global_rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_ddp_over_gloo_on_two_processes(collection, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(DDP_SCRIPT))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, collection, tmp_path, here],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ranks read the same rows" not in done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    data = AnnbatchDataModule(collection, split={"train": 0.7, "val": 0.2025, "test": 0.0975}, **SIZES)
    assert ranks[0]["weights"] == pytest.approx(ranks[1]["weights"])  # both took part in the same steps

    # training: full batches only, none shared between ranks within an epoch, nothing from outside the split
    assert [len(rank["train"]) for rank in ranks] == [14, 14]
    for epoch in range(2):
        rows = np.concatenate([np.concatenate(rank["train"][7 * epoch : 7 * epoch + 7]) for rank in ranks])
        assert rows.size == 280 == np.unique(rows).size
        assert np.isin(rows, data.rows("train")).all()
    # the first two validation batches of a rank are Lightning's sanity check
    for stage, skip, n_batches in ("val", 2, 2 * 3), ("test", 0, 1):
        batches = [rank[stage][skip:] for rank in ranks]
        assert [len(b) for b in batches] == [n_batches] * 2, stage
        last_pass = [row for b in batches for batch in b[-n_batches // 2 :] for row in batch]
        assert last_pass == data.rows(stage).tolist(), stage
    assert [row for rank in ranks for batch in rank["predict"] for row in batch] == list(range(N_ALL))


# -------------------------------------------------------------------------------------------- which Lightning package


def test_without_lightning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match=r"needs Lightning: pip install 'annbatch\[lightning\]'"):
        annbatch.lightning._lightning_base()


def test_either_package_may_provide_the_base_class(monkeypatch):
    other = pytest.importorskip("pytorch_lightning")
    with monkeypatch.context() as imported_alone:
        imported_alone.delitem(sys.modules, "lightning.pytorch")
        assert annbatch.lightning._lightning_base() is other.LightningDataModule
    with monkeypatch.context() as installed_alone:
        installed_alone.setitem(sys.modules, "lightning.pytorch", None)
        assert annbatch.lightning._lightning_base() is other.LightningDataModule
    assert issubclass(AnnbatchDataModule, pl.LightningDataModule)
