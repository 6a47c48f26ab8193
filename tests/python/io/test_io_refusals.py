"""What a collection cannot hold is refused before anything of it is written; and what only looks like it is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

from annbatch import DatasetCollection, Loader
from annbatch.io import _opening

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_OBS = 6
COUNTS = sp.csr_matrix(np.arange(N_OBS * 3, dtype="float32").reshape(N_OBS, 3))


def adata(name: str = "", **parts: Any) -> ad.AnnData:
    parts = {"X": COUNTS, "obs": pd.DataFrame(index=[f"{name}{i}" for i in range(N_OBS)]), **parts}
    return ad.AnnData(var=parts.pop("var", pd.DataFrame(index=[*"abc"])), **parts)


def collect(folder: Path, inputs: dict[str, ad.AnnData], *, h5ad: bool = False, **settings: Any) -> DatasetCollection:
    settings = {"dataset_size": 100, "shuffle_chunk_size": 2, "shuffle": False, **settings}
    return DatasetCollection(folder / "made.zarr", is_collection_h5ad=h5ad).add_adatas(
        list(inputs), load_adata=inputs.__getitem__, **settings
    )


def obs_column(values: Any, name: Any = "col") -> Callable[[ad.AnnData], None]:
    def put(x: ad.AnnData) -> None:
        x.obs[name] = pd.Series(values, index=x.obs_names) if not isinstance(values, pd.Categorical) else values

    return put


def twice(x: ad.AnnData) -> None:
    x.obs = pd.DataFrame(np.zeros((N_OBS, 2)), index=x.obs_names, columns=["col", "col"])


def twin_index(x: ad.AnnData) -> None:
    x.obs["col"] = [*"uvwxyz"]
    x.obs.index.name = "col"


def put(attribute: str, key: Any, value: Any) -> Callable[[ad.AnnData], None]:
    return lambda x: getattr(x, attribute).__setitem__(key, value)


def index_of(names: list[Any]) -> Callable[[ad.AnnData], None]:
    def change(x: ad.AnnData) -> None:
        x.obs.index = pd.Index(names, dtype=object)

    return change


CELLS = np.ones((N_OBS, 2))
# what is done to an input, and the place that the message names
REFUSED = {
    "slash in obs": (obs_column(1.0, "G1/col"), "obs column 'G1/col'"),
    "slash in the name of the index": (lambda x: setattr(x.obs.index, "name", "a/col"), "index of obs 'a/col'"),
    "slash in layers": (put("layers", "log/col", COUNTS), "layers key 'log/col'"),
    "slash in obsm": (put("obsm", "a/col", CELLS), "obsm key 'a/col'"),
    "slash in a frame of obsm": (
        put("obsm", "f", pd.DataFrame({"a/col": range(N_OBS)}, index=[str(i) for i in range(N_OBS)])),
        "obsm/f column 'a/col'",
    ),
    "slash in uns": (put("uns", "deep", {"a/col": 1}), r"uns\['deep'\] key 'a/col'"),
    "slash in varm": (put("varm", "a/col", np.ones((3, 1))), "varm key 'a/col'"),
    "slash in obsp": (put("obsp", "a/col", sp.eye_array(N_OBS, format="csr")), "obsp key 'a/col'"),
    "slash in var": (lambda x: x.var.__setitem__("a/col", 1), "var column 'a/col'"),
    "no name": (put("layers", "", COUNTS), "layers key ''"),
    "name of a file of Zarr's": (put("uns", "zarr.json", 1), "uns key 'zarr.json'"),
    "reserved": (obs_column(1.0, "_index"), "_index"),
    "number for a name": (obs_column(1.0, 7), "obs column 7 is of type int"),
    "columns alike": (twice, r"obs has more than one column named \['col'\]"),
    "index named as a column": (twin_index, "index of obs is named 'col'"),
    "numbers among names": (index_of([1, *"bcdef"]), "index of obs holds .*int"),
    "missing name": (index_of([None, *"bcdef"]), "index of obs holds .*NoneType"),
    "mixed objects": (
        obs_column(pd.Series([1, "a", None] * 2, dtype=object).to_numpy()),
        r"obs column 'col'.*'int', 'str'",
    ),
    "mixed categories": (obs_column(pd.Categorical([1, "a"] * 3)), r"categories of obs column 'col'.*'int', 'str'"),
    "intervals": (obs_column(pd.cut(np.arange(N_OBS), 2)), "categories of obs column 'col'.*interval"),
    "bytes": (obs_column(np.array([b"a"] * N_OBS, dtype=object)), "obs column 'col'.*bytes"),
    "lists": (obs_column([[1]] * N_OBS), "obs column 'col'.*list"),
    "dates": (obs_column(pd.to_datetime(["2020-01-01", None] * 3).to_numpy()), "obs 'col'"),
    "spans": (obs_column(pd.to_timedelta(np.arange(N_OBS), unit="D").to_numpy()), "obs 'col'"),
    "sparse": (obs_column(pd.arrays.SparseArray([0] * N_OBS)), "obs 'col'"),
    "no UTF-8": (obs_column(["a\udc80b"] * N_OBS), "obs column 'col' holds text"),
    "no UTF-8 in categories": (obs_column(pd.Categorical(["a\udc80b"] * N_OBS)), "obs column 'col' holds text"),
    "objects in uns": (put("uns", "col", np.array(["a", None], dtype=object)), "uns 'col'.*NoneType"),
    "no array in uns": (put("uns", "col", {"deep": {1, 2}}), "uns 'col'"),
    "mixed objects in a frame of uns": (put("uns", "col", pd.DataFrame({"v": [1, "a"]})), "uns 'col'.*'v'"),
    "mixed objects in var": (lambda x: x.var.__setitem__("col", [1, "a", 2.5]), "var 'col'"),
}
IN_FILES = {
    "slash in layers": REFUSED["slash in layers"],
    "slash in uns": REFUSED["slash in uns"],
    "NUL": (obs_column(["a\0b"] * N_OBS), "obs column 'col' holds text"),
    "mixed objects": REFUSED["mixed objects"],
    "dates as categories": (obs_column(pd.Categorical(pd.to_datetime(["2020-01-01"] * N_OBS))), "obs 'col'"),
}


def check_refused(folder: Path, change: Callable[[ad.AnnData], None], place: str, *, h5ad: bool = False) -> None:
    change(damaged := adata())
    with pytest.raises(ValueError, match=rf"first-file.*{place}.*load_adata"):
        collect(folder, {"first-file": damaged}, h5ad=h5ad)
    assert not list((folder / "made.zarr").glob("dataset*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_anndata_does_not_write_is_refused_first(tmp_path, kind):
    check_refused(tmp_path, *REFUSED[kind])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", IN_FILES)
def test_so_it_is_for_h5ad_files(tmp_path, kind):
    check_refused(tmp_path, *IN_FILES[kind], h5ad=True)


def test_the_input_at_fault_is_named_and_what_there_is_stays(tmp_path):
    good, bad = adata("good"), adata("bad")
    bad.layers["a/b"] = COUNTS
    for inputs in ({"good": good, "bad": bad}, {"bad": bad, "good": good}):
        with pytest.raises(ValueError, match="bad: the layers key 'a/b' has a slash"):
            collect(tmp_path, inputs)
    collection = collect(tmp_path, {"good": good})
    with pytest.raises(ValueError, match="bad: the layers key 'a/b' has a slash"):
        collection.add_adatas(["bad"], load_adata=lambda _: bad, shuffle_chunk_size=2)
    assert len(DatasetCollection(tmp_path / "made.zarr").obs()) == N_OBS


def test_what_joining_drops_is_not_refused(tmp_path):
    inputs = {name: adata(name) for name in ("one", "two")}
    inputs["two"].uns["a/b"] = 1
    inputs["two"].var["c/d"] = 1
    inputs["two"].varm["e/f"] = np.ones((3, 1))
    assert len(collect(tmp_path, inputs).obs()) == 2 * N_OBS


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_names_with_slashes_in_files_are_named_whole(tmp_path, kind):
    adata().write_h5ad(tmp_path / "a.h5ad") if kind == "h5ad" else adata().write_zarr(tmp_path / "a.zarr")
    root = (
        h5py.File(tmp_path / "a.h5ad", "r+")
        if kind == "h5ad"
        else zarr.open_group(tmp_path / "a.zarr", mode="r+", use_consolidated=False)
    )
    ad.io.write_elem(root["layers"].require_group("log"), "norm", COUNTS)  # as anndata 0.11 wrote "log/norm"
    loaded = _opening.load_lazily(root)
    assert (_opening.to_memory(loaded.layers["log/norm"]) != COUNTS).nnz == 0
    with pytest.raises(ValueError, match="layers key 'log/norm' has a slash"):
        DatasetCollection(tmp_path / "made.zarr").add_adatas([root])
    if kind == "h5ad":
        root.close()


def test_barcodes_that_are_index_and_column_convert(tmp_path):
    inputs = {}
    for name in ("one", "two"):
        inputs[name] = adata()  # the same names in both
        inputs[name].obs.index.name = "barcode"
        inputs[name].obs["barcode"] = inputs[name].obs_names.astype(object)
    collection = collect(tmp_path, inputs, dataset_size=4)
    obs = collection.obs()
    assert obs.index.is_unique
    assert sorted(obs["barcode"]) == sorted([str(i) for i in range(N_OBS)] * 2)
    assert all(name.split("-")[0] == barcode for name, barcode in obs["barcode"].items())
    # extended by one whose index has the name, but that has no such column
    more = adata("more")
    more.obs.index.name = "barcode"
    obs = collection.add_adatas(["more"], load_adata=lambda _: more, shuffle_chunk_size=2).obs()
    assert obs.loc[list(more.obs_names), "barcode"].isna().all()
    assert obs["barcode"].notna().sum() == 2 * N_OBS


def test_variables_that_repeat_join_where_they_are_the_same(tmp_path):
    var = pd.DataFrame({"id": [*"pqr"]}, index=["A", "B", "A"])
    inputs = {}
    for number, name in enumerate(("one", "two", "more")):
        inputs[name] = adata(name, X=COUNTS * (number + 1), var=var.copy(), layers={"dense": COUNTS.toarray()})
        inputs[name].raw = inputs[name].copy()
    more = inputs.pop("more")
    collection = collect(tmp_path, inputs, dataset_size=4, merge="same")
    collection.add_adatas(["more"], load_adata=lambda _: more, shuffle_chunk_size=1, merge="same")
    for group in collection:
        stored = ad.io.read_elem(group)
        assert list(stored.var_names) == list(stored.raw.var_names) == ["A", "B", "A"]
        assert list(stored.var["id"]) == [*"pqr"]
        for name, x, raw, dense in zip(
            stored.obs_names, stored.X.toarray(), stored.raw.X.toarray(), stored.layers["dense"], strict=True
        ):
            factor = {"one": 1, "two": 2, "mor": 3}[name[:3]]
            row = COUNTS.toarray()[int(name[-1])]
            assert (x == factor * row).all()
            assert (raw == factor * row).all()
            assert (dense == row).all()
    other = adata("other", var=pd.DataFrame(index=["A", "A", "B"]))
    with pytest.raises(
        ValueError, match=r"one: the variable 'A' comes more than once.*var_names_make_unique.*load_adata"
    ):
        collect(tmp_path / "made.zarr", {"one": inputs["one"], "other": other})
    with pytest.raises(ValueError, match="the variable 'A' comes more than once"):
        collection.add_adatas(["other"], load_adata=lambda _: other, shuffle_chunk_size=1)


# ---------------------------------------------------------------------------------------------------- data without X


def without_x(path: Path, how: str, *, name: str = "") -> Path:
    """A store whose counts are in a layer alone; X is absent, or an element of the type "null"."""
    given = adata(name, X=None, layers={"counts": COUNTS})
    if path.suffix == ".h5ad":
        given.write_h5ad(path)
    else:
        given.write_zarr(path)
    if how == "null":
        if path.suffix == ".h5ad":
            with h5py.File(path, "r+") as file:
                file.pop("X", None)
                ad.io.write_elem(file, "X", None)
        else:
            ad.io.write_elem(zarr.open_group(path, mode="r+", use_consolidated=False), "X", None)
            zarr.consolidate_metadata(path)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_data_without_x_stay_without(tmp_path, suffix, how):
    paths = [without_x(tmp_path / f"{name}{suffix}", how, name=name) for name in ("one", "two")]
    for number, inputs in enumerate((paths[:1], paths)):
        collection = DatasetCollection(tmp_path / f"{number}.zarr").add_adatas(
            inputs, shuffle=False, dataset_size="1GB", shuffle_chunk_size=2
        )
        collection.add_adatas(inputs[:1], shuffle=False, shuffle_chunk_size=2)
        (group,) = collection
        assert "X" not in group
        assert (ad.io.read_elem(group["layers/counts"]) != sp.vstack([COUNTS] * (len(inputs) + 1))).nnz == 0


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("backing", ["lazy", "lazy, in one block", "on disk", "dense", "memory"])
def test_a_layer_that_is_loaded_as_x_converts(tmp_path, suffix, backing):
    path = without_x(tmp_path / f"a{suffix}", "absent")
    seen = []

    def load(at: Path) -> ad.AnnData:
        root = h5py.File(at) if suffix == ".h5ad" else zarr.open_group(at, mode="r")
        layer = root["layers/counts"]
        X = {
            "lazy": lambda: ad.experimental.read_elem_lazy(layer, chunks=(2, 3)),
            "lazy, in one block": lambda: ad.experimental.read_elem_lazy(layer),
            "on disk": lambda: ad.io.sparse_dataset(layer),
            "dense": lambda: ad.io.read_elem(layer).toarray(),
            "memory": lambda: ad.io.read_elem(layer),
        }[backing]()
        seen.append(ad.AnnData(X=X, obs=ad.io.read_elem(root["obs"]), var=ad.io.read_elem(root["var"])))
        return seen[-1]

    collection = DatasetCollection(tmp_path / "made.zarr").add_adatas(
        [path], load_adata=load, shuffle=False, shuffle_chunk_size=2
    )
    rows = [batch["X"] for batch in Loader(batch_size=2, shuffle=False, to_torch=False).use_collection(collection)]
    assert (sp.vstack([sp.csr_matrix(x) for x in rows]) != COUNTS).nnz == 0
    # rows per dataset are estimated by what X takes: that of 2 rows makes three datasets
    per_row = (COUNTS.nnz * 8 + (N_OBS + 1) * 4) / N_OBS if backing != "dense" else 12
    made = DatasetCollection(tmp_path / "parts.zarr").add_adatas(
        [path], load_adata=load, shuffle=False, shuffle_chunk_size=1, dataset_size=str(round(2.7 * per_row))
    )
    assert len(list(made)) == 3


def test_x_in_some_inputs_alone_is_refused(tmp_path):
    inputs = {"with": adata("with"), "without": adata("without", X=None, layers={"counts": COUNTS})}
    with pytest.raises(ValueError, match=r"There is no X in without, but in with\. Give all of them X, or none"):
        collect(tmp_path, inputs)
    assert not list((tmp_path / "made.zarr").glob("dataset*"))
    collection = collect(tmp_path, {"with": inputs["with"]})
    with pytest.raises(ValueError, match=r"There is no X in without, but in /dataset_0"):
        collection.add_adatas(["without"], load_adata=inputs.__getitem__, shuffle_chunk_size=2)
