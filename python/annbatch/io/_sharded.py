"""Writing one AnnData as a sharded Zarr v3 store."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anndata as ad
import zarr
from packaging.version import Version
from zarr.codecs import BloscCodec

from ._sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zarr.abc.codec import BytesBytesCodec

_DENSE_PARENTS = ("obsm", "layers", "obsp")
_SPARSE = ("csr_matrix", "csc_matrix")


def write_sharded(
    group: zarr.Group,
    adata: ad.AnnData,
    *,
    n_obs_per_chunk: int = 64,
    shard_size: int | str = "1GB",
    compressors: Iterable[BytesBytesCodec] = (BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),),
    key: str | None = None,
) -> None:
    """Write an AnnData as a Zarr v3 store whose matrices are cut into chunks inside shards, both along the rows.

    A chunk is what is read and decompressed at a time, a shard is one file. Sparse matrices, whose rows differ in
    length, are cut by elements: as many as the average row has, times the rows asked for. ``X``, ``obsm``,
    ``layers`` and ``obsp`` and every sparse matrix are sharded; the rest is written as anndata would.

    Parameters
    ----------
    group
        Group to write to, of Zarr format 3.
    adata
        The object, in memory or lazy.
    n_obs_per_chunk
        Rows per chunk. More rows make contiguous reads faster and random ones slower.
    shard_size
        Rows per shard, or the bytes (uncompressed) that every shard should come close to, as a text such as
        ``"512MB"`` (of 1024², as scverse annbatch reads it); the text is applied to each matrix by itself. Rounded down to
        whole chunks.
    compressors
        Codecs applied to the bytes of each chunk of the sharded matrices.
    key
        Name in the group to write under. By default the root, and then the *whole store* is emptied first.

    Raises
    ------
    ValueError
        If the group is of Zarr format 2, a sharded matrix has no rows, or ``shard_size`` cannot be read.
    """
    write_unconsolidated(
        group, adata, n_obs_per_chunk=n_obs_per_chunk, shard_size=shard_size, compressors=compressors, key=key
    )
    consolidate(group)


def consolidate(group: zarr.Group) -> zarr.Group:
    """Collect the metadata of the whole store in its root, or of the group where the root is no group."""
    try:
        return zarr.consolidate_metadata(group.store)
    except FileNotFoundError:
        return zarr.consolidate_metadata(group.store, path=group.path)


def write_unconsolidated(
    group: zarr.Group,
    adata: ad.AnnData,
    *,
    n_obs_per_chunk: int,
    shard_size: int | str,
    compressors: Iterable[BytesBytesCodec],
    key: str | None,
) -> None:
    """Do the writing of :func:`write_sharded`, and leave consolidated metadata as it is."""
    if group.metadata.zarr_format != 3:
        raise ValueError(f"Shards need Zarr format 3, but {group} is of format {group.metadata.zarr_format}.")
    compressors = tuple(compressors)

    def write_element(
        write: ad.experimental.Write,
        store: zarr.Group,
        name: str,
        elem: Any,
        dataset_kwargs: Mapping[str, Any],
        *,
        iospec: ad.experimental.IOSpec,
    ) -> None:
        layout = None
        if iospec.encoding_type in _SPARSE:
            layout = _sparse_layout(name, elem, n_obs_per_chunk, shard_size)
        elif iospec.encoding_type == "array" and (name == "X" or store.name.rsplit("/", 1)[-1] in _DENSE_PARENTS):
            layout = _dense_layout(name, elem, n_obs_per_chunk, shard_size)
        if layout is not None:
            dataset_kwargs = {**dataset_kwargs, **layout, "compressors": compressors}
        write(store, name, elem, dataset_kwargs=dataset_kwargs)

    with ad.settings.override(**writer_settings()):
        ad.experimental.write_dispatched(group, "/" if key is None else key, adata, callback=write_element)


def writer_settings() -> dict[str, Any]:
    """Return the settings of anndata that datasets are written with, those of anndata 0.13 for all of its versions."""
    settings: dict[str, Any] = {"write_csr_csc_indices_with_min_possible_dtype": True}
    if Version(version("anndata")) < Version("0.13"):  # later, this is how it always writes
        settings |= {"auto_shard_zarr_v3": True, "zarr_write_format": 3, "allow_write_nullable_strings": True}
    return settings


def _dense_layout(name: str, elem: Any, n_obs_per_chunk: int, shard_size: int | str) -> dict[str, tuple[int, ...]]:
    n_obs, *tail = elem.shape
    if n_obs == 0:
        raise ValueError(f"Cannot write sharded array {name!r} with 0 observations.")
    chunk = min(n_obs_per_chunk, n_obs)
    shard = min(_rows_per_shard(shard_size, n_obs, elem.size * elem.dtype.itemsize), n_obs)
    return {"chunks": (chunk, *tail), "shards": (_round_down(shard, chunk), *tail)}


def _sparse_layout(name: str, elem: Any, n_obs_per_chunk: int, shard_size: int | str) -> dict[str, tuple[int, ...]]:
    n_obs = elem.shape[0]
    if n_obs == 0:
        raise ValueError(f"Cannot write sharded sparse matrix {name!r} with 0 observations.")
    matrix = elem._to_backed() if hasattr(elem, "_to_backed") else elem  # CSRDataset: the arrays, not their contents
    data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
    nnz = data.shape[0]
    n_bytes = sum(array.shape[0] * array.dtype.itemsize for array in (data, indices, indptr))

    def n_elements(n_rows: int) -> int:
        elements = max(1, int(n_rows * (nnz / n_obs)))
        return min(elements, nnz) if nnz > 0 else elements

    chunk = n_elements(n_obs_per_chunk)
    return {
        "chunks": (chunk,),
        "shards": (_round_down(n_elements(_rows_per_shard(shard_size, n_obs, n_bytes)), chunk),),
    }


def _rows_per_shard(shard_size: int | str, n_obs: int, n_bytes: int) -> int:
    """Rows per shard of a matrix of ``n_obs`` rows and ``n_bytes`` bytes."""
    if isinstance(shard_size, int):
        return shard_size
    target_bytes = parse_size(shard_size)
    return max(1, int(target_bytes / (n_bytes / n_obs))) if n_bytes > 0 else 1


def _round_down(shard: int, chunk: int) -> int:
    return max(chunk, shard - shard % chunk)
