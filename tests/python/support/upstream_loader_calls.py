"""Calls of `Loader` that scripts written for scverse annbatch 0.3.1 make, and what came of them there.

`upstream_loader_calls.json` holds the outcomes of annbatch 0.3.1 itself. It was written, and is rewritten, by running
this file in an environment that has that release (with numba) and not this package:

    python tests/python/support/upstream_loader_calls.py

`test_loader_upstream.py` compares ours with them; it needs no upstream installed.
"""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from scipy import sparse as sp

from annbatch import Loader
from annbatch.abc import Sampler
from annbatch.samplers import RandomSampler, SequentialSampler
from annbatch.utils import load_all_aligned

if TYPE_CHECKING:
    from collections.abc import Callable

TABLE = Path(__file__).with_suffix(".json")
CALLS: dict[str, Callable[[Path], Any]] = {}

CPU: dict[str, Any] = {"preload_to_gpu": False}
SIZES: dict[str, Any] = {"batch_size": 10, "chunk_size": 5, "preload_nchunks": 4, **CPU}
ANNBATCH_WARNINGS = ("Adding dataset", "Only `X`", "Passing a seed")


def call(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CALLS[function.__name__] = function
    return function


def outcome(name: str) -> dict[str, Any]:
    """Value, exception and warnings of a call, as JSON."""
    result: dict[str, Any] = {"value": None, "error": None}
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        try:
            result["value"] = CALLS[name](Path(folder))
        except Exception as error:
            result["error"] = [type(error).__name__, str(error)]
    result["warnings"] = [
        [warning.category.__name__, str(warning.message)]
        for warning in caught
        if str(warning.message).startswith(ANNBATCH_WARNINGS)
    ]
    return json.loads(json.dumps(result))


# ---------------------------------------------------------------- data


def adata(seed: int, dtype: str = "float32", *, dense: bool = False, n_obs: int = 13) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = (rng.integers(0, 50, (n_obs, 5)) * (rng.random((n_obs, 5)) < 0.4)).astype(dtype)
    obs = pd.DataFrame(
        {"kind": pd.Categorical(rng.choice(list("xyz"), n_obs), list("xyz")), "n": rng.integers(0, 9, n_obs)},
        index=[f"cell{seed}_{k}" for k in range(n_obs)],
    )
    made = ad.AnnData(counts if dense else sp.csr_matrix(counts), obs, pd.DataFrame(index=[f"g{k}" for k in range(5)]))
    made.layers["counts"] = made.X.copy()
    made.obsm["pca"] = rng.random((n_obs, 2))
    return made


def backed(folder: Path, some: ad.AnnData, *, extras: bool = False) -> ad.AnnData:
    path = folder / f"{len(list(folder.iterdir()))}.zarr"
    with ad.settings.override(zarr_write_format=3):
        some.write_zarr(path)
    read = load_all_aligned(zarr.open_group(path, mode="r"))
    return read if extras else ad.AnnData(X=read.X, obs=read.obs, var=read.var)


def two(folder: Path, dtype: str = "float32", *, dense: bool = False) -> list[ad.AnnData]:
    return [backed(folder, adata(seed, dtype, dense=dense)) for seed in range(2)]


def told(value: Any) -> Any:
    """What is compared of a value: type, dtypes and contents."""
    if isinstance(value, torch.Tensor):
        indices = [str(value.crow_indices().dtype)] if value.layout == torch.sparse_csr else []
        dense = value.to_dense() if indices else value
        return ["tensor", str(value.layout), str(value.dtype), *indices, dense.double().tolist()]
    if sp.issparse(value):
        dtypes = [str(part.dtype) for part in (value.data, value.indices, value.indptr)]
        return [type(value).__name__, *dtypes, value.toarray().astype(float).tolist()]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.astype(float).tolist()]
    if isinstance(value, pd.DataFrame):
        return [
            "frame",
            [str(t) for t in value.dtypes],
            list(value.columns),
            list(value.index),
            value.to_numpy().tolist(),
        ]
    return repr(value)


def batches(loader: Loader) -> list[dict[str, Any]]:
    return [{name: told(value) for name, value in batch.items()} for batch in loader]


# ---------------------------------------------------------------- batches

for _dtype in ("float32", "float64", "int16", "int64", "bool"):
    for _dense in (False, True):
        for _to in (None, "torch"):

            def _batches(folder: Path, dtype: str = _dtype, dense: bool = _dense, to: Any = _to) -> Any:
                return batches(Loader(**SIZES, to=to, return_index=True).add_adatas(two(folder, dtype, dense=dense)))

            _batches.__name__ = f"batches_{_dtype}_{'dense' if _dense else 'csr'}_{_to}"
            call(_batches)


