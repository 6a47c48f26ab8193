"""The op library as Python sees it: found, loaded, completed and called here, and nowhere else.

In: ``_annbatch.so`` of the package (``torch.ops.annbatch``, schemas in ``cpp/ops.cpp``). Out: functions over state
tensors that raise ordinary Python exceptions. What only Python can register is registered on import: the fake of
``load`` (the shapes a compiler may assume), its ordered effect (no compiler may drop, merge or reorder a load) and
its tags.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import numbers
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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

LIBRARY = Path(__file__).parents[1] / "_annbatch.so"
OLDEST_TORCH = "2.11"

# Python runs signal handlers between two ops, never inside one: no op waits longer than this.
WAIT_SLICE_MS = 50


class DataError(RuntimeError):
    """The stored data contradict themselves or cannot be decoded; the message names dataset, array and chunk."""


def _load_library(library: Path) -> None:
    """Load the op library into torch, or say in one sentence what keeps it from loading."""
    if not library.exists():
        msg = (
            f"annbatch's op library {library} is missing: build it with `pip install .` "
            "(in a source checkout: `pip install --no-build-isolation -e .`)."
        )
        raise ImportError(msg)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        msg = (
            f"annbatch's op library {library} does not load: it found torch {torch.__version__} and needs torch "
            f"{OLDEST_TORCH} or newer, on the platform that it was built for ({error})."
        )
        raise ImportError(msg) from error


_load_library(LIBRARY)
_ops = torch.ops.annbatch
# The first call of any op makes tables of torch's own. The child of a fork in the middle of that waits for ever, so it is
# made here, before threads of the user's call ops.
_ops.version()


# ---- what the compiler is told ---------------------------------------------------------------------------------------
@functools.cache
def _layout(number: int) -> tuple[dict[str, Any], ...]:
    """Elements of a batch, in order, by the number that the length of a state tensor stands for."""
    return tuple(json.loads(_ops.layout.default(number)))


def _register_ordered_effect() -> bool:
    """Tell compilers that two loads are two batches; false where this torch has no way to say so."""
    try:
        from torch._library.effects import EffectType
        from torch.library import _register_effectful_op

        _register_effectful_op("annbatch::load", EffectType.ORDERED)
    except (ImportError, AttributeError, TypeError):
        return False
    return True


_EFFECT_IS_ORDERED = _register_ordered_effect()


@torch.library.register_fake("annbatch::load")
def _fake_load(
    state: torch.Tensor, *, device: torch.device | None = None, host_rows: bool = False
) -> list[torch.Tensor]:
    """Shapes of a batch: ``rows [n]``, then ``indptr [n + 1], indices [nnz], data [nnz]`` or ``[n, ...]`` per element."""
    if torch.compiler.is_exporting():
        msg = (
            "torch.ops.annbatch.load cannot be exported: a state names files that this process holds open. "
            "Export the model on tensors, and load outside of it."
        )
        raise RuntimeError(msg)
    if not _EFFECT_IS_ORDERED:
        msg = (
            f"torch {torch.__version__} has no ordered effects as annbatch knows them, so a compiled graph could drop "
            "or merge loads: call torch.ops.annbatch.load outside of compiled code."
        )
        raise RuntimeError(msg)
    context = torch.library.get_ctx()
    where = {"device": "cpu" if device is None else device}
    n_rows = context.new_dynamic_size(min=0)
    batch = [torch.empty(n_rows, dtype=torch.int64, device="cpu" if host_rows else where["device"])]
    # Different lengths are different layouts: the guard that int() leaves behind is meant.
    for element in _layout(int(state.shape[0])):
        dtype = getattr(torch, element["dtype"])
        if element["kind"] == "csr":
            index_dtype = getattr(torch, element["index_dtype"])
            nnz = context.new_dynamic_size(min=0)
            batch.append(torch.empty(n_rows + 1, dtype=index_dtype, **where))
            batch.append(torch.empty(nnz, dtype=index_dtype, **where))
            batch.append(torch.empty(nnz, dtype=dtype, **where))
        else:
            batch.append(torch.empty([n_rows, *element["tail"]], dtype=dtype, **where))
    return batch


def _set_tags(op: torch._ops.OpOverload, *names: str) -> None:
    """Tag `op` with those of `names` that this torch knows; numbers of tags differ between releases, names do not."""
    tags = [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]
    if hasattr(op, "_tags"):
        op._tags = [*op._tags, *(tag for tag in tags if tag not in op._tags)]


_set_tags(_ops.load.default, "dynamic_output_shape", "cudagraph_unsafe", "pt2_compliant_tag")


@atexit.register
def _close_all() -> None:
    """End reads in flight before the interpreter, and the objects whose memory they fill, are taken apart."""
    _ops.close_all.default(at_exit=True)
    # Daemon threads inside an op stay there now (cpp/interrupt.h). One that had just left it waits for the GIL with C++
    # frames on its stack, and must get it before the interpreter stops handing it out.
    if threading.active_count() > 1:
        time.sleep(0.02)


# ---- errors ----------------------------------------------------------------------------------------------------------
_PREFIXED = re.compile(r"\[annbatch:(?P<kind>\w+)\] (?P<message>.*)", re.DOTALL)

_CLASSES: dict[str, type[BaseException]] = {
    "InvalidArgument": ValueError,
    "InvalidConfig": ValueError,
    "NotFound": FileNotFoundError,
    "Unsupported": TypeError,
    "Corrupt": DataError,
    "Io": OSError,
    "Closed": RuntimeError,
    "Budget": MemoryError,
    "Device": RuntimeError,
    "Interrupted": KeyboardInterrupt,
    "Internal": RuntimeError,
}


def _python_error(error: RuntimeError) -> BaseException:
    """Exception that stands for what an op raised: class by kind, text without the kind; `error` if it has none."""
    match = _PREFIXED.search(str(error))
    if match is None or match["kind"] not in _CLASSES:
        return error
    return _CLASSES[match["kind"]](match["message"])


def _reraise(error: RuntimeError) -> NoReturn:
    converted = _python_error(error)
    if converted is error:
        raise error
    raise converted from None


def _call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        _reraise(error)


# ---- the functions the package calls ---------------------------------------------------------------------------------
def _plain(value: Any) -> Any:
    """JSON form of what configurations hold besides plain Python: paths and NumPy integers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    msg = f"a configuration cannot hold {value!r} ({type(value).__name__})"
    raise TypeError(msg)


