"""The AnnData objects that go into a collection: opened without their matrices, checked, and read row by row.

:class:`Inputs` presents any number of them as one observation axis. Annotations (``obs``, ``var``) are in memory and
joined once; matrices stay where they are until :meth:`Inputs.take` reads some rows of them.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from annbatch._data.attributes import text_of

from ._checks import check_columns, check_elements, check_frame, check_keys, check_var_names, check_x, rehearse
from ._frames import column_types, concat_frames, joint_dtypes, read_frame, with_index
from ._joining import join_adatas, settle_var
from ._keys import Keys
from ._opening import frame_to_memory, stored_if_any, to_memory
from ._sizes import is_lazy_sparse, stored_bytes_per_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import zarr

    from ._frames import ColumnType
    from ._joining import Merge


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
            store = stored_if_any(path) if any(map(is_lazy_sparse, elements)) else None
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
        settle_var(joined)
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
    obsm: Any = group.get("obsm", {})
    frames = {f"obsm/{key}": obsm[key] for key in obsm if text_of(obsm[key], "encoding-type") == "dataframe"}
    return {name: column_types(read_frame(frame)) for name, frame in {"obs": group["obs"], **frames}.items()}


def _prepared(adata: ad.AnnData) -> ad.AnnData:
    """Bring the annotations of a freshly opened object into memory."""
    from anndata.experimental.backed import Dataset2D

    for name in ("obs", "var"):
        if isinstance(getattr(adata, name), Dataset2D):
            setattr(adata, name, frame_to_memory(getattr(adata, name)))
    for key in [key for key, value in adata.obsm.items() if isinstance(value, Dataset2D)]:
        adata.obsm[key] = frame_to_memory(adata.obsm[key])
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
