"""Small AnnData Zarr stores, written to disk, for the property tests.

In: descriptions (:mod:`drawing` draws random ones). Out: a :class:`Collection`: directories that follow anndata's
conventions (``csr_matrix`` groups with a ``shape`` attribute, ``array`` arrays) and, in memory, what was written.

A store is described before it is written (:class:`CsrSpec`, :class:`DenseSpec`, :class:`ArrayLayout`), so that
hypothesis shrinks the description and a failure prints it. The contents follow from a seed inside the description.

Everything that changes where bytes lie can be described: format, chunk and shard shapes that do not divide, codec, byte
order, memory order, chunk keys, where the shard index stands and whether it has a checksum, fill values and whether
chunks that equal them are left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numcodecs
import numpy as np
import zarr
import zarr.codecs as zc
import zarr.codecs.numcodecs as zn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DATA_DTYPES = ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
INDEX_DTYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
INDPTR_DTYPES = ("i4", "i8")
BLOSC_NAMES = tuple(sorted(numcodecs.blosc.list_compressors()))
"""Compressors this numcodecs was built with (snappy usually is not among them)."""
SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")


# ---------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, eq=False)
class Csr:
    """Rows of a sparse matrix: ``indptr`` int64 [n + 1], ``indices`` int64 [nnz], ``data`` [nnz], ``shape`` (n, n_var).

    Not scipy's class: that one has no float16, and merges or sorts entries where it likes.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    shape: tuple[int, int]

    def take(self, rows: np.ndarray) -> Csr:
        """The given rows in the given order, one at a time."""
        spans = [slice(int(self.indptr[row]), int(self.indptr[row + 1])) for row in rows]
        lengths = [span.stop - span.start for span in spans]
        return Csr(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([self.indices[:0], *(self.indices[span] for span in spans)]),
            np.concatenate([self.data[:0], *(self.data[span] for span in spans)]),
            (len(rows), self.shape[1]),
        )

    def to_dense(self) -> np.ndarray:
        """Dense ``shape`` array; entries stored twice keep the last."""
        dense = np.zeros(self.shape, self.data.dtype)
        for row in range(self.shape[0]):
            span = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
            dense[row, self.indices[span]] = self.data[span]
        return dense


