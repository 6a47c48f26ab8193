"""AnnData elements in HDF5 files, written with h5py in every way that it has, and read back with it.

:func:`write_element` writes what anndata would, but lets each dataset be created as asked; :func:`read_element` is the
slow reader that batches are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import h5py
import hdf5plugin
import numpy as np

from annbatch._core import ops as _ops
from support.oracle import Reference, opened, streaming
from support.sampling import Plan
from support.stores import Csr, random_values

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000


@dataclass(frozen=True)
class Layout:
    """How a dataset is stored."""

    chunks: tuple[int, ...] | int | None = None
    """None: contiguous; a number: of every dimension."""
    filters: tuple[tuple[Any, ...], ...] = ()
    """Number and parameters of each, in order; h5py's keyword arguments if it is a dict."""
    keywords: dict[str, Any] = field(default_factory=dict)
    compact: bool = False
    fill: Any = None


def create(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any, layout: Layout) -> h5py.Dataset:
    """An empty dataset, by h5py's low-level interface: its own sorts filters."""
    dtype = np.dtype(dtype)
    chunks = (layout.chunks,) * len(shape) if isinstance(layout.chunks, int) else layout.chunks
    if chunks is not None:  # libhdf5 allows no chunks longer than a dimension that cannot grow
        chunks = tuple(max(1, min(c, n)) for c, n in zip(chunks, shape, strict=True))
    if layout.keywords:
        return group.create_dataset(name, shape, dtype, chunks=chunks, **layout.keywords)
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks is not None:
        plist.set_chunk(chunks)
    for number, *parameters in layout.filters:
        if number == SHUFFLE:
            plist.set_shuffle()
        elif number == FLETCHER32:
            plist.set_fletcher32()
        else:
            # lzf fails on what it cannot compress: such chunks skip it
            flag = h5py.h5z.FLAG_OPTIONAL if number == LZF else h5py.h5z.FLAG_MANDATORY
            plist.set_filter(number, flag, tuple(parameters))
    if layout.compact:
        plist.set_layout(h5py.h5d.COMPACT)
    if layout.fill is not None:
        plist.set_fill_value(np.array(layout.fill, dtype))
    space = h5py.h5s.create_simple(shape)
    group[name] = h5py.Dataset(h5py.h5d.create(group.id, None, h5py.h5t.py_create(dtype, logical=True), space, plist))
    return group[name]


def write_array(group: h5py.Group, name: str, values: np.ndarray, layout: Layout, dtype: Any = None) -> h5py.Dataset:
    """A dataset of `values`, stored as `dtype` (which may be of the other byte order)."""
    dataset = create(group, name, values.shape, values.dtype if dtype is None else dtype, layout)
    if values.size:
        dataset[...] = values
    return dataset


def write_element(
    file: h5py.Group,
    name: str,
    values: Csr | np.ndarray,
    layout: Layout,
    *,
    order: str = "<",
    index: str = "i4",
    pointer: str = "i8",
) -> None:
    """An element as anndata writes it; `order` is the byte order of all of its datasets."""
    if isinstance(values, np.ndarray):
        dataset = write_array(file, name, values, layout, values.dtype.newbyteorder(order))
        dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        return
    group = file.create_group(name)
    group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
    group.attrs["shape"] = values.shape
    write_array(group, "data", values.data, layout, values.data.dtype.newbyteorder(order))
    write_array(group, "indices", values.indices.astype(index), layout, np.dtype(index).newbyteorder(order))
    write_array(group, "indptr", values.indptr.astype(pointer), layout, np.dtype(pointer).newbyteorder(order))


def _whole(dataset: h5py.Dataset) -> np.ndarray:
    values = dataset[...]
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def read_element(path: Path | str, name: str) -> Csr | np.ndarray:
    """All rows of an element, through h5py."""
    with h5py.File(path, locking=False) as file:
        node = file[name]
        if isinstance(node, h5py.Dataset):
            return _whole(node)
        indptr, indices = (_whole(node[part]).astype(np.int64) for part in ("indptr", "indices"))
        shape = node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"]
        return Csr(indptr, indices, _whole(node["data"]), tuple(int(n) for n in shape))


