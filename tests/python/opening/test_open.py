"""`annbatch.open`: stores with variables of their own as one, against `anndata.concat` of the same files."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch._core import ops as _ops
from annbatch._data import hdf5 as _hdf5
from annbatch._data.hdf5 import SharedReader
from annbatch._data.joins import join_annotations
from annbatch.transforms import Log1p, NormalizeTotal, SelectVar
from support.cells import densify, write, write_cells

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


def random_frames(rng: np.random.Generator, n_obs: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Annotations whose names, columns, types and categories are often, but not always, those of others."""
    genes = [GENES, GENES[::-1], GENES[:12], GENES[6:20], shuffled(GENES[4:16], int(rng.integers(3)))][rng.integers(5)]
    var = pd.DataFrame(index=pd.Index(genes, name=[None, "gene"][rng.integers(2)]))
    if rng.random() < 0.8:
        var["symbol"] = [gene.upper() for gene in genes]
    if rng.random() < 0.5:
        var["mean"] = np.where(np.arange(len(genes)) % 3, len(genes), np.nan)
    if rng.random() < 0.5:
        kinds = [["a", "b"], ["b", "a"]][rng.integers(2)]
        var["kind"] = pd.Categorical(np.array(["a", "b"])[np.arange(len(genes)) % 2], categories=kinds)
    obs = pd.DataFrame(index=[f"cell{k}" for k in range(n_obs)])
    for name in rng.permutation(["cell_type", "grade", "depth", "doublet", "note"])[: rng.integers(6)]:
        categories = shuffled(["B", "T", "NK", "mono"], int(rng.integers(2)))[: rng.integers(1, 5)]
        drawn = np.array(categories, dtype=object)[rng.integers(len(categories), size=n_obs)]
        drawn[rng.random(n_obs) < 0.1] = None
        obs[str(name)] = {
            "cell_type": pd.Categorical(drawn, categories=categories),
            "grade": pd.Categorical(drawn, categories=categories, ordered=True),
            "depth": rng.integers(0, 100, n_obs).astype(["i4", "i8", "f4"][rng.integers(3)]),
            "doublet": rng.random(n_obs) < 0.5,
            "note": [str(k) for k in rng.integers(0, 3, n_obs)],
        }[str(name)]
    return obs, var


