"""The recorded outcomes of scverse annbatch 0.3.1 (see `upstream_calls`), and the comparison with ours."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from support.upstream_calls import TABLE, outcome

# A message is ours but for its stem, what `pytest.raises(match=…)` and warning filters hold on to: as much of its
# first sentence.
_STEM_LENGTH = 40


@cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def names(*sections: str) -> list[str]:
    """Calls of the given sections, a section being what stands before the colon."""
    found = [name for name in table()["calls"] if name.startswith(tuple(f"{section}:" for section in sections))]
    assert found, sections
    return found


def check(name: str) -> None:
    """Make the call and compare value, exception and warnings with what annbatch 0.3.1 gave."""
    expected, got = table()["calls"][name], outcome(name)
    assert (got["error"] is None) == (expected["error"] is None), got["error"]
    if expected["error"] is not None:
        assert got["error"][0] == expected["error"][0]
        assert _stem(got["error"][1]) == _stem(expected["error"][1])
    assert got["value"] == expected["value"]
    assert len(got["warnings"]) == len(expected["warnings"])
    for (category, message, is_at_caller), (their_category, their_message, was_at_caller) in zip(
        got["warnings"], expected["warnings"], strict=True
    ):
        assert category == their_category
        assert _stem(message) == _stem(their_message)
        assert is_at_caller or not was_at_caller


def _stem(message: str) -> str:
    return message.split(". ")[0][:_STEM_LENGTH]
