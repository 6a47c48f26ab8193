"""The AnnData objects that go into a collection: opened without their matrices, checked, and read row by row.

:class:`Inputs` presents any number of them as one observation axis. Annotations (``obs``, ``var``) are in memory and
joined once; matrices stay where they are until :meth:`Inputs.take` reads some rows of them.
"""

from __future__ import annotations

import warnings
import zipfile
from collections import Counter
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse as sp
from tqdm.auto import tqdm

from annbatch._base.warn import stacklevel_outside_package
from annbatch._data.attributes import columns_of, is_plain, read_element, text_of
from annbatch._data.places import is_remote, places
from annbatch._data.remedies import said_of_mudata

from ._checks import check_columns, check_elements, check_frame, check_keys, check_var_names, check_x, rehearse
from ._frames import column_types, concat_frames, joint_dtypes, read_frame, with_index
from ._sizes import is_lazy_sparse, is_self_describing, stored_bytes_per_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Literal, TypeAlias

    Stored: TypeAlias = zarr.Group | h5py.Group | PathLike[str] | str
    from ._frames import ColumnType

    Merge: TypeAlias = Literal["same", "unique", "first", "only"] | None


def named_by(x: Any) -> list[Any]:
    """Return what stands for one input, in natural order if it is several: a pattern's files, those of a folder."""
    if not isinstance(x, str | PathLike) or is_remote(x):
        return [x]
    try:
        found = places(x)
    except FileNotFoundError:
        # a `load_adata` of the user's may know
        return [x]
    return [x] if len(found) == 1 and Path(x) == found[0].path else [str(place) for place in found]


def open_stored(x: Stored) -> zarr.Group | h5py.Group:
    """Open an AnnData store for reading: an h5ad file, a group in one, a Zarr store, or a group that is open already."""
    if isinstance(x, zarr.Group | h5py.Group):
        return x
    if is_remote(x):
        return zarr.open_group(x, mode="r")
    path, within = places(x)[0]
    if not path.is_file():
        return zarr.open_group(path, mode="r")
    if zipfile.is_zipfile(path):
        return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), path=within, mode="r")
    file = h5py.File(path, mode="r")
    if within and within not in file:
        raise KeyError(said_of_mudata(str(path), file) or f"{path} has no group {within}; it has {sorted(file)}")
    return file[within] if within else file


def _stored_if_any(x: Any) -> zarr.Group | h5py.Group | None:
    """Open what `load_adata` was given, which may be anything."""
    try:
        return open_stored(x)
    except (OSError, TypeError, ValueError):
        return None


def load_lazily(x: Stored) -> ad.AnnData:
    """Open an AnnData: annotations and small things in memory, matrices as dask arrays over the store.

    Files from before anndata 0.8, which do not say how their parts are encoded, are read as a whole.

    Parameters
    ----------
    x
        Path of an h5ad file or Zarr store, or an open group.
    """
    group = open_stored(x)
    if message := said_of_mudata(str(x), group):
        raise ValueError(message)
    if not is_self_describing(group):
        return ad.read_h5ad(group.file.filename) if isinstance(group, h5py.Group) else ad.read_zarr(group)
    parts: dict[str, Any] = {key: read_element(group[key]) for key in ("obs", "var", "varm", "uns") if key in group}
    if "X" in group:
        parts["X"] = _lazy_element(group["X"])
    for mapping in ("layers", "obsm", "obsp", "varp"):
        if mapping in group:
            parts[mapping] = {key: _lazy_element(node) for key, node in _members(group[mapping])}
    if "raw" in group and has_x(group["raw"]):
        raw = group["raw"]
        parts["raw"] = {key: read_element(raw[key]) for key in ("var", "varm") if key in raw}
        parts["raw"]["X"] = _lazy_element(raw["X"])
    return ad.AnnData(**parts)


def has_x(group: zarr.Group | h5py.Group) -> bool:
    """Whether a stored AnnData, or ``raw``, has X: anndata 0.12.0 and others write an element of the type "null" for none."""
    # raw may be of that type, too
    is_group = isinstance(group, zarr.Group | h5py.Group)
    return is_group and "X" in group and text_of(group["X"], "encoding-type") != "null"


