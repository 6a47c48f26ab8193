"""Small pieces shared by samplers, loader and collections: splitting, checks, and opening stored elements.

``convert`` is reachable here for code that imports it from this module; it lives in :mod:`annbatch.convert`.
"""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from zarr.core.indexing import Indexer

from annbatch._data.attributes import index_of, read_element, text_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_PACKAGE_DIR = Path(__file__).resolve().parent


def __getattr__(name: str) -> Any:
    # deferred: annbatch.convert imports torch's and JAX's side of things, which nothing else here needs
    if name == "convert":
        from .convert import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def split_given_size(a: np.ndarray, size: int, *, copy: bool = False) -> list[np.ndarray]:
    """Cut an array into consecutive pieces of ``size`` elements; the last may be shorter.

    Parameters
    ----------
    a
        Array, cut along its first axis.
    size
        Elements per piece, at least 1.
    copy
        Give copies. The default gives views, which change when ``a`` is shuffled in place afterwards.

    Returns
    -------
    list of numpy.ndarray
        At least one piece: an empty array gives one empty piece.
    """
    pieces = np.split(a, range(size, len(a), size))
    return [piece.copy() for piece in pieces] if copy else pieces


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
        for projection in itertools.chain.from_iterable(self.indexers):
            coords, chunk_selection, (rows, *others), is_complete = projection
            end = offset + rows.stop - rows.start
            yield type(projection)(coords, chunk_selection, (slice(offset, end), *others), is_complete)
            offset = end


def _spawn_worker_rng(rng: np.random.Generator, worker_id: int) -> np.random.Generator:
    """Derive a worker's own generator from one draw of a generator that all workers hold in the same state.

    The seed is a sequence of integers, worker first, as NumPy's page on parallel generation recommends
    (https://numpy.org/doc/stable/reference/random/parallel.html#sequence-of-integer-seeds).
    """
    shared_seed = rng.integers(np.iinfo(np.int64).max)
    return np.random.default_rng([worker_id, shared_seed])


def check_lt_1(vals: Sequence[int], obs: Sequence[str]) -> None:
    """Refuse values below 1.

    Parameters
    ----------
    vals
        The values.
    obs
        What each value is called in the message; as many as ``vals``.

    Raises
    ------
    ValueError
        Naming the first value below 1.
    """
    for value, label in zip(vals, obs, strict=True):
        if value < 1:
            raise ValueError(f"{label} must be greater than 1, got {value}: the smallest allowed is 1 itself")


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


def stacklevel_outside_package() -> int:
    """Return the ``stacklevel`` with which a warning of the caller points at the first line outside this package.

    ``skip_file_prefixes`` of :func:`warnings.warn` does this from Python 3.12 on; 3.11 is supported too.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _PACKAGE_DIR in Path(frame.f_code.co_filename).resolve().parents:
        level, frame = level + 1, frame.f_back
    return level


def warn_ignored_obs_aligned(adata: ad.AnnData, *, stacklevel: int) -> None:
    """Warn that a loader leaves out this object's ``obsm`` and ``layers``, once for each distinct message.

    Parameters
    ----------
    adata
        The object about to be added to a loader.
    stacklevel
        As for :func:`warnings.warn`, counted from the caller of this function.
    """
    ignored = sorted(
        f"{attribute}/{key}"
        for attribute in ("obsm", "layers")
        for key in getattr(adata, attribute)
        if key is not None  # backed objects list X among the layers, under the key None
    )
    if not ignored:
        return
    message = (
        "Only `X`, `obs`, and `var` are kept for now; the following observation-aligned elements are "
        f"ignored: {ignored}. Name those wanted in `Loader(layers=[...], obsm=[...])`; a later release will yield "
        "by default what every AnnData holds. Drop them (e.g. in a custom `load_adata`) to silence this warning."
    )
    warnings.warn(message, FutureWarning, stacklevel=stacklevel + 1)
    # The "once" action forgets in interactive sessions, where the caller's module registry changes with each cell.
    warnings.filterwarnings("ignore", message=re.escape(message), category=FutureWarning)


def csc_remedy(name: str = "X") -> str:
    """Say what to do with the CSC matrix that is stored as `name` (``"X"``, ``"obsm/…"``, ``"layers/…"``)."""
    keyed = re.search(r"(?:^|/)(layers|obsm)/(.+)", name)
    place = f"adata.{keyed[1]}[{keyed[2]!r}]" if keyed else "adata.X"
    return f"Store it as CSR, for example `{place} = {place}.tocsr()` before writing."


def _read_backed(elem: zarr.Array | zarr.Group) -> Any:
    """Present a stored dense array or CSR matrix without reading it.

    Returns
    -------
    zarr.Array or anndata.abc.CSRDataset

    Raises
    ------
    TypeError
        For any other element.
    """
    encoding = text_of(elem, "encoding-type")
    if encoding == "array" and isinstance(elem, zarr.Array):
        return elem
    if encoding == "csr_matrix" and isinstance(elem, zarr.Group):
        return ad.io.sparse_dataset(elem)
    message = f"Unrecognized encoding type {encoding} for {elem.name}"
    if encoding == "csc_matrix":
        message += f": its columns are contiguous, not its rows. {csc_remedy(elem.path)}"
    raise TypeError(message)


def load_all_aligned(g: zarr.Group) -> ad.AnnData:
    """Open one stored AnnData for a loader: annotations in memory, matrices left on disk.

    ``X`` is opened if there is one, ``obs`` is read, of ``var`` only the names are read. Of ``obsm`` and ``layers`` the dense arrays
    and CSR matrices are opened; elements of other kinds (data frames, awkward arrays) are left out, since no batch
    could hold them.

    Parameters
    ----------
    g
        Group that holds one AnnData.

    Raises
    ------
    TypeError
        If ``X`` is neither a dense array nor a CSR matrix.
    """
    return _load_aligned(g, read_element(g["obs"]))


def _load_aligned(g: zarr.Group, obs: pd.DataFrame) -> ad.AnnData:
    aligned = {
        attribute: {
            key: _read_backed(elem)
            for key, elem in g[attribute].members()
            if text_of(elem, "encoding-type") in ("array", "csr_matrix")
        }
        for attribute in ("obsm", "layers")
        if attribute in g
    }
    has_x = "X" in g and text_of(g["X"], "encoding-type") != "null"
    var = g["var"]
    return ad.AnnData(
        X=_read_backed(g["X"]) if has_x else None,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(read_element(var[index_of(var)]))),
        **aligned,
    )
