"""What compilers are told of ``load``, which only Python can register: done on import.

That is its fake (the shapes that a compiler may assume), its ordered effect (no compiler may drop, merge or reorder a load)
and its tags.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from annbatch._core.library import OPS


@functools.cache
def layout(number: int) -> tuple[dict[str, Any], ...]:
    """Elements of a batch, in order, by the number that the length of a state tensor stands for."""
    elements: list[dict[str, Any]] = json.loads(OPS.layout.default(number))
    return tuple(elements)


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


@torch.library.register_fake("annbatch::load")  # type: ignore[untyped-decorator]
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
    where = torch.device("cpu") if device is None else device
    n_rows = context.new_dynamic_size(min=0)
    batch = [torch.empty(n_rows, dtype=torch.int64, device="cpu" if host_rows else where)]
    # Different lengths are different layouts: the guard that int() leaves behind is meant.
    for element in layout(int(state.shape[0])):
        dtype = getattr(torch, element["dtype"])
        if element["kind"] == "csr":
            index_dtype = getattr(torch, element["index_dtype"])
            nnz = context.new_dynamic_size(min=0)
            batch.append(torch.empty(n_rows + 1, dtype=index_dtype, device=where))
            batch.append(torch.empty(nnz, dtype=index_dtype, device=where))
            batch.append(torch.empty(nnz, dtype=dtype, device=where))
        else:
            batch.append(torch.empty([n_rows, *element["tail"]], dtype=dtype, device=where))
    return batch


def _set_tags(op: torch._ops.OpOverload, *names: str) -> None:
    """Tag `op` with those of `names` that this torch knows; numbers of tags differ between releases, names do not."""
    tags = [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]
    if hasattr(op, "_tags"):
        op._tags = [*op._tags, *(tag for tag in tags if tag not in op._tags)]


_set_tags(OPS.load.default, "dynamic_output_shape", "cudagraph_unsafe", "pt2_compliant_tag")
