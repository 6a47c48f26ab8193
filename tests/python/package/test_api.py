"""The public names: those of scverse annbatch 0.3.1 with its parameters, and what importing them costs."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import typing
import warnings
from fractions import Fraction
from importlib import import_module

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from scipy import sparse as sp
from zarr.core.indexing import BasicIndexer

import annbatch
from annbatch import compat, types, utils
from support import upstream
from support.upstream_calls import parameters

# Names inside upstream's modules that nothing outside them uses.
NOT_KEPT = {"annbatch.loader:CSRDatasetElems"}


def find(name: str) -> object:
    module, _, path = name.partition(":")
    value = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", sorted(upstream.table()["signatures"]))
def test_names_and_parameters_are_those_of_upstream(name):
    if name.split(".data")[0].split(".ind")[0] in NOT_KEPT:
        with pytest.raises(AttributeError):
            find(name)
        return
    expected, got = upstream.table()["signatures"][name], parameters(find(name))
    if expected is None:
        assert got is None
        return
    assert got[: len(expected)] == expected
    assert all(kind == "KEYWORD_ONLY" and default != "required" for _, kind, default in got[len(expected) :])


def test_exports_are_those_of_upstream_and_ours():
    theirs = {name.split(":")[1] for name in upstream.table()["signatures"] if name.startswith("annbatch:")}
    assert {name for name in theirs if "." not in name} | {"nn", "transforms"} == set(annbatch.__all__)
    assert {"load", "open", "DataError", "lightning", "Loader"} <= set(dir(annbatch))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        annbatch.nothing  # noqa: B018
    assert isinstance(annbatch.__version__, str)


def test_importing_registers_the_ops_and_loads_nothing_optional():
    code = """
import sys
import anndata, torch, zarr
optional = ["jax", "cupy", "cupyx", "lightning", "pytorch_lightning", "numba", "zarrs"]
optional = [name for name in optional if name not in sys.modules]  # anndata 0.13 imports numba where it is
import annbatch
print([name for name in optional if name in sys.modules])
print(torch.ops.annbatch.load.default, "annbatch.loader" in sys.modules)
exec("from annbatch import *")
print(Loader.__name__, samplers.RandomSampler.__name__, open is __builtins__.open)
print([name for name in optional if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "annbatch.load.default False", "Loader RandomSampler True", "[]"]


# -------------------------------------------------------------------------------------------------------------- types


def test_backing_array_is_a_union_to_test_against(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3, 2), dtype="f4")
    for value in (array, np.ones(3), sp.csr_matrix((2, 2)), sp.csr_array((2, 2))):
        assert isinstance(value, types.BackingArray_T)
        assert isinstance(value, types.BackingArray_T.__value__)
    for value in (sp.csc_matrix((2, 2)), [1], torch.ones(2)):
        assert not isinstance(value, types.BackingArray_T)
        assert not isinstance(value, types.BackingArray_T.__value__)
    assert issubclass(np.ndarray, types.BackingArray_T)
    assert isinstance(torch.ones(2), types.OutputInMemoryArray_T)
    assert isinstance(None, types.BackingArray_T | None)
    assert repr(types.BackingArray_T) == types.BackingArray_T.__name__ == "BackingArray_T"


def test_unions_annotate_pickle_and_copy():
    def annotated(x: types.BackingArray_T, y: types.OutputInMemoryArray_T | None) -> types.InputInMemoryArray_T: ...

    assert typing.get_type_hints(annotated)["x"] is types.BackingArray_T
    typing.TypeVar("T", bound=types.BackingArray_T)
    for alias in (types.BackingArray_T, types.InputInMemoryArray_T):
        assert pickle.loads(pickle.dumps(alias)) is alias
        assert copy.deepcopy(alias) is alias


def test_load_requests_may_lack_splits():
    assert types.LoadRequest.__required_keys__ == {"requests"}
    assert types.LoadRequest.__optional_keys__ == {"splits"}
    assert types.LoaderOutput[np.ndarray].__args__ == (np.ndarray,)
    assert set(types.LoaderOutput.__annotations__) == {"X", "obs", "var", "index"}


def test_types_of_absent_libraries_are_told_apart_without_importing_them():
    assert not isinstance(np.ones(2), compat.CupyArray | compat.CupyCSRMatrix)
    assert not issubclass(np.ndarray, compat.JaxArray)
    assert issubclass(compat.JaxArray, compat.JaxArray)
    absent = compat._deferred("no_such_library", "Thing")
    with pytest.raises(ImportError, match=r"no_such_library\.Thing"):
        absent()
    present = compat._deferred("fractions", "Fraction")
    assert isinstance(Fraction(1, 2), present)
    assert issubclass(Fraction, present)
    assert present(1, 2) == Fraction(1, 2)


