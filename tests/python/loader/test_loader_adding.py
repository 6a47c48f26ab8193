"""What a loader takes and refuses; copies and pickles of it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from scipy import sparse as sp
from torch.utils.data import IterableDataset

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch.samplers import RandomSampler, SequentialSampler
from support.cells import N_VAR, SIZES, Cells, check_epoch, in_memory_store, loader_over, make_adata, write

WITHOUT_GPU = importlib.util.find_spec("cupy") is None and not torch.cuda.is_available()


# ---------------------------------------------------------------- arguments


def test_class():
    assert issubclass(Loader, IterableDataset)
    assert Loader[ad.abc.CSRDataset, torch.Tensor].__origin__ is Loader
    assert Loader._COMMON_SAMPLER_ARGS == {
        "chunk_size": 512,
        "preload_nchunks": 32,
        "batch_size": 1,
        "drop_last": False,
    }


def test_signature_begins_as_in_scverse_annbatch():
    parameters = list(inspect.signature(Loader).parameters.values())
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert list(defaults.items())[:10] == [
        ("batch_sampler", None),
        ("chunk_size", None),
        ("preload_nchunks", None),
        ("shuffle", None),
        ("return_index", False),
        ("batch_size", None),
        ("preload_to_gpu", importlib.util.find_spec("cupy") is not None),
        ("drop_last", None),
        ("to", None),
        ("rng", None),
    ]


def test_default_samplers():
    sampler = Loader().batch_sampler
    assert type(sampler) is SequentialSampler
    assert (sampler.batch_size, sampler._chunk_size, sampler._preload_nchunks, sampler._drop_last) == (
        1,
        512,
        32,
        False,
    )
    rng = np.random.default_rng(0)
    sampler = Loader(shuffle=True, rng=rng).batch_sampler
    assert type(sampler) is RandomSampler
    assert sampler.rng is rng


def test_a_sampler_excludes_its_arguments():
    sampler = SequentialSampler(**SIZES)
    with pytest.raises(
        ValueError, match="Cannot specify chunk_size, drop_last, shuffle when providing a custom sampler"
    ):
        Loader(batch_sampler=sampler, chunk_size=4, drop_last=False, shuffle=False)
    assert Loader(batch_sampler=sampler).batch_sampler is sampler


@pytest.mark.parametrize(
    "arguments", [{"to": "numpy"}, {"obs": "table"}, {"layers": ["a", "a"]}, {"batch_size": 7, "chunk_size": 2}]
)
def test_wrong_values_are_refused(arguments: dict):
    with pytest.raises(ValueError):
        Loader(**arguments)


def test_names_must_be_lists():
    with pytest.raises(TypeError, match="obs_columns must be a list"):
        Loader(obs_columns="cell_type")


@pytest.mark.skipif(not WITHOUT_GPU, reason="cupy or a CUDA device is there")
@pytest.mark.parametrize("to", [None, "torch"])
def test_gpu_needs_cupy(to: str | None):
    with pytest.raises(ImportError, match="Could not find cupy dependency"):
        Loader(preload_to_gpu=True, to=to)


@pytest.mark.skipif(importlib.util.find_spec("jax") is not None, reason="jax is there")
def test_jax_needs_jax():
    with pytest.raises(ImportError, match="Could not find jax dependency"):
        Loader(to="jax")


def test_to_torch_is_deprecated(cells: Cells):
    with pytest.warns(DeprecationWarning, match="to_torch") as caught:
        loader = Loader(**SIZES, to_torch=True).add_adatas(cells.without_extras())
    assert caught[0].filename.endswith("test_loader_adding.py")
    assert next(iter(loader))["X"].layout == torch.sparse_csr
    with pytest.warns(DeprecationWarning):
        assert sp.issparse(next(iter(loader_over(cells, to_torch=False)))["X"])
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="contradicts"):
        Loader(to_torch=True, to="jax")


# ---------------------------------------------------------------- what is in a loader


def test_counts(cells: Cells):
    loader = Loader(**SIZES)
    assert loader.n_obs == 0
    assert loader.var is None
    with pytest.raises(ValueError, match="No datasets added yet"):
        _ = loader.n_var
    assert loader.add_adatas(cells.without_extras()) is loader
    assert (loader.n_obs, loader.n_var, len(loader)) == (121, N_VAR, 13)
    assert issubclass(loader.dataset_type, ad.abc.CSRDataset)
    assert [len(obs) for obs in loader._obs] == [37, 20, 64]
    pd.testing.assert_frame_equal(loader.var, cells.adatas[0].var)


def test_dataset_type_is_the_real_class():
    array = np.ones((3, 2))
    assert Loader(batch_size=1).add_dataset(array).dataset_type is np.ndarray
    assert Loader(batch_size=1).add_dataset(sp.csr_array(array)).dataset_type is sp.csr_array


def test_nothing_to_iterate():
    with pytest.raises(ValueError, match="Number of datasets must be greater than 1, got 0"):
        next(iter(Loader(batch_size=1)))
    with pytest.raises(ValueError, match="Number of observations must be greater than 1, got 0"):
        next(iter(Loader(batch_size=1).add_dataset(np.ones((0, 2)))))
    with pytest.raises(ValueError, match="Number of adatas must be greater than 1, got 0"):
        Loader(batch_size=1).add_adatas([])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_files_without_rows_are_named_if_there_are_no_others(tmp_path, suffix: str, shuffle: bool):
    paths = []
    for k, n_obs in enumerate([0, 0, 6]):
        X = sp.csr_matrix(np.ones((n_obs, 2), dtype="float32"))
        adata = ad.AnnData(X, obs=pd.DataFrame(index=[f"{k}-{i}" for i in range(n_obs)]))
        paths.append(tmp_path / f"{k}.{suffix}")
        adata.write_h5ad(paths[-1]) if suffix == "h5ad" else adata.write_zarr(paths[-1])
    sizes = {"chunk_size": 2, "preload_nchunks": 2, "batch_size": 2, "shuffle": shuffle, "return_index": True}
    loader = annbatch.open(paths[:2], **sizes)
    for ask in (len, lambda loader: next(iter(loader))):
        with pytest.raises(
            ValueError, match=rf"observations.*got 0: there are no rows in .*0\.{suffix}.*, .*1\.{suffix}.*Add data"
        ):
            ask(loader)
    rows = [row for batch in annbatch.open(paths, **sizes) for row in batch["index"]]
    assert sorted(rows) == list(range(6))


# ---------------------------------------------------------------- adding


def test_datasets_must_fit(cells: Cells):
    first = cells.without_extras()[0]
    frame = pd.DataFrame({"a": [1, 2, 3]})
    var = pd.DataFrame({"b": range(2)})
    array = np.ones((3, 2))

    def loader(**kwargs) -> Loader:
        return Loader(batch_size=1).add_dataset(array, **kwargs)

    with pytest.raises(ValueError, match="Cannot add a dataset with obs label"):
        loader().add_dataset(array, obs=frame)
    with pytest.raises(ValueError, match="Cannot add a dataset with no obs label"):
        loader(obs=frame).add_dataset(array)
    with pytest.raises(ValueError, match="Cannot add a dataset with var when"):
        loader().add_dataset(array, var=var)
    with pytest.raises(ValueError, match="Cannot add a dataset without var when"):
        loader(var=var).add_dataset(array)
    with pytest.raises(ValueError, match="All datasets on a given loader must be of the same type"):
        loader().add_dataset(first.X)
    with pytest.raises(ValueError, match="All datasets must have same shape along the var axis"):
        loader().add_dataset(np.ones((3, 4)))
    with pytest.raises(ValueError, match="All datasets must have identical var DataFrames"):
        loader(var=var).add_dataset(array, var=var + 1)
    with pytest.raises(ValueError, match="obs has 3 rows but the dataset has 4"):
        loader(obs=frame).add_dataset(np.ones((4, 2)), obs=frame)
    with pytest.raises(TypeError, match="obs must be a pandas DataFrame"):
        Loader(batch_size=1).add_dataset(array, obs={"a": [1, 2, 3]})
    with pytest.raises(TypeError, match="var must be a pandas DataFrame"):
        Loader(batch_size=1).add_dataset(array, var=[1, 2])


def test_a_refused_dataset_changes_nothing(cells: Cells):
    loader = loader_over(cells)
    good = cells.without_extras()[0]
    bad = ad.AnnData(sp.csr_matrix((5, N_VAR)), obs=good.obs[:5], var=good.var)
    with pytest.raises((ValueError, TypeError)):
        loader.add_adatas([good, bad])
    with pytest.raises((ValueError, TypeError)):
        loader.add_datasets([good.X, np.ones((2, 2))], obs=[good.obs, good.obs[:2]])
    assert loader.n_obs == cells.n_obs
    check_epoch(list(loader), cells)


def test_unreadable_types_are_refused(tmp_path, cells: Cells):
    loader = Loader(batch_size=1)
    adata = cells.adatas[0]
    for matrix in (sp.csc_matrix(adata.X), sp.coo_matrix(adata.X), adata.X.toarray().tolist(), pd.DataFrame([[1]])):
        with pytest.raises(TypeError, match="Cannot add dataset of type"):
            loader.add_dataset(matrix)
    with pytest.raises(TypeError, match="tocsr"):
        loader.add_dataset(sp.csc_matrix(adata.X))
    with pytest.raises(TypeError, match=r"Found <class .* but only .*csr_matrix.* are usable"):
        loader.add_adata(ad.AnnData(sp.csc_matrix(adata.X)))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad") as file:
        with pytest.raises(TypeError, match="Cannot add CSRDataset backed by h5ad"):
            loader.add_dataset(ad.io.sparse_dataset(file["X"]))
        with pytest.raises(TypeError, match="Cannot add dataset of type"):
            loader.add_dataset(file["obsm/pca"])
    with pytest.raises(ValueError, match="at least one more"):
        loader.add_dataset(np.ones(3))


def test_other_stores_are_refused(tmp_path, cells: Cells):
    store = zarr.storage.ZipStore(tmp_path / "cells.zip", mode="w")
    root = zarr.open_group(store, mode="w")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.io.write_elem(root, "X", cells.adatas[0].X)
    with pytest.raises(TypeError, match="kept in a ZipStore: annbatch reads local directories"):
        Loader(batch_size=1).add_dataset(ad.io.sparse_dataset(root["X"]))
    store.close()


def test_relative_paths_stay_valid(cells: Cells, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.chdir(cells.paths[0].parent)
    matrix = ad.io.sparse_dataset(zarr.open_group("0.zarr", mode="r")["X"])
    loader = Loader(**SIZES, return_index=True).add_dataset(matrix)
    monkeypatch.chdir(tmp_path)
    for batch in loader:
        np.testing.assert_array_equal(batch["X"].toarray(), cells.dense()[batch["index"]])


def test_ignored_elements_are_named_once(cells: Cells):
    message = r"Only `X`, `obs`, and `var` are kept.*\['layers/doubled', 'obsm/pca', 'obsm/spots'\]"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loader(**SIZES).add_adatas(cells.backed())
        Loader(**SIZES).add_adata(cells.backed()[0])
    caught = [warning for warning in caught if warning.category is FutureWarning]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match=message):
        Loader(**SIZES).add_adata(cells.backed()[0])
    with pytest.warns(FutureWarning, match=r"ignored: \['obsm/pca'\]"):
        Loader(**SIZES, layers=["doubled"], obsm=["spots"]).add_adata(cells.backed()[0])


def test_promotion_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = Loader(batch_size=1).add_dataset(np.ones((3, 2), dtype="int32"))
        assert not caught
        loader.add_datasets([np.ones((3, 2), dtype="float32")] * 3)
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__
    assert "first dataset: dtype('int32')" in str(caught[0].message)


def test_missing_elements_are_named(cells: Cells):
    with pytest.raises(KeyError, match="layers/raw"), pytest.warns(FutureWarning):
        Loader(**SIZES, layers=["raw"], obsm=["pca", "spots"]).add_adatas(cells.backed())
    with pytest.raises(ValueError, match=r"also yields \['layers/doubled'\]"):
        Loader(**SIZES, layers=["doubled"]).add_dataset(cells.backed()[0].X)
    adata = cells.adatas[0].copy()
    adata.obsm["frame"] = pd.DataFrame({"a": np.arange(adata.n_obs)}, index=adata.obs_names)
    with pytest.raises(TypeError, match="Cannot add dataset of type"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loader(**SIZES, obsm=["frame"]).add_adata(adata)


# ---------------------------------------------------------------- passes lock adding


def test_adding_during_a_pass(cells: Cells):
    loader = loader_over(cells)
    more = cells.without_extras()[0]
    batches = iter(loader)
    loader.add_adata(more)  # nothing has been asked for yet
    next(batches)
    for add in (lambda: loader.add_adata(more), lambda: loader.add_dataset(more.X, more.obs, more.var)):
        with pytest.raises(RuntimeError, match="Cannot add datasets while the loader is being iterated"):
            add()
    other = iter(loader)
    next(other)
    batches.close()
    with pytest.raises(RuntimeError, match="being iterated"):
        loader.add_adata(more)
    other.close()
    loader.add_adata(more)
    assert inspect.isgenerator(batches)


def test_a_failed_pass_unlocks(cells: Cells):
    sampler = SequentialSampler(**SIZES, mask=slice(0, 1000))
    loader = Loader(batch_sampler=sampler).add_adatas(cells.without_extras())
    batches = iter(loader)  # checked when the first batch is asked for
    with pytest.raises(ValueError, match=r"mask.stop \(1000\) exceeds loader n_obs \(121\)"):
        next(batches)
    loader.add_adata(cells.without_extras()[0])


# ---------------------------------------------------------------- collections


@pytest.fixture(scope="module")
def collection(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> DatasetCollection:
    collection = DatasetCollection(tmp_path_factory.mktemp("collection") / "cells.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection.add_adatas(
            cells.paths,
            dataset_size=50,
            shuffle_chunk_size=10,
            n_obs_per_chunk=8,
            shard_size=16,
            rng=np.random.default_rng(0),
        )
    return collection


def test_use_collection(collection: DatasetCollection, cells: Cells):
    loader = Loader(**SIZES, shuffle=True, return_index=True)
    with pytest.warns(FutureWarning, match="Only `X`"):
        assert loader.use_collection(collection) is loader
    assert loader.n_obs == cells.n_obs
    dense, names = cells.dense(), list(cells.obs.index)
    seen = []
    for batch in loader:
        rows = [names.index(name) for name in batch["obs"].index]
        np.testing.assert_array_equal(batch["X"].toarray(), dense[rows])
        seen += rows
    assert sorted(seen) == list(range(cells.n_obs))
    with pytest.raises(RuntimeError, match="You should not add multiple collections"):
        loader.use_collection(collection)


def test_use_collection_reads_only_the_obs_columns_asked_for(collection: DatasetCollection, cells: Cells, monkeypatch):
    read = []
    plain = ad.io.read_elem
    monkeypatch.setattr(ad.io, "read_elem", lambda element: (read.append(element.name), plain(element))[1])
    loader = Loader(**SIZES, obs_columns=["depth"], layers=["doubled"], obsm=["pca", "spots"])
    loader.use_collection(collection)
    columns = {name.partition("/obs/")[2] for name in read if "/obs" in name}
    assert "depth" in columns
    assert columns.isdisjoint({"cell_type", "donor", "score", ""})
    for batch in loader:
        expected = cells.obs.loc[batch["obs"].index, ["depth"]]
        pd.testing.assert_frame_equal(batch["obs"], expected, check_names=False)
    with pytest.raises(KeyError, match="mood"):
        Loader(**SIZES, obs_columns=["mood"]).use_collection(collection)


def test_use_collection_with_a_loading_function(collection: DatasetCollection):
    def load(group: zarr.Group) -> ad.AnnData:
        return ad.AnnData(X=ad.io.sparse_dataset(group["layers/doubled"]))

    loader = Loader(**SIZES).use_collection(collection, load_adata=load)
    assert next(iter(loader))["obs"] is None


def test_empty_collection(tmp_path):
    with pytest.raises(ValueError, match="DatasetCollection is empty"):
        Loader(**SIZES).use_collection(DatasetCollection(tmp_path / "none.zarr"))


# ---------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_twins_go_their_own_way(cells: Cells, twin_of):
    loader = loader_over(cells, shuffle=True)
    batches = iter(loader)
    first = next(batches)
    twin = twin_of(loader)  # in the middle of a pass
    twin.add_adata(cells.without_extras()[0])
    assert (loader.n_obs, twin.n_obs) == (121, 158)
    assert (len(loader._obs), len(twin._obs)) == (3, 4)
    twin._batch_sampler = SequentialSampler(**SIZES, mask=slice(0, 121))
    check_epoch(list(twin), cells)
    check_epoch([first, *batches], cells)
    twin.close()
    check_epoch(list(loader), cells)


def test_a_copy_of_a_copy_shares_what_is_open(cells: Cells):
    loader = loader_over(cells)
    next(iter(loader))
    twin = copy.copy(loader)
    assert twin._collection() is loader._collection()
    loader.close()
    check_epoch(list(twin), cells)


@pytest.mark.parametrize("dense", [False, True])
def test_pickles_of_memory(dense: bool):
    matrix = make_adata(30, 0, dense=dense).X
    root = in_memory_store(matrix)
    stored = root["X"] if dense else ad.io.sparse_dataset(root["X"])
    for dataset in (matrix, stored):
        loader = Loader(**SIZES).add_dataset(dataset)
        next(iter(loader))
        size = len(pickle.dumps(loader))
        twin = pickle.loads(pickle.dumps(loader))
        assert [len(batch["obs"] or ()) for batch in twin] == [0, 0, 0]
        assert size < 20_000  # no arrays that were only read or converted on the way
        assert next(iter(twin))["X"].shape == (10, N_VAR)


def test_a_subclass_stays_itself(cells: Cells):
    loader = copy.copy(_Named(**SIZES, name="mine", return_index=True).add_adatas(cells.without_extras()))
    assert type(loader) is _Named
    assert loader.name == "mine"
    check_epoch(list(pickle.loads(pickle.dumps(loader))), cells)


class _Named(Loader):
    def __init__(self, *, name: str, **kwargs):
        super().__init__(**kwargs)
        self.name = name


def test_cell_stores_are_what_they_seem(tmp_path):
    """The stores these tests read are not all alike: a loader that ignores the format would be found out."""
    adata = make_adata(20, 0)
    assert not (write(adata, tmp_path / "2.zarr", zarr_format=2) / "zarr.json").exists()
    assert (write(adata, tmp_path / "3.zarr") / "zarr.json").exists()
    assert sys.modules["support.cells"].__file__.endswith("cells.py")
