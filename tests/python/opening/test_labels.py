"""Labels that are missing stay missing, and one label is one code, however the columns of the files are stored."""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse as sp

import annbatch
from annbatch import Loader
from annbatch._splits.splits import make_splits

if TYPE_CHECKING:
    from pathlib import Path

IN_ORDER = {"shuffle": False, "batch_size": 4, "chunk_size": 4, "preload_nchunks": 2}

TEXT = ["a", None, "b", "a", None, "c"]
COLUMNS = {
    "categories": lambda: pd.Categorical(TEXT),
    "other categories": lambda: pd.Categorical(["c", None, "d", "a", "d", np.nan]),
    "all missing": lambda: pd.Categorical([None] * 6, categories=["a"]),
    "no categories": lambda: pd.Categorical([None] * 6),
    "strings": lambda: np.array(list("abcdab"), dtype=object),
    "strings, NA": lambda: pd.array(TEXT, dtype="string"),
    "strings, NaN": lambda: pd.array(TEXT, dtype=pd.StringDtype(na_value=np.nan)),
    "no column": lambda: None,
    "Int64": lambda: pd.array([1, None, 3, 4, 5, None], dtype="Int64"),
    "UInt8": lambda: pd.array([1, None, 3, 4, 5, None], dtype="UInt8"),
    "integers": lambda: np.arange(6),
    "floats": lambda: np.array([1, np.nan, 2, 3, 4, 5]),
    "boolean": lambda: pd.array([True, None, False] * 2, dtype="boolean"),
    "bool": lambda: np.array([True, False] * 3),
    "integer categories": lambda: pd.Categorical([1, None, 2, 1, 2, None]),
    "boolean categories": lambda: pd.Categorical([True, None, False] * 2),
}


def values(column: Any) -> list[Any]:
    return [None if pd.isna(value) else value for value in column]


