"""DatasetCollection: a folder of AnnData datasets with one set of variables, rows in shuffled order.

Layout on disk: datasets ``dataset_0``, ``dataset_1``, … under one Zarr group that carries :data:`V1_ENCODING` once all
are written; or files ``dataset_0.h5ad``, … in one directory.

Creating goes: open inputs → deal their rows out to datasets in blocks → per dataset: read, shuffle, sort by group,
write. Extending deals new rows out to the datasets that exist, and rewrites each. One dataset at a time is in memory.
The draws taken from ``rng`` are those of scverse annbatch 0.3.1: a seed gives the collection it gave there.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec
from zarr.core.group import GroupMetadata

from annbatch._data.attributes import read_element
from annbatch._data.collections import DATASET_PREFIX, V1_ENCODING, dataset_keys, is_finished
from annbatch._data.places import is_remote, local_path

from ._checks import check_groupby
from ._frames import concat_frames, read_frame
from ._inputs import Inputs, joint_frame_dtypes, stored_types
from ._joining import extend_adata
from ._keys import Keys, warn_of_differing_keys
from ._opening import load_lazily, named_by
from ._sharded import consolidate, write_unconsolidated, writer_settings
from ._sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from os import PathLike
    from typing import Literal, Self

    from zarr.abc.codec import BytesBytesCodec


class DatasetCollection:
    """AnnData datasets on disk that are read as one, made from any number of AnnData files.

    Parameters
    ----------
    group
        Where the collection is or shall be: an open Zarr group, or a path (by custom ending in ``.zarr``).
    mode
        How a path is opened: ``"a"`` creates what is missing, ``"r+"`` and ``"r"`` need it there, ``"r"`` only reads.
    is_collection_h5ad
        Treat ``group`` as a directory of h5ad files instead. These can be made and their ``obs`` read, but they can
        be neither extended nor loaded from.

    Raises
    ------
    TypeError
        If ``group`` is neither a Zarr group nor a path.
    ValueError
        If ``is_collection_h5ad`` is set for a Zarr group.

    Examples
    --------
    >>> from annbatch import DatasetCollection
    >>> collection = DatasetCollection("cells.zarr").add_adatas(["lung.h5ad", "heart.h5ad"])  # doctest: +SKIP
    >>> collection.obs(["cell_type"])  # doctest: +SKIP
    """

    _group: zarr.Group | Path

    def __init__(
        self, group: zarr.Group | str | Path, *, mode: Literal["a", "r", "r+"] = "a", is_collection_h5ad: bool = False
    ):
        if isinstance(group, str | Path) and not is_remote(group):
            group = local_path(group)
        if isinstance(group, zarr.Group):
            if is_collection_h5ad:
                raise ValueError("Do not set `is_collection_h5ad` to True when also passing in a zarr Group.")
            self._group = group
        elif not isinstance(group, str | Path):
            raise TypeError("Group must either be a zarr group or a path")
        elif is_collection_h5ad:
            warnings.warn(
                "Loading h5ad is currently not supported and thus we cannot guarantee the functionality of the "
                "ecosystem with h5ad files. Such a collection can be created and its obs read, no more.",
                stacklevel=2,
            )
            self._group = Path(group)
            self._group.mkdir(exist_ok=True)
        else:
            if not str(group).endswith(".zarr"):
                warnings.warn(
                    f"It is highly recommended to make your collections have the `.zarr` suffix, got: {group}.",
                    stacklevel=2,
                )
            self._group = zarr.open_group(group, mode=mode)

    def _zarr_group(self) -> zarr.Group:
        if not isinstance(self._group, zarr.Group):
            raise ValueError("Cannot iterate through folder of h5ad files")
        return self._group

    @property
    def _dataset_keys(self) -> list[str]:
        """Names of the datasets, by number."""
        return dataset_keys(self._zarr_group())

    def _h5ad_paths(self) -> list[Path]:
        assert isinstance(self._group, Path)
        return sorted(self._group.glob(f"{DATASET_PREFIX}_*.h5ad"), key=lambda path: int(path.stem.split("_")[1]))

    def __iter__(self) -> Generator[zarr.Group, None, None]:
        """Yield the group of each dataset, by number.

        Raises
        ------
        ValueError
            For a directory of h5ad files.
        """
        group = self._zarr_group()
        for key in self._dataset_keys:
            dataset: Any = group[key]
            yield dataset if group.metadata.consolidated_metadata is not None else _editable(dataset)

    @property
    def is_empty(self) -> bool:
        """Whether there is no finished collection here; one whose writing was interrupted counts as empty."""
        if isinstance(self._group, zarr.Group):
            return not is_finished(self._group) or not self._dataset_keys
        return not any(self._group.iterdir())

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Read annotations of all observations, in the order of the datasets.

        Parameters
        ----------
        columns
            Columns to read; no others are touched on disk. Columns that no dataset has are left out. All by default;
            an empty list gives an empty frame.

        Returns
        -------
        pandas.DataFrame
            Categorical columns stay categorical, under the categories of all datasets.

        Examples
        --------
        >>> collection = DatasetCollection("cells.zarr")  # doctest: +SKIP
        >>> classes = collection.obs(["cell_type"])["cell_type"].array  # doctest: +SKIP
        """
        if columns is not None and len(columns) == 0:
            return pd.DataFrame()
        if isinstance(self._group, zarr.Group):
            frames = [read_frame(dataset["obs"], columns) for dataset in self]
        else:
            frames = []
            for path in self._h5ad_paths():
                with h5py.File(path, mode="r") as file:
                    frames.append(read_frame(file["obs"], columns))
        return concat_frames(frames) if frames else pd.DataFrame()

    def add_adatas(
        self,
        adata_paths: Iterable[zarr.Group | h5py.Group | PathLike[str] | str],
        *,
        load_adata: Callable[[zarr.Group | h5py.Group | PathLike[str] | str], ad.AnnData] = load_lazily,
        groupby: str | Iterable[str] | None = None,
        var_subset: Iterable[str] | None = None,
        n_obs_per_chunk: int = 64,
        shard_size: int | str = "1GB",
        zarr_compressor: Iterable[BytesBytesCodec] = (BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),),
        h5ad_compressor: Literal["gzip", "lzf"] | None = "gzip",
        dataset_size: int | str = "20GB",
        shuffle_chunk_size: int = 1000,
        shuffle: bool = True,
        rng: np.random.Generator | None = None,
        merge: Literal["same", "unique", "first", "only"] | None = None,
    ) -> Self:
        """Create the collection from AnnData files, or spread more files over the datasets of an existing one.

        A new collection has the union of the files' variables, an existing one keeps its own and takes from new
        files what it knows. ``obs`` gets a column ``src_path`` that names each row's file, and names that occur more
        than once in the files get a suffix. Sizes are of *uncompressed* data.

        Parameters
        ----------
        adata_paths
            The files: paths of h5ad files, Zarr stores or folders of h5ad files, patterns such as ``"plates/*.h5ad"``, or
            open groups. A modality of a MuData is ``"cells.h5mu/mod/rna"``.
        load_adata
            Opens one of them. The default reads annotations and leaves matrices on disk. A function of your own can
            drop elements that are not wanted or rename what differs between files; a matrix that it gives as
            :class:`dask.array.Array` is read piece by piece.
        groupby
            Columns of ``obs`` to sort each dataset by, after shuffling, as :class:`annbatch.samplers.ClassSampler`
            needs. Every file must have them; categorical ones with the same categories.
        var_subset
            Names of the variables to keep, for a new collection.
        n_obs_per_chunk
            Rows decompressed at a time; see :func:`write_sharded`.
        shard_size
            Rows, or bytes as a text such as ``"1GB"`` (1024³, as scverse annbatch reads it), per file of a matrix; see
            :func:`write_sharded`.
        zarr_compressor
            Codecs of a Zarr collection.
        h5ad_compressor
            Compression of h5ad files.
        dataset_size
            Rows per dataset of a new collection, or the bytes they should come to, as a text such as ``"20GB"`` (of 1024³,
            as scverse annbatch reads it), estimated from what ``load_adata`` gives and the files' metadata. Rows are shuffled within a dataset: larger mixes better and takes more memory.
        shuffle_chunk_size
            Consecutive rows that are read, and dealt out to a dataset, together: larger is faster, smaller mixes
            better.
        shuffle
            Deal blocks out at random and shuffle each dataset. Without it rows keep their order.
        rng
            Generator of all randomness here.
        merge
            Which columns of ``var`` survive joining several files, as for :func:`anndata.concat`.

        Returns
        -------
        DatasetCollection
            This object. Its groups can be edited with :func:`anndata.io.write_elem`; whoever opens the collection anew
            sees the edits after ``zarr.consolidate_metadata``.

        Raises
        ------
        ValueError
            If a size cannot be read, ``groupby`` does not fit the files, a dataset would be smaller than
            ``shuffle_chunk_size``, or there are fewer blocks than datasets to extend.

            Before anything is written, also if the files hold what anndata does not write, such as a name with a slash or
            objects of several types. Or if they do not fit together: a column of numbers in one file and of text in
            another, X in some files only.
        NotImplementedError
            If ``dataset_size`` is in bytes and an input is an object in memory.
        """
        rng = np.random.default_rng() if rng is None else rng
        groupby = None if groupby is None else _groupby_columns(groupby)
        self._reopen()
        is_new = self.is_empty
        with ad.settings.override(remove_unused_categories=False):  # datasets share their categories
            inputs = Inputs(
                [each for x in adata_paths for each in named_by(x)],
                load_adata=load_adata,
                var_subset=var_subset if is_new else None,
                merge=merge,
            )
            if groupby is not None:
                check_groupby(groupby, [adata.obs for adata in inputs.adatas])
            warn_of_differing_keys(inputs.keys)
            if is_new:
                inputs.check(to_hdf5=not isinstance(self._group, zarr.Group))
                parts = _new_parts(inputs, dataset_size, shuffle_chunk_size, shuffle=shuffle, rng=rng)
            else:
                parts = self._extended_parts(inputs, groupby, shuffle_chunk_size, merge, shuffle=shuffle, rng=rng)
            for key, adata in parts:
                if shuffle:
                    adata = adata[rng.permutation(adata.n_obs)]
                if groupby is not None:
                    adata = _sorted_by(adata, groupby)
                self._write(
                    key,
                    adata.copy() if adata.is_view else adata,
                    n_obs_per_chunk=n_obs_per_chunk,
                    shard_size=shard_size,
                    zarr_compressor=zarr_compressor,
                    h5ad_compressor=h5ad_compressor,
                )
        self._finish()
        return self

    def _extended_parts(
        self,
        inputs: Inputs,
        groupby: list[str] | None,
        shuffle_chunk_size: int,
        merge: Literal["same", "unique", "first", "only"] | None,
        *,
        shuffle: bool,
        rng: np.random.Generator,
    ) -> Generator[tuple[str, ad.AnnData], None, None]:
        """Yield the datasets of this collection with their share of new rows behind the ones they had."""
        keys = self._dataset_keys
        if math.ceil(inputs.n_obs / shuffle_chunk_size) < len(keys):
            raise ValueError(
                f"Use a shuffle size small enough to distribute the input data with {inputs.n_obs} obs across "
                f"{len(keys)} anndata stores: at most {inputs.n_obs // len(keys)}."
            )
        if groupby is not None:
            stored = [read_frame(dataset["obs"], groupby) for dataset in self]
            check_groupby(groupby, [*(adata.obs for adata in inputs.adatas), *stored])
        stored = [(Keys.of_stored(dataset), stored_types(dataset)) for dataset in self]
        warn_of_differing_keys([inputs.joint_keys, *(of_dataset for of_dataset, _ in stored)])
        inputs.check(to_hdf5=False, beside=stored)
        dtypes = joint_frame_dtypes([*inputs.types, *(types for _, types in stored)])
        blocks = _blocks(inputs.n_obs, shuffle_chunk_size, rng if shuffle else None)
        shares = np.array_split(np.arange(len(blocks)), len(keys))
        progress = zip(keys, shares, strict=True)
        for key, share in tqdm(progress, total=len(keys), desc="Extending dataset collection"):
            old = read_element(self._zarr_group()[key])
            new = inputs.take(_rows([blocks[i] for i in share]))
            new = new[:, new.var_names.isin(old.var_names)].copy()
            yield key, extend_adata(old, new, merge, dtypes)

    def _write(
        self,
        key: str,
        adata: ad.AnnData,
        *,
        n_obs_per_chunk: int,
        shard_size: int | str,
        zarr_compressor: Iterable[BytesBytesCodec],
        h5ad_compressor: Literal["gzip", "lzf"] | None,
    ) -> None:
        if isinstance(self._group, zarr.Group):
            write_unconsolidated(
                self._group,
                adata,
                n_obs_per_chunk=min(n_obs_per_chunk, adata.n_obs),
                shard_size=shard_size,
                compressors=zarr_compressor,
                key=key,
            )
        else:
            with ad.settings.override(**writer_settings()):
                ad.io.write_h5ad(self._group / f"{key}.h5ad", adata, dataset_kwargs={"compression": h5ad_compressor})

    def _reopen(self) -> None:
        """Look at a Zarr group afresh: consolidated metadata it was opened with goes stale as datasets change.

        anndata edits no group that was opened with them.
        """
        if isinstance(self._group, zarr.Group):
            self._group = zarr.open_group(self._group.store, path=self._group.path, mode="r+", use_consolidated=False)

    def _finish(self) -> None:
        """Mark the collection as complete."""
        if isinstance(self._group, zarr.Group):
            self._group.update_attributes(V1_ENCODING)
            consolidate(self._group)


