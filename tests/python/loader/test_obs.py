"""Joining and indexing of annotations, and the dictionary that looks them up lazily."""

from __future__ import annotations

import copy
import pickle
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree
from torch.utils.data import default_convert

from annbatch._output.batch import Batch
from annbatch._output.obs import ObsTable, join_frames

# ---------------------------------------------------------------- joining


def categorical(values: str, categories: str, ordered: bool = False) -> pd.Categorical:
    return pd.Categorical(list(values), categories=list(categories), ordered=ordered)


def test_one_frame_is_not_copied():
    frame = pd.DataFrame({"a": [1]})
    assert join_frames([frame]) is frame


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), min_size=1, max_size=4))
def test_join_has_the_values_of_concat(groups: list[list[str]]):
    frames = [
        pd.DataFrame({"c": pd.Categorical(group), "s": group, "n": np.arange(len(group))}, index=group)
        for group in groups
    ]
    joined, expected = join_frames(frames), pd.concat(frames)
    pd.testing.assert_frame_equal(joined.astype({"c": object}), expected.astype({"c": object}))
    assert list(joined["c"].cat.categories) == sorted({value for group in groups for value in group})


def test_equal_categories_are_left_as_they_are():
    frames = [pd.DataFrame({"c": categorical("ab", "ba")})] * 2
    pd.testing.assert_frame_equal(join_frames(frames), pd.concat(frames))


def test_unsorted_categories_keep_their_order():
    frames = [pd.DataFrame({"c": categorical("ab", "ba")}), pd.DataFrame({"c": categorical("cb", "cb")})]
    joined = join_frames(frames)
    assert list(joined["c"]) == ["a", "b", "c", "b"]
    assert list(joined["c"].cat.categories) == ["b", "a", "c"]


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([{"c": categorical("ab", "ab", True)}, {"c": categorical("bc", "bc", True)}], id="ordered"),
        pytest.param([{"c": categorical("ab", "ab")}, {"c": ["a", "c"]}], id="one is not categorical"),
        pytest.param([{"c": categorical("ab", "ab")}, {"d": [1, 2]}], id="missing column"),
        pytest.param([{"c": categorical("ab", "ab")}, {"c": pd.Categorical([1, 2])}], id="other values"),
        pytest.param([{"n": [1, 2]}, {"n": [0.5, 1.5]}], id="promoted"),
    ],
)
def test_all_else_is_left_to_pandas(frames: list[dict]):
    frames = [pd.DataFrame(frame) for frame in frames]
    pd.testing.assert_frame_equal(join_frames(frames), pd.concat(frames))


def test_rows_are_looked_up_over_all_frames():
    frames = [pd.DataFrame({"n": range(k, k + 3)}, index=[f"{k}{j}" for j in range(3)]) for k in (0, 3, 6)]
    rows = np.array([8, 0, 4, 4])
    pd.testing.assert_frame_equal(ObsTable(frames).frame(rows), pd.concat(frames).iloc[rows])


# ---------------------------------------------------------------- codes


def test_codes():
    table = ObsTable(
        [
            pd.DataFrame(
                {
                    "category": categorical("ab", "ab"),
                    "text": ["x", None],
                    "flag": [True, False],
                    "small": np.array([1, 2], dtype="uint16"),
                    "half": np.array([0.5, np.nan], dtype="float32"),
                    "gaps": pd.array([1, None], dtype="Int64"),
                    "full": pd.array([3, 4], dtype="Int32"),
                    "swapped": np.array([5, 6], dtype=">i4"),
                }
            ),
            pd.DataFrame(
                {
                    "category": pd.Categorical(["c", None]),
                    "text": ["y", "x"],
                    "flag": [True, True],
                    "small": np.array([65535, 4], dtype="uint16"),
                    "half": np.array([1, 2], dtype="float32"),
                    "gaps": pd.array([3, 4], dtype="Int64"),
                    "full": pd.array([5, 6], dtype="Int32"),
                    "swapped": np.array([7, 8], dtype=">i4"),
                }
            ),
        ]
    )
    codes = table.codes(np.array([3, 2, 1, 0]))
    expected = {
        "category": ([-1, 2, 1, 0], torch.int64),
        "text": ([0, 1, -1, 0], torch.int64),
        "flag": ([True, True, False, True], torch.bool),
        "small": ([4, 65535, 2, 1], torch.int32),
        "half": ([2, 1, np.nan, 0.5], torch.float32),
        "gaps": ([4, 3, np.nan, 1], torch.float64),
        "full": ([6, 5, 4, 3], torch.int32),
        "swapped": ([8, 7, 6, 5], torch.int32),
    }
    assert list(codes) == list(expected)
    for name, (values, dtype) in expected.items():
        assert codes[name].dtype == dtype, name
        assert codes[name].is_contiguous()
        np.testing.assert_array_equal(codes[name].numpy(), values, err_msg=name)
    assert {name: list(values) for name, values in table.categories.items()} == {
        "category": ["a", "b", "c"],
        "text": ["x", "y"],
    }


