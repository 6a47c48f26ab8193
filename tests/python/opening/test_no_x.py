"""Data without X, and what a loader says where something is missing or does not fit: which file, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch.transforms import Log1p
from support.cells import densify

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IN_ORDER = {"shuffle": False, "batch_size": 4, "chunk_size": 4, "preload_nchunks": 2}
COUNTS = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (10, 6)).astype("f4"))


def make(*, x: Any = None, genes: int = 6) -> ad.AnnData:
    obs = pd.DataFrame({"q": np.arange(10)}, index=[f"cell{k}" for k in range(10)])
    var = pd.DataFrame(index=[f"gene{k}" for k in range(genes)])
    adata = ad.AnnData(
        x, obs=obs, var=var, layers={"counts": COUNTS[:, :genes], "dense": COUNTS[:, :genes].toarray() + 1}
    )
    adata.obsm["pca"] = COUNTS[:, :2].toarray()
    return adata


def write(path: Path, kind: str, adata: ad.AnnData | None = None) -> Path:
    """Write data without X: there is none, or an element that stands for nothing, as anndata 0.12.0 and anndataR write."""
    adata = make() if adata is None else adata
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            file.pop("X", None)
            if kind == "null":
                ad.io.write_elem(file, "X", None)
        return path
    adata.write_zarr(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    if "X" in group:
        del group["X"]
    if kind == "null":
        ad.io.write_elem(group, "X", None)
    zarr.consolidate_metadata(path)
    return path


FILES = [(suffix, kind) for suffix in (".h5ad", ".zarr") for kind in ("missing", "null")]


def rows(loader: Loader, *path: str) -> np.ndarray:
    parts = []
    for batch in loader:
        for key in path:
            batch = batch[key]
        parts.append(densify(batch))
    return np.concatenate(parts)


@pytest.mark.parametrize(("suffix", "kind"), FILES)
def test_a_layer_takes_the_place_of_x_or_comes_beside_none(tmp_path: Path, suffix: str, kind: str) -> None:
    paths = [write(tmp_path / f"{k}{suffix}", kind) for k in range(2)]
    expected = np.concatenate([COUNTS.toarray()] * 2)
    np.testing.assert_array_equal(rows(annbatch.open(paths, layer="counts", **IN_ORDER), "X"), expected)
    for loader in (
        Loader(layers=["counts", "dense"], obsm=["pca"], **IN_ORDER).add_adatas(paths),
        annbatch.open(paths, layers=["counts", "dense"], obsm=["pca"], **IN_ORDER),
    ):
        assert (loader.n_obs, loader.n_var, len(loader)) == (20, 6, 5)
        assert all(batch["X"] is None for batch in loader)
        np.testing.assert_array_equal(rows(loader, "layers", "counts"), expected)
        np.testing.assert_array_equal(rows(loader, "layers", "dense"), expected + 1)
        np.testing.assert_array_equal(rows(loader, "obsm", "pca"), expected[:, :2])
        np.testing.assert_array_equal(pd.concat([batch["obs"] for batch in loader])["q"], np.tile(np.arange(10), 2))
        assert paths[1].name in loader.locate([13])[0]["path"]
    alone = Loader(obsm=["pca"], **IN_ORDER).add_adata(paths[0])
    assert alone.n_var == 6
    np.testing.assert_array_equal(rows(alone, "obsm", "pca"), expected[:10, :2])


@pytest.mark.parametrize(("suffix", "kind"), FILES)
def test_where_x_is_asked_for_the_file_and_its_layers_are_named(tmp_path: Path, suffix: str, kind: str) -> None:
    path = write(tmp_path / f"a{suffix}", kind)
    for call in (lambda: annbatch.open(path), lambda: Loader().add_adata(path)):
        with pytest.raises(
            KeyError, match=rf"a\{suffix} has no X; it has the layers \['counts', 'dense'\].*layer='counts'"
        ):
            call()
    with pytest.raises(
        ValueError, match=rf"transform, dense and dtype are done to X, and .*a\{suffix}.* has none.*layer="
    ):
        Loader(layers=["counts"], transform=[Log1p()]).add_adata(path)
    with pytest.raises(ValueError, match="transform, dense and dtype are done to X"):
        annbatch.open(path, layers=["counts"], dense=True)
    full = make(x=COUNTS)
    full.write_h5ad(tmp_path / "full.h5ad")
    for order in ([path, tmp_path / "full.h5ad"], [tmp_path / "full.h5ad", path]):
        for way in (
            lambda order=order: annbatch.open(order, layers=["counts"]),
            lambda order=order: Loader(layers=["counts"]).add_adatas(order),
        ):
            with pytest.raises(ValueError, match=rf"X must be in all.*a\{suffix}.* has none, .*full\.h5ad has one"):
                way()


def test_nothing_but_annotations_is_said_to_be_that(tmp_path: Path) -> None:
    make()[:, :].copy().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["layers"]
    with pytest.raises(KeyError, match=r"a\.h5ad has no X, no layers and no raw"):
        annbatch.open(tmp_path / "a.h5ad")


def test_raw_is_offered_where_it_is_all_there_is(tmp_path: Path) -> None:
    adata = make(x=COUNTS)
    adata.raw = adata
    del adata.layers["counts"], adata.layers["dense"]
    path = write(tmp_path / "a.h5ad", "missing", adata)
    with pytest.raises(KeyError, match=r"layer='raw'"):
        annbatch.open(path)
    np.testing.assert_array_equal(rows(annbatch.open(path, layer="raw", **IN_ORDER), "X"), COUNTS.toarray())


def test_objects_and_collections_without_x(tmp_path: Path) -> None:
    loader = Loader(layers=["counts"], **IN_ORDER).add_adata(make())
    np.testing.assert_array_equal(rows(loader, "layers", "counts"), COUNTS.toarray())
    with pytest.raises(KeyError, match=r"AnnData has no X; its layers are \['counts', 'dense'\]"):
        Loader().add_adata(make())
    path = write(tmp_path / "a.h5ad", "missing")
    backed = ad.read_h5ad(path, backed="r")
    np.testing.assert_array_equal(
        rows(Loader(layers=["counts"], **IN_ORDER).add_adata(backed), "layers", "counts"), COUNTS.toarray()
    )
    backed.file.close()
    collection = DatasetCollection(tmp_path / "all.zarr").add_adatas([path], shuffle=False)
    for columns in (None, ["q"]):
        loader = Loader(layers=["counts"], obs_columns=columns, **IN_ORDER).use_collection(collection)
        np.testing.assert_array_equal(rows(loader, "layers", "counts"), COUNTS.toarray())
    with pytest.raises(KeyError, match=r"all\.zarr/dataset_0 has no X; its layers are"):
        Loader().use_collection(collection)
    np.testing.assert_array_equal(
        rows(annbatch.open(tmp_path / "all.zarr", layer="counts", **IN_ORDER), "X"), COUNTS.toarray()
    )


@pytest.mark.parametrize("to", [None, "torch"])
def test_forms_of_batches_without_x(tmp_path: Path, to: str | None) -> None:
    path = write(tmp_path / "a.h5ad", "missing")
    loader = Loader(layers=["counts"], to=to, obs="codes", return_index=True, **IN_ORDER).add_adata(path)
    for batch in loader:
        assert list(batch) == ["X", "obs", "var", "index", "layers"]
        assert batch["X"] is None
        np.testing.assert_array_equal(densify(batch["layers"]["counts"]), COUNTS[batch["index"]].toarray())
        np.testing.assert_array_equal(batch["obs"]["q"], batch["index"])


# ---------------------------------------------------------------------------------------------- what does not fit


def test_widths_that_differ_are_told_by_file(tmp_path: Path) -> None:
    for name, genes, width in (("a", 6, 2), ("b", 5, 2), ("c", 6, 3)):
        adata = make(x=COUNTS[:, :genes], genes=genes)
        adata.obsm["pca"] = COUNTS[:, :width].toarray()
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    start = "All datasets must have same shape along the var axis"
    with pytest.raises(
        ValueError, match=rf"{start}: X has \[5\] columns in .*b\.h5ad, \[6\] in .*a\.h5ad; annbatch\.open joins"
    ):
        Loader().add_adatas([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    for way in (annbatch.open, lambda paths, **options: Loader(**options).add_adatas(paths)):
        with pytest.raises(
            ValueError,
            match=rf"{start}: obsm/pca has \[3\] columns in .*c\.h5ad, \[2\] in .*a\.h5ad; leave obsm/pca out",
        ):
            way([tmp_path / "a.h5ad", tmp_path / "c.h5ad"], obsm=["pca"])
    other = make(x=COUNTS)
    other.var_names = [f"other{k}" for k in range(6)]
    other.write_h5ad(tmp_path / "d.h5ad")
    with pytest.raises(
        ValueError, match=r"identical var DataFrames.*d\.h5ad differs from that of .*a\.h5ad.*annbatch\.open"
    ):
        Loader().add_adatas([tmp_path / "a.h5ad", tmp_path / "d.h5ad"])


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    make(x=COUNTS)[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    for loader in (annbatch.open(tmp_path / "none.h5ad"), Loader().add_adata(tmp_path / "none.h5ad")):
        for use in (len, list, lambda loader: next(iter(loader))):
            with pytest.raises(ValueError, match=r"there are no rows in .*none\.h5ad"):
                use(loader)
    both = annbatch.open([tmp_path / "none.h5ad", write(tmp_path / "a.h5ad", "missing")], layer="counts", **IN_ORDER)
    np.testing.assert_array_equal(rows(both, "X"), COUNTS.toarray())
    with pytest.raises(ValueError, match="Number of datasets"):
        len(Loader())


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_remedy_for_csc_names_the_element(tmp_path: Path, suffix: str) -> None:
    adata = make(x=COUNTS)
    adata.obsm["hot"] = sp.csc_matrix(COUNTS[:, :3])
    adata.write_h5ad(tmp_path / "a.h5ad") if suffix == ".h5ad" else adata.write_zarr(tmp_path / "a.zarr")
    with pytest.raises(
        TypeError, match=rf"a\{suffix}.*obsm/hot.*adata\.obsm\['hot'\] = adata\.obsm\['hot'\]\.tocsr\(\)"
    ):
        annbatch.open(tmp_path / f"a{suffix}", obsm=["hot"])
