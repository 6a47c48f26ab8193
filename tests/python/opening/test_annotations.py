"""Annotations of files: read and joined as anndata does, whoever wrote them; what is alike in many is held once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse as sp

import annbatch
from annbatch._core import ops as _ops
from annbatch._data import hdf5 as _hdf5
from annbatch._data.hdf5 import SharedReader
from annbatch._data.joins import join_annotations
from support.genes import GENES, concat, make, shuffled


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
