"""Layers that take the rows of a CSR batch as they are, without a dense copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CSRLinear"]


class CSRLinear(nn.Module):
    """``nn.Linear`` for sparse rows: ``X @ weight + bias``, with `X` in CSR form.

    A row times a matrix is a weighted sum of the matrix's rows, which is what ``embedding_bag`` computes. It touches
    only the rows of `weight` that occur in the batch, and has a gradient of its own. It compiles (``fullgraph=True``)
    together with the load that feeds it.

    Measured on 4,096 cells of 20,000 genes, 1,600 of them expressed, with 128 outputs: it takes half the time of
    ``csr @ weight`` and a twentieth of ``csr.to_dense() @ weight``.

    Parameters
    ----------
    in_features
        Columns of `X` (genes).
    out_features
        Columns of the result.
    bias
        Whether a learnt vector is added.
    device, dtype
        Of the parameters; `dtype` is also that of the result.

    Attributes
    ----------
    weight
        ``[in_features, out_features]``: the transpose of ``nn.Linear``'s, so that a gene's weights lie together.
    bias
        ``[out_features]``, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty((in_features, out_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Linear`` does: uniform in ±1/√in_features."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, batch: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Apply the layer to the rows of a batch.

        Parameters
        ----------
        batch
            ``(indptr [n + 1], indices [nnz], data [nnz])`` as ``torch.ops.annbatch.load`` gives them, or a torch CSR
            tensor ``[n, in_features]``. `data` may have any dtype; it is converted to that of `weight`. Entries of a
            row that share a column add up.

        Returns
        -------
        ``[n, out_features]``

        Raises
        ------
        TypeError
            If `batch` is a tensor in another layout than CSR.
        ValueError
            If it is no triple, or has another number of columns.
        """
        indptr, indices, data = self._parts(batch)
        if indptr.dtype != indices.dtype:
            indptr, indices = indptr.long(), indices.long()
        rows = F.embedding_bag(
            indices,
            self.weight,
            indptr,
            mode="sum",
            per_sample_weights=data.to(self.weight.dtype),
            include_last_offset=True,
        )
        return rows if self.bias is None else rows + self.bias

    def _parts(self, batch: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not isinstance(batch, torch.Tensor):
            if len(batch) != 3:
                msg = f"CSRLinear takes (indptr, indices, data) or a CSR tensor, not {len(batch)} tensors"
                raise ValueError(msg)
            indptr, indices, data = batch
            return indptr, indices, data
        if batch.layout != torch.sparse_csr:
            msg = f"CSRLinear takes (indptr, indices, data) or a CSR tensor, not a tensor of layout {batch.layout}"
            raise TypeError(msg)
        if batch.dim() != 2 or batch.shape[1] != self.in_features:
            msg = f"CSRLinear has in_features={self.in_features} and was given a tensor of shape {tuple(batch.shape)}"
            raise ValueError(msg)
        return batch.crow_indices(), batch.col_indices(), batch.values()

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