def test_what_has_no_numbers_is_named():
    with pytest.raises(TypeError, match=r"'when' of dtype datetime64"):
        ObsTable([pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])})]).codes(np.array([0]))
    with pytest.raises(OverflowError, match="'big'"):
        ObsTable([pd.DataFrame({"big": np.array([2**63], dtype="uint64")})]).codes(np.array([0]))
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(ValueError, match="distinct"):
        ObsTable([twice]).codes(np.array([0]))


# ---------------------------------------------------------------- the dictionary


def lazy() -> tuple[Batch, Mock]:
    make = Mock(return_value="frame")
    return Batch({"X": 1, "obs": None, "var": 2}, make), make


def test_obs_is_made_once_and_only_when_read():
    batch, make = lazy()
    assert batch["X"] == 1
    assert batch.get("var") == 2
    assert batch.get("nothing", 3) == 3
    assert "obs" in batch
    assert len(batch) == 3
    assert list(batch) == list(batch.keys()) == ["X", "obs", "var"]
    make.assert_not_called()
    assert batch["obs"] == batch.get("obs") == "frame"
    make.assert_called_once()


EXPECTED = {"X": 1, "obs": "frame", "var": 2}


@pytest.mark.parametrize(
    "read",
    [
        dict,
        lambda batch: {**batch},
        lambda batch: dict(**batch),
        lambda batch: dict(batch.items()),
        lambda batch: dict(zip(batch, batch.values(), strict=True)),
        lambda batch: {} | batch,
        lambda batch: batch | {},
        lambda batch: {key: batch[key] for key in batch},
        copy.copy,
        copy.deepcopy,
        lambda batch: batch.copy(),
        lambda batch: pickle.loads(pickle.dumps(batch)),
        lambda batch: (out := {}, out.update(batch))[0],
        default_convert,
        lambda batch: _pytree.tree_map(lambda leaf: leaf, batch),
    ],
)
def test_it_reads_as_a_plain_dict(read):
    batch, _ = lazy()
    plain = read(batch)
    assert type(plain) is dict
    assert plain == EXPECTED
    assert list(plain) == list(EXPECTED)


def test_it_compares_and_prints_as_a_plain_dict():
    assert lazy()[0] == EXPECTED
    assert EXPECTED == lazy()[0]  # noqa: SIM300, the other order is another method
    assert not lazy()[0] != EXPECTED  # noqa: SIM202
    assert repr(lazy()[0]) == repr(EXPECTED)


def test_it_can_be_changed():
    batch, _ = lazy()
    assert batch.pop("obs") == "frame"
    assert "obs" not in batch
    with pytest.raises(KeyError):
        batch["obs"]
    batch, _ = lazy()
    batch["obs"] = "mine"
    assert batch["obs"] == "mine"
    batch, _ = lazy()
    batch.update(obs="mine")
    assert dict(batch) == {**EXPECTED, "obs": "mine"}
    batch, _ = lazy()
    del batch["obs"]
    assert dict(batch) == {"X": 1, "var": 2}
    batch, _ = lazy()
    batch |= {"obs": "mine"}
    assert batch["obs"] == "mine"


def test_it_can_be_rebuilt_from_its_items():
    batch, _ = lazy()
    for items in (dict(batch), list(batch.items())):
        again = type(batch)(items)
        assert again == EXPECTED
        assert again["obs"] == again.get("obs") == "frame"


def test_lightning_moves_it():
    move = pytest.importorskip("lightning").fabric.utilities.apply_func.move_data_to_device
    batch = Batch({"X": torch.ones(2), "obs": None, "index": np.arange(2)}, lambda: pd.DataFrame({"a": [1, 2]}))
    moved = move(batch, torch.device("meta"))
    assert moved["X"].device.type == "meta"
    assert list(moved["obs"]["a"]) == [1, 2]


def test_tensors_inside_are_leaves():
    batch = Batch({"X": torch.ones(2), "obs": None}, lambda: None)
    doubled = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * 2, batch)
    assert doubled["X"].tolist() == [2, 2]
