"""What torch.ops.annbatch refuses, and that the refusal names it: tensors, numbers, configurations."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch

from annbatch._core import ops as _ops

pytestmark = pytest.mark.core

op = torch.ops.annbatch

SUBMITTED = {"kind": "submitted"}


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(4, 4).T, r"buffers\[0\] must be contiguous"),
        (torch.eye(3).to_sparse_csr(), r"buffers\[0\] must be a dense"),
        (torch.zeros(3, dtype=torch.complex64), r"buffers\[0\] has a dtype"),
        (torch.zeros(3, dtype=torch.bfloat16), r"buffers\[0\] has a dtype"),
        (torch.zeros(3, device="meta"), r"buffers\[0\] must be a CPU tensor"),
    ],
)
def test_buffers_that_cannot_be_lent(small, buffer, message):
    with pytest.raises(ValueError, match=message):
        _ops.open_state(small.config(), [buffer])


@pytest.mark.parametrize("which", ["rows", "positions", "sizes"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), "must have dtype int64"),
        (torch.zeros(2), "must have dtype int64"),
        (torch.zeros(2, 2, dtype=torch.int64), "must have one dimension, not 2"),
        (torch.zeros(4, dtype=torch.int64)[::2], "must be contiguous"),
    ],
)
def test_submitted_tensors_are_checked(small, which, tensor, message):
    state = _ops.open_state(small.config(sampling=SUBMITTED))
    _ops.start(state, 0)
    tensors = {name: torch.zeros(1, dtype=torch.int64) for name in ("rows", "positions", "sizes")}
    with pytest.raises(ValueError, match=f"{which} {message}"):
        _ops.submit(state, **(tensors | {which: tensor}))


@pytest.mark.parametrize(
    ("rows", "positions", "sizes"),
    [
        ([53], [0], [1]),
        ([-1], [0], [1]),
        ([0], [1], [1]),
        ([0], [-1], [1]),
        ([0], [0], [2]),
        ([0, 1], [0, 1], [1]),
        ([0], [0], [-1]),
        ([0], [0], [2**62]),
    ],
)
def test_submitted_numbers_are_checked(small, rows, positions, sizes):
    state = _ops.open_state(small.config(sampling=SUBMITTED))
    _ops.start(state, 0)
    with pytest.raises(ValueError, match=r"\w"):
        _ops.submit(state, torch.tensor(rows), torch.tensor(positions), torch.tensor(sizes))
    _ops.submit(state, torch.tensor([3]), torch.tensor([0]), torch.tensor([1]))
    assert small.check(_ops.load(state)) == [3], "a refused request leaves the epoch as it was"


def test_locate_checks_rows(small):
    state = _ops.open_state(small.config())
    for row in (-1, small.n_obs):
        with pytest.raises(ValueError, match=str(row)):
            _ops.locate(state, torch.tensor([row]))


def test_timeouts_are_kept_and_checked(small):
    state = _ops.open_state(small.config(sampling=SUBMITTED))
    _ops.start(state, 0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        _ops.ready(state, -1)
    for timeout_ms in (0, 120):
        began = time.perf_counter()
        assert not _ops.ready(state, timeout_ms)
        assert timeout_ms <= 1000 * (time.perf_counter() - began) < timeout_ms + 100


RANDOM = {"kind": "random", "chunk_size": 4, "preload_nchunks": 4, "batch_size": 8}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"datasets_": []}, "datasets_"),
        ({"datasets": []}, "datasets"),
        ({"elements": []}, "elements"),
        ({"elements": [{"name": "X", "dtpye": "float32"}]}, "dtpye"),
        ({"elements": [{"name": "X", "dtype": "float31"}]}, "float31"),
        ({"elements": [{"name": "X"}, {"name": "X"}]}, "X"),
        ({"sampling": {"kind": "shuffled"}}, "shuffled"),
        ({"sampling": {**RANDOM, "chunksize": 4}}, "chunksize"),
        ({"sampling": {**RANDOM, "chunk_size": 0}}, "chunk_size"),
        ({"sampling": {**RANDOM, "preload_nchunks": 0}}, "preload_nchunks"),
        ({"sampling": {**RANDOM, "batch_size": 0}}, "batch_size"),
        ({"sampling": {**RANDOM, "batch_size": -8}}, "batch_size"),
        ({"sampling": {**RANDOM, "batch_size": "8"}}, "batch_size"),
        ({"sampling": {**RANDOM, "mask": [10, 5]}}, "mask"),
        ({"sampling": {**RANDOM, "mask": [0, 54]}}, "mask"),
        ({"sampling": {**RANDOM, "part": [2, 2]}}, "part"),
        ({"sampling": {**RANDOM, "num_samples": 54}}, "num_samples"),
        ({"sampling": {**SUBMITTED, "batch_size": 8}}, "batch_size"),
        ({"memory_budget": "2 gigs"}, "memory_budget"),
        ({"memory_budget": -1}, "memory_budget"),
        ({"batches_ahead": -1}, "batches_ahead"),
        ({"threads": 0}, "threads"),
        ({"sampling": SUBMITTED, "auto_restart": True}, "auto_restart"),
        ({"buffers": 3}, "buffers"),
    ],
)
def test_configurations_are_refused_by_name(small, change, names):
    with pytest.raises(ValueError, match=names):
        _ops.open_state({**small.config(), **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"elements": 3}', "{} {}"])
def test_configurations_that_are_no_object_are_refused(text):
    with pytest.raises(RuntimeError, match=r"^\[annbatch:InvalidConfig\] "):
        op.open(text, [])


def test_streams_refuse_what_belongs_to_open(small):
    state = _ops.open_state(small.config())
    with pytest.raises(ValueError, match=r"elements|datasets"):
        _ops.stream(state, small.config())


def test_paths_and_numpy_integers_may_stand_in_a_configuration(small, tmp_path):
    config = small.config(seed=np.int64(3))
    config["datasets"] = [{"path": tmp_path / ".." / os.path.relpath(path, tmp_path.parent)} for path in small.paths]
    assert _ops.describe(_ops.open_state(config))["n_obs"] == small.n_obs
    with pytest.raises(TypeError, match="cannot hold"):
        _ops.open_state(small.config(seed=object()))
