"""Cells on disk for the tests of loaders."""

from __future__ import annotations

import pytest

from support.cells import Cells, write_cells


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return write_cells(tmp_path_factory.mktemp("cells"))
