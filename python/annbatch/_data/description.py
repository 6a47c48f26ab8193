"""Datasets as the core knows them: how they are described to it, and what it says of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from annbatch._core.requests import check_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from annbatch._core.session import Collection
    from annbatch._data.datasets import Datasets
    from annbatch._data.sources import Source
    from annbatch.types import RowPlace


def describe(
    datasets: Datasets, *, dtype: str, transform: Mapping[str, Any]
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return the core's configuration for some datasets, each of the same elements, and the buffers that it refers to.

    Parameters
    ----------
    datasets
        The datasets.
    dtype
        How values are delivered, ``"torch"`` or ``"native"``.
    transform
        What is done to ``X``, as `annbatch.transforms.Transform.config` says it.
    """
    buffers: list[torch.Tensor] = []
    names = list(datasets.sources[0])
    entries = [
        {
            "name": _label(i, first),
            "sources": {name: source.config(buffers) for name, source in elements.items()},
        }
        for i, (first, elements) in enumerate(zip(datasets.firsts, datasets.sources, strict=True))
    ]
    joined = _lend_columns(datasets, entries, buffers)
    elements = [
        {
            "name": name,
            "dtype": dtype,
            **({"n_var": datasets.n_var} if name in joined else {}),
            **({"transform": transform} if name == "X" else {}),
        }
        for name in names
    ]
    return {"elements": elements, "datasets": entries}, buffers


def locate(collection: Collection, datasets: Datasets, rows: np.ndarray) -> list[RowPlace]:
    """Say where rows (int64 ``[n]``) are stored, see `annbatch.Loader.locate`."""
    starts = np.cumsum([0, *(shape[0] for shape in datasets.shapes)])
    check_rows(rows, int(starts[-1]), "locate")
    places: list[RowPlace] = []
    for found in collection.locate(torch.from_numpy(rows)):
        dataset = int(np.searchsorted(starts, found["row"], side="right")) - 1
        local_row = int(found["row"] - starts[dataset])
        obs = None if datasets.obs is None else datasets.obs[dataset]
        places.append(
            {
                "row": found["row"],
                "dataset": dataset,
                "path": datasets.firsts[dataset].path,
                "local_row": local_row,
                "obs_name": None if obs is None else obs.index[local_row],
                "chunks": found["chunks"],
            }
        )
    return places


def _lend_columns(datasets: Datasets, entries: Sequence[dict[str, Any]], buffers: list[torch.Tensor]) -> set[str]:
    """Say in the core's description of each dataset where columns come to stand; return the elements that are joined."""
    joined, known = set(), {}
    for i, entry in enumerate(entries):
        for name in entry["sources"]:
            columns = datasets.columns(i, name)
            if columns is None:
                continue
            # one buffer for all datasets of the same variables
            if id(columns) not in known:
                known[id(columns)] = len(buffers)
                buffers.append(torch.from_numpy(columns))
            entry.setdefault("columns", {})[name] = known[id(columns)]
            joined.add(name)
    return joined


def _label(index: int, source: Source) -> str:
    return source.path if source.path is not None else f"dataset {index} (in memory)"
