"""One collection of three stores for the tests of what is asked for, and the rows that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.oracle import Reference, opened
from support.sampling import fixed_collection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.stores import Collection


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three stores of 71, 1 and 38 rows; see :func:`support.sampling.fixed_collection`."""
    return fixed_collection(tmp_path_factory.mktemp("fixed"))


@pytest.fixture(scope="module")
def reference(collection: Collection) -> Reference:
    """The rows of `collection`."""
    return Reference.of(collection)


@pytest.fixture(scope="module")
def parent(collection: Collection) -> Iterator[Any]:
    """`collection`, opened once for the whole file."""
    with opened(collection.config()) as state:
        yield state
