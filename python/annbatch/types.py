"""The types that cross the public interface: what goes into a loader, what a sampler asks for, what a loader returns.

Annotations are evaluated here (no ``from __future__ import annotations``): ``TypedDict`` must see ``NotRequired``.
"""

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NotRequired, TypeAlias, TypedDict, TypeVar

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse as sp
from zarr import Array as ZarrArray

from .compat import CupyArray, CupyCSRMatrix, JaxArray, JAXCSRMatrix, Tensor

__all__ = [
    "BackingArray_T",
    "InputInMemoryArray_T",
    "LoadRequest",
    "LoaderOutput",
    "LoaderStats",
    "OutputInMemoryArray_T",
    "RowPlace",
]


@dataclass
class CSRContainer:
    """The three arrays of a CSR matrix, without the checks and conversions of a matrix class.

    Attributes
    ----------
    elems
        ``(data, indices, indptr)``: two arrays of ``nnz`` elements and one of ``n_rows + 1``.
    shape
        ``(n_rows, n_columns)``.
    dtype
        The dtype of ``data``.
    """

    elems: tuple[np.ndarray, np.ndarray, np.ndarray]
    shape: tuple[int, int]
    dtype: np.dtype


class _UnionAlias:
    """A named union that can be annotated with, tested against and taken apart.

    Python 3.12's ``type`` statement gives a named alias with ``__value__`` that ``isinstance`` refuses; a plain union
    can be tested but has neither. Code written for either finds what it needs here.
    """

    def __init__(self, name: str, *members: type) -> None:
        self.__name__ = name
        self.__value__ = functools.reduce(operator.or_, members)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.__value__)

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.__value__)

    def __or__(self, other: Any) -> Any:
        return self.__value__ | getattr(other, "__value__", other)

    def __ror__(self, other: Any) -> Any:
        return other | self.__value__

    def __repr__(self) -> str:
        return self.__name__

    def __reduce__(self) -> str:
        return self.__name__  # a module-level name: pickled and copied by reference


if TYPE_CHECKING:
    BackingArray_T: TypeAlias = ad.abc.CSRDataset | ZarrArray[Any] | sp.csr_array | sp.csr_matrix | np.ndarray
    InputInMemoryArray_T: TypeAlias = CSRContainer | np.ndarray
    OutputInMemoryArray_T: TypeAlias = (
        sp.csr_matrix | np.ndarray | CupyCSRMatrix | CupyArray | Tensor | JaxArray | JAXCSRMatrix
    )
else:
    BackingArray_T = _UnionAlias(
        "BackingArray_T", ad.abc.CSRDataset, ZarrArray, sp.csr_array, sp.csr_matrix, np.ndarray
    )
    InputInMemoryArray_T = _UnionAlias("InputInMemoryArray_T", CSRContainer, np.ndarray)
    OutputInMemoryArray_T = _UnionAlias(
        "OutputInMemoryArray_T",
        sp.csr_matrix,
        np.ndarray,
        CupyCSRMatrix,
        CupyArray,
        Tensor,
        JaxArray,
        JAXCSRMatrix,
    )

_Output = TypeVar("_Output", bound=OutputInMemoryArray_T)


class LoadRequest(TypedDict):
    """One preload window: the rows a sampler wants in memory together, and the batches to cut from them.

    Attributes
    ----------
    requests
        The rows of the window, numbered over all datasets of the loader in the order they were added. Either a list
        of non-empty slices of step 1 (contiguous rows, cheap to read), or a one-dimensional integer array of row
        numbers. Rows come into memory in this order.
    splits
        One integer array per batch, holding positions in the window: position ``p`` means the ``p``-th row of
        ``requests``, whatever dataset it lies in. NumPy's indexing rules hold (negative positions count from the
        end). No array may be empty. Left out, :meth:`annbatch.abc.Sampler.sample` cuts the window into batches of
        :attr:`annbatch.abc.Sampler.batch_size` rows, in random order if :attr:`annbatch.abc.Sampler.shuffle` is set.
    """

    requests: list[slice] | np.ndarray
    splits: NotRequired[list[np.ndarray]]


class LoaderOutput(TypedDict, Generic[_Output]):
    """One batch of ``n`` rows as :class:`annbatch.Loader` yields it.

    Attributes
    ----------
    X
        The ``n`` by ``n_var`` matrix (or ``n`` by ``…`` array), in the library the loader's ``to`` names. None where the
        datasets have none and the loader was asked for ``layers`` or ``obsm``.
    obs
        The rows' annotations, or None where the datasets came without.
    var
        The variables' annotations, the same object in every batch, or None.
    index
        The rows' global numbers (int64, shape ``(n,)``), or None without ``return_index=True``.
    """

    X: _Output | None
    obs: pd.DataFrame | None
    var: pd.DataFrame | None
    index: np.ndarray | None


class RowPlace(TypedDict):
    """Where one row is stored; :meth:`annbatch.Loader.locate` says what each entry is.

    ``chunks`` has the arrays of each element: ``"data"``, and ``"indices"`` where it is sparse; None in memory.
    """

    row: int
    dataset: int
    path: str | None
    local_row: int
    obs_name: Any
    chunks: dict[str, dict[str, list[int] | None]]


class LoaderStats(TypedDict, total=False):
    """Counts, nanoseconds (``_ns``) and gauges of one pass; :meth:`annbatch.Loader.stats` says what each is."""

    reads: int
    bytes_read: int
    fetch_ns: int
    direct_reads_refused: int
    chunks_decoded: int
    bytes_decoded: int
    decode_ns: int
    chunks_general_path: int
    chunks_filled: int
    chunks_decoded_again: int
    seal_ns: int
    epochs_started: int
    windows_planned: int
    units_planned: int
    plan_ns: int
    batches_ready: int
    batches_delivered: int
    rows_delivered: int
    bytes_delivered: int
    consumer_wait_ns: int
    budget_wait_ns: int
    fetch_depth_wait_ns: int
    fetch_budget_wait_ns: int
    decode_idle_ns: int
    active_ns: int
    memory_budget: int
    reads_in_flight: int
    decode_queued: int
    decode_running: int
    units_alive: int
    encoded_bytes_held: int
    batches_undelivered: int
    bytes_undelivered: int
    leases_out: int
    leased_bytes: int
    h2d_batches: int
    h2d_copies: int
    h2d_bytes: int
    h2d_ns: int
    transfer_host_wait_ns: int
    transfer_room_wait_ns: int
    batches_widened: int
    batches_on_device: int
    staging_bytes: int
    pinned: bool | str | None
