"""A small collection on disk for the tests of the ops; `formats` has stores of every shape."""

from __future__ import annotations

import pytest

from support.small import SmallCollection, write_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCollection:
    """Two datasets with a sparse X of counts and a dense ``obsm/pca``."""
    return write_small(tmp_path_factory.mktemp("small"))