def _members(group: zarr.Group | h5py.Group, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a stored mapping holds; keys that had slashes in them lie in groups of no encoding, one in another."""
    for key in group:
        node = group[key]
        if (
            isinstance(node, zarr.Group | h5py.Group)
            and not is_self_describing(node)
            and text_of(node, "h5sparse_format") is None
        ):
            yield from _members(node, f"{prefix}{key}/")
        else:
            yield prefix + key, node


def _lazy_element(node: Any) -> Any:
    if text_of(node, "encoding-type") in ("array", "csr_matrix", "csc_matrix") and is_plain(node):
        return ad.experimental.read_elem_lazy(node)
    return read_element(node)


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
    has_x: bool

    @classmethod
    def of(cls, adata: ad.AnnData, label: Any) -> Keys:
        """Keys of an opened object."""
        keyed = {name: set(getattr(adata, name).keys()) - {None} for name in ("layers", "obsm")}
        return cls(
            label,
            obs=set(adata.obs.columns) - {"_index"},
            has_raw=adata.raw is not None,
            has_x=adata.X is not None,
            **keyed,
        )

    @classmethod
    def of_stored(cls, group: zarr.Group) -> Keys:
        """Keys of a stored object, from metadata."""
        keyed = {name: set(group[name].keys()) if name in group else set() for name in ("layers", "obsm")}
        columns = set(columns_of(group["obs"]))
        return cls(group.name, obs=columns, has_raw="raw" in group and has_x(group["raw"]), has_x=has_x(group), **keyed)


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
            has_x=all(keys.has_x for keys in each),
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
            elements = [adata.X, *adata.layers.values(), *adata.obsm.values()]
            store = _stored_if_any(path) if any(map(is_lazy_sparse, elements)) else None
            estimates.append(stored_bytes_per_row(adata, store))
            if isinstance(store, h5py.File) and store is not path:
                store.close()
        return float(np.mean(estimates))

    @cached_property
    def _frames(self) -> list[dict[str, pd.DataFrame]]:
        """Frames along the observations of each input: ``"obs"``, with ``src_path``, and ``"obsm/…"``."""
        numbers, sources = pd.factorize(np.array([str(path) for path in self._paths], dtype=object))
        frames = []
        for number, adata in zip(numbers, self.adatas, strict=True):
            source = pd.Categorical.from_codes(np.full(adata.n_obs, number), categories=sources)
            of_obsm = {f"obsm/{key}": value for key, value in adata.obsm.items() if isinstance(value, pd.DataFrame)}
            frames.append({"obs": adata.obs.assign(src_path=source), **of_obsm})
        return frames

    @cached_property
    def types(self) -> list[dict[str, dict[str, ColumnType]]]:
        """Types of the columns of each input's frames, by the names of `_frames`."""
        return [{name: column_types(frame) for name, frame in frames.items()} for frames in self._frames]

    @cached_property
    def _joined_frames(self) -> dict[str, pd.DataFrame]:
        """The frames of all inputs, one after the other, under unique names of observations."""
        joined = {}
        for name, dtypes in joint_frame_dtypes(self.types).items():
            none = [pd.DataFrame(index=adata.obs_names) for adata in self.adatas]
            frames = [of_input.get(name, lacking) for of_input, lacking in zip(self._frames, none, strict=True)]
            joined[name] = concat_frames(frames, dtypes)
        names = ad.utils.make_index_unique(joined["obs"].index)
        return {name: with_index(frame, names) for name, frame in joined.items()}

    def check(
        self, *, to_hdf5: bool, beside: Sequence[tuple[Keys, Mapping[str, Mapping[str, ColumnType]]]] = ()
    ) -> None:
        """Check that the inputs can be written to one collection.

        Parameters
        ----------
        to_hdf5
            Whether to h5ad files, or to Zarr.
        beside
            Keys, and types of columns by frame, of the datasets that the collection has.

        Raises
        ------
        ValueError
            If they cannot be, see :mod:`annbatch.io._checks`.
        """
        is_single = len(self.adatas) == 1
        for label, adata, frames in zip(self._paths, self.adatas, self._frames, strict=True):
            # what joining drops need not be stored
            var = adata.var if is_single or self._merge is not None else adata.var[[]]
            for name, frame in {**frames, "var": var}.items():
                check_frame(label, name, frame, to_hdf5=to_hdf5)
            for name in ("layers", "obsm", *(("varm", "obsp", "varp", "uns") if is_single else ())):
                check_keys(label, name, getattr(adata, name))
        for name in ("layers", "obsm"):
            check_elements(name, self._paths, [getattr(adata, name) for adata in self.adatas])
        check_var_names(self._paths, [adata.var_names for adata in self.adatas])
        keys = [*self.keys, *(keys for keys, _ in beside)]
        types = [*self.types, *(types for _, types in beside)]
        labels = [key.label for key in keys]
        check_x([key.label for key in keys if key.has_x], [key.label for key in keys if not key.has_x])
        for name in dict.fromkeys(name for each in types for name in each):
            check_columns(name, labels, [each.get(name, {}) for each in types])
        rehearse(self.take(np.zeros(0, dtype=int)), self._holders, to_hdf5=to_hdf5)

    def _holders(self, attribute: str, key: Any) -> list[Any]:
        """Paths of the inputs that have an element."""
        held = [getattr(adata, attribute) for adata in self.adatas]
        return [
            path
            for path, element in zip(self._paths, held, strict=True)
            if element is not None and (key is None or key in element)
        ]

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
        frames = {name: frame.iloc[ascending] for name, frame in self._joined_frames.items()}
        names = frames["obs"].index
        with_raw = all(adata.raw is not None for adata in self.adatas)
        pieces = []
        for i, adata in enumerate(self.adatas):
            of_input = slice(bounds[i], bounds[i + 1])
            rows_of_input = ascending[of_input] - self._offsets[i]
            piece = _read_rows(adata, rows_of_input, names[of_input], with_raw=with_raw, with_unaligned=is_single)
            pieces.append(piece)
        joined = pieces[0] if is_single else join_adatas(pieces, self._merge)
        joined.obs = frames.pop("obs")
        for name, frame in frames.items():
            joined.obsm[name.removeprefix("obsm/")] = frame
        _settle_var(joined)
        if np.array_equal(order, np.arange(order.size)):
            return joined
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        return joined[inverse].copy()


def joint_frame_dtypes(types: Sequence[Mapping[str, Mapping[str, ColumnType]]]) -> dict[str, dict[str, Any]]:
    """Return the dtypes of the columns, by frame, that hold what several objects have in frames of that name."""
    names = dict.fromkeys(name for each in types for name in each)
    return {name: joint_dtypes([each.get(name, {}) for each in types]) for name in names}


def stored_types(group: zarr.Group) -> dict[str, dict[str, ColumnType]]:
    """Read the types of the columns of a stored object's ``obs`` and frames in ``obsm``, as `Inputs.types` has them."""
    obsm = group.get("obsm", {})
    frames = {f"obsm/{key}": obsm[key] for key in obsm if text_of(obsm[key], "encoding-type") == "dataframe"}
    return {name: column_types(read_frame(frame)) for name, frame in {"obs": group["obs"], **frames}.items()}


def extend_adata(old: ad.AnnData, new: ad.AnnData, merge: Merge, dtypes: Mapping[str, Mapping[str, Any]]) -> ad.AnnData:
    """Lay new observations behind old ones, both in memory, with frames of the dtypes that `joint_frame_dtypes` gives.

    Both lose their frames in ``obsm``.
    """
    frames = [_pop_frames(piece) for piece in (old, new)]
    joined = join_adatas([old, new], merge)
    for name, of_columns in dtypes.items():
        parts = [
            of_piece.get(name, pd.DataFrame(index=piece.obs_names))
            for of_piece, piece in zip(frames, (old, new), strict=True)
        ]
        frame = concat_frames(parts, of_columns)
        key = name.removeprefix("obsm/")
        if name == "obs":
            joined.obs = frame
        elif key in joined.obsm:
            raise ValueError(
                f"obsm {key!r} is a data frame in the collection or in what is added, and a matrix in the other. "
                "Rename or convert it with a function of your own as `load_adata`."
            )
        else:
            joined.obsm[key] = with_index(frame, joined.obs_names)
    _settle_var(joined)
    return joined


def _pop_frames(adata: ad.AnnData) -> dict[str, pd.DataFrame]:
    frames = {key: value for key, value in adata.obsm.items() if isinstance(value, pd.DataFrame)}
    for key in frames:
        del adata.obsm[key]
    return {"obs": adata.obs, **{f"obsm/{key}": frame for key, frame in frames.items()}}


def _settle_var(adata: ad.AnnData) -> None:
    """Give frames along the variables types that anndata can write: merging them has left gaps."""
    adata.var = concat_frames([adata.var])
    for key in [key for key, value in adata.varm.items() if isinstance(value, pd.DataFrame)]:
        adata.varm[key] = concat_frames([adata.varm[key]])
    if adata.raw is not None:
        _set_raw_var(adata, concat_frames([adata.raw.var]))


def join_adatas(pieces: Sequence[ad.AnnData], merge: Merge) -> ad.AnnData:
    """Lay objects in memory one after the other, over the union of their variables and in the dtypes they have.

    anndata 0.13 computes dense matrices whose variables differ in float64; they are cast back. ``obs`` is not joined.
    """
    repeated = _number_repeated(pieces)
    joined = ad.concat(pieces, join="outer", merge=merge)
    for names, set_names in repeated:
        set_names(joined, names)
    if isinstance(joined.X, np.ndarray):
        joined.X = _cast_back(joined.X, [piece.X for piece in pieces])
    for name in ("layers", "obsm"):
        mapping = getattr(joined, name)
        for key in [key for key in mapping if key is not None and isinstance(mapping[key], np.ndarray)]:
            origins = [getattr(piece, name)[key] for piece in pieces if key in getattr(piece, name)]
            mapping[key] = _cast_back(mapping[key], origins)
    return joined


def _number_repeated(pieces: Sequence[ad.AnnData]) -> list[tuple[pd.Index, Callable[[ad.AnnData, pd.Index], None]]]:
    """Give numbers for names to variables that cannot be told by name, which have to be the same in all pieces.

    Returns
    -------
    list
        The names there were, of ``var`` and of ``raw.var``, and what gives an object these names again.
    """
    axes = [([piece.var_names for piece in pieces], _set_var_names)]
    if all(piece.raw is not None for piece in pieces):
        axes.append(([piece.raw.var_names for piece in pieces], _set_raw_names))
    repeated = []
    for names, set_names in axes:
        if not all(each.is_unique for each in names):
            check_var_names(range(1, len(pieces) + 1), names)
            repeated.append((names[0], set_names))
            for piece in pieces:
                set_names(piece, pd.Index(np.arange(len(names[0])).astype(str), name=names[0].name))
    return repeated


def _set_var_names(adata: ad.AnnData, names: pd.Index) -> None:
    adata.var_names = names


def _set_raw_names(adata: ad.AnnData, names: pd.Index) -> None:
    if adata.raw is not None:  # anndata joins none of no rows
        _set_raw_var(adata, adata.raw.var.set_axis(names))


def _set_raw_var(adata: ad.AnnData, var: pd.DataFrame) -> None:
    varm = {key: v.set_axis(var.index) if isinstance(v, pd.DataFrame) else v for key, v in adata.raw.varm.items()}
    adata.raw = ad.AnnData(X=adata.raw.X, obs=pd.DataFrame(index=adata.obs_names), var=var, varm=varm)


def _cast_back(matrix: np.ndarray, origins: Sequence[Any]) -> np.ndarray:
    dtype = np.result_type(*(origin.dtype for origin in origins))
    return matrix.astype(dtype) if dtype.kind == "f" and matrix.dtype.itemsize > dtype.itemsize else matrix


def _prepared(adata: ad.AnnData) -> ad.AnnData:
    """Bring the annotations of a freshly opened object into memory."""
    from anndata.experimental.backed import Dataset2D

    for name in ("obs", "var"):
        if isinstance(getattr(adata, name), Dataset2D):
            setattr(adata, name, _frame_to_memory(getattr(adata, name)))
    for key in [key for key, value in adata.obsm.items() if isinstance(value, Dataset2D)]:
        adata.obsm[key] = _frame_to_memory(adata.obsm[key])
    return adata


def _read_rows(
    adata: ad.AnnData, rows: np.ndarray, names: pd.Index, *, with_raw: bool, with_unaligned: bool
) -> ad.AnnData:
    """Read some rows of one input, under new names and without frames along the observations.

    ``with_unaligned`` keeps ``obsp``, ``varp`` and ``uns`` too, which joining several inputs would drop.
    """
    view = adata[rows]
    parts: dict[str, Any] = {
        name: {key: to_memory(value) for key, value in getattr(view, name).items() if key is not None}
        for name in ("layers", "varm", *(("obsp", "varp") if with_unaligned else ()))
    }
    parts["obsm"] = {key: to_memory(value) for key, value in view.obsm.items() if not isinstance(value, pd.DataFrame)}
    if with_unaligned:
        parts["uns"] = ad.AnnData(uns=dict(adata.uns)).to_memory().uns
    obs = pd.DataFrame(index=names)
    piece = ad.AnnData(X=None if view.X is None else to_memory(view.X), obs=obs, var=adata.var, **parts)
    if with_raw:
        raw = view.raw
        piece.raw = ad.AnnData(X=to_memory(raw.X), obs=obs, var=to_memory(raw.var), varm=dict(raw.varm))
    return piece
