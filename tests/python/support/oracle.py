"""The slow, obvious reader that batches are checked against.

It reads whole arrays with zarr-python, promotes with NumPy, takes rows one at a time, and shares no code with the
core. :class:`Reference` holds a collection's rows in memory and checks what ``annbatch.load`` delivers: every value,
dtype and shape of every batch against the batch's own row numbers, and which rows an epoch delivered.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr

from support.stores import Collection, Csr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

LOAD_TIMEOUT_MS = 30_000
"""A batch that is not there by then is a hang."""

_TORCH_DTYPES = {
    "bool": torch.bool,
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64")},
    **{name: getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: getattr(torch, name) for name in ("float16", "float32", "float64")},
}
# torch cannot compute with these, so by default they arrive as the next wider signed type
_TORCH_WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


def delivered_dtype(stored: Sequence[np.dtype], request: str = "torch") -> np.dtype:
    """Dtype an element arrives in: `stored` dtypes (one per dataset) under the request "torch", "native" or a name."""
    if request not in ("torch", "native"):
        return np.dtype(request)
    promoted = np.result_type(*(dtype.newbyteorder("=") for dtype in stored))
    return np.dtype(_TORCH_WIDER.get(promoted.name, promoted.name)) if request == "torch" else promoted


@contextlib.contextmanager
def opened(config: dict[str, Any], buffers: Sequence[torch.Tensor] = ()) -> Iterator[torch.Tensor]:
    """A state over `config`, closed on the way out whatever happened."""
    from annbatch._core import ops as _ops

    state = _ops.open_state(config, buffers)
    try:
        yield state
    finally:
        _ops.close(state)


@contextlib.contextmanager
def streaming(parent: torch.Tensor, config: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Another state over the collection of `parent`, closed on the way out."""
    from annbatch._core import ops as _ops

    state = _ops.stream(parent, config)
    try:
        yield state
    finally:
        _ops.close(state)


def load(state: torch.Tensor) -> list[torch.Tensor]:
    """The next batch; a wait that would not end is an AssertionError."""
    from annbatch._core import ops as _ops

    assert _ops.ready(state, LOAD_TIMEOUT_MS), f"no batch, no end and no error within {LOAD_TIMEOUT_MS} ms"
    return _ops.load(state)


def _whole(array: zarr.Array) -> np.ndarray:
    values = np.asarray(array[...])
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def read_element(dataset: Path | str, name: str) -> Csr | np.ndarray:
    """All rows of one element of a store on disk, through zarr-python."""
    node = zarr.open_group(dataset, mode="r")[name]
    if isinstance(node, zarr.Array):
        return _whole(node)
    assert node.attrs["encoding-type"] == "csr_matrix"
    indptr, indices = _whole(node["indptr"]).astype(np.int64), _whole(node["indices"]).astype(np.int64)
    return Csr(indptr, indices, _whole(node["data"]), tuple(node.attrs["shape"]))


def same_values(got: np.ndarray, want: np.ndarray) -> None:
    """Equal dtype, shape and values; NaN equals NaN, and zero keeps its sign."""
    assert got.dtype == want.dtype, f"dtype {got.dtype}, expected {want.dtype}"
    np.testing.assert_array_equal(got, want)
    if want.dtype.kind == "f":
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(want)[number])


@dataclass
class Element:
    """One element over all datasets: rows per dataset, the dtype it was stored in, and the one it arrives in."""

    name: str
    parts: list[Csr | np.ndarray]
    dtype: np.dtype

    @property
    def is_csr(self) -> bool:
        """Whether it is sparse."""
        return isinstance(self.parts[0], Csr)

    @property
    def n_tensors(self) -> int:
        """Tensors it contributes to a batch."""
        return 3 if self.is_csr else 1

    def take(self, where: Iterable[tuple[int, int]]) -> Csr | np.ndarray:
        """Rows, given as (dataset, row within it), in the delivered dtype."""
        taken = [(self.parts[dataset], np.array([row])) for dataset, row in where]
        if not self.is_csr:
            blank = np.zeros((0, *self.parts[0].shape[1:]), self.dtype)
            return np.concatenate([blank, *(part[row].astype(self.dtype) for part, row in taken)])
        rows = [part.take(row) for part, row in taken]
        lengths = [row.indptr[1] for row in rows]
        return Csr(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([np.zeros(0, np.int64), *(row.indices for row in rows)]),
            np.concatenate([np.zeros(0, self.dtype), *(row.data.astype(self.dtype) for row in rows)]),
            (len(rows), self.parts[0].shape[1]),
        )