def random_values(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], *, blocky: bool) -> np.ndarray:
    """Values over the whole range of `dtype`; `blocky` leaves long runs of zeros (chunks that are never written)."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        values = rng.random(shape) < 0.7
    elif kind.kind == "f":
        values = (rng.standard_normal(shape) * 100).astype(kind)
        special = np.array([np.nan, np.inf, -np.inf, -0.0], kind)
        odd = rng.random(shape) < 0.05
        values[odd] = rng.choice(special, int(odd.sum()))
    else:
        limits = np.iinfo(kind)
        # the upper half of uint64 has no int64: that error has a test of its own
        top = min(limits.max, np.iinfo(np.int64).max)
        values = rng.integers(limits.min, top, size=shape, dtype=kind, endpoint=True)
    if blocky and values.size:
        run = slice(int(values.shape[0] * 0.2), int(values.shape[0] * 0.8) + 1)
        values[run] = 0
    return values.astype(kind)


def _row_lengths(rng: np.random.Generator, pattern: str, n_obs: int, n_var: int) -> np.ndarray:
    most = min(n_var, 40)
    lengths = rng.integers(0, most, size=n_obs, endpoint=True)
    if pattern == "sparse":  # most rows empty
        lengths[rng.random(n_obs) < 0.8] = 0
    elif pattern == "empty":
        lengths[:] = 0
    elif pattern == "one long row":
        lengths[:] = 0
        lengths[n_obs // 2 : n_obs // 2 + 1] = most
    elif pattern == "full":
        lengths[:] = most
    return lengths


# ---------------------------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class ArrayLayout:
    """How one Zarr array lies on disk. `chunks` are inner chunks; `shards` whole multiples of them, or None."""

    zarr_format: int
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    codec: str = "none"
    big_endian: bool = False
    transposed: bool = False  # order "F" in format 2, a transpose codec in format 3
    transpose_outside: bool = False  # before the shards are cut, not inside each
    nested: bool = False  # shards within shards
    index_location: str = "end"
    index_checksum: bool = True
    separator: str = "/"
    v2_keys: bool = False
    fill_value: int | None = 0
    write_empty_chunks: bool = False


@dataclass(frozen=True)
class CsrSpec:
    """A sparse element: contents by `seed`, and one layout per array."""

    shape: tuple[int, int]
    pattern: str
    blocky: bool
    data_dtype: str
    index_dtype: str
    indptr_dtype: str
    seed: int
    layouts: dict[str, ArrayLayout]

    def values(self) -> Csr:
        """What is written: sorted, distinct column numbers in each row."""
        n_obs, n_var = self.shape
        rng = np.random.default_rng(self.seed)
        lengths = _row_lengths(rng, self.pattern, n_obs, n_var)
        columns = [np.sort(rng.choice(n_var, size=int(k), replace=False)) for k in lengths]
        indices = np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)
        data = random_values(rng, self.data_dtype, (len(indices),), blocky=self.blocky)
        return Csr(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), indices, data, self.shape)


@dataclass(frozen=True)
class DenseSpec:
    """A dense element of rank >= 2: contents by `seed`, and its layout."""

    shape: tuple[int, ...]
    blocky: bool
    dtype: str
    seed: int
    layout: ArrayLayout

    def values(self) -> np.ndarray:
        """What is written."""
        return random_values(np.random.default_rng(self.seed), self.dtype, self.shape, blocky=self.blocky)


@dataclass(frozen=True)
class DatasetSpec:
    """One AnnData store."""

    n_obs: int
    zarr_format: int
    consolidated: bool
    elements: dict[str, CsrSpec | DenseSpec]


@dataclass
class Collection:
    """Stores on disk, and what they hold: one dict of name to :class:`Csr` or array per dataset."""

    paths: list[Path]
    written: list[dict[str, Csr | np.ndarray]]
    specs: list[DatasetSpec] = field(default_factory=list)

    @property
    def element_names(self) -> list[str]:
        """Names of the elements that every dataset has."""
        return list(self.written[0])

    def config(self, elements: Sequence[str] | dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """An ``open`` configuration over all datasets; a dict gives each element's dtype."""
        names = self.element_names if elements is None else elements
        dtypes = names if isinstance(names, dict) else dict.fromkeys(names, "torch")
        return {
            "elements": [{"name": name, "dtype": dtype} for name, dtype in dtypes.items()],
            "datasets": [{"path": str(path), "name": f"ds{i}"} for i, path in enumerate(self.paths)],
            **fields,
        }


# ---------------------------------------------------------------------------------------------- codecs


def _blosc_v3(name: str, shuffle: str, blocksize: int, typesize: int | None) -> Callable[[int], list[Any]]:
    return lambda itemsize: [
        zc.BloscCodec(cname=name, clevel=5, shuffle=shuffle, blocksize=blocksize, typesize=typesize or itemsize)
    ]


def _blosc_v2(name: str, shuffle: int, blocksize: int) -> Callable[[int], dict[str, Any]]:
    return lambda itemsize: {"compressors": numcodecs.Blosc(name, 5, shuffle, blocksize)}


def _codecs_v3() -> dict[str, Callable[[int], list[Any]]]:
    table: dict[str, Callable[[int], list[Any]]] = {
        "none": lambda itemsize: [],
        "zstd": lambda itemsize: [zc.ZstdCodec(level=3)],
        "zstd+checksum": lambda itemsize: [zc.ZstdCodec(level=1, checksum=True)],
        "gzip": lambda itemsize: [zc.GzipCodec(level=5)],
        "crc32c": lambda itemsize: [zc.Crc32cCodec()],
        "zstd, crc32c": lambda itemsize: [zc.ZstdCodec(level=1), zc.Crc32cCodec()],
        "blosc, crc32c": lambda itemsize: [*_blosc_v3("lz4", "shuffle", 0, None)(itemsize), zc.Crc32cCodec()],
        "zlib": lambda itemsize: [zn.Zlib(level=1)],
        "bz2": lambda itemsize: [zn.BZ2(level=1)],
        "adler32": lambda itemsize: [zn.Adler32()],
        # zarrs 0.23.14 forgets the last byte of an odd number of them, so only wider items
        "fletcher32": lambda itemsize: [zn.Fletcher32() if itemsize > 1 else zn.Adler32()],
        "shuffle, zstd": lambda itemsize: [zn.Shuffle(elementsize=itemsize), zc.ZstdCodec(level=1)],
        # an element size that is not the dtype's is legal, and leaves a remainder
        "blosc typesize 3": _blosc_v3("lz4", "shuffle", 0, 3),
    }
    for name in BLOSC_NAMES:
        for shuffle in SHUFFLES:
            table[f"blosc {name} {shuffle}"] = _blosc_v3(name, shuffle, 0, None)
    table["blosc lz4 shuffle blocks of 256"] = _blosc_v3("lz4", "shuffle", 256, None)
    table["blosc zstd bitshuffle blocks of 256"] = _blosc_v3("zstd", "bitshuffle", 256, None)
    return table


