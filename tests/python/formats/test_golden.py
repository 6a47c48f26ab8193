"""Stores that anndata 0.12 and 0.13 wrote, committed in tests/data (see make_golden.py there), read back exactly."""

from __future__ import annotations

import zipfile
from pathlib import Path

import anndata
import numpy as np
import pytest

from annbatch._core import ops as _ops
from support.oracle import Reference, opened, read_element, same_values
from support.stores import Csr

DATA = Path(__file__).parents[2] / "data"
STORES = sorted(path.name for path in DATA.glob("golden-*.zip"))
ELEMENTS = ["X", "layers/counts", "layers/dense", "obsm/pca", "obsm/image", "raw/X"]


def _contents() -> dict[str, Csr | np.ndarray]:
    contents: dict[str, Csr | np.ndarray] = {}
    with np.load(DATA / "golden.npz") as flat:
        for name in ELEMENTS:
            if name in flat:
                contents[name] = flat[name]
                continue
            indptr, indices, data, shape = (flat[f"{name}:{part}"] for part in ("indptr", "indices", "data", "shape"))
            contents[name] = Csr(indptr.astype(np.int64), indices.astype(np.int64), data, tuple(map(int, shape)))
    return contents


@pytest.fixture(params=STORES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One golden store, unpacked."""
    with zipfile.ZipFile(DATA / request.param) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "golden.zarr"


def test_all_golden_stores_are_there() -> None:
    layouts = ("v2", "v3-sharded", "v3")
    assert [f"golden-{release}-{layout}.zip" for release in ("0.12", "0.13") for layout in layouts] == STORES
    assert all((DATA / name).stat().st_size < 60_000 for name in STORES)


def test_slow_reader_reads_golden_stores(golden: Path) -> None:
    for name, want in _contents().items():
        got = read_element(golden, name)
        if isinstance(want, Csr):
            assert got.shape == want.shape
            for part in ("indptr", "indices", "data"):
                same_values(getattr(got, part), getattr(want, part))
        else:
            same_values(got, want)
    assert anndata.read_zarr(golden).n_obs == 37


@pytest.mark.parametrize("kind", ["sequential", "random"])
@pytest.mark.parametrize("request_dtype", ["torch", "native"])
def test_golden_stores_are_read_exactly(golden: Path, kind: str, request_dtype: str) -> None:
    elements = dict.fromkeys(ELEMENTS, request_dtype)
    reference = Reference([_contents()], elements)
    config = {
        "elements": [{"name": name, "dtype": dtype} for name, dtype in elements.items()],
        "datasets": [{"path": str(golden)}],
        "sampling": {"kind": kind, "chunk_size": 4, "preload_nchunks": 3, "batch_size": 6},
    }
    with opened(config) as state:
        described = {element["name"]: element for element in _ops.describe(state)["elements"]}
        assert described["X"]["kind"] == "csr" and described["X"]["n_var"] == 23
        assert described["obsm/image"]["kind"] == "dense" and described["obsm/image"]["tail"] == [4, 3, 2]
        assert described["layers/counts"]["stored_dtypes"] == ["uint16"]
        reference.check_once(reference.epoch(state, 1, hold=True))
        assert _ops.stats(state)["chunks_general_path"] == 0


def test_golden_stores_of_all_releases_form_one_collection(tmp_path: Path) -> None:
    for name in STORES:
        with zipfile.ZipFile(DATA / name) as archive:
            archive.extractall(tmp_path / name)
    reference = Reference([_contents()] * len(STORES), dict.fromkeys(ELEMENTS, "torch"))
    config = {
        "elements": [{"name": name} for name in ELEMENTS],
        "datasets": [{"path": str(tmp_path / name / "golden.zarr"), "name": name} for name in STORES],
        "sampling": {"kind": "random", "chunk_size": 8, "preload_nchunks": 6, "batch_size": 16},
    }
    with opened(config) as state:
        assert [dataset["name"] for dataset in _ops.describe(state)["datasets"]] == STORES
        reference.check_once(reference.epoch(state, 2))
