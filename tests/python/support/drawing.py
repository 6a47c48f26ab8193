"""Random descriptions of stores: from hypothesis, or from a plain seed (see :mod:`stores` for what they describe)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from support.stores import (
    CODECS_V2,
    CODECS_V3,
    DATA_DTYPES,
    INDEX_DTYPES,
    INDPTR_DTYPES,
    ArrayLayout,
    CsrSpec,
    DatasetSpec,
    DenseSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_MOST_CHUNKS = 48  # per array: a file each, so more would only slow the tests


class Chooser(Protocol):
    """Where random decisions come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer of [low, high]."""

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`; hypothesis shrinks towards the first."""


class SeededChooser:
    """Decisions from ``random.Random(seed)``."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer of [low, high]."""
        return self._random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return self._random.choice(options)


class HypothesisChooser:
    """Decisions from the ``draw`` function of a hypothesis composite strategy."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        from hypothesis import strategies

        self._draw, self._strategies = draw, strategies

    def integer(self, low: int, high: int) -> int:
        """An integer of [low, high]."""
        return self._draw(self._strategies.integers(low, high))

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return self._draw(self._strategies.sampled_from(list(options)))


def _draw_chunks(choose: Chooser, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunk shape for `shape`, at most about `_MOST_CHUNKS` chunks in all, often not dividing."""
    chunks, left = [], _MOST_CHUNKS
    for length in shape:
        smallest = max(1, -(-length // left))
        chunks.append(choose.integer(smallest, max(smallest, length + 2)))
        left = max(1, left // max(1, -(-length // chunks[-1])))
    return tuple(chunks)


def draw_layout(choose: Chooser, shape: tuple[int, ...], zarr_format: int) -> ArrayLayout:
    """A layout for an array of `shape`."""
    chunks = _draw_chunks(choose, shape)
    plain = {
        "chunks": chunks,
        "big_endian": choose.integer(0, 4) == 4,
        "transposed": len(shape) > 1 and choose.integer(0, 3) == 3,
        "write_empty_chunks": choose.integer(0, 3) == 3,
    }
    if zarr_format == 2:
        return ArrayLayout(
            2,
            codec=choose.pick(list(CODECS_V2)),
            separator=choose.pick("./"),
            fill_value=choose.pick([0, 1, None]),
            **plain,
        )
    sharded = choose.pick([True, False])
    shards = tuple(chunk * choose.integer(1, 4) for chunk in chunks) if sharded else None
    outside = choose.pick([False, True])
    if sharded and plain["transposed"] and outside:
        # zarr-python compares the shapes before and after the turn, so only squares can be written
        plain["chunks"], shards = (max(chunks),) * len(shape), (max(chunks) * choose.integer(1, 3),) * len(shape)
    return ArrayLayout(
        3,
        shards=shards,
        codec=choose.pick(list(CODECS_V3)),
        transpose_outside=outside,
        nested=sharded and choose.integer(0, 7) == 7,
        index_location=choose.pick(["end", "start"]),
        index_checksum=choose.integer(0, 3) < 3,
        separator=choose.pick("/."),
        v2_keys=choose.integer(0, 3) == 3,
        fill_value=choose.pick([0, 1]),
        **plain,
    )


def draw_csr(choose: Chooser, n_obs: int, n_var: int, zarr_format: int) -> CsrSpec:
    """A sparse element of the given shape."""
    spec = CsrSpec(
        (n_obs, n_var),
        pattern=choose.pick(["any", "sparse", "one long row", "full", "empty"]),
        blocky=choose.pick([False, True]),
        data_dtype=choose.pick(DATA_DTYPES),
        index_dtype=choose.pick([name for name in INDEX_DTYPES if np.iinfo(name).max >= n_var - 1]),
        indptr_dtype=choose.pick(INDPTR_DTYPES),
        seed=choose.integer(0, 2**16),
        layouts={},
    )
    nnz = len(spec.values().data)
    for name, length in (("indptr", n_obs + 1), ("indices", nnz), ("data", nnz)):
        spec.layouts[name] = draw_layout(choose, (length,), zarr_format)
    return spec


def draw_dense(choose: Chooser, shape: tuple[int, ...], zarr_format: int) -> DenseSpec:
    """A dense element of the given shape."""
    return DenseSpec(
        shape,
        blocky=choose.pick([False, True]),
        dtype=choose.pick(DATA_DTYPES),
        seed=choose.integer(0, 2**16),
        layout=draw_layout(choose, shape, zarr_format),
    )


# element name -> what it may be; a tuple is the tail of a dense element, with None for a length to draw
_ELEMENTS: dict[str, tuple[Any, ...]] = {
    "X": ("csr", "csr", (None,)),
    "layers/counts": ("csr", (None,)),
    "obsm/pca": ((None,),),
    "obsm/image": ((None, None, 3),),
    "raw/X": ("csr",),
}


def draw_collection(
    choose: Chooser, *, most_datasets: int = 5, most_rows: int = 40, elements: Sequence[str] | None = None
) -> list[DatasetSpec]:
    """Descriptions of 1 to `most_datasets` stores that share their elements (names, kinds and widths)."""
    names = list(elements or ["X", *(name for name in _ELEMENTS if name != "X" and choose.integer(0, 3) == 3)])
    forms: dict[str, Any] = {}
    for name in names:
        form = choose.pick(_ELEMENTS[name])
        wide = choose.pick([7, 1, 30, 200, 300, 70_000])  # 200 > i8, 300 > u8, 70,000 > u16
        forms[name] = wide if form == "csr" else tuple(choose.integer(1, 9) if n is None else n for n in form)
    specs = []
    for _ in range(choose.integer(1, most_datasets)):
        n_obs, zarr_format = choose.integer(1, most_rows), choose.pick([3, 2])
        drawn = {
            name: draw_csr(choose, n_obs, form, zarr_format)
            if isinstance(form, int)
            else draw_dense(choose, (n_obs, *form), zarr_format)
            for name, form in forms.items()
        }
        specs.append(DatasetSpec(n_obs, zarr_format, choose.pick([False, True]), drawn))
    return specs
