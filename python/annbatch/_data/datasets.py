"""What has been added to a loader: matrices, their annotations, and that they fit together.

In come AnnData objects or matrices; out goes `Datasets`, a record that is never changed: adding gives a new one. So
copies of a loader can share it, and what was opened for it is known to be stale by looking at its identity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from annbatch._base.sizes import check_lt_1
from annbatch._base.warn import ignored_elements, warn_once
from annbatch._data.hdf5 import Hdf5Matrix, hdf5_matrix, open_hdf5, stamp_of
from annbatch._data.sources import BACKING_TYPES, Source, share_dtypes, source_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import anndata as ad
    import numpy as np

    from annbatch._data.joins import Joined


@dataclass(frozen=True, eq=False)
class Datasets:
    """Datasets as one observation axis.

    Parameters
    ----------
    matrices
        The first element of each dataset, as added: its data matrix, if it has one.
    sources
        For each dataset its elements by name, ``"X"`` first. None of them has an ``"X"`` if that is missing.
    obs
        One frame per dataset, or ``None`` if they have none.
    var
        The frame they share, if any.
    joined
        Where the columns of each dataset come to stand, if they were joined.
    dense
        Whether rows of ``X`` are yielded dense: then it may be sparse in some datasets and dense in others.
    """

    matrices: tuple[Any, ...] = ()
    sources: tuple[Mapping[str, Source], ...] = ()
    obs: tuple[pd.DataFrame, ...] | None = None
    var: pd.DataFrame | None = None
    joined: Joined | None = None
    dense: bool = False

    @property
    def n_var(self) -> int:
        """Length of the second axis of ``X`` and layers."""
        if self.joined is not None:
            return len(self.joined.var)
        widths = [source.shape[1] for name, source in self.sources[0].items() if _has_var(name)]
        # an obsm entry alone says nothing of variables
        return widths[0] if widths else 0 if self.var is None else len(self.var)

    @property
    def firsts(self) -> list[Source]:
        """The first element of each dataset: its data matrix, if it has one."""
        return [next(iter(elements.values())) for elements in self.sources]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of the first element of each dataset."""
        return [source.shape for source in self.firsts]

    @property
    def n_obs(self) -> int:
        """Number of observations of all datasets together."""
        return sum(shape[0] for shape in self.shapes)

    @property
    def has_x(self) -> bool:
        """Whether datasets have a data matrix."""
        return bool(self.sources) and "X" in self.sources[0]

    def check_not_empty(self) -> None:
        """Refuse to be read without datasets or without rows (`ValueError`)."""
        check_lt_1([len(self.matrices)], ["Number of datasets"])
        if not any(shape[0] for shape in self.shapes):
            places = [source.path or "memory" for source in self.firsts]
            raise ValueError(
                f"Number of observations must be greater than 1, got 0: there are no rows in {', '.join(places[:5])}"
                f"{'' if len(places) <= 5 else f' and {len(places) - 5} more'}. Add data that have some."
            )

    def plus(
        self,
        elements: Mapping[str, Any],
        obs: pd.DataFrame | None,
        var: pd.DataFrame | None,
    ) -> Datasets:
        """Return these datasets and one more.

        Parameters
        ----------
        elements
            Its elements by name: ``"X"`` first, if it has that, then ``"layers/…"`` and ``"obsm/…"``.
        obs, var
            Its annotations, or ``None``.

        Raises
        ------
        TypeError
            If an element cannot be read or `obs` or `var` is no DataFrame.
        ValueError
            If it does not fit the others.
        """
        if self.joined is not None:
            raise ValueError(
                "No datasets can be added to those that annbatch.open has joined: give it all paths at once."
            )
        matrix = next(iter(elements.values()))
        if self.matrices:
            _check_present_as_before("obs", self.obs, obs)
            _check_present_as_before("var", self.var, var)
        sources = {name: source_of(element) for name, element in elements.items()}
        if self.matrices:
            # what is read from disk goes together; whether it is sparse or dense is looked at below
            first, before, added = self.matrices[0], self.firsts[0], next(iter(sources.values()))
            mixes = added.kind != before.kind and (self.dense or None not in (before.path, added.path))
            if not (isinstance(matrix, (type(first), Hdf5Matrix)) or isinstance(first, Hdf5Matrix) or mixes):
                raise ValueError(
                    f"All datasets on a given loader must be of the same type {type(first)} but got {type(matrix)}"
                )
        for name, frame in (("obs", obs), ("var", var)):
            if frame is not None and not isinstance(frame, pd.DataFrame):
                raise TypeError(f"{name} must be a pandas DataFrame")
        self._check_shapes(sources, obs)
        if self.var is not None and not self.var.equals(var):
            raise ValueError(
                f"All datasets must have identical var DataFrames. That of {_named(next(iter(sources.values())))} "
                f"differs from that of {_named(self.firsts[0])}. Data of different variables are joined by annbatch.open."
            )
        self._warn_of_promotion(matrix)
        return replace(
            self,
            matrices=(*self.matrices, matrix),
            sources=(*self.sources, sources),
            obs=None if obs is None else (*(self.obs or ()), obs),
            var=self.var if self.var is not None else var,
        )

    @classmethod
    def of_joined(cls, elements: Sequence[Mapping[str, Any]], joined: Joined, *, dense: bool) -> Datasets:
        """Return datasets of these elements each (``"X"`` first, if they have it) whose columns are joined.

        Raises
        ------
        TypeError
            If an element cannot be read.
        ValueError
            If they do not fit together, or annotations are not as long as their axis.
        """
        whole = cls(var=joined.var, joined=joined, dense=dense)
        for of_dataset, obs in zip(elements, joined.obs, strict=True):
            sources = {name: source_of(element) for name, element in of_dataset.items()}
            first, source = next(iter(sources.items()))
            if _has_var(first) and source.kind == "dense" and 0 in source.shape[1:]:
                raise ValueError(f"{source.path} has no variables: leave it out of the join.")
            whole._check_shapes(sources, obs)
            matrices = (*whole.matrices, of_dataset[first])
            whole = replace(whole, matrices=matrices, sources=(*whole.sources, sources))
        return replace(whole, obs=joined.obs) if len(joined.obs[0].columns) else whole

    def width(self, element: str) -> int:
        """Return the number of columns of an element's rows, those of all datasets where they are joined."""
        return self.n_var if _has_var(element) else self.sources[0][element].shape[1]

    def columns(self, dataset: int, element: str) -> np.ndarray | None:
        """Return the joined column of each stored one of an element; ``None`` where all keep their places."""
        return self.joined.columns[dataset] if self.joined is not None and _has_var(element) else None

    def _check_shapes(self, sources: Mapping[str, Source], obs: pd.DataFrame | None) -> None:
        if self.sources and ("X" in sources) != self.has_x:
            before, added = self.firsts[0], next(iter(sources.values()))
            without, other = (before, added) if "X" in sources else (added, before)
            raise ValueError(
                f"X must be in all datasets or in none: {_named(without)} has none, {_named(other)} has one. "
                "Load them apart, or a layer that all have with annbatch.open(..., layer=...)."
            )
        first_name, first_source = next(iter(sources.items()))
        n_obs = first_source.shape[0]
        if obs is not None and len(obs) != n_obs:
            raise ValueError(f"{_place(first_source)}obs has {len(obs)} rows but the dataset has {n_obs}.")
        for name, source in sources.items():
            if source.shape[0] != n_obs:
                raise ValueError(f"{_place(source)}{name} has {source.shape[0]} rows but {first_name} has {n_obs}.")
            first = self.sources[0][name] if self.sources else source
            if self.joined is not None and _has_var(name):
                columns = self.joined.columns[len(self.sources)]
                n_var = self.n_var if columns is None else len(columns)
                if source.shape[1:] != (n_var,):
                    raise ValueError(
                        f"{source.path}: rows have shape {list(source.shape[1:])} but var has {n_var} names."
                    )
            elif source.shape[1:] != first.shape[1:]:
                remedy = (
                    "annbatch.open joins data of different variables"
                    if _has_var(name)
                    else f"leave {name} out, or give it one width in all of them"
                )
                raise ValueError(
                    f"All datasets must have same shape along the var axis: {name} has {list(source.shape[1:])} columns in "
                    f"{_named(source)}, {list(first.shape[1:])} in {_named(first)}; {remedy}."
                )
            if source.kind != first.kind and not (name == "X" and self.dense):
                raise ValueError(_both_kinds(name, first, source))

    def _warn_of_promotion(self, matrix: Any) -> None:
        if self.matrices and not share_dtypes([*self.matrices, matrix]):
            warn_once(
                f"Adding dataset with dtype {matrix.dtype!r} that differs from the existing dataset dtype(s) "
                f"(first dataset: {self.matrices[0].dtype!r}). Heterogeneous dtypes are promoted in every batch, by "
                "NumPy's rules; consider casting all datasets to a common dtype.",
                UserWarning,
            )