def _codecs_v2() -> dict[str, Callable[[int], dict[str, Any]]]:
    table: dict[str, Callable[[int], dict[str, Any]]] = {
        "none": lambda itemsize: {"compressors": None},
        "zstd": lambda itemsize: {"compressors": numcodecs.Zstd(3)},
        "gzip": lambda itemsize: {"compressors": numcodecs.GZip(5)},
        "zlib": lambda itemsize: {"compressors": numcodecs.Zlib(1)},
        "bz2": lambda itemsize: {"compressors": numcodecs.BZ2(1)},
        "shuffle, zlib": lambda itemsize: {
            "filters": [numcodecs.Shuffle(itemsize)],
            "compressors": numcodecs.Zlib(1),
        },
        "fletcher32": lambda itemsize: {
            "filters": [numcodecs.Fletcher32() if itemsize > 1 else numcodecs.Adler32()],
            "compressors": None,
        },
        "adler32": lambda itemsize: {"filters": [numcodecs.Adler32()], "compressors": None},
        "blosc autoshuffle": _blosc_v2("lz4", numcodecs.Blosc.AUTOSHUFFLE, 0),
        "blosc lz4 blocks of 256": _blosc_v2("lz4", numcodecs.Blosc.SHUFFLE, 256),
    }
    for name in BLOSC_NAMES:
        for shuffle, label in enumerate(SHUFFLES):
            table[f"blosc {name} {label}"] = _blosc_v2(name, shuffle, 0)
    return table


CODECS_V3 = _codecs_v3()
CODECS_V2 = _codecs_v2()


# ---------------------------------------------------------------------------------------------- writing


def _write_arguments_v2(dtype: np.dtype, layout: ArrayLayout) -> dict[str, Any]:
    return {
        "dtype": dtype.newbyteorder(">" if layout.big_endian else "<"),
        "chunks": layout.chunks,
        "order": "F" if layout.transposed else "C",
        "chunk_key_encoding": {"name": "v2", "separator": layout.separator},
        "filters": None,
        **CODECS_V2[layout.codec](dtype.itemsize),
    }


def _write_arguments_v3(dtype: np.dtype, layout: ArrayLayout) -> dict[str, Any]:
    rank = len(layout.chunks)
    turn = [zc.TransposeCodec(order=tuple(reversed(range(rank))))] if layout.transposed else []
    endian = zc.BytesCodec(endian="big" if layout.big_endian else "little")
    compressors = CODECS_V3[layout.codec](dtype.itemsize)
    outside = turn if layout.shards is None or layout.transpose_outside else []
    inside = [] if outside else turn
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "chunk_key_encoding": {"name": "v2" if layout.v2_keys else "default", "separator": layout.separator},
        "filters": outside or None,
    }
    if layout.shards is None:
        return {**arguments, "chunks": layout.chunks, "serializer": endian, "compressors": compressors or None}

    def sharded(chunk_shape: tuple[int, ...], codecs: list[Any]) -> zc.ShardingCodec:
        return zc.ShardingCodec(
            chunk_shape=chunk_shape,
            codecs=codecs,
            index_codecs=[zc.BytesCodec(endian="little"), *([zc.Crc32cCodec()] if layout.index_checksum else [])],
            index_location=layout.index_location,
        )

    # the shards of a transposed array are cut from what the transpose codec leaves
    order = tuple(reversed(range(rank))) if outside else tuple(range(rank))
    chunks, shards = (tuple(shape[axis] for axis in order) for shape in (layout.chunks, layout.shards))
    serializer, grid = sharded(chunks, [*inside, endian, *compressors]), layout.shards
    if layout.nested:
        serializer, grid = sharded(shards, [serializer]), (2 * grid[0], *grid[1:])
    return {**arguments, "chunks": grid, "serializer": serializer, "compressors": None}


