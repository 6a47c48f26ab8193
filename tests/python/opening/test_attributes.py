"""Texts in attributes, in the forms that other languages write them, in every place where one is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from h5py import h5a, h5d, h5s, h5t
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch._data.attributes import columns_of, index_of, read_element, text_of, texts_of
from annbatch._data.hdf5 import SharedReader
from support.cells import densify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IN_ORDER = {"shuffle": False, "batch_size": 4, "chunk_size": 4, "preload_nchunks": 2}


def fixed(padding: int, charset: int = h5t.CSET_UTF8, more: int = 3) -> Callable[[h5py.Group, str, Any], None]:
    """Write texts of a fixed length, so padded, with room for some bytes more."""

    def put(part: h5py.Group, name: str, value: str | list[str]) -> None:
        values = np.array([text.encode() for text in ([value] if isinstance(value, str) else value)], "S")
        kind = h5t.TypeID.copy(h5t.C_S1)
        kind.set_size(max(values.dtype.itemsize, 1) + more)
        kind.set_strpad(padding)
        kind.set_cset(charset)
        space = h5s.create(h5s.SCALAR) if isinstance(value, str) else h5s.create_simple(values.shape)
        attribute = h5a.create(part.id, name.encode(), kind, space)
        # as in the file: libhdf5 pads what it converts
        pad = b" " if padding == h5t.STR_SPACEPAD else b"\0"
        padded = np.array([text.ljust(kind.get_size(), pad) for text in values.ravel()], f"S{kind.get_size()}")
        attribute.write(padded.reshape(space.get_simple_extent_dims()), kind)

    return put


def variable(part: h5py.Group, name: str, value: str | list[str]) -> None:
    part.attrs[name] = np.array(value, dtype=h5py.string_dtype()) if isinstance(value, list) else value


def lists(part: h5py.Group, name: str, value: str | list[str]) -> None:
    """As R writes them: one text is a list of one."""
    fixed(h5t.STR_NULLPAD)(part, name, [value] if isinstance(value, str) else value)


def singles(part: h5py.Group, name: str, value: str | list[str]) -> None:
    """A list of one is a text."""
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    variable(part, name, single)


def variable_lists(part: h5py.Group, name: str, value: str | list[str]) -> None:
    """As `lists`, of variable length."""
    variable(part, name, [value] if isinstance(value, str) else value)


FORMS = {
    "variable": variable,
    "lists of variable length": variable_lists,
    "null-terminated": fixed(h5t.STR_NULLTERM),
    "padded with zeros": fixed(h5t.STR_NULLPAD, h5t.CSET_ASCII),
    "no room to spare": fixed(h5t.STR_NULLPAD, more=0),
    "padded with blanks": fixed(h5t.STR_SPACEPAD),
    "lists": lists,
    "singles": singles,
}


def rewrite(path: Path, put: Callable[[h5py.Group, str, Any], None]) -> None:
    """Write all texts in attributes of a file in another form."""

    def look(_: str, part: h5py.Group | h5py.Dataset) -> None:
        for name, value in list(part.attrs.items()):
            if name == "column-order" and len(value) == 0:
                continue
            if isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype == object):
                del part.attrs[name]
                put(part, name, value if isinstance(value, str) else list(value))

    with h5py.File(path, "r+") as file:
        look("", file)
        file.visititems(look)


def make() -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(1.0, (9, 4)).astype("f4")
    obs = pd.DataFrame(
        {
            "größe": np.arange(9.0),
            "tissue": pd.Categorical(["b", None, "a"] * 3, categories=["b", "a"]),
            "age": pd.array([1, None, 3] * 3, dtype="Int64"),
            "is_doublet": pd.array([True, None, False] * 3, dtype="boolean"),
        },
        index=pd.Index([f"cell{k}" for k in range(9)], name="barcode"),
    )
    var = pd.DataFrame({"symbol": ["A", "B", "C", "D"]}, index=[f"gene{k}" for k in range(4)])
    adata = ad.AnnData(
        sp.csr_matrix(counts), obs=obs, var=var, layers={"dense": counts * 2, "sparse": sp.csr_matrix(counts)}
    )
    adata.obsm["pca"] = counts[:, :2].astype("f8")
    return adata


@pytest.mark.parametrize("form", FORMS)
def test_annotations_of_a_file_are_the_same_whatever_form_its_texts_have(tmp_path: Path, form: str) -> None:
    adata = make()
    adata.write_h5ad(tmp_path / "a.h5ad")
    expected = ad.read_h5ad(tmp_path / "a.h5ad")
    rewrite(tmp_path / "a.h5ad", FORMS[form])
    with h5py.File(tmp_path / "a.h5ad") as file:
        for name, frame in (("obs", expected.obs), ("var", expected.var)):
            pd.testing.assert_frame_equal(SharedReader().read(file[name]), frame)
            pd.testing.assert_frame_equal(read_element(file[name]), frame)
        for column in expected.obs:
            pd.testing.assert_series_equal(
                pd.Series(SharedReader().read(file[f"obs/{column}"])),
                expected.obs[column].reset_index(drop=True),
                check_names=False,
            )
        assert text_of(file["X"], "encoding-type") == "csr_matrix"
        assert columns_of(file["obs"]) == list(expected.obs)
        assert index_of(file["obs"]) == "barcode"


# the core takes no lists of texts of variable length
@pytest.mark.parametrize("form", [form for form in FORMS if form != "variable"])
def test_loaders_and_collections_read_files_of_every_form(tmp_path: Path, form: str) -> None:
    adata = make()
    paths = [tmp_path / "other.h5ad", tmp_path / "as_anndata.h5ad"]
    for path in paths:
        adata.write_h5ad(path)
    rewrite(paths[0], FORMS[form])
    expected = ad.read_h5ad(paths[1])
    obs, x = pd.concat([expected.obs] * 2), np.concatenate([densify(adata.X)] * 2)
    for options in ({}, {"obs_columns": ["tissue", "age"]}, {"layer": "dense"}, {"layer": "sparse", "obsm": ["pca"]}):
        batches = list(annbatch.open(paths, **options, **IN_ORDER))
        factor = 2 if options.get("layer") == "dense" else 1
        np.testing.assert_array_equal(np.concatenate([densify(batch["X"]) for batch in batches]), factor * x)
        pd.testing.assert_frame_equal(
            pd.concat([batch["obs"] for batch in batches]), obs[options.get("obs_columns", list(obs))]
        )
        if "obsm" in options:
            np.testing.assert_array_equal(np.concatenate([batch["obsm"]["pca"] for batch in batches]), x[:, :2])
    np.testing.assert_array_equal(
        np.concatenate([densify(batch["X"]) for batch in Loader(**IN_ORDER).add_adatas(paths)]), x
    )
    collection = DatasetCollection(tmp_path / "all.zarr").add_adatas(paths, shuffle=False)
    read = ad.io.read_elem(next(iter(collection)))
    np.testing.assert_array_equal(densify(read.X), x)
    np.testing.assert_array_equal(densify(read.layers["sparse"]), x)
    pd.testing.assert_frame_equal(
        read.obs[list(obs)].reset_index(drop=True), obs.reset_index(drop=True), check_dtype=False
    )


@pytest.mark.parametrize("columns", ["one", "none, as floats", "none, as nothing", "none said", "one, not said"])
def test_frames_of_few_columns(tmp_path: Path, columns: str) -> None:
    obs = make().obs[["größe"] if columns.startswith("one") else []]
    ad.AnnData(sp.csr_matrix((9, 2), dtype="f4"), obs=obs).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        attributes = file["obs"].attrs
        if columns == "one":
            # a vector of one is no vector in R
            attributes["column-order"] = "größe"
        elif columns == "none, as floats":
            attributes["column-order"] = np.array([])
        elif columns == "none, as nothing":
            attributes["column-order"] = h5py.Empty("f4")
        else:
            del attributes["column-order"]
    with h5py.File(tmp_path / "a.h5ad") as file:
        pd.testing.assert_frame_equal(SharedReader().read(file["obs"]), obs, check_column_type=False)
    loader = annbatch.open(tmp_path / "a.h5ad", **IN_ORDER)
    batches = [batch["obs"] for batch in loader]
    if len(obs.columns):
        pd.testing.assert_frame_equal(pd.concat(batches), obs)
    else:
        assert batches == [None] * 3


def test_blanks_at_the_end_of_a_name_are_of_the_name_if_something_has_it(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        frame = file.create_group("frame")
        frame["a "], frame["b"] = [1], [2]
        for name in ("column-order", "_index"):
            frame.attrs[name] = np.array(
                ["a ", "b "] if name == "column-order" else "b  ", h5py.string_dtype("ascii", 4)
            )
        assert columns_of(frame) == ["a ", "b"]
        assert index_of(frame) == "b"


def bits(parent: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write a dataset of 8-bit bitfields, which HDF5.jl makes of Bool."""
    made = h5d.create(parent.id, name.encode(), h5t.NATIVE_B8, h5s.create_simple(values.shape))
    made.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(values), h5t.NATIVE_B8)
    variable(h5py.Dataset(made), "encoding-type", "array")
    variable(h5py.Dataset(made), "encoding-version", "0.2.0")


