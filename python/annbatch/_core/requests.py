"""What samplers ask for, in numbers the core takes.

In come the load requests of a sampler written in Python; out go `Window`s of row numbers, positions and batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True)
class Window:
    """One load request, resolved.

    `rows` (int64) are read together; batch ``k`` consists of
    ``rows[positions[o : o + sizes[k]]]`` with ``o = sum(sizes[:k])``.
    """

    rows: np.ndarray
    positions: np.ndarray
    sizes: list[int]


def resolve_requests(load_requests: Iterable[Mapping[str, Any]], n_obs: int) -> Iterator[Window]:
    """Turn a sampler's load requests into windows.

    Raises
    ------
    KeyError
        If a load request has no requests or no splits.
    IndexError
        If a row lies outside of the ``n_obs`` rows, or a split outside of its window.
    """
    for load_request in load_requests:
        requests = load_request.get("requests")
        if requests is None:
            raise KeyError(
                "load_request must contain either a list of slices or an array of row numbers as 'requests'."
            )
        rows = _requested_rows(requests)
        check_rows(rows, n_obs, "sampler")
        # NumPy decides what a split means: negative, repeated and boolean entries included
        places = np.arange(len(rows), dtype=np.int64)
        splits = [np.atleast_1d(places[split]) for split in load_request["splits"]]
        positions = np.concatenate(splits) if splits else places[:0]
        yield Window(rows, positions, [len(split) for split in splits])


def check_rows(rows: np.ndarray, n_obs: int, who: str) -> None:
    """Refuse row numbers outside of ``[0, n_obs)``.

    Raises
    ------
    IndexError
        Naming the first one and `who` asked for it.
    """
    outside = (rows < 0) | (rows >= n_obs)
    if outside.any():
        raise IndexError(f"{who} asked for row {rows[np.argmax(outside)]}, but n_obs is {n_obs}")


def _requested_rows(requests: Any) -> np.ndarray:
    if isinstance(requests, np.ndarray) and np.issubdtype(requests.dtype, np.integer):
        return np.ascontiguousarray(requests, dtype=np.int64).reshape(-1)
    pieces = [
        np.arange(request.start or 0, request.stop, request.step or 1, dtype=np.int64)
        if isinstance(request, slice)
        else np.asarray(request).astype(np.int64, casting="safe")
        for request in requests
    ]
    return np.concatenate([np.atleast_1d(piece) for piece in pieces])
