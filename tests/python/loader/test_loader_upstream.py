"""The loader against the recorded outcomes of scverse annbatch 0.3.1: values, exceptions, warnings."""

from __future__ import annotations

import json

import pytest

from support.upstream_loader_calls import CALLS, TABLE, outcome

EXPECTED = json.loads(TABLE.read_text())
# Messages are ours, but for how they begin: what `pytest.raises(match=…)` and filters of warnings hold on to.
STEM_LENGTH = 33


# Refused there, taken by its file here.
TAKEN_HERE = {"adding_a_backed_adata"}


def stem(message: str) -> str:
    return message.removeprefix("TODO: ").strip("\"'")[:STEM_LENGTH]


def test_every_call_is_recorded():
    assert list(EXPECTED) == list(CALLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_outcome(name: str):
    expected, got = EXPECTED[name], outcome(name)
    assert got["value"] == expected["value"], got["error"]
    if expected["error"] is None or name in TAKEN_HERE:
        assert got["error"] is None
    else:
        assert got["error"][0] == expected["error"][0]
        assert stem(got["error"][1]) == stem(expected["error"][1])
    told = [(category, stem(message)) for category, message in got["warnings"]]
    assert told == [(category, stem(message)) for category, message in expected["warnings"]]
