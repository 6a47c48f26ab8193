"""From the tensors of the op to the array type the user asked for.

In come the parts of one element of one batch, host tensors that share the core's pooled memory, or tensors on a GPU; out
goes a scipy CSR matrix or NumPy array, a torch tensor, a JAX array or CSR, or the like on the GPU. Nothing is copied on
the host (but for half precision, which scipy lacks): the result keeps the core's buffers until it is dropped.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse as sp
from torch.utils.dlpack import from_dlpack

from annbatch.compat import CupyArray, CupyCSRMatrix

OutputLibrary = Literal["torch", "jax"] | None


def stored_as(to: OutputLibrary) -> Literal["torch", "native"]:
    """How the core should deliver values: widened to dtypes torch computes with, or as NumPy promotes them."""
    return "torch" if to == "torch" else "native"


def convert_csr(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    data: torch.Tensor,
    n_var: int,
    *,
    to: OutputLibrary,
    preload_to_gpu: bool,
) -> Any:
    """Return a CSR matrix of shape ``[len(indptr) - 1, n_var]``.

    Parameters
    ----------
    indptr, indices, data
        int32 or int64 ``[n + 1]``, the same ``[nnz]``, and the values ``[nnz]``, on the CPU or a GPU.
    n_var
        Number of columns.
    to
        ``None`` (scipy ``csr_matrix``, or cupyx's on the GPU), ``"torch"`` or ``"jax"``.
    preload_to_gpu
        Whether the result lies on the current CUDA device; values then have a dtype cupy's sparse matrices know.
    """
    shape = (indptr.shape[0] - 1, n_var)
    if preload_to_gpu or (data.is_cuda and to is None):
        # on the GPU, where that is where they are
        data = data.to(_gpu_value_dtype(data.dtype))
    if to == "torch":
        if preload_to_gpu:
            indptr, indices, data = (part.cuda(non_blocking=True) for part in (indptr, indices, data))
        return _torch_csr(indptr, indices, data, shape)
    if data.is_cuda and to == "jax":
        return _jax_csr((data, indices, indptr), shape)
    parts = tuple(map(_array, (data, indices, indptr)))
    if preload_to_gpu and not data.is_cuda:
        parts = _to_cupy(*parts)
    if to == "jax":
        return _jax_csr(parts, shape)
    if preload_to_gpu or data.is_cuda:
        from cupyx.scipy.sparse import csr_matrix

        with parts[0].device:
            return csr_matrix(parts, shape=shape)
    if parts[0].dtype == np.float16:
        # scipy's sparse matrices cannot even be printed with half precision
        parts = (parts[0].astype(np.float32), *parts[1:])
    return sp.csr_matrix(parts, shape=shape, copy=False)


def convert_dense(values: torch.Tensor, *, to: OutputLibrary, preload_to_gpu: bool) -> Any:
    """Return `values` (``[n, ...]``) as an array of the library asked for; see `convert_csr`."""
    if to == "torch":
        return values.cuda(non_blocking=True) if preload_to_gpu else values
    if values.is_cuda and to == "jax":
        return _jax_array(values)
    array = _array(values)
    if preload_to_gpu and not values.is_cuda:
        (array,) = _to_cupy(array)
    return _jax_array(array) if to == "jax" else array


def convert(input: Any, preload_to_gpu: bool, to: Literal["torch", "jax"]) -> Any:
    """Return a matrix as an array of another library.

    Parameters
    ----------
    input
        A scipy CSR matrix or NumPy array, or what cupy has in their place.
    preload_to_gpu
        Whether what lies on the host goes to the current CUDA device.
    to
        ``"torch"`` or ``"jax"``.

    Raises
    ------
    TypeError
        If `input` is something else.
    """
    if isinstance(input, sp.csr_matrix | sp.csr_array):
        indptr, indices, data = (torch.from_numpy(part) for part in (input.indptr, input.indices, input.data))
        return convert_csr(indptr, indices, data, input.shape[1], to=to, preload_to_gpu=preload_to_gpu)
    if isinstance(input, np.ndarray):
        return convert_dense(torch.from_numpy(input), to=to, preload_to_gpu=preload_to_gpu)
    if isinstance(input, CupyCSRMatrix):
        if to == "jax":
            return _jax_csr((input.data, input.indices, input.indptr), input.shape)
        indptr, indices, data = (from_dlpack(part) for part in (input.indptr, input.indices, input.data))
        return _torch_csr(indptr, indices, data, input.shape)
    if isinstance(input, CupyArray):
        return _jax_array(input) if to == "jax" else from_dlpack(input)
    raise TypeError(f"Cannot convert {type(input)} to {'torch.Tensor' if to == 'torch' else 'jax.Array'}")


def _array(tensor: torch.Tensor) -> Any:
    """Return a NumPy array, or a cupy one of a tensor on a GPU, of the same memory."""
    if not tensor.is_cuda:
        return tensor.numpy()
    import cupy as cp

    # torch exports tensors of its current device only, on the current stream there
    with torch.cuda.device(tensor.device), cp.cuda.Device(tensor.device.index):
        return cp.from_dlpack(tensor)


def _jax_array(array: Any) -> Any:
    import jax.numpy as jnp

    if isinstance(array, torch.Tensor) and array.is_cuda:
        with torch.cuda.device(array.device):
            return jnp.from_dlpack(array)
    return jnp.from_dlpack(array)


def _jax_csr(parts: tuple[Any, Any, Any], shape: tuple[int, int]) -> Any:
    from jax.experimental.sparse import CSR

    return CSR(tuple(_jax_array(part) for part in parts), shape=shape)


def _torch_csr(indptr: torch.Tensor, indices: torch.Tensor, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    _use_up_beta_warning()
    # the core has checked what it delivers; torch would go through all of it again, on the consumer's time
    return torch.sparse_csr_tensor(indptr, indices, data, size=shape, check_invariants=False)


@functools.cache
def _use_up_beta_warning() -> None:
    """Make a CSR tensor in silence: torch says once per process that they are in beta, and once that it checks none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        none = torch.zeros(0, dtype=torch.int32)
        # without saying whether to check: so does torch where it makes one of what a worker sends
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), none, none, size=(0, 0))


def _gpu_value_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sparse values on the GPU: cupy's sparse matrices know bool, float32 and float64 only."""
    if dtype in (torch.bool, torch.float32, torch.float64):
        return dtype
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def _to_cupy(*arrays: np.ndarray) -> tuple[Any, ...]:
    """`arrays` on the GPU."""
    import cupy as cp

    return tuple(cp.asarray(array) for array in arrays)