def _nvrtc_path() -> str | None:
    """Path of CUDA's run-time compiler among the packages that torch brought, found without loading any of them."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    # nvidia/cu13/lib, before CUDA 13 nvidia/cuda_nvrtc/lib
    paths = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    return os.fspath(max(paths)) if paths else None


def _with_compiler(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config`, and for a stream to a GPU where its kernels' compiler is."""
    if config.get("device") is None or "nvrtc" in config:
        return config
    return {**config, "nvrtc": _nvrtc_path()}


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
    return _call(_ops.open.default, json.dumps(_with_compiler(config), default=_plain), list(buffers))


def stream(state: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Give another state over the collection that `state` opened, with sampling and budget of its own."""
    return _call(_ops.stream.default, state, json.dumps(_with_compiler(config), default=_plain))


def start(state: torch.Tensor, epoch_seed: int, first_batch: int = 0) -> None:
    """Begin an epoch at batch `first_batch`; its order is a function of `epoch_seed` (the low 64 bits) alone."""
    seed = int(epoch_seed) & 0xFFFF_FFFF_FFFF_FFFF
    # The op's int is signed; the core takes the same 64 bits as an unsigned number.
    _call(_ops.start.default, state, seed - (1 << 64) if seed >> 63 else seed, int(first_batch))


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
    _call(_ops.submit.default, state, rows, positions, sizes)


def finish(state: torch.Tensor) -> None:
    """Say that the epoch has no further submissions: the end follows what was submitted."""
    _call(_ops.finish.default, state)


def ready(state: torch.Tensor, timeout_ms: int = 0) -> bool:
    """Whether :func:`load` would not wait (for a batch, the end of the epoch, or an error), within `timeout_ms`."""
    return _call(_ops.ready.default, state, int(timeout_ms))


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
        while not _call(_ops.ready.default, state, WAIT_SLICE_MS):
            pass
    device = None if device is None else torch.device(device)
    return _call(_ops.load.default, state, device=device, host_rows=host_rows)


def describe(state: torch.Tensor) -> dict[str, Any]:
    """Describe what `state` opened: ``n_obs``, ``datasets``, ``elements``, ``sampling``, ``threads``, ``n_batches``."""
    return json.loads(_call(_ops.describe.default, state))


def stats(state: torch.Tensor) -> dict[str, Any]:
    """Give counts, bytes and nanoseconds since `state` was opened, and gauges; see `annbatch.Loader.stats`."""
    return json.loads(_call(_ops.stats.default, state))


def locate(state: torch.Tensor, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Where rows (int64 ``[n]``) are stored: dataset, path, local row and chunks, one entry per row."""
    return json.loads(_call(_ops.locate.default, state, rows))


def texts(file: str, path: str) -> bytes:
    """Read the texts of variable length at `path` of the HDF5 file `file`, each with a zero byte behind it.

    Raises
    ------
    DataError, OSError, TypeError
        If they cannot be read, or not by the core: libhdf5 may know how.
    """
    return _call(_ops.texts.default, file, path).numpy().tobytes()


def close(state: torch.Tensor) -> None:
    """Stop reading and give up files and threads; batches already delivered stay valid."""
    _call(_ops.close.default, state)