def elements_of(adata: ad.AnnData, wanted: Mapping[str, Sequence[str]], name: str = "AnnData") -> dict[str, Any]:
    """Take the data matrix and the elements `wanted` (names by ``"layers"`` and ``"obsm"``) out of an AnnData.

    Parameters
    ----------
    adata
        The object.
    wanted
        Names of further elements.
    name
        What messages call the object.

    Returns
    -------
    The elements by name: ``"X"`` (if there is one, or nothing else is wanted), ``"layers/…"``, ``"obsm/…"``.

    Raises
    ------
    TypeError
        If ``X`` is of no kind that a loader reads.
    KeyError
        If an element is missing.

    Warns
    -----
    FutureWarning
        Of elements that are there but not wanted, once per message.
    """
    held = {group: [key for key in getattr(adata, group) if key is not None] for group in wanted}
    # the key None: AnnData over a store shows X among the layers
    if ignored := [f"{group}/{key}" for group in wanted for key in held[group] if key not in wanted[group]]:
        warn_once(ignored_elements(ignored), FutureWarning)
    elements: dict[str, Any] = {}
    if (matrix := _matrix_of(adata)) is not None:
        if not isinstance(matrix, BACKING_TYPES) and not isinstance(matrix, Hdf5Matrix):
            usable = " | ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in BACKING_TYPES)
            raise TypeError(f"Found {type(matrix)} but only {usable} are usable")
        elements["X"] = matrix
    elif not any(wanted.values()):
        raise KeyError(
            f"{name} has no X; its layers are {[key for key in adata.layers if key is not None]}. Name those to yield in "
            "Loader(layers=[...]), or put one in its place: adata.X = adata.layers[...]."
        )
    for group, keys in wanted.items():
        for key in keys:
            if key not in held[group]:
                raise KeyError(f"{name} has no {group}/{key}; its {group} are {held[group]}")
            elements[f"{group}/{key}"] = getattr(adata, group)[key]
    return elements