def write(path: Path, column: Any) -> Path:
    names = [f"{path.stem}{k}" for k in range(6)]
    obs = pd.DataFrame({"number": np.arange(6)} | ({} if column is None else {"y": column}), index=names)
    adata = ad.AnnData(sp.csr_matrix(np.ones((6, 2), "f4")), obs=obs, var=pd.DataFrame(index=["g", "h"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(ad.settings, "allow_write_nullable_strings"):
            ad.settings.allow_write_nullable_strings = True
        how = {"convert_strings_to_categoricals": False}
        adata.write_h5ad(path, **how) if path.suffix == ".h5ad" else adata.write_zarr(path, **how)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Each kind of column in an h5ad file and in a Zarr store."""
    folder = tmp_path_factory.mktemp("labels")
    before = getattr(ad.settings, "allow_write_nullable_strings", None)
    try:
        return {
            name: [write(folder / f"{k}{suffix}", make()) for suffix in (".h5ad", ".zarr")]
            for k, (name, make) in enumerate(COLUMNS.items())
        }
    finally:
        if before is not None:
            ad.settings.allow_write_nullable_strings = before


@pytest.mark.parametrize("first", COLUMNS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_missing_stays_missing_in_frames_and_codes(stored: dict[str, list[Path]], first: str) -> None:
    start = list(COLUMNS).index(first)
    for number, second in enumerate(list(COLUMNS)[start:], start):
        # each pair once, in one order or the other
        names = (first, second) if number % 2 else (second, first)
        paths = [stored[names[0]][0], stored[names[1]][1]]
        parts = [[None] * 6 if (made := COLUMNS[name]()) is None else values(made) for name in names]
        expected = [*parts[0], *parts[1]]
        joined = annbatch.open(paths, obs="codes", **IN_ORDER)
        added = Loader(obs="codes", **IN_ORDER).add_adatas(paths)
        for loader in (joined, added):
            assert first == second == "no column" or values(pd.concat(loader._obs)["y"]) == expected
        loader = added if number % 3 else joined
        codes = [batch["obs"].get("y") for batch in loader]
        if codes[0] is None:
            continue
        codes = np.concatenate(codes)
        if "y" in loader.obs_categories:
            categories = loader.obs_categories["y"]
            assert not categories.isna().any()
            assert not {"nan", "<NA>", "None"} & {str(category) for category in categories}
            assert [None if code < 0 else categories[code] for code in codes] == expected
        else:
            assert values(codes) == expected


def test_dates_with_gaps_stay_dates_with_gaps() -> None:
    obs = pd.DataFrame({"day": pd.to_datetime(["2020-01-01", None, "2021-05-06"])}, index=list("xyz"))
    adata = ad.AnnData(np.ones((3, 2), "f4"), obs=obs)
    loader = Loader(**IN_ORDER).add_adata(adata)
    pd.testing.assert_frame_equal(pd.concat([batch["obs"] for batch in loader]), obs)
    with pytest.raises(TypeError, match="no numbers for column 'day'"):
        next(iter(Loader(obs="codes", **IN_ORDER).add_adata(adata)))["obs"]


# ---------------------------------------------------------------------------------------------- one label, two codes

TWINS = {
    "0": (pd.Categorical([0, 1] * 3), pd.Categorical(["0", "x"] * 3)),
    "1": (np.array([1, 2] * 3), pd.Categorical(["1", None] * 3)),
    "2": (np.array([2.0, np.nan] * 3), np.array(["2", "x"] * 3, dtype=object)),
    "True": (np.array([True, False] * 3), pd.Categorical(["True", "x"] * 3)),
    "3": (pd.array([3, None] * 3, dtype="Int64"), pd.Categorical(["3", "x"] * 3)),
}


@pytest.mark.parametrize("label", TWINS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_label_that_is_a_number_here_and_text_there_is_warned_of_once(
    tmp_path: Path, label: str, turned: bool
) -> None:
    columns = TWINS[label][::-1] if turned else TWINS[label]
    paths = [write(tmp_path / f"{k}.h5ad", column) for k, column in enumerate([*columns, *columns])]
    number, text = (1, 0) if turned else (0, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            annbatch.open(paths, **IN_ORDER)
    (message,) = {str(warning.message) for warning in caught if "obs column 'y'" in str(warning.message)}
    assert len([warning for warning in caught if str(warning.message) == message]) == 1
    for part in (f"{number}.h5ad and text", f"text in {tmp_path}/{text}.h5ad", ".astype(str)"):
        assert part in message


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (pd.Categorical([0, 1] * 3), np.array([1.0, np.nan] * 3)),
        (pd.Categorical(["a", "b"] * 3), np.array(["a", "c"] * 3, dtype=object)),
        (pd.Categorical(["a", "b"] * 3), np.array([1, 2] * 3)),
        (pd.Categorical(["1", "01"] * 3), pd.Categorical(["1.0", "1"] * 3)),
    ],
)
def test_labels_that_only_look_alike_or_not_at_all_are_not_warned_of(tmp_path: Path, one: Any, two: Any) -> None:
    paths = [write(tmp_path / "a.h5ad", one), write(tmp_path / "b.h5ad", two)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annbatch.open(paths, **IN_ORDER)
    assert not [warning for warning in caught if "obs column" in str(warning.message)]


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
@pytest.mark.parametrize("dtype", ["object", "category", "string"])
def test_rows_without_a_label_are_no_group_of_their_own_unnoticed(missing: Any, dtype: str) -> None:
    labels = pd.Series(["a", missing, "b", "c", missing, "a", "d", "b"], dtype=dtype, name="donor")
    with pytest.warns(UserWarning, match="2 of 8 rows have no label in donor"):
        splits = make_splits(8, (0.5, 0.5), labels=labels)
    found = [set(rows.rows().tolist()) for rows in splits.values()]
    assert set.union(*found) == set(range(8))
    assert any({1, 4} <= rows for rows in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = make_splits(8, {"train": ["a", "b"], "val": ["c"], "test": [None, "d"]}, labels=labels)
    assert [rows.rows().tolist() for rows in named.values()] == [[0, 2, 5, 7], [3], [1, 4, 6]]
    with pytest.raises(ValueError, match="names groups that no row has"):
        make_splits(8, {"train": ["nan"]}, labels=labels)


def test_missing_numbers_can_be_named_too() -> None:
    splits = make_splits(4, {"train": [1.0], "val": [np.nan]}, labels=pd.Series([1.0, np.nan, 1.0, np.nan]))
    assert [rows.rows().tolist() for rows in splits.values()] == [[0, 2], [1, 3]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("columns", [["y"], []])
def test_a_split_by_labels_that_are_numbers_here_and_text_there_is_warned_of(
    tmp_path: Path, columns: list[str]
) -> None:
    pytest.importorskip("lightning")
    from annbatch.lightning import AnnbatchDataModule

    one, two = (write(tmp_path / f"{k}.h5ad", column) for k, column in enumerate(TWINS["0"]))
    module = AnnbatchDataModule([one, two], split=(0.5, 0.5), split_by="y", obs_columns=columns, batch_size=2)
    with pytest.warns(
        UserWarning, match=r"split_by: 0 of obs column 'y' is a number in .*0\.h5ad and text in .*1\.h5ad"
    ):
        module.setup("fit")
    rows = [module.rows(name) for name in ("train", "val")]
    assert sorted(itertools.chain(*rows)) == list(range(12))
    module.teardown()


# ---------------------------------------------------------------------------------------------- names of variables


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("join", ["outer", "inner"])
@pytest.mark.filterwarnings("ignore")
def test_names_that_repeat_need_no_join_where_all_have_the_same(tmp_path: Path, suffix: str, join: str) -> None:
    genes = ["TBCE", "MATR3", "TBCE", "A", "MATR3"]
    adatas = []
    for k in range(3):
        counts = sp.csr_matrix(np.random.default_rng(k).poisson(1.0, (5, 5)).astype("f4"))
        var = pd.DataFrame(
            {"id": [f"ENSG{i}" for i in range(5)], "mean": np.arange(5) + k}, index=pd.Index(genes, name="symbol")
        )
        adatas.append(
            ad.AnnData(
                counts, obs=pd.DataFrame(index=[f"{k}-{i}" for i in range(5)]), var=var, layers={"l": counts * 2}
            )
        )
        adatas[-1].write_h5ad(tmp_path / f"{k}.h5ad") if suffix == ".h5ad" else adatas[-1].write_zarr(
            tmp_path / f"{k}.zarr"
        )
    paths = sorted(tmp_path.glob(f"*{suffix}"))
    expected = np.concatenate([adata.X.toarray() for adata in adatas])
    for loader, n in [
        (annbatch.open(paths[0], join=join, layers=["l"], **IN_ORDER), 1),
        (annbatch.open(paths, join=join, layers=["l"], **IN_ORDER), 3),
    ]:
        np.testing.assert_array_equal(np.concatenate([batch["X"].toarray() for batch in loader]), expected[: 5 * n])
        np.testing.assert_array_equal(
            np.concatenate([batch["layers"]["l"].toarray() for batch in loader]), 2 * expected[: 5 * n]
        )
        assert list(loader.var.index) == genes
        # what all have with the same values
        assert list(loader.var.columns) == (["id"] if n > 1 else ["id", "mean"])
        assert loader.var["id"].tolist() == [f"ENSG{i}" for i in range(5)]
    other = adatas[0][:, [1, 0, 2, 3, 4]].copy()
    other.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(ValueError, match=r"'TBCE' comes more than once.*var_names_make_unique"):
        annbatch.open([paths[0], tmp_path / "other.h5ad"])