@call
def rows_when_shuffled(folder: Path) -> Any:
    loader = Loader(**SIZES, shuffle=True, return_index=True).add_adatas(two(folder))
    got = [batch["index"] for batch in loader]
    return [sorted(np.concatenate(got).tolist()), [len(rows) for rows in got], len(loader)]


@call
def memory_csr_matrix(folder: Path) -> Any:
    some = [adata(seed) for seed in range(2)]
    loader = Loader(**SIZES, return_index=True).add_datasets([a.X for a in some], obs=[a.obs for a in some])
    return [batches(loader), str(loader.dataset_type)]


@call
def memory_csr_array_with_long_indices(folder: Path) -> Any:
    matrix = sp.csr_array(adata(0).X)
    matrix.indices, matrix.indptr = matrix.indices.astype("int64"), matrix.indptr.astype("int64")
    loader = Loader(**SIZES).add_dataset(matrix)
    return [batches(loader), str(loader.dataset_type)]


@call
def memory_array(folder: Path) -> Any:
    loader = Loader(**SIZES).add_dataset(adata(0, dense=True).X)
    return [batches(loader), str(loader.dataset_type)]


@call
def images(folder: Path) -> Any:
    values = np.arange(23 * 24, dtype="uint8").reshape(23, 2, 3, 4)
    array = zarr.create_array(folder / "images.zarr", data=values, chunks=(5, 2, 3, 4))
    loader = Loader(**SIZES, return_index=True).add_dataset(array)
    return [batches(loader), loader.n_obs, loader.n_var, len(loader)]


class Requests(Sampler):
    batch_size = 5
    shuffle = False

    def __init__(self, *load_requests: dict[str, Any]):
        self.load_requests = load_requests

    def n_batches(self, n_obs: int) -> int:
        return 3

    def validate(self, n_obs: int) -> None:
        pass

    def _sample(self, n_obs: int):
        for load_request in self.load_requests:
            yield dict(load_request)


@call
def splits(folder: Path) -> Any:
    sampler = Requests(
        {
            "requests": [slice(20, 25), slice(3, 8)],
            "splits": [np.array([9, 0, 5]), [1, 1, -1], np.array([True] * 5 + [False] * 5), slice(2, 4)],
        },
        {"requests": np.array([24, 2, 24]), "splits": [np.array([2, 1]), np.array([], dtype=int)]},
        {"requests": [slice(0, 7)]},
    )
    return batches(Loader(batch_sampler=sampler, return_index=True, **CPU).add_adatas(two(folder)))


@call
def no_requests(folder: Path) -> Any:
    return batches(Loader(batch_sampler=Requests({"splits": []}), **CPU).add_adatas(two(folder)))


@call
def split_outside(folder: Path) -> Any:
    sampler = Requests({"requests": [slice(0, 3)], "splits": [np.array([3])]})
    return batches(Loader(batch_sampler=sampler, **CPU).add_adatas(two(folder)))


@call
def obs_without_columns(folder: Path) -> Any:
    return batches(Loader(**SIZES).add_adata(ad.AnnData(backed(folder, adata(0)).X)))


@call
def dataset_with_obs_without_columns(folder: Path) -> Any:
    return batches(Loader(**SIZES).add_dataset(np.ones((2, 2)), obs=pd.DataFrame(index=["a", "b"])))


# ---------------------------------------------------------------- arguments


@call
def sampler_and_its_arguments(folder: Path) -> Any:
    return Loader(batch_sampler=SequentialSampler(5, 4, 10), chunk_size=3, drop_last=False, rng=np.random.default_rng())


@call
def sizes_that_do_not_divide(folder: Path) -> Any:
    return Loader(chunk_size=3, preload_nchunks=1, batch_size=2, **CPU)


@call
def batch_larger_than_window(folder: Path) -> Any:
    return Loader(chunk_size=3, preload_nchunks=1, batch_size=20, **CPU)


@call
def integer_rng(folder: Path) -> Any:
    return type(Loader(**SIZES, shuffle=True, rng=0).batch_sampler).__name__


@call
def boolean_rng(folder: Path) -> Any:
    return Loader(**SIZES, shuffle=True, rng=True)


@call
def default_samplers(folder: Path) -> Any:
    made = [Loader(**CPU).batch_sampler, Loader(shuffle=True, batch_size=4, **CPU).batch_sampler]
    names = ("_chunk_size", "_preload_nchunks", "_batch_size", "_drop_last", "_shuffle")
    return [[type(sampler).__name__, *(getattr(sampler, name) for name in names)] for sampler in made]


@call
def the_class(folder: Path) -> Any:
    bases = [cls.__name__ for cls in Loader.__mro__ if cls.__name__ in ("Loader", "IterableDataset", "Generic")]
    return [str(Loader[int, str]), bases, Loader._COMMON_SAMPLER_ARGS]