def _matrix_of(adata: ad.AnnData) -> Any:
    """``X``, or ``None`` if that is missing."""
    if not adata.isbacked:
        return adata.X
    try:
        return _backing_of(adata)
    except KeyError:
        return None


def _is_held_by(adata: ad.AnnData, path: Any) -> bool:
    """Whether what lies at `path` is the file that `adata` holds open, as far as that can be told."""
    if not Path(path).exists():
        return False
    if not adata.file.is_open:
        return True
    try:
        held = os.fstat(adata.file._file.id.get_vfd_handle())
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError):
        # anndata keeps it under another name, or HDF5 reads it without a descriptor
        return True
    return os.path.samestat(held, Path(path).stat())


def _backing_of(adata: ad.AnnData) -> Hdf5Matrix:
    """``X`` of an AnnData opened with ``backed="r"``, in its file."""
    if adata.is_view:
        raise ValueError(
            f"This AnnData is a view of {adata.filename}, some of whose rows or columns it leaves out. Add the whole of "
            "it and choose rows with `mask` of a sampler and columns with `transform=[SelectVar(...)]`, or load the "
            "view: adata.to_memory()."
        )
    if not _is_held_by(adata, adata.filename):
        raise OSError(
            f"{adata.filename} is not the file that this AnnData was opened from: that was moved or replaced, or it was "
            "named by a path relative to another working directory. Open it again, by an absolute path."
        )
    path = Path(adata.filename).absolute()
    stamp = stamp_of(path)
    with open_hdf5(path) as file:
        matrix = hdf5_matrix(file, "X", stamp)
    if matrix.shape != tuple(adata.shape):
        raise ValueError(f"{adata.filename}: X has shape {matrix.shape}, the AnnData that was opened {adata.shape}.")
    return matrix


def _named(source: Source) -> str:
    """Return how messages name a source wherever it lies."""
    return source.path or f"a {type(source.matrix).__name__} in memory"


def _place(source: Source) -> str:
    """Return how a message about a source begins that lies somewhere."""
    return "" if source.path is None else f"{source.path}: "


def _both_kinds(element: str, *sources: Source) -> str:
    """Return the message about an element that is sparse in one of two sources and dense in the other."""
    place = {source.kind: _named(source) for source in sources}
    one_way = "store it in one way in all of them"
    remedy = f"pass dense=True, and rows come dense from all of them; or {one_way}"
    if element.startswith("layers/"):
        layer = element.removeprefix("layers/")
        remedy = f"{one_way}; or have it in place of X, with annbatch.open(paths, layer={layer!r}, dense=True)"
    elif element != "X":
        remedy = one_way
    return (
        f"{element} must be sparse in all datasets or in none, but it is sparse in {place['csr']} and dense in "
        f"{place['dense']}: {remedy}."
    )


def _has_var(element: str) -> bool:
    """Whether the columns of an element are the variables."""
    return element == "X" or element.startswith("layers/")


def choose_columns(obs: Any, columns: Sequence[str] | None) -> Any:
    """Return `obs` with the named columns only (``None``: all of them), or ``None`` if that leaves no column."""
    if columns is None or not isinstance(obs, pd.DataFrame):
        return obs
    for column in columns:
        if column not in obs.columns:
            raise KeyError(f"obs has no column {column!r}; it has {list(obs.columns)}")
    return obs[list(columns)] if columns else None


def _check_present_as_before(name: str, before: Any, now: Any) -> None:
    without, with_it = ("with no obs label", "with obs label") if name == "obs" else (f"without {name}", f"with {name}")
    if before is None and now is not None:
        raise ValueError(
            f"Cannot add a dataset {with_it} when training datasets have already been added without {name}"
        )
    if before is not None and now is None:
        raise ValueError(f"Cannot add a dataset {without} when training datasets have already been added with {name}")