def write_array(
    group: zarr.Group, name: str, values: np.ndarray, layout: ArrayLayout, attributes: dict[str, Any] | None = None
) -> zarr.Array:
    """Write `values` as array `name` of `group` in the given layout."""
    arguments = (_write_arguments_v2 if layout.zarr_format == 2 else _write_arguments_v3)(values.dtype, layout)
    fill = layout.fill_value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not in the Zarr version 3 specification": the point of the exercise
        array = group.create_array(
            name,
            shape=values.shape,
            fill_value=None if fill is None else values.dtype.type(fill),
            attributes=attributes,
            config={"write_empty_chunks": layout.write_empty_chunks},
            **arguments,
        )
        if values.size:
            array[...] = values
    return array


def write_csr(group: zarr.Group, name: str, csr: Csr, spec: CsrSpec) -> None:
    """Write a ``csr_matrix`` group (https://anndata.readthedocs.io/en/stable/fileformat-prose.html)."""
    element = group.create_group(
        name,
        attributes={"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(csr.shape)},
    )
    write_array(element, "indptr", csr.indptr.astype(spec.indptr_dtype), spec.layouts["indptr"])
    write_array(element, "indices", csr.indices.astype(spec.index_dtype), spec.layouts["indices"])
    write_array(element, "data", csr.data, spec.layouts["data"])


def write_dense(group: zarr.Group, name: str, values: np.ndarray, layout: ArrayLayout) -> None:
    """Write an ``array`` element."""
    write_array(group, name, values, layout, {"encoding-type": "array", "encoding-version": "0.2.0"})


def write_dataset(path: Path, spec: DatasetSpec, *, frames: bool = False) -> dict[str, Csr | np.ndarray]:
    """Write one store at `path`; `frames` adds the obs and var tables that ``anndata.read_zarr`` asks for."""
    root = zarr.open_group(path, mode="w", zarr_format=spec.zarr_format)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for parent in sorted({name.rpartition("/")[0] for name in spec.elements} - {""}):
        kind = "raw" if parent == "raw" else "dict"
        root.create_group(parent, attributes={"encoding-type": kind, "encoding-version": "0.1.0"})
    written: dict[str, Csr | np.ndarray] = {}
    for name, element in spec.elements.items():
        values = written[name] = element.values()
        parent, _, leaf = name.rpartition("/")
        group = root[parent] if parent else root
        if isinstance(element, CsrSpec):
            write_csr(group, leaf, values, element)
        else:
            write_dense(group, leaf, values, element.layout)
    if frames:
        _write_frames(root, spec)
    if spec.consolidated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(path, zarr_format=spec.zarr_format)
    return written


def _write_frames(root: zarr.Group, spec: DatasetSpec) -> None:
    import pandas as pd
    from anndata.io import write_elem

    columns = {name: element.shape[1] for name, element in spec.elements.items()}
    write_elem(root, "obs", pd.DataFrame(index=[f"cell{i}" for i in range(spec.n_obs)]))
    write_elem(root, "var", pd.DataFrame(index=[f"gene{i}" for i in range(columns.get("X", 0))]))
    if "raw/X" in columns:
        write_elem(root["raw"], "var", pd.DataFrame(index=[f"gene{i}" for i in range(columns["raw/X"])]))


def write_collection(path: Path, specs: Sequence[DatasetSpec], *, frames: bool = False) -> Collection:
    """Write each dataset as ``dataset_<i>.zarr`` under `path`."""
    paths = [Path(path) / f"dataset_{i}.zarr" for i in range(len(specs))]
    written = [write_dataset(where, spec, frames=frames) for where, spec in zip(paths, specs, strict=True)]
    return Collection(paths, written, list(specs))