# -------------------------------------------------------------------------------------------------------------- utils


def written(path, **parts) -> zarr.Group:
    n_obs = 6
    obs = pd.DataFrame({"type": pd.Categorical(list("abcabc"))}, index=[f"c{i}" for i in range(n_obs)])
    var = pd.DataFrame({"unread": [1, 2]}, index=["g0", "g1"])
    group = zarr.open_group(path, zarr_format=3)
    X = parts.pop("X", sp.csr_matrix(np.arange(12, dtype="float32").reshape(6, 2)))
    annbatch.write_sharded(group, ad.AnnData(X=X, obs=obs, var=var, **parts))
    return zarr.open_group(path)


def test_a_stored_anndata_is_opened_for_a_loader(tmp_path):
    dense = np.ones((6, 3), dtype="float32")
    frame = pd.DataFrame({"v": np.arange(6)}, index=[f"c{i}" for i in range(6)])
    group = written(
        tmp_path / "a.zarr",
        layers={"sparse": sp.csr_matrix((6, 2)), "columns": sp.csc_matrix((6, 2))},
        obsm={"dense": dense, "frame": frame},
    )
    adata = utils.load_all_aligned(group)
    assert isinstance(adata.X, ad.abc.CSRDataset)
    assert adata.obs["type"].tolist() == list("abcabc")
    assert list(adata.var.columns) == []
    assert list(adata.var_names) == ["g0", "g1"]
    assert set(adata.obsm) == {"dense"}
    assert isinstance(adata.obsm["dense"], zarr.Array)
    assert [key for key in adata.layers if key is not None] == ["sparse"]
    assert isinstance(utils._read_backed(group["obsm/dense"]), zarr.Array)


def test_what_cannot_be_loaded_is_refused_with_the_remedy(tmp_path):
    group = written(tmp_path / "a.zarr", X=sp.csc_matrix((6, 2), dtype="float32"))
    with pytest.raises(TypeError, match=r"Unrecognized encoding type csc_matrix for /X.*tocsr"):
        utils.load_all_aligned(group)
    with pytest.raises(TypeError, match="Unrecognized encoding type dataframe for /obs"):
        utils._read_backed(group["obs"])


def test_ignored_elements_are_named_once():
    adata = ad.AnnData(X=np.ones((2, 2)), layers={"b": np.ones((2, 2))}, obsm={"a": np.ones((2, 1))})

    def add():
        utils.warn_ignored_obs_aligned(adata, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            add()
        utils.warn_ignored_obs_aligned(ad.AnnData(X=np.ones((2, 2))), stacklevel=1)
    assert [(w.category, w.filename) for w in caught] == [(FutureWarning, __file__)]
    assert "['layers/b', 'obsm/a']" in str(caught[0].message)


def test_differing_numbers_of_variables_are_refused():
    utils.check_var_shapes([np.ones((2, 3)), np.ones((5, 3))])
    with pytest.raises(ValueError, match="All datasets must have same shape along the var axis"):
        utils.check_var_shapes([np.ones((2, 3)), np.ones((2, 4))])


def test_values_below_one_are_refused():
    utils.check_lt_1([1, 2], ["a", "b"])
    with pytest.raises(ValueError, match="b must be greater than 1, got 0"):
        utils.check_lt_1([1, 0, -1], ["a", "b", "c"])


def test_slices_laid_end_to_end_are_indexed():
    index = utils.interval_indexer_from_slices([[slice(3, 5), slice(0, 1)], [slice(9, 11)]])
    assert [(interval.left, interval.right) for interval in index] == [(0, 3), (3, 5)]
    assert index.closed == "left"


def test_several_selections_are_read_as_one(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", data=np.arange(60).reshape(20, 3), chunks=(4, 3))
    grid = getattr(array, "_chunk_grid", None) or array.metadata.chunk_grid
    selections = [(slice(2, 5), slice(None)), (slice(0, 1), slice(None)), (slice(7, 13), slice(None))]
    indexer = utils.MultiBasicIndexer([BasicIndexer(s, shape=array.shape, chunk_grid=grid) for s in selections])
    assert indexer.shape == (10, 3)
    out = np.zeros(indexer.shape, dtype=int)
    for projection in indexer:
        (chunk, _), rows = projection.chunk_coords, projection.chunk_selection
        out[projection.out_selection] = array[chunk * 4 : chunk * 4 + 4][rows]
    assert (out == np.concatenate([array[s] for s, _ in selections])).all()


def test_workers_derive_generators_of_their_own():
    draws = [utils._spawn_worker_rng(np.random.default_rng(0), worker).random() for worker in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
