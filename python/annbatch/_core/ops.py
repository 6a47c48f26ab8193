"""The ops as functions over state tensors, which raise ordinary Python exceptions."""

from __future__ import annotations

import importlib.util
import json
import numbers
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from annbatch._core import fakes as fakes  # registered before the first op is called
from annbatch._core.errors import DataError, call
from annbatch._core.library import OPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from annbatch.types import LoaderStats

__all__ = [
    "DataError",
    "close",
    "describe",
    "finish",
    "load",
    "locate",
    "open_state",
    "ready",
    "start",
    "stats",
    "stream",
    "submit",
    "texts",
]

# Python runs signal handlers between two ops, never inside one: no op waits longer than this.
WAIT_SLICE_MS = 50


def _plain(value: Any) -> Any:
    """JSON form of what configurations hold besides plain Python: paths and NumPy integers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    msg = f"a configuration cannot hold {value!r} ({type(value).__name__})"
    raise TypeError(msg)


def nvrtc_path() -> str | None:
    """Path of CUDA's run-time compiler among the packages that torch brought, found without loading any of them."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    # nvidia/cu13/lib, before CUDA 13 nvidia/cuda_nvrtc/lib
    paths = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    return os.fspath(max(paths)) if paths else None


def with_compiler(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config`, and for a stream to a GPU where its kernels' compiler is."""
    if config.get("device") is None or "nvrtc" in config:
        return config
    return {**config, "nvrtc": nvrtc_path()}


def open_state(config: Mapping[str, Any], buffers: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Open datasets and give the state tensor that every other function takes.

    Parameters
    ----------
    config
        Datasets, elements, sampling, seed, threads, budget and ``direct_io``; unknown or contradictory fields are refused by name.
    buffers
        Contiguous CPU tensors that `config` refers to by position. They are read in place, and kept alive by the
        state.

    Returns
    -------
    int64 CPU tensor. It works as long as it is this very tensor, in this process: copies of it name nothing.

    Raises
    ------
    ValueError
        For a configuration or a buffer that is refused.
    FileNotFoundError, OSError
        For stores that are missing or cannot be read.
    TypeError
        For stored data of a kind that is not supported.
    DataError
        For stores that contradict themselves.
    """
    state: torch.Tensor = call(OPS.open.default, json.dumps(with_compiler(config), default=_plain), list(buffers))
    return state


def stream(state: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Give another state over the collection that `state` opened, with sampling and budget of its own."""
    opened: torch.Tensor = call(OPS.stream.default, state, json.dumps(with_compiler(config), default=_plain))
    return opened


def start(state: torch.Tensor, epoch_seed: int, first_batch: int = 0) -> None:
    """Begin an epoch at batch `first_batch`; its order is a function of `epoch_seed` (the low 64 bits) alone."""
    seed = int(epoch_seed) & 0xFFFF_FFFF_FFFF_FFFF
    # The op's int is signed; the core takes the same 64 bits as an unsigned number.
    call(OPS.start.default, state, seed - (1 << 64) if seed >> 63 else seed, int(first_batch))


def submit(state: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, sizes: torch.Tensor) -> None:
    """Ask for batches in the mode ``{"kind": "submitted"}``.

    Parameters
    ----------
    rows
        int64 ``[n]``, rows to read, as global row numbers.
    positions
        int64 ``[m]``, positions in `rows`, batch after batch.
    sizes
        int64 ``[b]``, rows per batch: batch `k` is ``rows[positions[o : o + sizes[k]]]``, `o` the sum of the earlier
        sizes.
    """
    call(OPS.submit.default, state, rows, positions, sizes)


def finish(state: torch.Tensor) -> None:
    """Say that the epoch has no further submissions: the end follows what was submitted."""
    call(OPS.finish.default, state)


def ready(state: torch.Tensor, timeout_ms: int = 0) -> bool:
    """Whether :func:`load` would not wait (for a batch, the end of the epoch, or an error), within `timeout_ms`."""
    return bool(call(OPS.ready.default, state, int(timeout_ms)))


def load(
    state: torch.Tensor, device: torch.device | str | None = None, *, host_rows: bool = False
) -> list[torch.Tensor]:
    """Give the next batch; wait for it if need be, in slices that let Ctrl-C through.

    Parameters
    ----------
    state
        What `open_state` or `stream` gave.
    device
        Where the tensors are to be. A stream that was opened for a GPU delivers to that one only, without waiting for the
        copy; batches of other streams are copied while the caller waits.
    host_rows
        Whether ``rows`` stays on the CPU all the same.

    Returns
    -------
    ``rows`` (int64 ``[n]``), then per element ``indptr [n + 1], indices [nnz], data [nnz]`` or one ``[n, ...]``.
    No rows: the epoch is over.
    """
    # The op itself lets signals through, but can raise no KeyboardInterrupt; other threads are sent no signals.
    if threading.current_thread() is threading.main_thread():
        while not call(OPS.ready.default, state, WAIT_SLICE_MS):
            pass
    device = None if device is None else torch.device(device)
    return call(OPS.load.default, state, device=device, host_rows=host_rows)


def describe(state: torch.Tensor) -> dict[str, Any]:
    """Describe what `state` opened: ``n_obs``, ``datasets``, ``elements``, ``sampling``, ``threads``, ``n_batches``."""
    description: dict[str, Any] = json.loads(call(OPS.describe.default, state))
    return description


def stats(state: torch.Tensor) -> LoaderStats:
    """Give counts, bytes and nanoseconds since `state` was opened, and gauges; see `annbatch.types.LoaderStats`."""
    counters: LoaderStats = json.loads(call(OPS.stats.default, state))
    return counters


def locate(state: torch.Tensor, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Where rows (int64 ``[n]``) are stored: dataset, path, local row and chunks, one entry per row."""
    places: list[dict[str, Any]] = json.loads(call(OPS.locate.default, state, rows))
    return places


def texts(file: str, path: str) -> bytes:
    """Read the texts of variable length at `path` of the HDF5 file `file`, each with a zero byte behind it.

    Raises
    ------
    DataError, OSError, TypeError
        If they cannot be read, or not by the core: libhdf5 may know how.
    """
    text: torch.Tensor = call(OPS.texts.default, file, path)
    return text.numpy().tobytes()


def close(state: torch.Tensor) -> None:
    """Stop reading and give up files and threads; batches already delivered stay valid."""
    call(OPS.close.default, state)
