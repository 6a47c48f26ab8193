"""Labels in collections: what is missing in a file stays missing, and values are written as they are or refused."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse as sp

from annbatch import DatasetCollection
from annbatch.io._frames import concat_frames

N_OBS = 6
TEXT = ["x", None, "y", "x", None, "y"]
# the same labels, two of them missing, in all that anndata 0.12 or 0.13 or a `load_adata` gives for such
TEXTS = {
    "objects with None": pd.Series(TEXT, dtype=object),
    "objects with NaN": pd.Series(["x", np.nan, "y", "x", np.nan, "y"], dtype=object),
    "objects with NA": pd.Series(["x", pd.NA, "y", "x", pd.NA, "y"], dtype=object),
    "strings with NA": pd.Series(pd.array(TEXT, dtype="string")),
    "strings with NaN": pd.Series(TEXT, dtype=pd.StringDtype("python", na_value=np.nan)),
    "categories": pd.Series(pd.Categorical(TEXT)),
    "other categories": pd.Series(pd.Categorical(TEXT, categories=["y", "z", "x"], ordered=True)),
    "categories that are strings": pd.Series(pd.Categorical(pd.array(TEXT, dtype="string"))),
}
NONE = {
    "floats": pd.Series(np.full(N_OBS, np.nan)),
    "objects": pd.Series([None] * N_OBS, dtype=object),
    "categories": pd.Series(pd.Categorical([None] * N_OBS)),
    "strings": pd.Series(pd.array([None] * N_OBS, dtype="string")),
}


def adata(name: str, columns: dict[str, Any], **parts: Any) -> ad.AnnData:
    index = [f"{name}{i}" for i in range(N_OBS)]
    obs = pd.DataFrame(
        {key: pd.Series(value).to_numpy() if isinstance(value, list) else value for key, value in columns.items()}
    )
    obs.index = pd.Index(index)
    X = sp.csr_matrix(np.ones((N_OBS, 2), dtype="float32"))
    return ad.AnnData(
        X, obs=obs if len(columns) else pd.DataFrame(index=index), var=pd.DataFrame(index=["a", "b"]), **parts
    )


def collect(folder: Any, inputs: dict[str, ad.AnnData], *, h5ad: bool = False, **settings: Any) -> DatasetCollection:
    """A collection of objects in memory, as a `load_adata` may give them, by name."""
    settings = {"dataset_size": 8, "shuffle_chunk_size": 4, "rng": np.random.default_rng(0), **settings}
    collection = DatasetCollection(folder / "made.zarr", is_collection_h5ad=h5ad)
    return collection.add_adatas(list(inputs), load_adata=inputs.__getitem__, **settings)


def plain(values: Any) -> list[Any]:
    return [None if pd.isna(value) else value for value in values]


def check_stored(collection: DatasetCollection, inputs: dict[str, ad.AnnData]) -> pd.DataFrame:
    """Compare every column with what the inputs hold, for every dataset by itself and all together."""
    expected = pd.concat([each.obs.astype(object) for each in inputs.values()])
    frames = [ad.io.read_elem(group["obs"]) for group in collection]
    for stored in (*frames, collection.obs()):
        for column in expected:
            assert plain(stored[column]) == plain(expected.loc[stored.index, column]), column
    assert len(frames) > 1
    for column in expected:
        assert len({str(frame[column].dtype) for frame in frames}) == 1, column
    return collection.obs().loc[expected.index]


@pytest.mark.parametrize("one", TEXTS)
def test_missing_text_joins_whatever_it_is_held_as(one):
    for two in TEXTS:
        joined = concat_frames([pd.DataFrame({"label": TEXTS[one]}), pd.DataFrame({"label": TEXTS[two]})])["label"]
        assert plain(joined) == TEXT + TEXT, two
        assert joined.dtype != object, two  # anndata writes "nan" for missing objects
    plain_text = pd.DataFrame({"label": [*"xyz"]})
    joined = concat_frames([plain_text, pd.DataFrame({"label": TEXTS[one]}), pd.DataFrame({"other": [1]})])["label"]
    assert plain(joined) == [*"xyz", *TEXT, None]
    assert joined.dtype != object


def test_missing_text_stays_missing_whatever_it_is_stored_as(tmp_path):
    others = dict(zip(TEXTS, reversed(TEXTS.values()), strict=True))
    inputs = {"one": adata("one", TEXTS), "two": adata("two", others)}
    collection = collect(tmp_path, inputs)
    check_stored(collection, inputs)
    # an input of the collection's own, and text without gaps
    more = {"more": adata("more", {kind: [*"xyzzyx"] for kind in TEXTS})}
    collection.add_adatas(list(more), load_adata=more.__getitem__, shuffle_chunk_size=2)
    check_stored(collection, inputs | more)


def test_one_input_is_cleaned_as_several_are(tmp_path):
    inputs = {"one": adata("one", {**TEXTS, **{f"no {kind}": values for kind, values in NONE.items()}})}
    check_stored(collect(tmp_path, inputs, dataset_size=4, shuffle_chunk_size=2), inputs)


@pytest.mark.filterwarnings("ignore:Loading h5ad")
def test_files_hold_missing_text_too(tmp_path):
    others = dict(zip(TEXTS, reversed(TEXTS.values()), strict=True))
    obs = collect(tmp_path, {"one": adata("one", TEXTS), "two": adata("two", others)}, h5ad=True).obs()
    for column in TEXTS:
        assert plain(obs[column]) == [TEXT[int(name[-1])] for name in obs.index]


def test_a_column_without_values_takes_any_type(tmp_path):
    values = {
        "text": TEXTS["strings with NA"],
        "categories": TEXTS["categories"],
        "plain text": [*"abcabc"],
        "whole": np.arange(N_OBS),
        "small": np.arange(N_OBS, dtype="uint8"),
        "numbers": np.arange(N_OBS) / 2,
        "booleans": np.arange(N_OBS) % 2 == 0,
        "nullable": pd.Series(pd.array([1, None] * 3, dtype="Int16")),
    }
    inputs = {
        "one": adata(
            "one", {f"{kind} | {none}": value for kind, value in values.items() for none in NONE if none != "strings"}
        ),
        "two": adata("two", {f"{kind} | {none}": NONE[none] for kind in values for none in NONE if none != "strings"}),
    }
    obs = check_stored(collect(tmp_path, inputs), inputs)
    assert obs["booleans | floats"].dtype == "boolean"
    assert obs["categories | objects"].dtype == "category"


def test_numbers_and_booleans_with_gaps_stay_what_they_are(tmp_path):
    large = 2**60 + 1  # no float of 64 bits
    one = {
        "objects that are booleans": pd.Series([True, None] * 3, dtype=object),
        "objects that are integers": pd.Series([7, None] * 3, dtype=object),
        "objects that are floats": pd.Series([0.5, None] * 3, dtype=object),
        "booleans and nullable ones": pd.Series(pd.array([True, None] * 3, dtype="boolean")),
        "nullable floats": pd.Series(pd.array([0.5, None] * 3, dtype="Float32")),
        "nullable integers and floats": pd.Series(pd.array([3, None] * 3, dtype="Int64")),
        "categories that are integers": pd.Series(pd.Categorical([4, None] * 3)),
        "nullable categories": pd.Series(pd.Categorical(pd.array([4, None] * 3, dtype="Int64"))),
        "categories that are booleans": pd.Series(pd.Categorical([True, None] * 3)),
        "integers and floats as categories": pd.Series(pd.Categorical([1, 2] * 3)),
        "signed and unsigned": np.full(N_OBS, -1),
        "small": np.full(N_OBS, 200, dtype="uint8"),
        "large": np.full(N_OBS, large),
        "large ones with gaps": pd.Series(pd.array([large, None] * 3, dtype="Int64")),
        "large and none": pd.Series(np.full(N_OBS, np.nan)),
        "large in categories": pd.Series(pd.Categorical([large, None] * 3)),
        "large, in one": np.full(N_OBS, large),
        "in one": np.arange(N_OBS),
        "dates as categories": pd.Series(pd.Categorical(pd.to_datetime(["2020-01-01", None] * 3))),
    }
    two = {
        "objects that are booleans": np.array([False] * N_OBS),
        "objects that are integers": np.arange(N_OBS, dtype="int8"),
        "objects that are floats": np.arange(N_OBS, dtype="float32"),
        "booleans and nullable ones": np.array([False] * N_OBS),
        "nullable floats": np.arange(N_OBS),
        "nullable integers and floats": np.array([0.25, np.nan] * 3),
        "categories that are integers": np.arange(N_OBS),
        "nullable categories": pd.Series(pd.array([None, 5] * 3, dtype="Int8")),
        "categories that are booleans": pd.Series([None, False] * 3, dtype=object),
        "integers and floats as categories": pd.Series(pd.Categorical([1.0, 2.5] * 3)),
        "signed and unsigned": np.full(N_OBS, 2**62, dtype="uint64"),
        "small": np.full(N_OBS, -100, dtype="int8"),
        "large": np.arange(N_OBS, dtype="int32"),
        "large ones with gaps": np.arange(N_OBS),
        "large and none": np.full(N_OBS, large),
        "large in categories": np.arange(N_OBS),
        "dates as categories": pd.Series(pd.Categorical(pd.to_datetime(["2021-01-01", None] * 3))),
    }
    inputs = {"one": adata("one", one), "two": adata("two", two)}
    collection = collect(tmp_path, {"one": inputs["one"], "two": inputs["two"]})
    obs = collection.obs()
    for column in one:
        for name in obs.index:
            source = inputs[name[:3]].obs
            value = source.loc[name, column] if column in source else None
            got = obs.loc[name, column]
            assert pd.isna(got) if value is None or pd.isna(value) else got == value, (column, name)
    types = {column: str(obs[column].dtype) for column in one}
    assert types["large, in one"] == "Int64"
    assert types["in one"] == "float64"
    assert types["small"] == "int16"
    assert types["signed and unsigned"] == "int64"
    assert types["objects that are booleans"] == "boolean"


MIXTURES = {
    "whole numbers and text": ([0, 1] * 3, ["0", "1"] * 3),
    "categories, whole numbers and text": (pd.Categorical([0, 1] * 3), pd.Categorical(["0", "1"] * 3)),
    "numbers and text": (np.arange(N_OBS) / 2, pd.Categorical(["0", "1"] * 3)),
    "booleans and text": ([True, False] * 3, ["True", "False"] * 3),
    "booleans and whole numbers": ([True, False] * 3, [2, 3] * 3),
    "dates and text": (pd.Categorical(pd.to_datetime(["2020-01-01"] * N_OBS)), ["2020-01-01"] * N_OBS),
    "numbers, and whole ones that are none": (np.arange(N_OBS) / 2, np.full(N_OBS, 2**60 + 1)),
    "integers past 64 bits": (np.full(N_OBS, -1), np.full(N_OBS, 2**63, dtype="uint64")),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_no_type_holds_is_refused_before_anything_is_written(tmp_path, kind):
    one, two = (adata(name, {"label": values}) for name, values in zip(("one", "two"), MIXTURES[kind], strict=True))
    with pytest.raises(ValueError, match=r"obs column 'label' holds .*(one.*two|two.*one).*load_adata"):
        collect(tmp_path, {"one": one, "two": two})
    assert not list((tmp_path / "made.zarr").glob("dataset*"))
    # nor is what is there touched
    collection = collect(tmp_path, {"one": one})
    before = collection.obs()
    with pytest.raises(ValueError, match=r"obs column 'label' holds .*dataset_0.*load_adata"):
        collection.add_adatas(["two"], load_adata=lambda _: two, shuffle_chunk_size=2)
    pd.testing.assert_frame_equal(DatasetCollection(tmp_path / "made.zarr").obs(), before)


def test_frames_in_obsm_and_var_keep_gaps_as_well(tmp_path):
    var = pd.DataFrame({"symbol": pd.Series(["A", None], dtype=object).to_numpy()}, index=["a", "b"])
    for number, (one, two) in enumerate((("objects with None", "categories"), ("strings with NA", "objects with NaN"))):
        inputs = {}
        for name, kind in (("one", one), ("two", two)):
            inputs[name] = adata(name, {})
            frame = pd.DataFrame({"label": TEXTS[kind].array, name: np.arange(N_OBS)}, index=inputs[name].obs_names)
            inputs[name].obsm["frame"] = frame
            inputs[name].var = var.copy()
        more = adata("new", {})
        more.obsm["frame"] = pd.DataFrame({"label": [*"xyzxyz"]}, index=more.obs_names)
        more.var = var.copy()
        folder = tmp_path / str(number)
        folder.mkdir()
        collection = collect(folder, inputs, merge="first")
        collection.add_adatas(["more"], load_adata=lambda _, more=more: more, shuffle_chunk_size=2, merge="first")
        for group in collection:
            stored = ad.io.read_elem(group)
            frame = stored.obsm["frame"]
            assert list(frame.index) == list(stored.obs_names)
            for name, label in frame["label"].items():
                expected = "xyzxyz"[int(name[-1])] if name.startswith("new") else TEXT[int(name[-1])]
                assert label == expected or (expected is None and pd.isna(label)), (name, label)
            assert frame.loc[[name for name in frame.index if not name.startswith("one")], "one"].isna().all()
            assert plain(stored.var["symbol"]) == ["A", None]


def test_text_in_one_frame_of_obsm_and_numbers_in_another_are_refused(tmp_path):
    inputs = {"one": adata("one", {}), "two": adata("two", {})}
    for (name, each), values in zip(inputs.items(), ([*"abcabc"], np.arange(N_OBS)), strict=True):
        each.obsm["frame"] = pd.DataFrame({"v": values}, index=[f"{name}{i}" for i in range(N_OBS)])
    with pytest.raises(ValueError, match=r"obsm/frame column 'v' holds text in one and whole numbers in two"):
        collect(tmp_path, inputs)
    inputs["two"].obsm["frame"] = np.ones((N_OBS, 2))
    with pytest.raises(ValueError, match="obsm 'frame' is a data frame in one, a matrix in two"):
        collect(tmp_path, inputs)
    collection = collect(tmp_path, {"one": inputs["one"]})
    with pytest.raises(ValueError, match="obsm 'frame' is a data frame in the collection or"):
        collection.add_adatas(["two"], load_adata=inputs.__getitem__, shuffle_chunk_size=2)


def test_joining_to_read_never_refuses():
    frames = [
        pd.DataFrame({"y": [1, 2]}),
        pd.DataFrame({"y": ["1", None]}),
        pd.DataFrame({"y": pd.Categorical([True])}),
    ]
    assert concat_frames(frames)["y"].tolist()[:3] == [1, 2, "1"]
    twins = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert concat_frames([twins, twins]).shape == (2, 2)
