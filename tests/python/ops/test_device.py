"""Streams to a GPU: refusals where there is none, whole epochs and compiled code where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from annbatch._core import ops as _ops


def needs_gpu(test):
    there = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(there(test))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_named_with_the_remedy(small):
    with pytest.raises(RuntimeError, match=r"^GPU 0 .*leave the device out|CUDA_VISIBLE_DEVICES"):
        _ops.open_state(small.config(device=0))
    state = _ops.open_state(small.config(sampling=None))
    with pytest.raises(RuntimeError, match=r"^GPU 1 "):
        _ops.stream(state, {"sampling": {"kind": "submitted"}, "device": 1})


@pytest.mark.parametrize("device", [-1, "cuda:0", 1.5])
def test_a_device_is_a_number(small, device):
    with pytest.raises(ValueError, match="device"):
        _ops.open_state(small.config(device=device))


def test_streams_to_host_memory_say_so(small):
    state = _ops.open_state(small.config(device=None, nvrtc=None))
    assert _ops.describe(state)["device"] is None
    assert _ops.stats(state)["pinned"] is None


def test_the_compiler_of_torch_is_found_without_loading_it():
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA")
    assert Path(_ops.nvrtc_path()).name.startswith("libnvrtc.so.")
    assert _ops.with_compiler({"device": 0})["nvrtc"] == _ops.nvrtc_path()
    assert _ops.with_compiler({"device": 0, "nvrtc": "mine"})["nvrtc"] == "mine"
    assert "nvrtc" not in _ops.with_compiler({"device": None})


@needs_gpu
def test_an_epoch_on_the_gpu_is_that_in_host_memory(small):
    elements = ("X", "obsm/pca")
    host, gpu = (_ops.open_state(small.config(elements=elements, device=device)) for device in (None, 0))
    for seed in range(3):
        _ops.start(host, seed)
        _ops.start(gpu, seed)
        while True:
            expected, found = _ops.load(host), _ops.load(gpu, "cuda:0")
            for a, b in zip(expected, found, strict=True):
                assert b.device == torch.device("cuda:0")
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a.numpy(), b.cpu().numpy())
            if not len(expected[0]):
                break
    stats = _ops.stats(gpu)
    assert 0 < stats["h2d_bytes"] < stats["bytes_delivered"]
    assert _ops.describe(gpu)["narrow"] is True
    assert stats["pinned"] is True


@needs_gpu
def test_batches_are_right_on_streams_of_the_consumer(small):
    state = _ops.open_state(small.config(device=0))
    _ops.start(state, 1)
    streams = [torch.cuda.Stream() for _ in range(2)]
    held = []
    while True:
        with torch.cuda.stream(streams[len(held) % 2]):
            # the consumer's stream is far behind: batches wait in line, and are placed after this
            torch.cuda._sleep(10_000_000)
            batch = _ops.load(state, "cuda")
        if not len(batch[0]):
            break
        held.append(batch)
    torch.cuda.synchronize()
    rows = [row for batch in held for row in small.check([t.cpu() for t in batch])]
    assert sorted(rows) == list(range(small.n_obs))


@needs_gpu
def test_the_device_must_be_the_streams(small):
    state = _ops.open_state(small.config(device=0))
    _ops.start(state, 1)
    for device in (None, "cpu", "cuda:7"):
        with pytest.raises(ValueError, match=r"delivers to cuda:0, but load was given"):
            _ops.load(state, device)
    assert len(_ops.load(state, "cuda")[0])


@needs_gpu
def test_loads_on_the_gpu_compile(small):
    state = _ops.open_state(small.config(device=0))
    _ops.start(state, 1)

    @torch.compile(fullgraph=True)
    def total(state):
        _, _, _, data = torch.ops.annbatch.load(state, device=torch.device("cuda:0"))
        return data.sum()

    found = [float(total(state)) for _ in range(7)]
    np.testing.assert_allclose(sum(found), small.x.sum(), rtol=1e-6)
