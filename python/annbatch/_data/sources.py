"""From what the user adds to what the core reads.

In comes a matrix as AnnData holds it (a zarr array, a ``CSRDataset``, a scipy CSR matrix, a NumPy array, an element of an
h5ad file); out goes its entry in the core's configuration: the directory of an array or a ``csr_matrix`` group on a local
disk, a file and a name in it, or numbers of buffers that are lent to the core in place. Nothing of the data on disk is read here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import torch
import zarr
from scipy import sparse as sp

from annbatch._data.hdf5 import Hdf5Matrix
from annbatch._data.remedies import csc_remedy

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKING_TYPES = (ad.abc.CSRDataset, zarr.Array, sp.csr_array, sp.csr_matrix, np.ndarray)
"""What may stand behind ``X``, a layer or an ``obsm`` entry."""

_HDF5_REFUSAL = (
    "Cannot add CSRDataset backed by h5ad at the moment: add the whole file by its path, `loader.add_adata(path)` or "
    "`annbatch.open([path])`."
)


@dataclass
class Source:
    """One element (``X``, ``layers/counts``, ``obsm/pca``, ...) of one dataset.

    Parameters
    ----------
    matrix
        The object the user added.
    kind
        ``"csr"`` or ``"dense"``.
    shape
        ``(n_obs, n_var)`` for ``csr``; ``(n_obs, ...)`` for ``dense``.
    path
        Absolute directory of the array or group, or the HDF5 file that it is in; ``None`` for what lies in memory.
    """

    matrix: Any
    kind: Literal["csr", "dense"]
    shape: tuple[int, ...]
    path: str | None
    # Arrays lent to the core. Kept, because a state may be opened several times over the same conversion or the same
    # read of a MemoryStore; left out of pickles, because `matrix` has it all.
    _lent: tuple[np.ndarray, ...] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lent": None}

    def config(self, buffers: list[torch.Tensor]) -> dict[str, Any]:
        """Return the core's description of this source, appending what it lends to `buffers`."""
        if isinstance(self.matrix, Hdf5Matrix):
            self.matrix.check_unchanged()
            return {"hdf5": {"file": self.matrix.file, "path": self.matrix.name}}
        if self.path is not None:
            return {"path": self.path}
        if self._lent is None:
            self._lent = _csr_arrays(self.matrix) if self.kind == "csr" else (_dense_array(self.matrix),)
        first = len(buffers)
        buffers.extend(_as_tensor(array) for array in self._lent)
        if self.kind == "csr":
            entry = {"indptr": first, "indices": first + 1, "data": first + 2, "shape": list(self.shape)}
            return {"csr": entry}
        return {"dense": {"data": first}}


def source_of(matrix: Any) -> Source:
    """Describe `matrix` for the core.

    Raises
    ------
    TypeError
        If the core cannot read it: not one of `BACKING_TYPES`, backed by HDF5, or in a store that is neither a local
        directory nor zarr's ``MemoryStore``.
    ValueError
        If it has fewer than two dimensions.
    """
    if isinstance(matrix, ad.abc.CSCDataset | sp.csc_matrix | sp.csc_array):
        raise TypeError(
            f"Cannot add dataset of type {type(matrix)}: rows of a CSC matrix are scattered over the whole of it. "
            f"{csc_remedy()}"
        )
    if isinstance(matrix, Hdf5Matrix):
        _check_axes(matrix.shape)
        return Source(matrix, matrix.kind, matrix.shape, matrix.file)
    if not isinstance(matrix, BACKING_TYPES):
        raise TypeError(
            f"Cannot add dataset of type {type(matrix)}; use a zarr.Array, an anndata CSRDataset over Zarr, "
            "a scipy csr_matrix or csr_array, or a numpy array."
        )
    if isinstance(matrix, ad.abc.CSRDataset) and matrix.backend != "zarr":
        raise TypeError(_HDF5_REFUSAL)
    kind: Literal["csr", "dense"] = "csr" if is_sparse(matrix) else "dense"
    shape = tuple(int(n) for n in matrix.shape)
    _check_axes(shape)
    return Source(matrix, kind, shape, _local_path(matrix))


def _check_axes(shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"Cannot add a dataset of shape {shape}: the first axis is obs, at least one more is needed.")


def is_sparse(matrix: Any) -> bool:
    """Whether `matrix` is one of the CSR kinds."""
    return isinstance(matrix, ad.abc.CSRDataset | sp.csr_matrix | sp.csr_array)


def share_dtypes(matrices: Sequence[Any]) -> bool:
    """Whether values (and, for CSR, column indices) of all `matrices` are stored with the same dtypes."""
    values, columns = zip(*((dtypes[0], dtypes[1:]) for dtypes in map(_stored_dtypes, matrices)), strict=True)
    return len(set(values)) <= 1 and len(set(columns) - {()}) <= 1


def _stored_dtypes(matrix: Any) -> tuple[np.dtype, ...]:
    if isinstance(matrix, Hdf5Matrix):
        return matrix.dtypes
    if isinstance(matrix, ad.abc.CSRDataset):
        return matrix.group["data"].dtype, matrix.group["indices"].dtype
    if is_sparse(matrix):
        return matrix.data.dtype, matrix.indices.dtype
    return (matrix.dtype,)


def _local_path(matrix: Any) -> str | None:
    """Absolute directory behind a zarr-backed `matrix`; ``None`` if it lies in memory."""
    if isinstance(matrix, ad.abc.CSRDataset):
        location = matrix.group.store_path
    elif isinstance(matrix, zarr.Array):
        location = matrix.store_path
    else:
        return None
    store = location.store
    if isinstance(store, zarr.storage.LoggingStore):
        store = store._store
    if isinstance(store, zarr.storage.LocalStore):
        # made absolute now: the working directory may be another when the first batch is asked for
        return str(Path(store.root).absolute() / location.path)
    if isinstance(store, zarr.storage.MemoryStore) and not isinstance(store, zarr.storage.GpuMemoryStore):
        return None
    raise TypeError(
        f"Cannot add dataset kept in a {type(store).__name__}: annbatch reads local directories (a path or "
        "zarr.storage.LocalStore), zarr.storage.MemoryStore, scipy CSR matrices and numpy arrays. "
        "Copy the store to a local directory first."
    )


def _csr_arrays(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(indptr, indices, data)`` of a CSR matrix in memory, in place where the core can use them so."""
    if isinstance(matrix, ad.abc.CSRDataset):
        indptr, indices, data = (matrix.group[name][...] for name in ("indptr", "indices", "data"))
    else:
        indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    # scipy lets the arrays be longer than indptr says (after `resize`, say); the core takes that for damage
    nnz = int(indptr[-1]) if len(indptr) else 0
    return _lendable(indptr), _lendable(indices[:nnz]), _lendable(data[:nnz])


def _dense_array(matrix: Any) -> np.ndarray:
    return _lendable(np.asarray(matrix[...] if isinstance(matrix, zarr.Array) else matrix))


def _lendable(array: np.ndarray) -> np.ndarray:
    """`array` itself where it is native, aligned and contiguous in C order; else a copy that is."""
    array = np.asarray(array)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise TypeError(f"Cannot add data of dtype {array.dtype}: bool, integers and floats up to 64 bits can be read.")
    return np.require(array, dtype=array.dtype.newbyteorder("="), requirements=["C", "A"])


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # the core only reads what it is lent
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)
