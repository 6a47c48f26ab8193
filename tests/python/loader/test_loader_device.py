"""``Loader(device=…)`` up to the first call of the driver; what comes after is tested in ``gpu/``."""

from __future__ import annotations

import importlib.util
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from annbatch import Loader
from annbatch._core import ops as _ops
from annbatch._core.passes import Element, Pass
from support.cells import make_adata

SIZES = {"batch_size": 10, "chunk_size": 5, "preload_nchunks": 4, "to": "torch"}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that believes in one CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def loader(**options) -> Loader:
    adata = make_adata(40, 0)
    del adata.layers["doubled"], adata.obsm["pca"], adata.obsm["spots"]
    return Loader(**{**SIZES, **options}).add_adata(adata)


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_without_a_device_the_reason_is_said(device) -> None:
    with pytest.raises(RuntimeError, match=r"(built without CUDA|no CUDA device).*Leave the device out"):
        Loader(device=device)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="CUDA device"):
        Loader(device=device)


def test_a_device_that_torch_does_not_see(pretend: None) -> None:
    with pytest.raises(RuntimeError, match=r"cuda:3.*1 CUDA device"):
        Loader(device="cuda:3", to="torch")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is there")
def test_arrays_on_a_gpu_are_cupys(pretend: None) -> None:
    with pytest.raises(ImportError, match=r"cupy.*torch"):
        Loader(device="cuda")


def test_the_cpu_is_no_device() -> None:
    batches = list(loader(device="cpu"))
    assert [batch["X"].device.type for batch in batches] == ["cpu"] * 4
    assert loader().stats() == {}


@NO_GPU
@pytest.mark.parametrize("options", [{"device": "cuda:0"}, {"device": "cuda"}, {"preload_to_gpu": True}])
def test_the_core_says_what_the_driver_lacks(pretend: None, options: dict) -> None:
    """Everything up to the driver's first call; upstream's argument goes the same way."""
    there = pickle.loads(pickle.dumps(loader(**options)))
    with pytest.raises(RuntimeError, match=r"GPU 0 cannot be opened.*leave the device out"):
        next(iter(there))


def test_workers_are_refused(pretend: None) -> None:
    with pytest.raises(RuntimeError, match=r"worker.*num_workers=0"):
        list(DataLoader(loader(device="cuda"), batch_size=None, num_workers=1))


def test_a_refusal_to_lock_pages_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the core's answer is made up: what it says where page-locking is refused."""
    batch = [torch.arange(2), torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.ones(2)]
    monkeypatch.setattr(_ops, "load", lambda state, device, host_rows: batch)
    monkeypatch.setattr(
        _ops, "describe", lambda state: {"pinned": "page-locking 4096 bytes was refused; see `ulimit -l`"}
    )
    element = Element("X", "csr", torch.float32, 3, ())
    begun = Pass(torch.zeros(2, dtype=torch.int64), [element], torch.device("cuda", 0))
    begun.closed = True
    with pytest.warns(RuntimeWarning, match=r"cuda:0 from ordinary memory.*ulimit -l") as told:
        for _ in range(3):
            begun._load()
    assert len(told) == 1