# ---------------------------------------------------------------- adding

ONES = np.ones((3, 2))
FRAME = pd.DataFrame({"a": [1, 2, 3]})


def one(**kwargs: Any) -> Loader:
    return Loader(**CPU).add_dataset(ONES, **kwargs)


for _name, _refused in {
    "obs_after_none": lambda: one().add_dataset(ONES, obs=FRAME),
    "none_after_obs": lambda: one(obs=FRAME).add_dataset(ONES),
    "var_after_none": lambda: one().add_dataset(ONES, var=FRAME),
    "none_after_var": lambda: one(var=FRAME).add_dataset(ONES),
    "other_var": lambda: one(var=FRAME).add_dataset(ONES, var=FRAME + 1),
    "other_type": lambda: one().add_dataset(sp.csr_matrix(ONES)),
    "other_width": lambda: one().add_dataset(np.ones((3, 4))),
    "coo_matrix": lambda: Loader(**CPU).add_dataset(sp.coo_matrix(ONES)),
    "nested_list": lambda: Loader(**CPU).add_dataset([[1, 2]]),
    "adata_with_csc": lambda: Loader(**CPU).add_adata(ad.AnnData(sp.csc_matrix(ONES))),
    "obs_is_a_dict": lambda: Loader(**CPU).add_dataset(ONES, obs={"a": 1}),
    "var_is_a_list": lambda: Loader(**CPU).add_dataset(ONES, var=[1]),
    "lists_of_other_length": lambda: Loader(**CPU).add_datasets([ONES, ONES], obs=[FRAME]).n_obs,
    "no_adatas": lambda: Loader(**CPU).add_adatas([]),
    "no_datasets": lambda: Loader(**CPU).add_datasets([]).n_obs,
    "n_var_of_nothing": lambda: Loader(**CPU).n_var,
    "n_obs_of_nothing": lambda: [Loader(**CPU).n_obs, Loader(**CPU).var],
    "type_of_nothing": lambda: Loader(**CPU).dataset_type,
    "batches_of_nothing": lambda: batches(Loader(**CPU)),
    "batches_of_no_rows": lambda: batches(Loader(**CPU).add_dataset(np.ones((0, 2)))),
    "another_dtype": lambda: one().add_dataset(ONES.astype("int8")).n_obs,
}.items():

    def _adding(folder: Path, refused: Callable[[], Any] = _refused) -> Any:
        return refused()

    _adding.__name__ = f"adding_{_name}"
    call(_adding)


@call
def adding_layers_and_obsm(folder: Path) -> Any:
    return Loader(**CPU).add_adatas([backed(folder, adata(seed), extras=True) for seed in range(2)]).n_obs


@call
def adding_hdf5(folder: Path) -> Any:
    adata(0).write_h5ad(folder / "cells.h5ad")
    with h5py.File(folder / "cells.h5ad") as file:
        Loader(**CPU).add_dataset(ad.io.sparse_dataset(file["X"]))


@call
def adding_a_backed_adata(folder: Path) -> Any:
    adata(0).write_h5ad(folder / "cells.h5ad")
    Loader(**CPU).add_adata(ad.read_h5ad(folder / "cells.h5ad", backed="r"))


@call
def adding_during_a_pass(folder: Path) -> Any:
    first, second = two(folder)
    loader = Loader(**SIZES).add_adata(first)
    running = iter(loader)
    loader.add_adata(first)  # not begun
    next(running)
    loader.add_adata(second)


@call
def adding_after_a_pass(folder: Path) -> Any:
    first, second = two(folder)
    loader = Loader(**SIZES).add_adata(first)
    running = iter(loader)
    next(running)
    running.close()
    return loader.add_adata(second).n_obs


@call
def mask_too_long(folder: Path) -> Any:
    sampler = SequentialSampler(5, 4, 10, mask=slice(0, 500))
    loader = Loader(batch_sampler=sampler, **CPU).add_adatas(two(folder))
    running = iter(loader)
    try:
        next(running)
    finally:
        loader.add_adatas(two(folder))


@call
def copies(folder: Path) -> Any:
    loader = Loader(**SIZES, return_index=True).add_adatas(two(folder))
    twin = copy.copy(loader)
    twin._batch_sampler = RandomSampler(5, 4, 20, mask=slice(4, 24))
    others = [copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))]
    counts = [[len(other), len(list(other)), other.n_obs, other.n_var] for other in (loader, twin, *others)]
    return [counts, [told(frame) for frame in twin._obs], told(twin.var), str(type(twin._obs))]


if __name__ == "__main__":
    table = {name: outcome(name) for name in CALLS}
    TABLE.write_text(json.dumps(table, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(f"{len(table)} calls")