@pytest.mark.parametrize("seed", range(60))
def test_joined_frames_are_those_of_anndata_concat(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    adatas, paths = [], []
    for k in range(int(rng.integers(1, 7))):
        if k and rng.random() < 0.3:
            # the same variables again, of another dataset than the last perhaps
            obs, var = random_frames(rng, 4)[0], adatas[rng.integers(k)].var
        else:
            obs, var = random_frames(rng, int(rng.integers(1, 6)))
        adatas.append(ad.AnnData(sp.csr_matrix((len(obs), len(var)), dtype="f4"), obs=obs, var=var))
        adatas[-1].write_h5ad(tmp_path / f"{k}.h5ad")
        paths.append(tmp_path / f"{k}.h5ad")
    for join in ("outer", "inner"):
        expected = concat([ad.read_h5ad(path) for path in paths], join)
        loader = annbatch.open(paths, join=join)
        pd.testing.assert_frame_equal(loader.var, expected.var, check_names=True)
        if expected.obs.columns.empty:
            assert loader._obs is None
            continue
        # no concatenation of frames that are alike changes their types
        pd.testing.assert_frame_equal(pd.concat(loader._obs), expected.obs)
        assert [len(frame) for frame in loader._obs] == [adata.n_obs for adata in adatas]


def test_datasets_of_the_same_variables_share_their_columns() -> None:
    frames = [pd.DataFrame(index=list(genes)) for genes in ("abc", "abc", "bcd", "abc")]
    obs = [pd.DataFrame(index=["cell"])] * 4
    first, second, other, last = join_annotations(list("1234"), obs, frames, "outer").columns
    assert first is second is last is not None and other is not None and other is not first


@pytest.fixture(params=["h5py", "core"])
def texts_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads arrays of few texts: the core usually reads only those of many."""
    if request.param == "core":
        monkeypatch.setattr(_hdf5, "_MANY_TEXTS", 1)


@pytest.mark.usefixtures("texts_by")
def test_what_files_have_alike_is_one_object(tmp_path: Path) -> None:
    odd = ["", "é", "naïve 🧬", "b", "c"]
    for k in range(4):
        obs = pd.DataFrame(
            {
                "tissue": pd.Categorical(odd[:4], categories=odd),
                "stage": pd.Categorical(odd[1:], categories=odd, ordered=True),
                "fewer": pd.Categorical([odd[k], None, odd[k], None]),
                "number": pd.Categorical([1, 2, 1, 2 + k]),
                "none": pd.Categorical([None] * 4),
                "depth": [k, 1, 2, 3],
            },
            index=[f"{k} {cell}" for cell in odd[:4]],
        )
        # the last has another name in its column
        var = pd.DataFrame({"symbol": [*odd[:4], "d" if k == 3 else "c"]}, index=odd[::-1])
        ad.AnnData(sp.csr_matrix((4, 5), dtype="f4"), obs=obs, var=var).write_h5ad(tmp_path / f"{k}.h5ad")
    shared, read = SharedReader(), {"obs": [], "var": [], "var/symbol": []}
    for k in range(4):
        with h5py.File(tmp_path / f"{k}.h5ad") as file:
            for frame in ("obs", "var"):
                pd.testing.assert_frame_equal(shared.read(file[frame]), ad.io.read_elem(file[frame]))
            for element, values in read.items():
                values.append(shared.read(file[element]))
    for name in ("var/symbol", "var"):
        first, *others = read[name]
        assert [other is first for other in others] == [True, True, False]
    for column in ("tissue", "stage"):
        assert len({id(obs[column].dtype.categories) for obs in read["obs"]}) == 1
    assert len({id(obs) for obs in read["obs"]}) == 4
    with h5py.File(tmp_path / "0.h5ad", "r+") as file:
        # the same members, of which another is the index
        for columns, index in ((["symbol", "_index"], "symbol"), (["symbol"], "_index"), (["_index"], "symbol")):
            file["var"].attrs.update({"column-order": columns, "_index": index})
            pd.testing.assert_frame_equal(shared.read(file["var"]), ad.io.read_elem(file["var"]))
        # of a fixed length, and none at all
        file["fixed"], file["none"] = np.array([b"a", b"b\0c"], "S4"), np.array([], h5py.string_dtype())
        for other in ("fixed", "none"):
            file[other].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
            np.testing.assert_array_equal(shared.read(file[other]), ad.io.read_elem(file[other]))


def test_frames_of_the_same_arrays_may_be_different(tmp_path: Path) -> None:
    index, symbols = pd.Index(["x", "y"], name="gene"), {"symbol": ["s", "t"]}
    frames = [
        pd.DataFrame(symbols, index),
        pd.DataFrame({**symbols, "gene": index}, index),
        pd.DataFrame(symbols, index),
    ]
    shared = SharedReader()
    for k, var in enumerate(frames):
        ad.AnnData(sp.csr_matrix((3, 2), dtype="f4"), var=var).write_h5ad(tmp_path / f"{k}.h5ad")
        with h5py.File(tmp_path / f"{k}.h5ad") as file:
            pd.testing.assert_frame_equal(shared.read(file["var"]), ad.io.read_elem(file["var"]))


@pytest.mark.parametrize("chunks", [None, (1_000,)])
def test_what_was_never_written_is_zero(chunks: tuple[int] | None, tmp_path: Path) -> None:
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if chunks:
        how.set_chunk(chunks)
    with h5py.File(tmp_path / "0.h5", "w") as file:
        space = h5py.h5s.create_simple((100_000,))
        h5py.h5d.create(file.id, b"depth", h5py.h5t.NATIVE_INT64, space, how)
        if chunks:
            file["depth"][5_000:6_000] = 3
        file["depth"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        # what is freed now is there again, full of sevens
        for _ in range(8):
            np.full(100_000, 7)
        np.testing.assert_array_equal(SharedReader().read(file["depth"]), file["depth"][()])


@pytest.mark.usefixtures("texts_by")
def test_text_is_read_in_the_encoding_that_its_array_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "0.h5", "w") as file:
        for name, encoding in (("text", "utf-8"), ("ascii", "ascii")):
            file.create_dataset(name, data=np.array(["é".encode()], object), dtype=h5py.string_dtype(encoding))
            file[name].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        shared = SharedReader()
        assert list(shared.read(file["text"])) == ["é"]
        with pytest.raises(UnicodeDecodeError):
            ad.io.read_elem(file["ascii"])
        with pytest.raises(UnicodeDecodeError):
            shared.read(file["ascii"])


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_many_texts_are_read_by_the_core(
    compression: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{'é' * (i % 3)} {i}" for i in range(3_000)]
    var = pd.DataFrame({"symbol": names[::-1]}, index=names)
    for k in range(2):
        ad.AnnData(sp.csr_matrix((2, 3_000), dtype="f4"), var=var).write_h5ad(
            tmp_path / f"{k}.h5ad", compression=compression
        )
    answered, texts = [], _ops.texts

    def watched(file: str, path: str) -> bytes:
        answer = texts(file, path)
        answered.append((Path(file).name, path))
        return answer

    monkeypatch.setattr(_ops, "texts", watched)
    shared, read = SharedReader(), []
    for k in range(2):
        with h5py.File(tmp_path / f"{k}.h5ad") as file:
            read.append(shared.read(file["var/_index"]))
    assert read[0] is read[1] and list(read[0]) == names
    # as pandas 3 has texts, anndata writes them with a mask
    assert [(file, path.removesuffix("/values")) for file, path in answered] == [
        ("0.h5ad", "/var/_index"),
        ("1.h5ad", "/var/_index"),
    ]


@pytest.mark.usefixtures("texts_by")
@pytest.mark.parametrize(
    "other", ["", "text", "missing", "na-value", "no mask", "a mask of another length", "a mask of numbers"]
)
def test_strings_with_a_mask(other: str, tmp_path: Path) -> None:
    """As pandas 3 has texts, and its nullable strings, anndata writes them."""

    def read(reader: Any, file: h5py.File) -> Any:
        try:
            return reader(file["names"])
        except Exception as error:  # whatever it is
            return type(error)

    shared, texts = SharedReader(), np.array(["a", "é", "", "b"], object)
    ours, expected = [], []
    for k in range(2):
        with h5py.File(tmp_path / f"{k}.h5", "w") as file, ad.settings.override(allow_write_nullable_strings=True):
            values = np.array(["a", "é", "", "c"], object) if other == "text" and k else texts.copy()
            values[1] = pd.NA if other == "missing" and k else values[1]
            ad.io.write_elem(file, "names", pd.array(values, dtype=pd.StringDtype("python")))
            if k and other == "na-value":
                file["names"].attrs["na-value"] = "NA" if file["names"].attrs.get("na-value") == "NaN" else "NaN"
            elif k and "mask" in other:
                del file["names/mask"]
                if other != "no mask":
                    mask = np.zeros(3, bool) if "length" in other else np.zeros(4, "u1")
                    ad.io.write_elem(file["names"], "mask", mask)
        with h5py.File(tmp_path / f"{k}.h5") as file:
            ours.append(read(shared.read, file))
            expected.append(read(ad.io.read_elem, file))
    for mine, theirs in zip(ours, expected, strict=True):
        if isinstance(theirs, type):
            assert mine is theirs
        else:
            pd.testing.assert_extension_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    assert (ours[0] is ours[1]) == (other == "")


@pytest.mark.usefixtures("texts_by")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_this_process_has_not_flushed_is_seen(masked: bool, compression: str | None, tmp_path: Path) -> None:
    names = np.array([f"gene {k}" for k in range(300)], object)
    for name in "ab":
        with (
            h5py.File(tmp_path / f"{name}.h5", "w") as file,
            ad.settings.override(allow_write_nullable_strings=True),
        ):
            kind = pd.array(names, dtype=pd.StringDtype("python")) if masked else names
            ad.io.write_elem(file, "names", kind, dataset_kwargs={"compression": compression})
    with h5py.File(tmp_path / "a.h5", "r+") as writer:
        writer["names/values" if masked else "names"][7] = "renamed"
        for order in ("ab", "ba"):
            shared = SharedReader()
            for name in order:
                with h5py.File(tmp_path / f"{name}.h5") as file:
                    read = shared.read(file["names"])
                assert list(read) == [*names[:7], "renamed" if name == "a" else "gene 7", *names[8:]]


@pytest.mark.usefixtures("texts_by")
@pytest.mark.parametrize("where", ["fixed", "two", "compact", "none yet"])
def test_texts_of_other_forms_are_what_they_are_to_anndata(where: str, tmp_path: Path) -> None:
    text = h5py.string_dtype()
    with h5py.File(tmp_path / "0.h5", "w") as file:
        if where == "compact":
            how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            how.set_layout(h5py.h5d.COMPACT)
            space, kind = h5py.h5s.create_simple((3,)), h5py.h5t.py_create(text, logical=True)
            stored = h5py.Dataset(h5py.h5d.create(file.id, b"names", kind, space, how))
        elif where == "fixed":
            stored = file.create_dataset("names", data=np.array([b"a", b"bc", b""], "S2"))
        elif where == "two":
            stored = file.create_dataset("names", data=[["a", "b"], ["c", "d"]], dtype=text)
        else:
            stored = file.create_dataset("names", (3,), text)
        if where == "compact":
            stored[1] = "é"
        stored.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    with h5py.File(tmp_path / "0.h5") as file:
        np.testing.assert_array_equal(SharedReader().read(file["names"]), ad.io.read_elem(file["names"]))


@pytest.mark.usefixtures("texts_by")
def test_what_anndata_writes_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "big": np.array([1, 2], ">i8"),
        "half": np.array([0.5, -0.0], "f2"),
        "is_doublet": np.array([True, False]),
    }
    obs = pd.DataFrame({"tissue": pd.Categorical(["b", None], categories=["b", "a"]), **columns}, index=["x", "y"])
    ad.AnnData(sp.csr_matrix((2, 3), dtype="f4"), obs=obs).write_h5ad(tmp_path / "0.h5ad")
    # as pandas 3 has texts, anndata writes them with a mask
    names = ["obs", "var"] if pd.__version__ < "3" else [f"obs/{name}" for name in columns]
    with h5py.File(tmp_path / "0.h5ad") as file:
        expected = [ad.io.read_elem(file[name]) for name in names]
        monkeypatch.setattr(ad.io, "read_elem", lambda element: pytest.fail(f"{element} was left to anndata"))
        for name, value in zip(names, expected, strict=True):
            read = SharedReader().read(file[name])
            if isinstance(value, pd.DataFrame):
                pd.testing.assert_frame_equal(read, value)
                assert [dtype.str for dtype in read.dtypes[1:]] == [dtype.str for dtype in value.dtypes[1:]]
            else:
                np.testing.assert_array_equal(read, value, strict=True)
                assert read.dtype.str == value.dtype.str


_UTF8, _ASCII = h5py.string_dtype(), h5py.string_dtype("ascii")


@pytest.mark.parametrize(
    ("at", "attribute", "value"),
    [
        ("obs", "encoding-type", np.bytes_(b"dataframe")),
        ("obs", "encoding-type", np.array("dataframe", _ASCII)),
        ("obs", "encoding-type", np.array(b"data\xff", _UTF8)),
        ("obs", "encoding-type", 3),
        ("obs", "encoding-type", h5py.Empty("f4")),
        ("obs", "encoding-version", "0.1.0"),
        ("obs", "encoding-version", "9.9.9"),
        ("obs", "column-order", np.array([b"depth"])),
        ("obs", "column-order", np.array([])),
        ("obs", "column-order", np.array(["depth", "elsewhere"], _UTF8)),
        ("obs", "column-order", np.array([["depth"]], _UTF8)),
        ("obs", "_index", np.bytes_(b"_index")),
        ("obs", "_index", "depth"),
        ("obs", "_index", "elsewhere"),
        ("obs/_index", "encoding-type", np.array("string-array", _ASCII)),
        ("obs/_index", "encoding-type", "array"),
        ("obs/depth", "encoding-type", "string-array"),
        ("obs/depth", "encoding-type", "of tomorrow"),
        ("obs/tissue", "ordered", True),
        ("obs/tissue", "ordered", 1),
        ("obs/tissue", "ordered", np.array([True])),
        ("obs/tissue", "ordered", None),
        ("obs/tissue/codes", "encoding-type", None),
    ],
)
def test_attributes_of_other_forms_are_what_they_are_to_anndata(
    at: str, attribute: str, value: Any, tmp_path: Path
) -> None:
    obs = pd.DataFrame({"depth": [3, 1], "tissue": pd.Categorical(["b", "a"])}, index=["x", "y"])
    ad.AnnData(sp.csr_matrix((2, 3), dtype="f4"), obs=obs).write_h5ad(tmp_path / "0.h5ad")
    with h5py.File(tmp_path / "0.h5ad", "r+") as file:
        del file[at].attrs[attribute]
        if value is not None:
            file[at].attrs[attribute] = value
    with h5py.File(tmp_path / "0.h5ad") as file:
        try:
            expected = ad.io.read_elem(file["obs"])
        except Exception as error:  # whatever it is
            with pytest.raises(type(error)):
                SharedReader().read(file["obs"])
        else:
            pd.testing.assert_frame_equal(SharedReader().read(file["obs"]), expected)


def test_frames_of_the_same_types_are_joined_as_others_are() -> None:
    def frame(k: int, **columns: Any) -> pd.DataFrame:
        return pd.DataFrame({"k": [k, k + 1], **columns}, index=[f"{k}", f"{k} again"])

    types = [
        pd.CategoricalDtype(list("ba")),
        pd.CategoricalDtype(list("bc")),
        pd.CategoricalDtype(list("ba"), ordered=True),
    ]
    tissues = [frame(k, tissue=pd.Categorical(["b", None], dtype=types[k % 2])) for k in range(7)]
    depths = [frame(k, depth=np.array([k, k], ["i4", "f4", "?"][k % 3])) for k in range(7)]
    stages = [frame(k, tissue=pd.Categorical(["b", None], dtype=types[2])) for k in range(3)]
    others = [frame(0, tissue=["b", 3]), frame(0)[:0], frame(1, depth=[0.5, 1]).rename_axis("cell"), frame(2)]
    ages = [frame(k, age=pd.array(age, "Int64")) for k, age in enumerate([[None, None], [3, 4], [None, None]])]
    ages.insert(1, frame(9, age=["P3", None]))
    for obs in (
        tissues,
        depths,
        ages,
        stages,
        [*tissues, *depths],
        [*stages, *tissues],
        [*others, *tissues, *others],
        [others[1]] * 3,
    ):
        var = [pd.DataFrame(index=["gene"])] * len(obs)
        for join in ("outer", "inner"):
            joined = join_annotations([str(k) for k in range(len(obs))], obs, var, join).obs
            adatas = [ad.AnnData(obs=frame, var=var[0]) for frame in obs]
            expected = ad.concat(adatas, join=join).obs
            pd.testing.assert_frame_equal(pd.concat(joined), expected)
            # missing values are of several kinds
            assert str(pd.concat(joined).values.tolist()) == str(expected.values.tolist())
            assert [len(frame) for frame in joined] == [len(frame) for frame in obs]
            assert all(frame.dtypes.equals(expected.dtypes) for frame in joined)


def test_what_only_looks_alike_is_not_shared(tmp_path: Path) -> None:
    """Texts of a fixed length are no objects that are kept: the next file's may lie where the last one's did."""
    paths = [tmp_path / f"{k}.h5ad" for k in range(24)]
    for k, path in enumerate(paths):
        make(3, GENES[:4], 0).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            for name in ("symbol", "mean"):
                del file[f"var/{name}"]
            file["var/symbol"] = np.array([f"s{k}_{gene}" for gene in range(4)], "S8")
            file["var/symbol"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
            file["var"].attrs["column-order"] = ["symbol"]
    shared = SharedReader()
    for path in paths:
        with h5py.File(path) as file:
            shared.read(file["obs"])
            pd.testing.assert_frame_equal(shared.read(file["var"]), ad.io.read_elem(file["var"]))
    # whatever a frame is known by is kept: whether its place is taken again is a matter of luck
    for (_, known), (_, members) in shared._frames.items():
        assert {name: id(member) for name, member in members.items()} == dict(known)
    # no two files say the same
    assert list(annbatch.open(paths).var.columns) == []


def test_what_others_write_is_read_as_anndata_does(tmp_path: Path) -> None:
    path = tmp_path / "0.h5ad"
    make(3, GENES[:4], 0).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        obs, column = file["obs"], file["obs/cell_type"]
        # categories with a mask, as extension arrays are
        del column["categories"]
        masked = column.create_group("categories")
        masked.attrs.update({"encoding-type": "nullable-integer", "encoding-version": "0.1.0"})
        for name, values in (("values", np.array([4, 7])), ("mask", np.array([False, False]))):
            masked[name] = values
            masked[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        # names of a fixed length
        obs.attrs["column-order"] = np.array([b"cell_type", b"depth"], "S9")
        expected = ad.io.read_elem(obs)
        pd.testing.assert_frame_equal(SharedReader().read(obs), expected)
        file["text"] = ["a", "b"]
        file["text"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        np.testing.assert_array_equal(SharedReader().read(file["text"]), ad.io.read_elem(file["text"]))
    assert annbatch.open(path)._obs[0]["cell_type"].tolist() == expected["cell_type"].tolist()


@pytest.mark.parametrize("damage", ["no codes", "no categories", "codes too large", "no order", "codes as text"])
def test_damaged_categoricals_are_refused_as_anndata_does(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "0.h5ad"
    make(3, GENES[:4], 0).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        column = file["obs/cell_type"]
        if damage == "no order":
            del column.attrs["ordered"]
        elif damage == "codes too large":
            column["codes"][1] = 2
        else:
            del column["categories" if damage == "no categories" else "codes"]
            if damage == "codes as text":
                column["codes"] = ["a", "b", "c"]
        with pytest.raises(Exception) as expected:
            ad.io.read_elem(file["obs"])
    with pytest.raises(expected.type, match="obs"):
        annbatch.open(path)


def test_many_files_are_opened_one_at_a_time(tmp_path: Path) -> None:
    make(3, GENES[:4], 0).write_h5ad(tmp_path / "0.h5ad")
    paths = [tmp_path / f"{k}.h5ad" for k in range(300)]
    for path in paths[1:]:
        path.symlink_to(paths[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 100, hard))
    try:
        loader = annbatch.open(paths, batch_size=64)
        assert sum(len(batch["obs"]) for batch in loader) == 900
    finally:
        loader.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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


def write_any(adata: ad.AnnData, folder: Path, k: int) -> Path:
    """Write h5ad and Zarr in turn."""
    if k % 2:
        return write(adata, folder / f"{k}.zarr")
    adata.write_h5ad(folder / f"{k}.h5ad", compression=[None, "gzip", "lzf"][k % 3])
    return folder / f"{k}.h5ad"


@pytest.mark.parametrize("join", ["outer", "inner"])
@pytest.mark.parametrize("dense", [False, True])
def test_h5ad_and_zarr_are_one(tmp_path: Path, dense: bool, join: str) -> None:
    spaces = [*CASES["unsorted"], GENES[2:], shuffled(GENES, 7)]
    adatas = [
        make(11 + 7 * k, genes, k, dense=dense, dtype=["float32", "int32"][k % 2]) for k, genes in enumerate(spaces)
    ]
    paths = [write_any(adata, tmp_path, k) for k, adata in enumerate(adatas)]
    expected = concat(adatas, join)
    loader = annbatch.open(paths, join=join, return_index=True, batch_size=8)
    check(loader, expected)
    assert [place["path"] for place in loader.locate([0, 11])] == [str(paths[0]), str(paths[1] / "X")]
    check(pickle.loads(pickle.dumps(loader)), expected)
    check(annbatch.open(paths, join=join, layer="doubled", return_index=True, batch_size=8), expected, "doubled")
    some = annbatch.open(paths, join=join, obs_columns=["depth"], return_index=True, batch_size=8)
    for batch in in_order(some):
        pd.testing.assert_frame_equal(batch["obs"], expected.obs[["depth"]].iloc[batch["index"]])


def test_raw_of_h5ad_has_variables_of_its_own(tmp_path: Path) -> None:
    adata = make(30, GENES, 0)
    adata.raw = adata
    smaller = adata[:, GENES[:7]].copy()
    smaller.write_h5ad(tmp_path / "raw.h5ad")
    loader = annbatch.open(tmp_path / "raw.h5ad", layer="raw", return_index=True, batch_size=8)
    assert loader.n_var == 30
    for batch in in_order(loader):
        np.testing.assert_array_equal(densify(batch["X"]), densify(adata.X)[batch["index"]])
    assert annbatch.open(tmp_path / "raw.h5ad").n_var == 7


def test_collections_of_h5ad_files(tmp_path: Path) -> None:
    adatas = [make(10, GENES, k) for k in range(12)]
    for k, adata in enumerate(adatas):
        adata.write_h5ad(tmp_path / f"dataset_{k}.h5ad")
    check(annbatch.open(tmp_path, return_index=True, batch_size=8), concat(adatas, "outer"))


def old_h5ad(path: Path, adata: ad.AnnData) -> None:
    """Write what anndata wrote before version 0.7: frames as records, matrices as h5sparse groups."""
    obs = np.array(
        [(str(name).encode(), depth) for name, depth in zip(adata.obs_names, adata.obs["depth"], strict=True)],
        dtype=[("index", "S16"), ("depth", "f4")],
    )
    var = np.array([(name.encode(),) for name in adata.var_names], dtype=[("index", "S16")])
    with h5py.File(path, "w") as file:
        file["obs"], file["var"] = obs, var
        x = file.create_group("X")
        x.attrs["h5sparse_format"], x.attrs["h5sparse_shape"] = b"csr", adata.shape
        for name in ("data", "indices", "indptr"):
            x[name] = getattr(adata.X, name)


@pytest.mark.filterwarnings("ignore")
def test_files_from_before_anndata_0_7(tmp_path: Path) -> None:
    adata = make(23, GENES, 0)
    old_h5ad(tmp_path / "old.h5ad", adata)
    new = make(9, GENES[::-1], 1)
    new.write_h5ad(tmp_path / "new.h5ad")
    read = ad.read_h5ad(tmp_path / "old.h5ad")
    np.testing.assert_array_equal(densify(read.X), densify(adata.X))
    check(
        annbatch.open([tmp_path / "old.h5ad", tmp_path / "new.h5ad"], return_index=True, batch_size=8),
        concat([read, new], "outer"),
    )
    for batch in annbatch.open(tmp_path / "old.h5ad", obs_columns=["depth"], return_index=True, batch_size=8):
        np.testing.assert_array_equal(batch["obs"]["depth"], adata.obs["depth"].iloc[batch["index"]])
    with pytest.raises(KeyError, match=r"old\.h5ad has no column 'doublet'; it has \['depth'\]"):
        annbatch.open([tmp_path / "new.h5ad", tmp_path / "old.h5ad"], obs_columns=["doublet"], join="inner")


@pytest.mark.parametrize("dense", [False, True])
def test_an_adata_that_is_backed_is_taken_by_its_file(tmp_path: Path, dense: bool) -> None:
    adata = make(40, GENES, 1, dense=dense)
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    settings = {"batch_size": 10, "chunk_size": 10, "preload_nchunks": 2, "return_index": True, "layers": ["doubled"]}
    with pytest.warns(FutureWarning, match="obsm/pca"):
        loader = Loader(**settings).add_adata(backed)
    # beside what is in memory and what is in Zarr
    loader.add_adata(write(adata, tmp_path / "a.zarr"))
    expected = np.concatenate([densify(adata.X)] * 2)
    seen = []
    for batch in loader:
        np.testing.assert_array_equal(densify(batch["X"]), expected[batch["index"]])
        np.testing.assert_array_equal(densify(batch["layers"]["doubled"]), 2 * expected[batch["index"]])
        seen.extend(batch["index"])
    assert sorted(seen) == list(range(80))
    # the file that the AnnData holds open is still its own
    np.testing.assert_array_equal(densify(backed.X[:5]), expected[:5])
    with pytest.raises(ValueError, match=r"view of .*a\.h5ad.*to_memory"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loader(**settings).add_adata(backed[:7])
    backed.file.close()


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


def test_a_file_that_changes_under_a_loader_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    first, second = make(100, GENES, 1), make(100, GENES[::-1], 2)
    for change in ("replaced", "written again"):
        first.write_h5ad(path)
        loader = annbatch.open(path, return_index=True, batch_size=8)
        copied = pickle.loads(pickle.dumps(loader))
        if change == "written again":
            in_order(loader)
            second.write_h5ad(path)
        else:
            second.write_h5ad(tmp_path / "b.h5ad")
            (tmp_path / "b.h5ad").replace(path)
        for changed in (loader, copied):
            with pytest.raises(OSError, match=r"a\.h5ad.*replaced or changed after it was opened"):
                in_order(changed)


def test_a_backed_adata_whose_file_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        make(10, GENES, k, dense=True).write_h5ad(tmp_path / name / "x.h5ad")
    monkeypatch.chdir(tmp_path / "a")
    backed = ad.read_h5ad("x.h5ad", backed="r")
    monkeypatch.chdir(tmp_path / "b")
    for _ in range(2):
        with (
            pytest.raises(OSError, match=r"x\.h5ad is not the file that this AnnData was opened from"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            Loader().add_adata(backed)
        # nor is one that is not there
        (tmp_path / "b/x.h5ad").unlink(missing_ok=True)
    backed.file.close()


def test_errors_about_h5ad_files_name_them(tmp_path: Path) -> None:
    adata = make(10, GENES, 0)
    adata.obs.index.name = "barcode"
    adata.write_h5ad(tmp_path / "a.h5ad")
    for batch in annbatch.open(tmp_path / "a.h5ad", obs_columns=["depth"]):
        assert batch["obs"].index.name == "barcode"
    with pytest.raises(KeyError, match=r"a\.h5ad has no layers/absent; layers has \['doubled'\]"):
        annbatch.open(tmp_path / "a.h5ad", layer="absent")
    for number, (member, change, error, message) in enumerate(
        [
            ("X/data", lambda file: file.__delitem__("X/data"), TypeError, "X is a CSR matrix without data"),
            ("shape", lambda file: file["X"].attrs.__delitem__("shape"), TypeError, "X has the attribute shape None"),
            (
                "shape",
                lambda file: file["X"].attrs.__setitem__("shape", [8, 30]),
                ValueError,
                "obs has 10 rows but the dataset has 8",
            ),
        ]
    ):
        path = tmp_path / f"{member.replace('/', '')}{number}.h5ad"
        adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(error, match=rf"{path.name}: .*{message}"):
            annbatch.open(path)
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("dataset_1", "dataset_01"):
        adata.write_h5ad(folder / f"{name}.h5ad")
    with pytest.raises(ValueError, match="a number twice"):
        annbatch.open(folder)
    with pytest.raises(TypeError, match="as text, not as bytes"):
        annbatch.open(bytes(tmp_path / "a.h5ad"))
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.h5ad")
    (tmp_path / "a.h5ad").rename(odd)
    with pytest.raises(ValueError, match="no text in UTF-8"):
        annbatch.open(odd)


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
