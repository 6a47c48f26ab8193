"""Names of scverse annbatch's `utils`: those that live elsewhere here, and those that nothing here needs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
from zarr.core.indexing import Indexer

from annbatch._base.sizes import check_lt_1, split_given_size
from annbatch._base.warn import ignored_elements, warn_once
from annbatch._data.aligned import load_all_aligned
from annbatch._data.stored import read_backed as _read_backed
from annbatch.convert import convert
from annbatch.samplers._utils import spawn_worker_rng as _spawn_worker_rng
from annbatch.types import CSRContainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import anndata as ad

__all__ = [
    "CSRContainer",
    "MultiBasicIndexer",
    "SupportsShape",
    "_read_backed",
    "_spawn_worker_rng",
    "check_lt_1",
    "check_var_shapes",
    "convert",
    "interval_indexer_from_slices",
    "load_all_aligned",
    "split_given_size",
    "warn_ignored_obs_aligned",
]


def interval_indexer_from_slices(slices: Iterable[Iterable[slice]]) -> pd.IntervalIndex:
    """Index the positions that groups of slices take when laid end to end.

    Parameters
    ----------
    slices
        Groups of slices with both bounds set.

    Returns
    -------
    pandas.IntervalIndex
        One interval ``[first, end)`` per group.
    """
    lengths = (sum(piece.stop - piece.start for piece in group) for group in slices)
    bounds = list(itertools.accumulate(lengths, initial=0))
    return pd.IntervalIndex.from_breaks(bounds, closed="left")


class MultiBasicIndexer(Indexer):
    """Several zarr indexers presented as one whose results lie one after the other along the first axis.

    Parameters
    ----------
    indexers
        Non-empty list of indexers over the same array that agree in all axes but the first.
    """

    def __init__(self, indexers: list[Indexer]) -> None:
        first = indexers[0]
        self.indexers = indexers
        self.shape = (sum(indexer.shape[0] for indexer in indexers), *first.shape[1:])
        self.drop_axes = first.drop_axes

    def __iter__(self) -> Iterator[Any]:
        offset = 0
        projections: Iterator[Any] = itertools.chain.from_iterable(self.indexers)
        for projection in projections:
            coords, chunk_selection, (rows, *others), is_complete = projection
            end = offset + rows.stop - rows.start
            yield type(projection)(coords, chunk_selection, (slice(offset, end), *others), is_complete)
            offset = end


class SupportsShape(Protocol):
    """Anything with a shape of at least two axes."""

    @property
    def shape(self) -> tuple[int, int] | list[int]:
        """Length of each axis."""
        ...


def check_var_shapes(objs: Sequence[SupportsShape]) -> None:
    """Refuse objects that differ in their number of variables.

    Raises
    ------
    ValueError
        If any ``shape[1]`` differs from the first one's.
    """
    widths = [obj.shape[1] for obj in objs]
    if len(set(widths)) > 1:
        raise ValueError(
            f"All datasets must have same shape along the var axis. Got {widths} variables. "
            "annbatch.open joins files whose variables differ."
        )


def warn_ignored_obs_aligned(adata: ad.AnnData, *, stacklevel: int) -> None:
    """Warn that a loader leaves out this object's ``obsm`` and ``layers``, once for each distinct message.

    Parameters
    ----------
    adata
        The object about to be added to a loader.
    stacklevel
        As for :func:`warnings.warn`, counted from the caller of this function.
    """
    ignored = [
        f"{attribute}/{key}"
        for attribute in ("obsm", "layers")
        for key in getattr(adata, attribute)
        if key is not None  # backed objects list X among the layers, under the key None
    ]
    if ignored:
        warn_once(ignored_elements(ignored), FutureWarning, stacklevel=stacklevel + 1)
