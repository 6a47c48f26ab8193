"""How a collection lies on disk: datasets ``dataset_0``, ``dataset_1``, … under one Zarr group."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from annbatch._data.attributes import text_of

if TYPE_CHECKING:
    import zarr

V1_ENCODING = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
"""Attributes of the group once all datasets are written."""

DATASET_PREFIX = "dataset"


def dataset_keys(group: zarr.Group) -> list[str]:
    """Names of the datasets in a group, by number."""
    numbers = {int(match[1]): key for key in group if (match := re.fullmatch(rf"{DATASET_PREFIX}_([0-9]+)", key))}
    return [numbers[number] for number in sorted(numbers)]


def is_finished(group: zarr.Group) -> bool:
    """Whether all datasets of a collection are written; after an interruption they are not."""
    return all(text_of(group, name) == value for name, value in V1_ENCODING.items())