def random_csr(seed: int, n_obs: int = 40, n_var: int = 23, dtype: str = "f4", *, blocky: bool = False) -> Csr:
    """Rows of 0 to `n_var` / 2 entries, with values over the whole range of `dtype`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, n_var // 2 + 1, n_obs)
    columns = [np.sort(rng.choice(n_var, int(n), replace=False)) for n in lengths]
    indices = np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)
    data = random_values(rng, dtype, (len(indices),), blocky=blocky)
    return Csr(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), indices, data, (n_obs, n_var))


def count_csr(seed: int, n_obs: int = 60, n_var: int = 200) -> Csr:
    """Small counts, as compressors like them."""
    csr = random_csr(seed, n_obs, n_var)
    csr.data[:] = np.random.default_rng(seed).geometric(0.6, len(csr.data))
    return csr


def config(paths: Sequence[Path | str], elements: Sequence[str] = ("X",), **fields: Any) -> dict[str, Any]:
    """An ``open`` configuration over the files."""
    return {
        "elements": [{"name": name} for name in elements],
        "datasets": [{"path": str(path), "name": f"ds{i}"} for i, path in enumerate(paths)],
        **fields,
    }


def check(paths: Sequence[Path | str], elements: Sequence[str] = ("X",), **fields: Any) -> dict[str, Any]:
    """Whole epochs in order, at random and of single rows equal what h5py reads; the statistics of the last."""
    datasets = [{name: read_element(path, name) for name in elements} for path in paths]
    reference = Reference(datasets, dict.fromkeys(elements, "torch"))
    with opened(config(paths, elements, **fields)) as parent:
        assert _ops.describe(parent)["n_obs"] == reference.n_obs
        for plan, kind in ((Plan(5, 3, 5), "sequential"), (Plan(4, 3, 6), "random"), (Plan(1, 8, 4), "random")):
            with streaming(parent, {"sampling": plan.config(kind)}) as state:
                reference.check_once(reference.epoch(state, 7))
                stats = _ops.stats(state)
                assert stats["chunks_general_path"] == 0
    return stats


def blosc(name: str, shuffle: int) -> dict[str, Any]:
    """Keyword arguments of h5py for a Blosc filter."""
    return {**hdf5plugin.Blosc(cname=name, clevel=5, shuffle=shuffle)}


FILTERS: dict[str, Layout] = {
    "none": Layout(37),
    "one chunk": Layout(100_000),
    "contiguous": Layout(),
    "gzip": Layout(37, ((DEFLATE, 4),)),
    "gzip 9": Layout(211, ((DEFLATE, 9),)),
    "gzip 0": Layout(37, ((DEFLATE, 0),)),
    "shuffle": Layout(37, ((SHUFFLE,),)),
    "shuffle, gzip": Layout(64, ((SHUFFLE,), (DEFLATE, 4))),
    "fletcher32": Layout(37, ((FLETCHER32,),)),
    "shuffle, fletcher32": Layout(37, ((SHUFFLE,), (FLETCHER32,))),
    "shuffle, gzip, fletcher32": Layout(37, ((SHUFFLE,), (DEFLATE, 6), (FLETCHER32,))),
    "lzf": Layout(53, keywords={"compression": "lzf"}),
    "shuffle, lzf": Layout(211, keywords={"compression": "lzf", "shuffle": True}),
    "shuffle, lzf, fletcher32": Layout(211, keywords={"compression": "lzf", "shuffle": True, "fletcher32": True}),
    "gzip by anndata": Layout(128, keywords={"compression": "gzip"}),
    "zstd": Layout(211, keywords={**hdf5plugin.Zstd(clevel=3)}),
    "shuffle, zstd": Layout(211, keywords={**hdf5plugin.Zstd(clevel=3), "shuffle": True}),
    # what no writer does by itself: filters in an odd order, or twice
    "gzip, shuffle": Layout(64, ((DEFLATE, 4), (SHUFFLE,))),
    "fletcher32, gzip": Layout(37, ((FLETCHER32,), (DEFLATE, 1))),
    "fletcher32, shuffle, gzip": Layout(37, ((FLETCHER32,), (SHUFFLE,), (DEFLATE, 1))),
    "gzip, fletcher32, gzip": Layout(64, ((DEFLATE, 1), (FLETCHER32,), (DEFLATE, 9))),
    "gzip, gzip, shuffle, gzip": Layout(64, ((DEFLATE, 1), (DEFLATE, 2), (SHUFFLE,), (DEFLATE, 9))),
    # every chunk skips the second, to which libhdf5 gives no parameter
    "shuffle, shuffle, gzip": Layout(64, ((SHUFFLE,), (SHUFFLE,), (DEFLATE, 1))),
    "gzip, zstd": Layout(64, ((DEFLATE, 1), (32015, 3))),
}
for _name in ("blosclz", "lz4", "lz4hc", "zlib", "zstd"):
    for _shuffle, _label in enumerate(("", ", shuffled", ", bits shuffled")):
        FILTERS[f"blosc {_name}{_label}"] = Layout(211, keywords=blosc(_name, _shuffle))
FILTERS["shuffle, blosc"] = Layout(211, keywords={**blosc("lz4", 0), "shuffle": True})
FILTERS["blosc, fletcher32"] = Layout(211, keywords={**blosc("lz4", 1), "fletcher32": True})

DTYPES = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
