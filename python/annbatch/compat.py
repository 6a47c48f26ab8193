"""Names of array types from libraries that may be absent.

Torch is a dependency and is imported. CuPy and JAX are not: importing annbatch must never import them (either import
may initialise a GPU). Their types stand here as *deferred* classes, which answer ``isinstance`` and ``issubclass`` by
asking the real class once its library has been imported by somebody else. Until then no value of the type can exist,
so the answer is False.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = ["CupyArray", "CupyCSRMatrix", "IterableDataset", "JAXCSRMatrix", "JaxArray", "Tensor"]


class _DeferredType(type):
    """Metaclass of a stand-in for ``<__module__>.<__name__>``, resolved on use without importing anything."""

    def _resolve(cls) -> type | None:
        return getattr(sys.modules.get(cls.__module__), cls.__name__, None)

    def __instancecheck__(cls, instance: object) -> bool:
        real = cls._resolve()
        return real is not None and isinstance(instance, real)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if subclass is cls:
            return True
        real = cls._resolve()
        return real is not None and issubclass(subclass, real)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        real = cls._resolve()
        if real is None:
            raise ImportError(f"{cls.__module__}.{cls.__name__} is needed here: import {cls.__module__} first.")
        return real(*args, **kwargs)


def _deferred(module: str, name: str) -> type:
    return _DeferredType(name, (), {"__module__": module, "__doc__": f"Stand-in for ``{module}.{name}``."})


if TYPE_CHECKING:
    from cupy import ndarray as CupyArray
    from cupyx.scipy.sparse import csr_matrix as CupyCSRMatrix
    from jax import Array as JaxArray
    from jax.experimental.sparse import CSR as JAXCSRMatrix
else:
    CupyArray = _deferred("cupy", "ndarray")
    CupyCSRMatrix = _deferred("cupyx.scipy.sparse", "csr_matrix")
    JaxArray = _deferred("jax", "Array")
    JAXCSRMatrix = _deferred("jax.experimental.sparse", "CSR")
