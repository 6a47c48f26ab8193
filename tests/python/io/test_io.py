"""Collections and the sharded writer: what scverse annbatch 0.3.1 stores, and where we keep more."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

from annbatch import DatasetCollection, Loader, write_sharded
from annbatch.io import V1_ENCODING, _opening
from annbatch.io._frames import concat_frames, read_frame
from annbatch.io._sharded import writer_settings
from annbatch.io._sizes import parse_size, stored_bytes_per_row
from support import upstream
from support.upstream_calls import write_input

# Upstream fails, ours converts: given inputs that differ in raw or layers, and given what a `load_adata` has computed.
BEYOND_UPSTREAM = {"create: keys of inputs differ", "collection: bytes of an element that is not stored"}


@pytest.mark.parametrize(
    "name", [name for name in upstream.names("create", "add", "collection") if name not in BEYOND_UPSTREAM]
)
def test_collections_are_those_of_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("name", [n for n in upstream.table()["calls"] if n.startswith("write_sharded")])
def test_written_stores_are_those_of_upstream(name):
    upstream.check(name)


def make(folder: Path, name: str, obs: dict, *, n_obs: int = 20, genes: str = "abc", **parts) -> str:
    """An h5ad file of known values: row `i` of X is `i + 1` in every column."""
    index = [f"{name}{i}" for i in range(n_obs)]
    X = sp.csr_matrix(np.repeat(np.arange(1, n_obs + 1, dtype="float32")[:, None], len(genes), axis=1))
    adata = ad.AnnData(X=X, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(index=list(genes)), **parts)
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path := folder / f"{name}.h5ad")
    return str(path)


def build(folder: Path, inputs: list[str], **settings) -> DatasetCollection:
    settings = {"dataset_size": 20, "shuffle_chunk_size": 4, "rng": np.random.default_rng(0), **settings}
    return DatasetCollection(folder / "made.zarr").add_adatas(inputs, **settings)


def by_name(collection: DatasetCollection, column: str) -> dict[str, object]:
    return collection.obs([column])[column].to_dict()


# ------------------------------------------------------------------------------------------- annotations are not lost


def test_categories_of_all_inputs_survive(tmp_path):
    one = make(tmp_path, "one", {"type": pd.Categorical(["T", "B"] * 10), "only_one": pd.Categorical(["x"] * 20)})
    two = make(tmp_path, "two", {"type": pd.Categorical(["NK", "B"] * 10), "only_two": pd.Categorical(["y"] * 20)})
    collection = build(tmp_path, [one, two])
    for dataset in collection:
        obs = read_frame(dataset["obs"])
        assert list(obs["type"].cat.categories) == ["B", "NK", "T"]
        assert list(obs["only_one"].cat.categories) == ["x"]
        assert list(obs["only_two"].cat.categories) == ["y"]
    types = by_name(collection, "type")
    assert [types[name] for name in ("one0", "one1", "two0", "two1")] == ["T", "B", "NK", "B"]
    only_two = by_name(collection, "only_two")
    assert only_two["two3"] == "y"
    assert pd.isna(only_two["one3"])

    more = make(tmp_path, "more", {"type": pd.Categorical(["DC"] * 20), "only_one": pd.Categorical(["z"] * 20)})
    collection.add_adatas([more], shuffle_chunk_size=4)
    obs = collection.obs()
    assert list(obs["type"].cat.categories) == ["B", "DC", "NK", "T"]
    assert list(obs["only_one"].cat.categories) == ["x", "z"]
    assert obs.loc["more5", "only_one"] == "z"
    assert obs["src_path"].value_counts().to_dict() == {one: 20, two: 20, more: 20}


def test_categories_and_plain_text_mix_without_loss(tmp_path):
    one = make(tmp_path, "one", {"donor": pd.Categorical(["d1", "d2"] * 10)})
    two = make(tmp_path, "two", {"donor": [f"free text {i}" for i in range(20)]})
    donors = by_name(build(tmp_path, [one, two]), "donor")
    assert donors["one1"] == "d2"
    assert donors["two7"] == "free text 7"


def test_gaps_are_kept_as_gaps(tmp_path):
    nullable = pd.array([1, None] * 10, dtype="Int64")
    text = [f"t{i}" for i in range(20)]
    columns = {"nullable": nullable, "count": np.arange(20), "flag": [True, False] * 10, "text": text}
    collection = build(tmp_path, [make(tmp_path, "one", columns), make(tmp_path, "two", {"nullable": nullable})])
    obs = collection.obs()
    assert obs["nullable"].dtype == "Int64"
    assert obs["flag"].dtype == "boolean"
    assert obs.loc["one3", ["nullable", "count", "flag", "text"]].tolist() == [pd.NA, 3, False, "t3"]
    assert obs.loc["two2", "nullable"] == 1
    assert obs.loc["two2", ["count", "flag", "text"]].isna().all()
    # upstream cannot extend a collection that has a nullable column
    extended = collection.add_adatas([make(tmp_path, "more", columns)], shuffle_chunk_size=4).obs()
    assert extended["nullable"].dtype == "Int64"
    assert extended["nullable"].isna().sum() == 30
    assert extended.loc["more4", ["count", "flag", "text"]].tolist() == [4, True, "t4"]


def test_rows_of_all_elements_stay_together(tmp_path):
    inputs = []
    for name, genes in (("one", "abc"), ("two", "cbx")):
        path = make(tmp_path, name, {"v": np.arange(20) + 1.0}, genes=genes)
        adata = ad.read_h5ad(path)
        adata.obs_names = [f"cell{i}" for i in range(20)]  # each occurs twice
        adata.obsm["frame"] = pd.DataFrame({"v": np.arange(20) + 1.0}, index=adata.obs_names)
        adata.obsm["dense"] = adata.obs[["v"]].to_numpy()
        adata.layers["twice"] = adata.X * 2
        adata.raw = adata.copy()
        adata.write_h5ad(path)
        inputs.append(path)
    for settings in ({}, {"shuffle": False}, {"groupby": "v"}):
        folder = tmp_path / str(len(settings)) / str(*settings or ["-"])
        collection = build(folder, inputs, **settings)
        for dataset in collection:
            adata = ad.io.read_elem(dataset)
            value = adata.obs["v"].to_numpy()
            assert (adata[:, "b"].X.toarray().ravel() == value).all()
            assert (adata[:, "b"].layers["twice"].toarray().ravel() == 2 * value).all()
            assert (adata.raw[:, "b"].X.toarray().ravel() == value).all()
            assert (adata.obsm["dense"].ravel() == value).all()
            assert (adata.obsm["frame"]["v"].to_numpy() == value).all()
            assert list(adata.obsm["frame"].index) == list(adata.obs_names)
            from_one = adata.obs["src_path"].to_numpy() == inputs[0]
            assert (adata[from_one, "x"].X.toarray() == 0).all()
            assert (adata[~from_one, "a"].X.toarray() == 0).all()
            if "groupby" in settings:
                assert (np.diff(value) >= 0).all()
        names = collection.obs(["v"]).index
        assert sorted(names) == sorted(f"cell{i}{suffix}" for i in range(20) for suffix in ("", "-1"))


def test_inputs_whose_elements_differ_are_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = [write_input("one.h5ad", 30, 1, "abc"), write_input("two.h5ad", 30, 2, "abc")]
    adata = ad.read_h5ad("two.h5ad")
    adata.raw = adata.copy()
    del adata.layers["double"]
    del adata.obsm["pca"]
    adata.write_h5ad("two.h5ad")
    with pytest.warns(UserWarning, match="not present in all anndatas") as caught:
        collection = build(tmp_path, inputs)
    found = [w for w in caught if str(w.message).startswith("Found ")]
    assert [str(w.message).split()[1] for w in found] == ["raw", "layers", "obsm"]
    assert {w.filename for w in found} == {__file__}
    for dataset in collection:
        stored = ad.io.read_elem(dataset)
        lacking = stored.obs["src_path"] == "two.h5ad"
        double = stored.layers["double"]
        double = double.toarray() if sp.issparse(double) else double
        assert np.allclose(double[~lacking], stored[~lacking].X.toarray() * 2)
        assert np.isnan(stored.obsm["pca"][lacking]).all()
        assert not np.isnan(stored.obsm["pca"][~lacking]).any()
        assert stored.raw is None


def test_matrices_keep_their_dtype(tmp_path):
    for name, genes in (("one", "abc"), ("two", "bcd")):
        path = make(tmp_path, name, {}, genes=genes)
        adata = ad.read_h5ad(path)
        adata.X = adata.X.toarray().astype("float32")
        adata.layers["counts"] = sp.csr_matrix(adata.X.astype("uint16"))
        adata.write_h5ad(path)
    collection = build(tmp_path, [tmp_path / "one.h5ad", tmp_path / "two.h5ad"])
    collection.add_adatas([tmp_path / "two.h5ad"], shuffle_chunk_size=4)
    for dataset in collection:
        assert dataset["X"].dtype == "float32"
        assert dataset["layers/counts/data"].dtype == "uint16"


# ------------------------------------------------------------------------------------------------------------ opening


class CountingReads(zarr.storage.WrapperStore):
    """A store that remembers which keys were read."""

    def __init__(self, store):
        super().__init__(store)
        self.read = []

    async def get(self, key, prototype, byte_range=None):
        self.read.append(key)
        return await super().get(key, prototype, byte_range)

    def with_read_only(self, read_only=False):
        return self


def test_obs_reads_only_the_columns_asked_for(tmp_path):
    columns = {"type": pd.Categorical(["T", "B"] * 10), **{f"c{i}": np.arange(20.0) for i in range(5)}}
    build(tmp_path, [make(tmp_path, "one", columns)])
    store = CountingReads(zarr.storage.LocalStore(tmp_path / "made.zarr"))
    collection = DatasetCollection(zarr.open_group(store, mode="r"))
    obs = collection.obs(["c3", "type", "nowhere"])
    assert list(obs.columns) == ["c3", "type"]
    touched = {key.split("/obs/")[1].split("/")[0] for key in store.read if "/obs/" in key and "/c/" in key}
    assert touched == {"_index", "c3", "type"}
    assert not [key for key in store.read if "/X/" in key and "/c/" in key]


def test_opening_reads_the_metadata_of_all_datasets_at_once(tmp_path):
    build(tmp_path, [make(tmp_path, "one", {"v": np.arange(20)}, n_obs=20)], dataset_size=4, shuffle_chunk_size=2)
    store = CountingReads(zarr.storage.LocalStore(tmp_path / "made.zarr"))
    collection = DatasetCollection(zarr.open_group(store, mode="r"))
    assert not collection.is_empty
    assert len([group["X/data"].shape for group in collection]) == 5
    assert sorted(collection.obs(["v"])["v"]) == list(range(20))
    documents = [key for key in store.read if "/c/" not in key and not key.endswith("/c")]
    assert not [key for key in documents if key.startswith("dataset_")]


def test_groups_that_were_just_written_can_be_edited(tmp_path):
    path = make(tmp_path, "one", {})
    opened_before = DatasetCollection(tmp_path / "made.zarr")
    build(tmp_path, [path])
    # new, extended, opened with consolidated metadata and extended
    for collection in (opened_before.add_adatas([path]), DatasetCollection(tmp_path / "made.zarr").add_adatas([path])):
        (group,) = collection
        wide = ad.io.read_elem(group["X"]).astype("float64")
        with ad.settings.override(**writer_settings()):
            ad.io.write_elem(group, "X", wide)
            ad.io.write_elem(group["layers"], "twice", wide * 2)
        (seen,) = collection
        assert seen["X/data"].dtype == "float64"
        assert (ad.io.read_elem(seen["layers/twice"]) != wide * 2).nnz == 0
        batch = next(
            iter(Loader(batch_size=2, shuffle=False, layers=["twice"], to_torch=False).use_collection(collection))
        )
        assert (batch["layers"]["twice"] != batch["X"] * 2).nnz == 0
        assert group == zarr.open_group(tmp_path / "made.zarr")["dataset_0"] != group["X"]


def test_a_collection_sees_what_it_just_wrote(tmp_path):
    build(tmp_path, [make(tmp_path, "one", {})])
    collection = DatasetCollection(tmp_path / "made.zarr")  # opened with consolidated metadata
    assert "consolidated_metadata" in (tmp_path / "made.zarr/zarr.json").read_text()
    for number in range(2):
        collection.add_adatas([make(tmp_path, f"more{number}", {})], shuffle_chunk_size=4)
        assert len(collection.obs()) == sum(g["X/indptr"].shape[0] - 1 for g in collection) == 40 + 20 * number
    assert list(collection) == list(DatasetCollection(tmp_path / "made.zarr"))


def test_a_collection_inside_a_larger_store(tmp_path):
    root = zarr.open_group(tmp_path / "all.zarr", zarr_format=3)
    collection = DatasetCollection(root.create_group("cells")).add_adatas(
        [make(tmp_path, "one", {})], dataset_size=10, shuffle_chunk_size=2
    )
    assert [group.name for group in collection] == ["/cells/dataset_0", "/cells/dataset_1"]
    assert not DatasetCollection(zarr.open_group(tmp_path / "all.zarr")["cells"]).is_empty
    # a group whose store has no group at its root
    lone = zarr.open_group(zarr.storage.LocalStore(tmp_path / "lone"), path="a/b", zarr_format=3)
    assert not DatasetCollection(lone).add_adatas([tmp_path / "one.h5ad"]).is_empty


def test_only_numbered_datasets_count_and_in_order_of_number(tmp_path):
    build(tmp_path, [make(tmp_path, "one", {}, n_obs=24)], dataset_size=2, shuffle_chunk_size=1)
    group = zarr.open_group(tmp_path / "made.zarr")
    for name in ("dataset_", "dataset_1_old", "other"):
        group.create_group(name)
    assert DatasetCollection(group)._dataset_keys == [f"dataset_{i}" for i in range(12)]


def test_interrupted_writing_leaves_an_empty_collection(tmp_path):
    paths = [make(tmp_path, "one", {}), make(tmp_path, "two", {})]

    def damaged(block):
        raise OSError("cannot be read")

    def load(path):
        adata = _opening.load_lazily(path)
        if "two" in path:
            adata.X = adata.X.map_blocks(damaged, dtype="float32", meta=adata.X._meta)
        return adata

    with pytest.raises(OSError, match="cannot be read"):
        build(tmp_path, paths, load_adata=load, shuffle=False)
    collection = DatasetCollection(tmp_path / "made.zarr")
    assert collection._dataset_keys == ["dataset_0"]
    assert collection.is_empty
    collection.add_adatas(paths, dataset_size=20, shuffle_chunk_size=4)
    assert not collection.is_empty
    assert V1_ENCODING.items() <= dict(zarr.open_group(tmp_path / "made.zarr").attrs).items()


def test_each_input_is_opened_once(tmp_path):
    opened = []

    def load(path):
        opened.append(Path(path).name)
        return ad.read_h5ad(path)

    paths = [make(tmp_path, "one", {"v": [1] * 20}), make(tmp_path, "two", {"v": [2] * 20})]
    build(tmp_path, (path for path in paths), load_adata=load, groupby="v")
    assert opened == ["one.h5ad", "two.h5ad"]


def test_one_input_twice(tmp_path):
    path = make(tmp_path, "one", {})
    obs = build(tmp_path, [path, path], dataset_size=100).obs()
    assert obs.index.is_unique
    assert len(obs) == 40
    assert list(obs["src_path"].cat.categories) == [path]


@pytest.mark.parametrize("load", [ad.read_h5ad, lambda p: ad.read_h5ad(p, backed="r"), ad.experimental.read_lazy])
def test_other_ways_to_open_give_the_same(tmp_path, load):
    paths = [make(tmp_path, n, {"t": pd.Categorical([n, "x"] * 10), "v": np.arange(20.0)}) for n in ("one", "two")]
    expected = build(tmp_path / "lazy", paths)
    got = build(tmp_path / "other", paths, load_adata=load)
    pd.testing.assert_frame_equal(got.obs(), expected.obs(), check_dtype=False)
    for dataset, other in zip(got, expected, strict=True):
        assert (ad.io.read_elem(dataset["X"]) != ad.io.read_elem(other["X"])).nnz == 0


def test_old_files_are_read(tmp_path):
    # written in 2018: annotations and embeddings as compound arrays, no encodings; upstream cannot open it
    path = str(Path(find_spec("scanpy").origin).parent / "datasets/10x_pbmc68k_reduced.h5ad")
    for dataset_size in (300, "1MB"):
        collection = DatasetCollection(tmp_path / f"{dataset_size}.zarr")
        collection.add_adatas([path], dataset_size=dataset_size, shuffle_chunk_size=50)
        expected = ad.read_h5ad(path)
        assert len(collection._dataset_keys) > 1
        for dataset in collection:
            stored = ad.io.read_elem(dataset)
            same = expected[stored.obs_names]
            assert (stored.X == same.X).all()
            assert (stored.raw.X != same.raw.X).nnz == 0
            assert stored.obs["bulk_labels"].tolist() == same.obs["bulk_labels"].tolist()
            assert (stored.obsm["X_pca"] == same.obsm["X_pca"]).all()


def test_h5ad_collections_cannot_be_extended(tmp_path):
    path = make(tmp_path, "one", {"v": np.arange(20)})
    with pytest.warns(UserWarning, match="Loading h5ad is currently not supported"):
        collection = DatasetCollection(tmp_path / "files", is_collection_h5ad=True)
    collection.add_adatas([path], dataset_size=10, shuffle_chunk_size=2)
    assert sorted(collection.obs(["v"])["v"]) == list(range(20))
    with pytest.raises(ValueError, match="Cannot iterate through folder of h5ad files"):
        collection.add_adatas([path], shuffle_chunk_size=2)
    assert len(collection.obs()) == 20


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("42", 42),
        ("13b", 13),
        ("5 bytes", 5),
        ("1KB", 1024),
        ("1 KiB", 1024),
        ("1 kilobyte", 1024),
        ("1.5 GB", 3 * 2**29),
        ("2gb", 2**31),
        ("2 G", 2**31),
        ("20GB", 20 * 2**30),
        (" 3 megabytes ", 3 * 2**20),
        ("9007199254740993TB", 9007199254740993 * 2**40),
    ],
)
def test_sizes_are_read(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "1 GB GB", "-1", "1,5GB", "2 parsecs", "1e3", "5 kg"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="Failed to parse size"):
        parse_size(text)


def test_estimated_bytes_are_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_input("one.h5ad", 50, 1, "abcdefgh")
    with h5py.File("one.h5ad") as file:
        adata = ad.read_h5ad("one.h5ad")
        sparse = sum(part.nbytes for m in (adata.X, adata.layers["double"]) for part in (m.data, m.indices, m.indptr))
        obs = adata.obs["score"].to_numpy().nbytes + adata.obs["type"].cat.codes.to_numpy().nbytes
        expected = (sparse + adata.obsm["pca"].nbytes + obs) / 50
        assert stored_bytes_per_row(adata, file) == pytest.approx(expected)
        del adata.layers["double"]
        assert stored_bytes_per_row(adata, file) < expected


# ----------------------------------------------------------------------------------------------------- write_sharded


def test_old_zarr_format_is_refused(tmp_path):
    group = zarr.open_group(tmp_path / "old.zarr", zarr_format=2)
    with pytest.raises(ValueError, match="Zarr format 3"):
        write_sharded(group, ad.AnnData(X=np.ones((3, 2), dtype="float32")))


def test_what_is_written_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    X = sp.random(103, 31, density=0.2, format="csr", dtype="float32", random_state=0)
    X[5:9] = 0  # empty rows
    adata = ad.AnnData(
        X=X.tocsr(),
        obsm={
            "image": rng.random((103, 4, 5)).astype("float32"),
            "frame": pd.DataFrame({"v": rng.random(103)}, index=list(map(str, range(103)))),
        },
        layers={"columns": X.tocsc()},
        obsp={"near": sp.eye_array(103, format="csr")},
        uns={"deep": {"er": np.arange(3)}},
    )
    group = zarr.open_group(tmp_path / "x.zarr", zarr_format=3)
    write_sharded(group, adata, n_obs_per_chunk=10, shard_size=30, key="here")
    back = ad.io.read_elem(group["here"])
    assert (back.X != adata.X).nnz == 0
    assert (back.layers["columns"].tocsr() != adata.X).nnz == 0
    assert (back.obsm["image"] == adata.obsm["image"]).all()
    assert (back.obsm["frame"]["v"].to_numpy() == adata.obsm["frame"]["v"].to_numpy()).all()
    assert (back.uns["deep"]["er"] == np.arange(3)).all()
    image = group["here/obsm/image"]
    assert (image.chunks, image.shards) == ((10, 4, 5), (30, 4, 5))
    assert group["here/X/indices"].dtype == "uint8"
    per_chunk, per_shard = group["here/X/data"].chunks[0], group["here/X/data"].shards[0]
    assert per_chunk == int(10 * adata.X.nnz / 103)
    assert per_shard % per_chunk == 0
    assert per_shard <= 30 * adata.X.nnz / 103


def test_a_matrix_without_entries_can_be_written(tmp_path):
    group = zarr.open_group(tmp_path / "x.zarr", zarr_format=3)
    write_sharded(group, ad.AnnData(X=sp.csr_matrix((5, 3), dtype="float32")), key="empty")
    assert ad.io.read_elem(group["empty"]).X.shape == (5, 3)


# ------------------------------------------------------------------------------------------------------------ frames


def test_frames_join_to_the_narrowest_dtype_that_holds_all():
    one = pd.DataFrame(
        {"i": [1, 2], "f": [True, False], "c": pd.Categorical(["a", "b"]), "x": [1.5, 2]}, index=["p", "q"]
    )
    two = pd.DataFrame({"i": [3], "c": pd.Categorical(["z"]), "x": [4]}, index=["r"])
    joined = concat_frames([one, two])
    assert list(joined.index) == ["p", "q", "r"]
    assert list(joined.columns) == ["i", "f", "c", "x"]
    assert joined["i"].dtype == "int64"
    assert joined["x"].dtype == "float64"
    assert joined["f"].tolist() == [True, False, pd.NA]
    assert list(joined["c"].cat.categories) == ["a", "b", "z"]
    ordered = pd.CategoricalDtype(["low", "high"], ordered=True)
    frames = [pd.DataFrame({"c": pd.Categorical(values, dtype=ordered)}) for values in (["low"], ["high"])]
    assert concat_frames(frames)["c"].dtype == ordered
    assert concat_frames([one]).equals(one)


def test_lazy_arrays_are_read_block_by_block(tmp_path):
    path = make(tmp_path, "one", {}, n_obs=2500)
    lazy = _opening.load_lazily(path)
    assert lazy.X.numblocks[0] > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = _opening.to_memory(lazy[np.arange(990, 1010)].X)
    assert (matrix.toarray()[:, 0] == np.arange(991, 1011)).all()
