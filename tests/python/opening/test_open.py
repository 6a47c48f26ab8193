"""`annbatch.open`: stores with variables of their own as one, against `anndata.concat` of the same files."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch.transforms import Log1p, NormalizeTotal, SelectVar
from support.cells import densify, write, write_cells
from support.genes import CASES, GENES, check, concat, in_order, make, shuffled

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("join", ["outer", "inner"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_annotations_are_those_of_anndata_concat(tmp_path: Path, case: str, dense: bool, join: str) -> None:
    adatas = [make(11 + 7 * k, genes, k, dense=dense) for k, genes in enumerate(CASES[case])]
    paths = []
    for k, adata in enumerate(adatas):
        with ad.settings.override(zarr_write_format=2 + k % 2), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # chunks that cut columns
            adata.write_zarr(tmp_path / f"{k}.zarr", chunks=(5, 4) if dense else None)
        paths.append(tmp_path / f"{k}.zarr")
    expected = concat(adatas, join)
    check(annbatch.open(paths, join=join, return_index=True, batch_size=8), expected)
    check(annbatch.open(paths, join=join, layer="doubled", return_index=True, batch_size=8), expected, "doubled")


def _write_of_both_kinds(root: Path, case: str, suffix: str) -> tuple[list[ad.AnnData], list[Path]]:
    """Write the data of a case, in the second and each further second file dense, in chunks that cut columns."""
    paths = []
    for k, genes in enumerate(CASES[case]):
        adata = make(11 + 7 * k, genes, k, dense=k % 2 == 1, dtype=["float32", "int32", "uint8"][k])
        paths.append(root / f"{k}.{suffix}")
        if suffix == "h5ad":
            adata.write_h5ad(paths[-1], compression=[None, "gzip"][k % 2])
        else:
            with ad.settings.override(zarr_write_format=2 + k % 2), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adata.write_zarr(paths[-1], chunks=(5, 4) if k % 2 else None)
    dtypes = ["float32", "int32", "uint8"]
    return [make(11 + 7 * k, genes, k, dtype=dtypes[k]) for k, genes in enumerate(CASES[case])], paths


@pytest.mark.parametrize("suffix", ["zarr", "h5ad"])
@pytest.mark.parametrize("join", ["outer", "inner"])
@pytest.mark.parametrize("case", CASES)
def test_sparse_and_dense_files_together_come_dense(tmp_path: Path, case: str, join: str, suffix: str) -> None:
    adatas, paths = _write_of_both_kinds(tmp_path, case, suffix)
    expected, settings = concat(adatas, join), {"join": join, "dense": True, "return_index": True, "batch_size": 8}
    check(annbatch.open(paths, **settings), expected)
    check(annbatch.open(paths, layer="doubled", **settings), expected, "doubled")
    x = densify(expected.X).astype(np.float64)
    steps = [NormalizeTotal(1e4), Log1p(), SelectVar([2, 0])]
    sums = x.sum(1, keepdims=True)
    wanted = np.log1p(np.divide(x * 1e4, sums, where=sums > 0, out=np.zeros_like(x)))[:, [2, 0]]
    for batch in annbatch.open(paths, transform=steps, dtype="float32", **settings):
        np.testing.assert_allclose(batch["X"], wanted[batch["index"]], rtol=1e-5)


@pytest.mark.parametrize("suffix", ["zarr", "h5ad"])
def test_sparse_and_dense_files_without_dense_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    _, paths = _write_of_both_kinds(tmp_path, "same", suffix)
    sparse, dense = rf"sparse in \S*0\.{suffix}\S*", rf"dense in \S*1\.{suffix}\S*"
    for order in (paths, paths[::-1]):
        with pytest.raises(ValueError, match=f"X must be .* it is {sparse} and {dense}: pass dense=True"):
            annbatch.open(order)
        with pytest.raises(
            ValueError, match=f"layers/doubled must be .* it is {sparse} and {dense}: .*layer='doubled'"
        ):
            annbatch.open(order, dense=True, layers=["doubled"])
    with pytest.raises(ValueError, match=f"X must be .* it is {sparse} and {dense}: pass dense=True"):
        Loader(batch_size=8).add_adatas(paths)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("uint8", "float64"), ("int64", "uint16")])
@pytest.mark.parametrize("to", [None, "torch"])
def test_sparse_and_dense_matrices_together_come_dense(tmp_path: Path, to: str | None, dtypes: tuple[str, str]) -> None:
    rng = np.random.default_rng(4)
    parts = [rng.integers(0, 5, (n, 6)).astype(dtype) for n, dtype in zip((9, 12), dtypes, strict=True)]
    stored = zarr.create_array(tmp_path / "dense.zarr", data=parts[1], chunks=(4, 5))
    for dense, order in [(parts[1], 1), (parts[1], -1), (stored, 1), (stored, -1)]:
        loader = Loader(
            batch_size=7, chunk_size=2, preload_nchunks=7, shuffle=True, dense=True, to=to, return_index=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = list(loader.add_datasets([sp.csr_matrix(parts[0]), dense][::order]))
        rows = np.concatenate(parts[::order])
        assert sum(len(batch["index"]) for batch in batches) == len(rows)
        for batch in batches:
            x = densify(batch["X"])
            np.testing.assert_array_equal(x, rows[batch["index"]])
            assert x.dtype == rows.dtype


def test_transforms_see_joined_rows(tmp_path: Path) -> None:
    adatas = [make(20, shuffled(GENES[:20], 1), 0), make(20, shuffled(GENES[5:], 2), 1)]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    kept = ["gene29", "gene07", "gene12"]
    for join, dense in [("outer", False), ("inner", False), ("inner", True)]:
        x = densify(concat(adatas, join).X).astype(np.float64)
        sums = x.sum(1, keepdims=True)
        wanted = kept if join == "outer" else kept[1:]
        columns = concat(adatas, join).var_names.get_indexer(wanted)
        expected = np.log1p(x / np.where(sums == 0, 1, sums) * 1e4)[:, columns]
        transform = [NormalizeTotal(1e4), Log1p(), SelectVar(wanted)]
        loader = annbatch.open(paths, join=join, transform=transform, dense=dense, return_index=True, batch_size=8)
        assert list(loader.var.index) == wanted
        for batch in in_order(loader):
            np.testing.assert_allclose(densify(batch["X"]), expected[batch["index"]], rtol=1e-5)


def test_layers_are_joined_and_obsm_is_not(tmp_path: Path) -> None:
    adatas = [make(20, GENES[:20], 0), make(20, GENES[5:], 1)]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    expected = concat(adatas, "outer")
    loader = annbatch.open(paths, layers=["doubled"], obsm=["pca"], to="torch", return_index=True, batch_size=8)
    for batch in in_order(loader):
        rows = batch["index"]
        np.testing.assert_array_equal(densify(batch["X"]), densify(expected.X)[rows])
        np.testing.assert_array_equal(densify(batch["layers"]["doubled"]), densify(expected.layers["doubled"])[rows])
        np.testing.assert_array_equal(densify(batch["obsm"]["pca"]), expected.obsm["pca"][rows])


def test_raw_has_variables_of_its_own(tmp_path: Path) -> None:
    adatas = []
    for k, genes in enumerate([GENES[:20], shuffled(GENES[5:], 2)]):
        whole = make(12, genes, k)
        adata = whole[:, :3].copy()
        adata.raw = whole
        adatas.append(adata)
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    expected = concat([ad.AnnData(adata.raw.X, obs=adata.obs, var=adata.raw.var) for adata in adatas], "outer")
    check(annbatch.open(paths, layer="raw", return_index=True, batch_size=8), expected)


def test_a_collection_is_as_many_stores_as_it_has(tmp_path: Path) -> None:
    adatas = [make(40, GENES[:20], 0), make(40, GENES[:20], 1)]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection = DatasetCollection(tmp_path / "both.zarr").add_adatas(paths, n_obs_per_chunk=10)
        other = make(15, shuffled(GENES[10:], 7), 2)
        other_path = write(other, tmp_path / "other.zarr")
        held = [ad.io.read_elem(group) for group in collection]
    loader = annbatch.open([tmp_path / "both.zarr", other_path], return_index=True, batch_size=8)
    check(loader, concat([*held, other], "outer"))


def test_chosen_columns_of_obs(tmp_path: Path) -> None:
    adatas = [make(20, GENES[:20], 0), make(20, GENES[5:], 1)]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    loader = annbatch.open(paths, obs_columns=["doublet", "cell_type"], return_index=True, batch_size=8)
    expected = concat(adatas, "outer").obs[["doublet", "cell_type"]]
    for batch in in_order(loader):
        pd.testing.assert_frame_equal(batch["obs"], expected.iloc[batch["index"]])
    codes = in_order(annbatch.open(paths, obs_columns=["cell_type"], obs="codes", return_index=True, batch_size=8))
    categories = expected["cell_type"].cat
    for batch in codes:
        np.testing.assert_array_equal(batch["obs"]["cell_type"], categories.codes.iloc[batch["index"]])
    assert annbatch.open(paths, obs_columns=[])._obs is None
    with pytest.raises(KeyError, match=r"0\.zarr has no column 'age'; it has \['cell_type'"):
        annbatch.open(paths, obs_columns=["age"])
    with pytest.raises(KeyError, match=r"0\.zarr has no column 'doublet'"):
        annbatch.open(paths, obs_columns=["doublet"], join="inner")


def test_mixed_types_are_promoted(tmp_path: Path) -> None:
    adatas = [make(20, GENES[:20], 0, dtype="int32"), make(20, shuffled(GENES[5:], 3), 1, dtype="float64")]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    check(annbatch.open(paths, return_index=True, batch_size=8), concat(adatas, "outer"))


def test_what_cannot_be_joined_is_named(tmp_path: Path) -> None:
    good = write(make(5, GENES[:4], 0), tmp_path / "good.zarr")
    with pytest.raises(ValueError, match="no path"):
        annbatch.open([])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zarr"):
        annbatch.open([good, tmp_path / "nowhere.zarr"])
    with pytest.raises(ValueError, match='join must be "outer" or "inner", got \'left\''):
        annbatch.open(good, join="left")
    with pytest.raises(TypeError, match=r"annbatch\.open_state"):
        annbatch.open({"elements": []})

    twice = make(5, GENES[:4], 0)
    twice.var_names = ["a", "b", "a", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(twice, tmp_path / "twice.zarr")
    with pytest.raises(ValueError, match=r"twice\.zarr.*'a' comes more than once.*var_names_make_unique"):
        annbatch.open([good, path])

    apart = write(make(5, GENES[4:8], 0), tmp_path / "apart.zarr")
    with pytest.raises(ValueError, match="leaves no variable"):
        annbatch.open([good, apart], join="inner")
    assert annbatch.open([good, apart]).n_var == 8
    with pytest.raises(KeyError, match=r"good\.zarr has no layers/absent; it has \['layers/doubled'\]"):
        annbatch.open(good, layer="absent")
    with pytest.raises(ValueError, match="sparse in all datasets or in none"):
        annbatch.open([good, write(make(5, GENES[:4], 0, dense=True), tmp_path / "dense.zarr")])

    csc = make(5, GENES[:4], 0)
    csc.X = csc.X.tocsc()
    with pytest.raises(TypeError, match=r"csc\.zarr.*tocsr"):
        annbatch.open([good, write(csc, tmp_path / "csc.zarr")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no Zarr group"):
        annbatch.open(tmp_path / "empty")
    csc.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(TypeError, match=r"csc\.h5ad.*tocsr"):
        annbatch.open(tmp_path / "csc.h5ad")
    whole = (tmp_path / "csc.h5ad").read_bytes()
    for name, content in [("no.h5ad", b"no HDF5 at all"), ("short.h5ad", whole[: len(whole) // 2])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=rf"{name} cannot be opened as HDF5 .*truncated"):
            annbatch.open([good, tmp_path / name])
    loader = annbatch.open([good, apart])
    with pytest.raises(ValueError, match=r"annbatch\.open has joined"):
        loader.add_adata(good)


def test_copies_and_pickles_are_joined_too(tmp_path: Path) -> None:
    adatas = [make(20, shuffled(GENES[:20], 1), 0), make(20, GENES[5:], 1)]
    paths = [write(adata, tmp_path / f"{k}.zarr") for k, adata in enumerate(adatas)]
    loader = annbatch.open(paths, return_index=True, batch_size=8)
    check(pickle.loads(pickle.dumps(loader)), concat(adatas, "outer"))
    check(copy.copy(loader), concat(adatas, "outer"))
    where = loader.locate([0, 39])
    assert [(place["dataset"], place["local_row"], place["obs_name"]) for place in where] == [
        (0, 0, "cell0"),
        (1, 19, "cell19"),
    ]


def test_sampling_is_by_small_blocks_unless_told(tmp_path: Path) -> None:
    path = write(make(5, GENES[:4], 0), tmp_path / "a.zarr")
    sampler = annbatch.open(path).batch_sampler
    assert (type(sampler).__name__, sampler.batch_size) == ("RandomSampler", 1024)
    own = annbatch.samplers.SequentialSampler(chunk_size=2, preload_nchunks=1, batch_size=2)
    assert annbatch.open(path, batch_sampler=own).batch_sampler is own
    assert annbatch.open(path, shuffle=False, batch_size=64).batch_sampler.batch_size == 64


@pytest.mark.parametrize("h5ad", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_names_that_are_numbers_are_joined_as_text(tmp_path: Path, h5ad: bool) -> None:
    adatas = [make(9, GENES[:8], 0), make(7, ["3", "11", "4", "50"], 1)]
    for k, adata in enumerate(adatas):
        path = tmp_path / f"{k}.{'h5ad' if h5ad else 'zarr'}"
        adata.write_h5ad(path) if h5ad else write(adata, path)
        if k == 0:
            group = h5py.File(path, "r+") if h5ad else zarr.open_group(path, mode="r+", use_consolidated=False)
            key = group["var"].attrs["_index"]
            attributes = dict(group["var"][key].attrs) | {"encoding-type": "array", "encoding-version": "0.2.0"}
            del group["var"][key]
            group["var"][key] = np.arange(8)
            group["var"][key].attrs.update(attributes)
            group.close() if h5ad else zarr.consolidate_metadata(path)
            adata.var_names = [str(name) for name in range(8)]
    paths = sorted(tmp_path.glob("[01].*"))
    for loader, expected in [
        (annbatch.open(paths[:1], return_index=True, batch_size=8), adatas[:1]),
        (annbatch.open(paths, return_index=True, batch_size=8), adatas),
    ]:
        whole = concat(expected, "outer")
        assert list(loader.var.index) == list(whole.var_names)
        for batch in in_order(loader):
            np.testing.assert_array_equal(densify(batch["X"]), densify(whole.X)[batch["index"]])


def test_a_loader_takes_paths_beside_objects(tmp_path: Path) -> None:
    cells = write_cells(tmp_path)
    expected = cells.dense()
    with warnings.catch_warnings():
        # not those of deprecations, which are between libraries
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", FutureWarning)
        loader = Loader(batch_size=10, chunk_size=10, preload_nchunks=2, return_index=True, obs_columns=["donor"])
        loader.add_adata(cells.paths[0]).add_adata(str(cells.paths[1])).add_adatas([cells.without_extras()[2]])
        for batch in loader:
            np.testing.assert_array_equal(densify(batch["X"]), expected[batch["index"]])
            np.testing.assert_array_equal(batch["obs"]["donor"], cells.obs["donor"].iloc[batch["index"]])
    loader = Loader(batch_size=10, chunk_size=10, preload_nchunks=2, layers=["doubled"]).add_adatas(cells.paths)
    assert densify(next(iter(loader))["layers"]["doubled"]).shape == (10, expected.shape[1])


def test_adding_paths_adds_all_or_nothing(tmp_path: Path) -> None:
    cells = write_cells(tmp_path)
    loader = Loader()
    with pytest.raises(FileNotFoundError):
        loader.add_adatas([cells.paths[0], tmp_path / "nowhere.zarr"])
    with pytest.raises(KeyError, match="has no layers/absent"):
        Loader(layers=["absent"]).add_adata(cells.paths[0])
    with pytest.raises(TypeError, match="add_adatas takes a list"):
        loader.add_adatas(str(cells.paths[0]))
    assert loader.n_obs == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DatasetCollection(tmp_path / "all.zarr").add_adatas(cells.paths, n_obs_per_chunk=10)
    assert loader.add_adata(tmp_path / "all.zarr").n_obs == cells.n_obs
    cells.adatas[0].write_h5ad(tmp_path / "a.h5ad")
    assert loader.add_adata(tmp_path / "a.h5ad").n_obs == cells.n_obs + cells.adatas[0].n_obs
