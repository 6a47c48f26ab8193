"""What a collection cannot hold, found before anything of it is written.

Inputs come as opened by the user's function. What anndata's writer would refuse, or write as something else, raises with
the inputs, the element and the remedy. Values are looked at here, as missing text would become ``"nan"`` in Zarr; for all
that depends on types alone :func:`rehearse` has anndata write elements without rows to memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse as sp

from ._frames import ColumnType, is_named_as_another, joint_dtype
from ._sharded import writer_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

REMEDY = "in the files, or with a function of your own as `load_adata`"

_KINDS = {"integers": "whole numbers", "numbers": "floating-point numbers"}


def check_frame(label: Any, name: str, frame: pd.DataFrame, *, to_hdf5: bool) -> None:
    """Check the columns and the index of one frame of one input.

    Raises
    ------
    ValueError
        If a name is no text or cannot be stored, columns are named alike, the index is named as a column of other values
        or holds more than text, or a text cannot be encoded.
    """
    if not frame.columns.is_unique:
        repeated = list(frame.columns[frame.columns.duplicated()].unique())
        raise ValueError(f"{label}: {name} has more than one column named {repeated}. Rename or drop them {REMEDY}.")
    for column in frame.columns:
        check_name(label, f"{name} column", column)
    if frame.index.name is not None:
        check_name(label, f"index of {name}", frame.index.name)
        if is_named_as_another(frame.index, frame):
            raise ValueError(
                f"{label}: the index of {name} is named {frame.index.name!r} as is a column of other values. "
                f"Rename one of them {REMEDY}."
            )
    index = np.asarray(frame.index, dtype=object)
    if len(index) and pd.api.types.infer_dtype(index, skipna=False) != "string":
        raise ValueError(f"{label}: the index of {name} holds {_types_of(index)}, not text alone. Change it {REMEDY}.")
    for column, values in ((None, frame.index), *frame.items()):
        if not _can_be_encoded(values, to_hdf5=to_hdf5):
            place = f"the index of {name}" if column is None else f"{name} column {column!r}"
            raise ValueError(f"{label}: {place} holds text that is no UTF-8, or has a NUL in it. Change it {REMEDY}.")


def check_keys(label: Any, name: str, mapping: Mapping[Any, Any]) -> None:
    """Check the keys of layers, obsm or the like of one input, and of mappings within.

    Raises
    ------
    ValueError
        If a key is no text or cannot be stored.
    """
    for key, value in mapping.items():
        if key is None:  # X, which anndata 0.13 keeps among the layers
            continue
        check_name(label, f"{name} key", key)
        if isinstance(value, Mapping):
            check_keys(label, f"{name}[{key!r}]", value)


def check_name(label: Any, what: str, name: Any) -> None:
    """Check that a collection can have something of this name; `what` it is says the message.

    Raises
    ------
    ValueError
        If it cannot.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"{label}: the {what} {name!r} is of type {type(name).__name__}, not text. Rename it {REMEDY}."
        )
    if "/" in name:
        raise ValueError(
            f"{label}: the {what} {name!r} has a slash in its name, which would be a path in the collection. "
            f"Rename or drop it {REMEDY}."
        )
    if name.strip(".") == "" or name == "zarr.json":
        raise ValueError(f"{label}: the {what} {name!r} has a name that no store can hold. Rename it {REMEDY}.")


def _can_be_encoded(values: pd.Series | pd.Index, *, to_hdf5: bool) -> bool:
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.categories if isinstance(values, pd.Series) else values.categories
    if not pd.api.types.is_object_dtype(values.dtype) and not isinstance(values.dtype, pd.StringDtype):
        return True
    text = "".join(value for value in values if isinstance(value, str))
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not (to_hdf5 and "\0" in text)