class _EditableMetadata(GroupMetadata):
    """Metadata of a group that was opened without consolidated metadata, as anndata demands of those it edits.

    They equal the metadata of the same group opened with them.
    """

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, GroupMetadata) and self.to_dict() == replace(other, consolidated_metadata=None).to_dict()
        )

    __hash__ = None  # type: ignore[assignment]  # as Python has it of classes that only define __eq__


def _editable(group: zarr.Group) -> zarr.Group:
    metadata = _EditableMetadata.from_dict(group.metadata.to_dict())
    return zarr.Group(zarr.AsyncGroup(metadata=metadata, store_path=group.store_path))


def _new_parts(
    inputs: Inputs,
    dataset_size: int | str,
    shuffle_chunk_size: int,
    *,
    shuffle: bool,
    rng: np.random.Generator,
) -> Generator[tuple[str, ad.AnnData], None, None]:
    """Yield the datasets of a new collection: name, and rows in the order of the inputs."""
    if isinstance(dataset_size, str):
        dataset_size = max(1, int(parse_size(dataset_size) / inputs.bytes_per_row()))
    if shuffle_chunk_size > dataset_size:
        raise ValueError(
            "Cannot have a larger slice size than observations per dataset. "
            "Reduce `shuffle_chunk_size` or increase `dataset_size`."
        )
    blocks = _blocks(inputs.n_obs, shuffle_chunk_size, rng if shuffle else None)
    n_blocks = min(inputs.n_obs, dataset_size) // shuffle_chunk_size
    if inputs.n_obs <= dataset_size or n_blocks <= 1:
        dealt = [blocks]
    else:
        dealt = [blocks[first : first + n_blocks] for first in range(0, len(blocks), n_blocks)]
    for number, dealt_blocks in enumerate(tqdm(dealt, desc="Creating dataset collection")):
        # in ascending order, which is how storage is read fastest: they are shuffled once in memory
        yield f"{DATASET_PREFIX}_{number}", inputs.take(np.sort(_rows(dealt_blocks)))


def _groupby_columns(groupby: str | Iterable[str]) -> list[str]:
    columns = [groupby] if isinstance(groupby, str) else list(groupby)
    if not columns:
        raise ValueError("`groupby` must contain at least one `obs` column.")
    if len(set(columns)) < len(columns):
        raise ValueError("`groupby` columns must be unique.")
    return columns


def _sorted_by(adata: ad.AnnData, columns: list[str]) -> ad.AnnData:
    """Sort observations by columns; equal ones keep their order."""
    values = adata.obs[columns].reset_index(drop=True)
    return adata[values.sort_values(by=columns, kind="stable").index.to_numpy(dtype=int)]


def _blocks(n_obs: int, size: int, rng: np.random.Generator | None) -> list[range]:
    """Cut ``n_obs`` rows into blocks of ``size`` consecutive ones, in random order if there is a generator."""
    blocks = [range(first, min(first + size, n_obs)) for first in range(0, n_obs, size)]
    if rng is not None:
        rng.shuffle(blocks)
    return blocks


def _rows(blocks: Sequence[range]) -> np.ndarray:
    return np.concatenate([np.arange(block.start, block.stop) for block in blocks])
