"""Mini-batches from AnnData stores at the speed of the hardware: the public names.

Importing the package registers ``torch.ops.annbatch``. ``Loader``, ``open``, ``nn`` and ``lightning`` are imported when first
used, and no optional library is imported here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import abc, samplers, types
from ._core.ops import DataError as DataError
from ._core.ops import load as load
from ._core.ops import open_state as open_state
from .io import DatasetCollection, write_sharded

if TYPE_CHECKING:
    from . import lightning as lightning
    from . import nn, transforms
    from ._open import open as open  # out of __all__, as a star import must not hide the builtin
    from .loader import Loader

try:
    __version__ = version("annbatch")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

# `lightning` stays out: a star import must not need an extra.
__all__ = [
    "DatasetCollection",
    "Loader",
    "abc",
    "nn",
    "samplers",
    "transforms",
    "types",
    "write_sharded",
]

# Public name -> module of this package and attribute in it (None: the module itself).
_DEFERRED = {
    "Loader": ("loader", "Loader"),
    "convert": ("convert", None),
    "lightning": ("lightning", None),
    "loader": ("loader", None),
    "nn": ("nn", None),
    "open": ("_open", "open"),
    "transforms": ("transforms", None),
    "utils": ("utils", None),
}


def __getattr__(name: str) -> Any:
    if name not in _DEFERRED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _DEFERRED[name]
    module = import_module(f".{module_name}", __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFERRED})