def check_columns(name: str, labels: Sequence[Any], types: Sequence[Mapping[str, ColumnType]]) -> None:
    """Check that there is one type for what all inputs have in a column of one of their frames.

    Parameters
    ----------
    name
        The frame, such as ``"obs"``.
    labels, types
        What each input is called, and the types of its columns.

    Raises
    ------
    ValueError
        If a column holds text in some inputs and numbers in others, say, or objects of several types.
    """
    for column in dict.fromkeys(column for each in types for column in each):
        held = [(label, each[column]) for label, each in zip(labels, types, strict=True) if column in each]
        for label, type_ in held:
            if type_.kind == "other" and (type_.is_categorical or pd.api.types.is_object_dtype(type_.dtype)):
                values = "categories" if type_.is_categorical else "values"
                raise ValueError(
                    f"{label}: the {values} of {name} column {column!r} are of types {list(type_.objects)}, which are neither "
                    f"text, nor numbers, nor booleans alone. Convert or drop it {REMEDY}."
                )
        kinds = dict.fromkeys(type_.kind for _, type_ in held if type_.kind != "missing")
        if pd.api.types.is_object_dtype(joint_dtype([type_ for _, type_ in held])) and list(kinds) != ["text"]:
            found = " and ".join(
                f"{_KINDS.get(kind, kind)} in {_listed(label for label, type_ in held if type_.kind == kind)}"
                for kind in kinds
            )
            raise ValueError(
                f"{name} column {column!r} holds {found}: no type holds them all as they are. Make them one, or drop the "
                f"column, {REMEDY}."
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


def check_elements(name: str, labels: Sequence[Any], mappings: Sequence[Mapping[Any, Any]]) -> None:
    """Check that what inputs have under one key of their layers or obsm are all matrices, frames, or other things alike.

    Raises
    ------
    ValueError
        Naming the key, and inputs that differ.
    """
    found: dict[Any, dict[str, Any]] = {}
    for label, mapping in zip(labels, mappings, strict=True):
        for key, value in mapping.items():
            kind = "a data frame" if isinstance(value, pd.DataFrame) else "a matrix"
            if type(value).__module__.startswith("awkward"):
                kind = "an awkward array"
            found.setdefault(key, {}).setdefault(kind, label)
    for key, kinds in found.items():
        if len(kinds) > 1:
            where = ", ".join(f"{kind} in {label}" for kind, label in kinds.items())
            raise ValueError(f"{name} {key!r} is {where}. Rename or convert it {REMEDY}.")


def check_var_names(labels: Sequence[Any], names: Sequence[pd.Index]) -> None:
    """Check that variables can be joined by name, or are the same ones in the same order.

    Raises
    ------
    ValueError
        Naming the input and a name that it has more than once.
    """
    if all(each.equals(names[0]) for each in names):
        return
    for label, each in zip(labels, names, strict=True):
        if not each.is_unique:
            raise ValueError(
                f"{label}: the variable {each[each.duplicated()][0]!r} comes more than once, and the variables of "
                f"{_listed(labels)} differ, so they cannot be joined by name. Call `adata.var_names_make_unique()` {REMEDY}."
            )


def check_x(have: Iterable[Any], lack: Iterable[Any]) -> None:
    """Check that all have X or none.

    Raises
    ------
    ValueError
        Naming those that have X and those that lack it.
    """
    have, lack = list(have), list(lack)
    if have and lack:
        raise ValueError(
            f"There is no X in {_listed(lack)}, but in {_listed(have)}. Give all of them X, or none, with a function of "
            "your own as `load_adata`, such as one that takes a layer for it."
        )


def rehearse(joined: ad.AnnData, holders: Callable[[str, Any], Iterable[Any]], *, to_hdf5: bool) -> None:
    """Have anndata write everything but the rows to memory.

    Parameters
    ----------
    joined
        The inputs as joined, without observations. Its frames have been checked.
    holders
        Gives, for an attribute and a key (or None) of it, the inputs that have it.
    to_hdf5
        Whether h5ad files are to be written, or Zarr.

    Raises
    ------
    ValueError
        If something cannot be written; with anndata's reason, and the inputs that hold it.
    """
    with ad.settings.override(**writer_settings()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of is warned of when it is written
        if to_hdf5:
            with h5py.File(BytesIO(), "w") as file:
                _rehearse_in(file, joined, holders)
        else:
            _rehearse_in(zarr.open_group(zarr.storage.MemoryStore(), zarr_format=3), joined, holders)


def _rehearse_in(
    target: zarr.Group | h5py.Group, joined: ad.AnnData, holders: Callable[[str, Any], Iterable[Any]]
) -> None:
    for number, (attribute, key, element) in enumerate(_elements(joined)):
        try:
            ad.io.write_elem(target, f"{number}", _without_rows(element))
        except Exception as error:
            place = attribute if key is None else f"{attribute} {key!r}"
            reason = str(error).split("\n", 1)[0]
            raise ValueError(
                f"{_listed(holders(attribute, key))}: {place} cannot be written ({reason}). "
                f"Rename, convert or drop it {REMEDY}."
            ) from error


def _elements(joined: ad.AnnData) -> Iterator[tuple[str, Any, Any]]:
    """Yield attribute, key and value of all that is written."""
    if joined.X is not None:
        yield "X", None, joined.X
    for attribute in ("obs", "var"):
        frame = getattr(joined, attribute)
        for column in frame.columns:
            yield attribute, column, frame[[column]]
    for attribute in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        for key, value in getattr(joined, attribute).items():
            if key is not None:
                yield attribute, key, value
    if joined.raw is not None:
        for value in (joined.raw.X, joined.raw.var, *joined.raw.varm.values()):
            yield "raw", None, value


def _without_rows(element: Any) -> Any:
    """Return as little of an element as has all its types; what depends on values is refused here."""
    if isinstance(element, Mapping):
        return {key: _without_rows(value) for key, value in element.items()}
    if isinstance(element, pd.DataFrame):
        for column, type_ in ((name, ColumnType.of(values)) for name, values in element.items()):
            if type_.kind == "other" and (type_.is_categorical or pd.api.types.is_object_dtype(type_.dtype)):
                raise ValueError(f"column {column!r} holds objects of types {list(type_.objects)}")
        return element[:0]
    if isinstance(element, np.ndarray) and element.dtype == np.dtype(object) and element.size:
        if pd.api.types.infer_dtype(element.ravel(), skipna=False) != "string":
            raise ValueError(f"it holds {_types_of(element.ravel())}")
        return element
    if isinstance(element, np.ndarray) and element.ndim and element.dtype.kind in "biufc":
        return element[:0]
    if isinstance(element, sp.spmatrix | sp.sparray) and element.ndim == 2:
        return element.tocsr()[:0] if element.format != "csc" else element[:, :0]
    return element


def _types_of(values: Any) -> str:
    return f"objects of types {sorted({type(value).__name__ for value in values})}"


def _listed(labels: Iterable[Any]) -> str:
    names = list(dict.fromkeys(map(str, labels)))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
