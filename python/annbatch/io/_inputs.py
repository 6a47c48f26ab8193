"""The AnnData objects that go into a collection: opened without their matrices, checked, and read row by row.

:class:`Inputs` presents any number of them as one observation axis. Annotations (``obs``, ``var``) are in memory and
joined once; matrices stay where they are until :meth:`Inputs.take` reads some rows of them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse as sp
from tqdm.auto import tqdm

from annbatch.utils import stacklevel_outside_package

from ._frames import concat_frames
from ._sizes import is_self_describing, stored_bytes_per_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from os import PathLike
    from typing import Literal, TypeAlias

    Stored: TypeAlias = zarr.Group | h5py.Group | PathLike[str] | str
    Merge: TypeAlias = Literal["same", "unique", "first", "only"] | None


def open_stored(x: Stored) -> zarr.Group | h5py.Group:
    """Open an AnnData store for reading: an h5ad file, a Zarr directory, or a group that is open already."""
    if isinstance(x, zarr.Group | h5py.Group):
        return x
    return h5py.File(x, mode="r") if Path(x).is_file() else zarr.open_group(x, mode="r")


def load_lazily(x: Stored) -> ad.AnnData:
    """Open an AnnData: annotations and small things in memory, matrices as dask arrays over the store.

    Files from before anndata 0.8, which do not say how their parts are encoded, are read as a whole.

    Parameters
    ----------
    x
        Path of an h5ad file or Zarr store, or an open group.
    """
    group = open_stored(x)
    if not is_self_describing(group):
        return ad.read_h5ad(group.file.filename) if isinstance(group, h5py.Group) else ad.read_zarr(group)
    parts: dict[str, Any] = {key: ad.io.read_elem(group[key]) for key in ("obs", "var", "varm", "uns") if key in group}
    if "X" in group:
        parts["X"] = _lazy_element(group["X"])
    for mapping in ("layers", "obsm", "obsp", "varp"):
        if mapping in group:
            parts[mapping] = {key: _lazy_element(group[mapping][key]) for key in group[mapping]}
    if "raw" in group and "X" in group["raw"]:
        raw = group["raw"]
        parts["raw"] = {key: ad.io.read_elem(raw[key]) for key in ("var", "varm") if key in raw}
        parts["raw"]["X"] = _lazy_element(raw["X"])
    return ad.AnnData(**parts)


def _lazy_element(node: Any) -> Any:
    if node.attrs.get("encoding-type") in ("array", "csr_matrix", "csc_matrix"):
        return ad.experimental.read_elem_lazy(node)
    return ad.io.read_elem(node)


def to_memory(x: Any) -> Any:
    """Read a lazy array or frame, or copy what is in memory already (anndata's views hold on to their origin)."""
    from anndata.experimental.backed import Dataset2D
    from dask import compute
    from dask.array import Array as DaskArray

    if isinstance(x, DaskArray):
        if x.shape[0] == 0 and isinstance(x._meta, sp.sparray | sp.spmatrix | np.ndarray):
            return type(x._meta)(x.shape, dtype=x.dtype)  # dask would read a block to take nothing from it
        if isinstance(x._meta, sp.csr_matrix | sp.csr_array) and x.numblocks[1] == 1:
            # dask would join sparse blocks pairwise, over and over
            return sp.vstack(compute(*x.blocks), format="csr")
        return x.compute()
    if isinstance(x, Dataset2D):
        return _frame_to_memory(x)
    if isinstance(x, h5py.Dataset | zarr.Array):
        return x[...]
    if isinstance(x, ad.abc.CSRDataset | ad.abc.CSCDataset):
        return x.to_memory()
    return x.copy() if hasattr(x, "copy") else copy(x)


def _frame_to_memory(lazy: Any) -> pd.DataFrame:
    """Read a lazy frame under its stored index, which anndata may have put beside a range index."""
    lazy.index = lazy.true_index
    frame = lazy.to_memory()
    return frame.set_index("_index") if "_index" in frame.columns else frame


@dataclass
class Keys:
    """Which keyed elements one object holds."""

    label: Any
    layers: set[str]
    obsm: set[str]
    obs: set[str]
    has_raw: bool

    @classmethod
    def of(cls, adata: ad.AnnData, label: Any) -> Keys:
        """Keys of an opened object."""
        keyed = {name: set(getattr(adata, name).keys()) - {None} for name in ("layers", "obsm")}
        return cls(label, obs=set(adata.obs.columns) - {"_index"}, has_raw=adata.raw is not None, **keyed)

    @classmethod
    def of_stored(cls, group: zarr.Group) -> Keys:
        """Keys of a stored object, from metadata."""
        keyed = {name: set(group[name].keys()) if name in group else set() for name in ("layers", "obsm")}
        columns = set(group["obs"].attrs.get("column-order", []))
        return cls(group.name, obs=columns, has_raw="raw" in group and "X" in group["raw"], **keyed)


def warn_of_differing_keys(keys: Sequence[Keys]) -> None:
    """Warn of elements that some objects have and others lack."""
    labels = [key.label for key in keys]
    if 0 < sum(key.has_raw for key in keys) < len(keys):
        warnings.warn(
            f"Found raw keys not present in all anndatas {labels}, consider deleting raw or moving it to a shared "
            "layer/X location via `load_adata`",
            stacklevel=stacklevel_outside_package(),
        )
    for name in ("layers", "obsm", "obs"):
        counts = Counter(key for each in keys for key in getattr(each, name))
        differing = sorted(key for key, count in counts.items() if count < len(keys))
        if differing:
            warnings.warn(
                f"Found {name} keys {differing} not present in all anndatas {labels}, consider stopping and using "
                f"the `load_adata` argument to alter {name} accordingly.",
                stacklevel=stacklevel_outside_package(),
            )


def check_groupby(columns: Sequence[str], frames: Sequence[pd.DataFrame]) -> None:
    """Check that every frame has every column to sort by, with the same categories if categorical.

    Raises
    ------
    ValueError
        If a column is missing, or differs in being categorical or in its categories.
    """
    n_found = {column: sum(column in frame.columns for frame in frames) for column in columns}
    for column in columns:
        dtypes = [frame[column].dtype for frame in frames if column in frame.columns]
        categorical = [isinstance(dtype, pd.CategoricalDtype) for dtype in dtypes]
        if len(set(categorical)) > 1:
            raise ValueError(f"Found groupby column {column!r} with inconsistent categorical dtype across anndatas.")
        if any(categorical) and not all(dtypes[0].categories.equals(dtype.categories) for dtype in dtypes):
            raise ValueError(
                f"Found groupby categorical columns {[column]!r} with inconsistent categories across anndatas."
            )
    if absent := [column for column, n in n_found.items() if n == 0]:
        raise ValueError(f"Could not find groupby columns {absent!r} in `obs`.")
    if partial := [column for column, n in n_found.items() if n < len(frames)]:
        raise ValueError(f"Found groupby columns {partial!r} not present in all anndatas.")


class Inputs:
    """Several opened AnnData objects as one observation axis.

    Parameters
    ----------
    paths
        What ``load_adata`` opens, one after the other.
    load_adata
        Gives an AnnData, lazy or not, for each.
    var_subset
        Names of the variables to keep; all if None.
    merge
        What to do with the columns of ``var``, as for :func:`anndata.concat`.

    Attributes
    ----------
    adatas
        The opened objects, with ``obs`` and ``var`` as data frames in memory.
    obs
        Joint annotations, with the column ``src_path`` (categorical) that names the input, under unique names.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        *,
        load_adata: Callable[[Any], ad.AnnData],
        var_subset: Iterable[str] | None = None,
        merge: Merge = None,
    ) -> None:
        self._paths = list(paths)
        self._merge = merge
        self.adatas = [_prepared(load_adata(path)) for path in tqdm(self._paths, desc="Opening anndatas")]
        self._stored_adatas = self.adatas
        if var_subset is not None:
            wanted = set(var_subset)
            self.adatas = [adata[:, adata.var_names.isin(wanted)] for adata in self.adatas]
        self._offsets = np.cumsum([0, *(adata.n_obs for adata in self.adatas)])

    @property
    def n_obs(self) -> int:
        """Number of observations of all inputs."""
        return int(self._offsets[-1])

    @property
    def keys(self) -> list[Keys]:
        """Keyed elements of each input."""
        return [Keys.of(adata, path) for adata, path in zip(self.adatas, self._paths, strict=True)]

    @property
    def joint_keys(self) -> Keys:
        """Keyed elements of the inputs as joined: all that any holds, but ``raw`` only if all hold it."""
        each = self.keys
        union = {name: set().union(*(getattr(keys, name) for keys in each)) for name in ("layers", "obsm", "obs")}
        return Keys(
            " + ".join(map(str, self._paths)),
            has_raw=all(keys.has_raw for keys in each),
            obs=union["obs"] | {"src_path"},
            layers=union["layers"],
            obsm=union["obsm"],
        )

    def bytes_per_row(self) -> float:
        """Estimate the uncompressed bytes per observation, averaged over the inputs.

        Raises
        ------
        NotImplementedError
            If an input is no path or group, so that its stored sizes cannot be looked up.
        """
        estimates = []
        for path, adata in zip(self._paths, self._stored_adatas, strict=True):
            if isinstance(path, ad.AnnData):
                raise NotImplementedError(
                    "Cannot estimate bytes per observation row from an AnnData object. "
                    "Provide file paths or groups instead, or pass an integer for dataset_size."
                )
            store = open_stored(path)
            estimates.append(stored_bytes_per_row(adata, store))
            if isinstance(store, h5py.File) and store is not path:
                store.close()
        return float(np.mean(estimates))

    @cached_property
    def obs(self) -> pd.DataFrame:
        numbers, sources = pd.factorize(np.array([str(path) for path in self._paths], dtype=object))
        frames = []
        for number, adata in zip(numbers, self.adatas, strict=True):
            source = pd.Categorical.from_codes(np.full(adata.n_obs, number), categories=sources)
            frames.append(adata.obs.assign(src_path=source))
        obs = concat_frames(frames)
        obs.index = ad.utils.make_index_unique(obs.index)
        return obs

    def take(self, rows: np.ndarray) -> ad.AnnData:
        """Read observations into memory.

        Parameters
        ----------
        rows
            Row numbers over all inputs, in any order, each at most once.

        Returns
        -------
        anndata.AnnData
            The observations in the order of ``rows``; several inputs are joined by the union of their variables.
        """
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        bounds = np.searchsorted(ascending, self._offsets)
        is_single = len(self.adatas) == 1
        obs = self.obs.iloc[ascending]
        with_raw = all(adata.raw is not None for adata in self.adatas)
        pieces = []
        for i, adata in enumerate(self.adatas):
            of_input = slice(bounds[i], bounds[i + 1])
            rows_of_input = ascending[of_input] - self._offsets[i]
            names = obs.index[of_input]
            pieces.append(_read_rows(adata, rows_of_input, names, with_raw=with_raw, with_unaligned=is_single))
        joined = pieces[0] if is_single else join_adatas(pieces, self._merge)
        joined.obs = obs
        if np.array_equal(order, np.arange(order.size)):
            return joined
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        return joined[inverse].copy()


def join_adatas(pieces: Sequence[ad.AnnData], merge: Merge) -> ad.AnnData:
    """Lay objects in memory one after the other, over the union of their variables and in the dtypes they have.

    anndata 0.13 computes dense matrices whose variables differ in float64; they are cast back.
    """
    joined = ad.concat(pieces, join="outer", merge=merge)
    if isinstance(joined.X, np.ndarray):
        joined.X = _cast_back(joined.X, [piece.X for piece in pieces])
    for name in ("layers", "obsm"):
        mapping = getattr(joined, name)
        for key in [key for key in mapping if key is not None and isinstance(mapping[key], np.ndarray)]:
            origins = [getattr(piece, name)[key] for piece in pieces if key in getattr(piece, name)]
            mapping[key] = _cast_back(mapping[key], origins)
    return joined


def _cast_back(matrix: np.ndarray, origins: Sequence[Any]) -> np.ndarray:
    dtype = np.result_type(*(origin.dtype for origin in origins))
    return matrix.astype(dtype) if dtype.kind == "f" and matrix.dtype.itemsize > dtype.itemsize else matrix


def _prepared(adata: ad.AnnData) -> ad.AnnData:
    """Bring the annotations of a freshly opened object into memory."""
    from anndata.experimental.backed import Dataset2D

    for name in ("obs", "var"):
        if isinstance(getattr(adata, name), Dataset2D):
            setattr(adata, name, _frame_to_memory(getattr(adata, name)))
    return adata


def _read_rows(
    adata: ad.AnnData, rows: np.ndarray, names: pd.Index, *, with_raw: bool, with_unaligned: bool
) -> ad.AnnData:
    """Read some rows of one input, under new names and without its columns of ``obs``.

    ``with_unaligned`` keeps ``obsp``, ``varp`` and ``uns`` too, which joining several inputs would drop.
    """
    view = adata[rows]
    parts: dict[str, Any] = {
        name: {key: to_memory(value) for key, value in getattr(view, name).items() if key is not None}
        for name in ("layers", "obsm", "varm", *(("obsp", "varp") if with_unaligned else ()))
    }
    for value in parts["obsm"].values():
        if isinstance(value, pd.DataFrame):
            value.index = names
    if with_unaligned:
        parts["uns"] = ad.AnnData(uns=dict(adata.uns)).to_memory().uns
    obs = pd.DataFrame(index=names)
    piece = ad.AnnData(X=None if view.X is None else to_memory(view.X), obs=obs, var=adata.var, **parts)
    if with_raw:
        raw = view.raw
        piece.raw = ad.AnnData(X=to_memory(raw.X), obs=obs, var=to_memory(raw.var), varm=dict(raw.varm))
    return piece