class Reference:
    """What a state over these elements and datasets must deliver.

    Parameters
    ----------
    datasets
        One dict per dataset: element name to :class:`stores.Csr` or dense array, in the stored dtype.
    elements
        Element name to requested dtype, in the order of the configuration.
    """

    def __init__(self, datasets: Sequence[dict[str, Csr | np.ndarray]], elements: dict[str, str]) -> None:
        self.elements = []
        for name, request in elements.items():
            parts = [dataset[name] for dataset in datasets]
            stored = [part.data.dtype if isinstance(part, Csr) else part.dtype for part in parts]
            self.elements.append(Element(name, parts, delivered_dtype(stored, request)))
        lengths = [part.shape[0] for part in self.elements[0].parts]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.n_obs = int(self.offsets[-1])

    @classmethod
    def of(cls, collection: Collection, elements: Sequence[str] | dict[str, str] | None = None) -> Reference:
        """Read from the disk what :meth:`stores.Collection.config` with the same `elements` opens."""
        names = collection.element_names if elements is None else elements
        requests = names if isinstance(names, dict) else dict.fromkeys(names, "torch")
        return cls([{name: read_element(path, name) for name in requests} for path in collection.paths], requests)

    def locate(self, row: int) -> tuple[int, int]:
        """Dataset of a global row, and its row within that dataset."""
        dataset = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return dataset, int(row - self.offsets[dataset])

    def check_batch(self, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """Check every tensor of a batch against its ``rows``, which are returned (int64 [n])."""
        assert len(tensors) == 1 + sum(element.n_tensors for element in self.elements)
        assert tensors[0].dtype == torch.int64 and tensors[0].ndim == 1
        rows = tensors[0].numpy().copy()
        assert ((rows >= 0) & (rows < self.n_obs)).all(), rows
        where = [self.locate(row) for row in rows]
        at = 1
        for element in self.elements:
            want, got = element.take(where), tensors[at : at + element.n_tensors]
            at += element.n_tensors
            try:
                (check_csr if element.is_csr else check_dense)(got, want)
            except AssertionError as error:
                raise AssertionError(f"element {element.name}, rows {rows.tolist()}: {error}") from None
        return rows

    def drain(self, state: torch.Tensor, *, hold: bool = False) -> list[np.ndarray]:
        """Load and check batches until the end of the epoch; the row numbers of each.

        `hold` keeps every batch alive until the end and checks them a second time then: a batch that is handed out
        must not change when later ones are decoded.
        """
        batches: list[np.ndarray] = []
        held: list[list[torch.Tensor]] = []
        deadline = time.monotonic() + LOAD_TIMEOUT_MS / 1000
        while True:
            assert time.monotonic() < deadline, f"the epoch has not ended after {len(batches)} batches"
            tensors = load(state)
            rows = self.check_batch(tensors)
            if len(rows) == 0:
                break  # an end of an epoch is a batch too, and was checked like one
            batches.append(rows)
            if hold:
                held.append(tensors)
        for rows, tensors in zip(batches, held, strict=False):
            np.testing.assert_array_equal(self.check_batch(tensors), rows)
        return batches

    def epoch(self, state: torch.Tensor, seed: int = 0, first_batch: int = 0, **options: Any) -> list[np.ndarray]:
        """Start an epoch and :meth:`drain` it."""
        from annbatch._core import ops as _ops

        _ops.start(state, seed, first_batch)
        return self.drain(state, **options)

    def check_once(self, batches: Sequence[np.ndarray], expected: Iterable[int] | None = None) -> None:
        """Each of the `expected` rows (all, if None) was delivered exactly as often as it stands there."""
        delivered = Counter(int(row) for rows in batches for row in rows)
        wanted = Counter(range(self.n_obs) if expected is None else map(int, expected))
        missing, extra = wanted - delivered, delivered - wanted
        assert not missing, f"rows never delivered: {sorted(missing)[:20]}"
        assert not extra, f"rows delivered too often: {sorted(extra)[:20]}"


def check_csr(got: Sequence[torch.Tensor], want: Csr) -> None:
    """The three tensors of a sparse element, also as a torch CSR tensor with its invariants checked."""
    indptr, indices, data = got
    assert indptr.dtype == indices.dtype == torch.int32, (indptr.dtype, indices.dtype)
    assert data.dtype == _TORCH_DTYPES[want.data.dtype.name], (data.dtype, want.data.dtype)
    same_values(indptr.numpy().astype(np.int64), want.indptr)
    same_values(indices.numpy().astype(np.int64), want.indices)
    same_values(data.numpy(), want.data)
    if data.dtype not in (torch.uint16, torch.uint32, torch.uint64):  # torch has no sparse tensors of these
        torch.sparse_csr_tensor(indptr, indices, data, size=want.shape, check_invariants=True)


def check_dense(got: Sequence[torch.Tensor], want: np.ndarray) -> None:
    """The one tensor of a dense element."""
    (tensor,) = got
    assert tensor.dtype == _TORCH_DTYPES[want.dtype.name], (tensor.dtype, want.dtype)
    assert tensor.is_contiguous()
    same_values(tensor.numpy(), want)