def test_columns_of_bits_are_what_they_are_to_anndata(tmp_path: Path) -> None:
    make().write_h5ad(tmp_path / "a.h5ad")
    flags = np.array([0, 1, 1] * 3, "u1")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        bits(file["obs"], "flag", flags)
        file["obs"].attrs["column-order"] = np.array(["tissue", "flag"], "S6")
    expected = ad.read_h5ad(tmp_path / "a.h5ad").obs
    assert expected["flag"].dtype == np.uint8
    for options in ({}, {"obs_columns": ["flag"]}):
        obs = pd.concat([batch["obs"] for batch in annbatch.open(tmp_path / "a.h5ad", **options, **IN_ORDER)])
        pd.testing.assert_frame_equal(obs, expected[list(obs)])
        np.testing.assert_array_equal(obs["flag"], flags)
    codes = [batch["obs"]["flag"] for batch in annbatch.open(tmp_path / "a.h5ad", obs="codes", **IN_ORDER)]
    np.testing.assert_array_equal(np.concatenate(codes), flags)


@pytest.mark.parametrize("form", ["null-terminated", "padded with blanks", "lists"])
def test_files_of_old_anndata_and_mudata_name_their_kind_in_every_form(tmp_path: Path, form: str) -> None:
    adata = make()
    put = FORMS[form]
    path = tmp_path / "old.h5ad"
    adata.obs = adata.obs[["größe", "tissue"]]
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        x = file["X"]
        shape = x.attrs["shape"]
        for name in list(x.attrs):
            del x.attrs[name]
        put(x, "h5sparse_format", "csr")
        x.attrs["h5sparse_shape"] = shape
        put(file, "encoding-type", "MuData") if "encoding-type" not in file.attrs else None
    batches = list(annbatch.open(path, **IN_ORDER))
    np.testing.assert_array_equal(np.concatenate([densify(batch["X"]) for batch in batches]), densify(adata.X))
    with h5py.File(tmp_path / "a.h5mu", "w") as file:
        file.create_group("mod/rna")
        put(file, "encoding-type", "MuData")
    with pytest.raises(KeyError, match=r"is a MuData of the modalities \['rna'\]"):
        annbatch.open(tmp_path / "a.h5mu")


@pytest.mark.parametrize("value", [3, h5py.Empty("f4"), np.array(["csr_matrix", "array"], h5py.string_dtype())])
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, value: Any) -> None:
    make().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X"].attrs["encoding-type"] = value
    with pytest.raises((TypeError, ValueError), match=r"a\.h5ad.*X"):
        annbatch.open(tmp_path / "a.h5ad")


def test_zarr_attributes_are_read_by_the_same_function(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.attrs.update({"one": "a ", "list": ["b"], "two": ["b", "c"], "number": 3, "nothing": []})
    assert text_of(group, "one") == "a"
    assert text_of(group, "list") == "b"
    assert text_of(group, "absent") is None
    assert texts_of(group, "two") == ["b", "c"]
    assert texts_of(group, "nothing") == []
    with pytest.raises(ValueError, match=r"a\.zarr.*the attribute two has the texts"):
        text_of(group, "two")
    with pytest.raises(ValueError, match=r"a\.zarr.*the attribute number is 3; expected text"):
        texts_of(group, "number")
