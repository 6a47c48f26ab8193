"""`Loader`: datasets and a sampler in, batches out.

The loader keeps what the user added and says in which form batches come back. Reading, sampling, slicing and
shuffling happen in the Rust core:

    _data                 what was added, checked, and described to the core
    _core                 what a sampler asks for, in numbers; opened datasets, and passes over them
    _output, convert      what the core delivers, in the form asked for
"""

from __future__ import annotations

import copy
import os
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal

import numpy as np
from torch.utils.data import IterableDataset

from annbatch._base.sizes import check_lt_1
from annbatch._data.aligned import load_all_aligned, load_chosen_columns
from annbatch._data.datasets import Datasets, choose_columns, elements_of
from annbatch._data.stored import stored_at
from annbatch._output.batch import refuse_collating
from annbatch._output.form import Form
from annbatch._output.options import (
    check_output,
    choose_device,
    choose_sampler,
    distinct_names,
    instead_of_to_torch,
)
from annbatch._output.reader import Reader
from annbatch.transforms import Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from typing import Self

    import anndata as ad
    import pandas as pd
    import torch
    import zarr

    from annbatch._core.session import Collection
    from annbatch._data.stored import StoredAnnData
    from annbatch.abc import Sampler
    from annbatch.io import DatasetCollection
    from annbatch.transforms import Log1p, NormalizeTotal, SelectVar
    from annbatch.types import LoaderOutput, LoaderStats, RowPlace

if TYPE_CHECKING:
    # with defaults, so that neither has to be said; typing has them from Python 3.13 on
    from typing_extensions import TypeVar

    BackingArray = TypeVar("BackingArray", default=Any)
    OutputInMemoryArray = TypeVar("OutputInMemoryArray", default=Any)
else:
    from typing import TypeVar

    BackingArray = TypeVar("BackingArray")
    OutputInMemoryArray = TypeVar("OutputInMemoryArray")


class Loader(IterableDataset[Any], Generic[BackingArray, OutputInMemoryArray]):
    """Mini-batches from AnnData matrices on disk or in memory.

    Each batch is a dictionary with the keys

    ``X``
        Rows of the data matrix: by default a `scipy.sparse.csr_matrix` ``[n, n_var]`` or a `numpy.ndarray`
        ``[n, ...]``. ``None`` if the datasets have no ``X`` and `layers` or `obsm` are asked for; `annbatch.open` puts a
        layer in its place.
    ``obs``
        Their annotations, a `pandas.DataFrame` of n rows, or ``None`` if the datasets have none.
    ``var``
        The annotations of the variables, the same frame each time, or ``None``.
    ``index``
        int64 ``[n]``, the rows' numbers counted over all datasets in the order they were added, or ``None`` unless
        `return_index` is set.
    ``layers``, ``obsm``
        Dictionaries of further elements of the same rows; only if asked for by the arguments of these names.

    Rows are read in contiguous chunks, `preload_nchunks` of them at a time, and batches are drawn from those. Reading
    goes on in background threads while a batch is being used. Larger chunks read faster and shuffle less, so shuffle
    the data on disk beforehand (`annbatch.DatasetCollection`) where order matters.

    Iterating gives a generator; closing it ends the pass. Several may be open at once. Reading needs no worker processes;
    a `torch.utils.data.DataLoader` around a loader takes ``batch_size=None``.

    While `torch.profiler` is recording, taking a batch from the core shows as a range ``annbatch.load``: the time that
    the training waited for data. Within it a mark ``annbatch.batch rows=... bytes=...`` says what it got.

    Parameters
    ----------
    batch_sampler
        Decides which rows form which batch. Without one a `annbatch.samplers.RandomSampler` (`shuffle`) or
        `annbatch.samplers.SequentialSampler` is made from the next arguments, which exclude this one.
    chunk_size
        Rows read contiguously, by default 512.
    preload_nchunks
        Chunks read together, by default 32. ``chunk_size * preload_nchunks`` must be a multiple of `batch_size`.
    shuffle
        Whether rows come in random order, by default not.
    return_index
        Whether batches carry the numbers of their rows.
    batch_size
        Rows per batch, by default 1.
    preload_to_gpu
        Whether batches are put on the current CUDA device, sparse ones as bool, float32 or float64. Needs cupy, or
        for ``to="torch"`` just a CUDA device. On by default where cupy is installed. Where torch has the device this is
        `device`.
    drop_last
        Whether an incomplete last batch is left out, by default not.
    to
        ``"torch"``: `torch.Tensor` (sparse CSR or dense). ``"jax"``: `jax.Array` or `jax.experimental.sparse.CSR`.
        ``None``: NumPy and scipy.
    rng
        Source of randomness for `shuffle`, by default a fresh `numpy.random.default_rng`.
    to_torch
        Deprecated; ``True`` means ``to="torch"``.
    layers, obsm
        Names of the `layers` and `obsm` entries to yield beside ``X``. Every dataset must have them.
    obs_columns
        The columns of obs to keep. Others are neither read by `use_collection` nor indexed. None at all if empty.
    obs
        ``"frame"``: obs as `pandas.DataFrame`. ``"codes"``: as a dictionary of tensors, see `obs_categories`.
    transform
        What is done to the rows of ``X`` before they are yielded, in this order: `annbatch.transforms.NormalizeTotal`,
        `annbatch.transforms.Log1p` and `annbatch.transforms.SelectVar` (of which ``var`` and `n_var` tell, too).
    dense
        Whether a sparse ``X`` is yielded as a dense array ``[n, n_var]``. It may then be sparse in some datasets and dense
        in others.
    device
        The CUDA device that the arrays of batches arrive on (``"cuda"``, ``"cuda:1"``, 1): copied ahead from page-locked
        memory on a stream of their own, while the training computes, and handed over to the current stream without
        waiting. ``index`` and ``obs`` stay on the CPU. With ``to=None`` arrays are cupy's.
    dtype
        Type of the values of ``X``: float32, bfloat16 (with ``to="torch"``), float16 or float64. ``None``: float32 (of
        float64 data float64) after arithmetic, else that of the data.
    batches_ahead
        How many batches may wait ready or half ready beyond the one to be delivered next before another window of
        ``chunk_size * preload_nchunks`` rows is begun. ``None``: as many as fit into `memory_budget`. Batches are made
        by windows, so up to a window more than this may wait. Two more may wait on a `device`, with 0 one.

        With 0 a window is begun only when all batches before it have been delivered. So is a sampler written in Python
        asked for its next request only then: samplers that adapt to the training need that.
    memory_budget
        Bytes, or a text such as ``"2GB"`` (of 1000³) or ``"512MiB"`` (of 1024²), that batches not yet delivered may take
        up. A batch that was delivered no longer counts.

        ``None`` leaves it to the core, which takes 48 MiB, or two preload windows where these are larger. That is at
        most an eighth of the memory (of the cgroup's limit if there is one, shared out among ranks). One batch always fits.

        A budget of one's own holds as it is. Windows that do not fit are read in parts, each of which decodes their chunks
        anew. One too small for a single batch is refused (`MemoryError`) with the number needed.
    threads
        Decode threads; ``None``: all CPUs this process may use, shared out among ranks and `DataLoader` workers.
    direct_io
        Whether files are read past the page cache (``O_DIRECT``). It is meant for data many times larger than the memory:
        they would only churn through the cache, and slow it down for all who use it. Each read is widened to whole pages.
        A file on a file system that refuses such reads is read through the cache and its pages given up at once;
        ``stats()["direct_reads_refused"]`` counts these reads.

    Raises
    ------
    ValueError
        If `batch_sampler` is combined with an argument it takes the place of, or sizes do not fit.
    ImportError
        If `to`, `device` or `preload_to_gpu` ask for a package that is not installed.
    RuntimeError
        If torch does not see the `device`.

    Examples
    --------
    >>> from annbatch import DatasetCollection, Loader
    >>> loader = Loader(batch_size=4096, chunk_size=32, preload_nchunks=512, shuffle=True, to="torch")
    >>> loader.use_collection(DatasetCollection("cells.zarr", mode="r"))  # doctest: +SKIP
    >>> for batch in loader:  # doctest: +SKIP
    ...     train_step(batch["X"].to_dense(), batch["obs"]["cell_type"])
    """

    _COMMON_SAMPLER_ARGS: ClassVar[dict[str, Any]] = {
        "chunk_size": 512,
        "preload_nchunks": 32,
        "batch_size": 1,
        "drop_last": False,
    }

    _batch_sampler: Sampler

    def __init__(
        self,
        *,
        batch_sampler: Sampler | None = None,
        chunk_size: int | None = None,
        preload_nchunks: int | None = None,
        shuffle: bool | None = None,
        return_index: bool = False,
        batch_size: int | None = None,
        preload_to_gpu: bool = find_spec("cupy") is not None,
        drop_last: bool | None = None,
        to: Literal["torch", "jax"] | None = None,
        rng: np.random.Generator | None = None,
        to_torch: bool | None = None,
        layers: Sequence[str] = (),
        obsm: Sequence[str] = (),
        obs_columns: Sequence[str] | None = None,
        obs: Literal["frame", "codes"] = "frame",
        transform: Sequence[NormalizeTotal | Log1p | SelectVar] = (),
        dense: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        batches_ahead: int | None = None,
        memory_budget: int | str | None = None,
        threads: int | None = None,
        direct_io: bool = False,
    ):
        sizes = {
            "chunk_size": chunk_size,
            "preload_nchunks": preload_nchunks,
            "batch_size": batch_size,
            "drop_last": drop_last,
        }
        if to_torch is not None:
            to = instead_of_to_torch(to_torch, to)
        self._batch_sampler = choose_sampler(batch_sampler, sizes, self._COMMON_SAMPLER_ARGS, shuffle=shuffle, rng=rng)
        check_output(to, obs, preload_to_gpu)
        form = Form(
            to=to,
            obs=obs,
            return_index=return_index,
            device=choose_device(device, to),
            # with `device=`, upstream's rules about dtypes on the GPU do not apply
            preload_to_gpu=preload_to_gpu and device is None,
            wanted={"layers": distinct_names("layers", layers), "obsm": distinct_names("obsm", obsm)},
            transform=Transform.of(transform, dense, dtype, to),
        )
        self._obs_columns = None if obs_columns is None else distinct_names("obs_columns", obs_columns)
        limits = {"batches_ahead": batches_ahead, "memory_budget": memory_budget}
        self._reader = Reader(form, limits=limits, threads=threads, direct_io=direct_io)
        self._datasets = Datasets(dense=dense)
        self._collection_added = False
        self._num_open_iters = 0

    # ---------------------------------------------------------------- what is in it

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        self._datasets.check_not_empty()
        return self._batch_sampler.n_batches(self.n_obs)

    @property
    def dataset_type(self) -> type[BackingArray]:
        """The class of the data matrices added."""
        return type(self._train_datasets[0])

    @property
    def n_obs(self) -> int:
        """Number of observations of all datasets together."""
        return self._datasets.n_obs

    @property
    def n_var(self) -> int:
        """Length of the second axis of ``X``, which all datasets share, after `transform`."""
        if not self._datasets.matrices:
            raise ValueError("No datasets added yet")
        return self._variables[1]

    @property
    def var(self) -> pd.DataFrame | None:
        """The annotations of the variables of ``X`` after `transform`, if any were given."""
        return self._variables[0]

    @property
    def batch_sampler(self) -> Sampler:
        """The sampler that decides which rows form which batch."""
        return self._batch_sampler

    @property
    def obs_categories(self) -> dict[str, pd.Index]:
        """What the codes of ``obs="codes"`` stand for: by name of each categorical or string column, its categories.

        Code ``c`` of a column means ``obs_categories[column][c]``; -1 means missing.
        """
        table = self._reader.obs_table(self._datasets)
        return {} if table is None else table.categories

    @property
    def _variables(self) -> tuple[pd.DataFrame | None, int]:
        return self._reader.variables(self._datasets)

    @property
    def _train_datasets(self) -> list[Any]:
        return list(self._datasets.matrices)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return self._datasets.shapes

    @property
    def _obs(self) -> list[pd.DataFrame] | None:
        # scvi-tools and others read the frames of the datasets here
        return None if self._datasets.obs is None else list(self._datasets.obs)

    # ---------------------------------------------------------------- adding

    def use_collection(
        self,
        collection: DatasetCollection,
        *,
        load_adata: Callable[[zarr.Group], ad.AnnData] = load_all_aligned,
    ) -> Self:
        """Add every dataset of a collection. Can be done once; add further data with `add_adatas`.

        Parameters
        ----------
        collection
            The collection.
        load_adata
            Opens one of its groups as `anndata.AnnData`; what it has in ``X``, ``obs`` and ``var`` is yielded, and the
            ``layers`` and ``obsm`` entries this loader was asked for. The default leaves matrices on disk.

        Raises
        ------
        ValueError
            If the collection is empty.
        RuntimeError
            If a collection has been added before, or a pass is open.
        """
        if collection.is_empty:
            raise ValueError("DatasetCollection is empty")
        if self._collection_added:
            raise RuntimeError(
                "You should not add multiple collections: each is shuffled on its own, so rows of different ones "
                "would never meet. Write one collection from all the data, or add them with `add_adatas`."
            )
        if self._obs_columns is not None and load_adata is load_all_aligned:
            load_adata = partial(load_chosen_columns, columns=self._obs_columns)
        with self._all_or_none():
            for group in collection:
                self._add_adata(load_adata(group), str(group.store_path))
        self._collection_added = True
        return self

    def add_adatas(self, adatas: list[ad.AnnData | str | os.PathLike[str]]) -> Self:
        """Add several AnnData objects or paths, see `add_adata`."""
        if isinstance(adatas, str | os.PathLike):
            raise TypeError(f"add_adatas takes a list; add_adata adds one path, such as {adatas!r}")
        check_lt_1([len(adatas)], ["Number of adatas"])
        with self._all_or_none():
            for adata in adatas:
                self.add_adata(adata)
        return self

    def add_adata(self, adata: ad.AnnData | str | os.PathLike[str]) -> Self:
        """Add an AnnData object, or what lies at a path.

        Parameters
        ----------
        adata
            An AnnData Zarr store, an h5ad file, a collection or folder of several, or a pattern, as `annbatch.open` takes
            them: nothing but ``obs`` and ``var`` is read of it. So is an object opened with ``anndata.read_h5ad(path, backed="r")``, whole, for its ``X``.

            Or an object, of which ``X`` and the ``layers`` and ``obsm`` entries asked for must be `zarr.Array`,
            `anndata.abc.CSRDataset` over Zarr, `scipy.sparse.csr_matrix`, `scipy.sparse.csr_array` or `numpy.ndarray`.

            ``obs`` without columns counts as none. ``var`` must equal that of what was added before; `annbatch.open`
            joins data of which that is not so.

        Raises
        ------
        FileNotFoundError
            If there is nothing at the path.
        TypeError
            If an element is of another type.
        KeyError
            If an element or obs column asked for is missing.
        ValueError
            If it does not fit what was added before.
        RuntimeError
            If a pass is open.

        Warns
        -----
        FutureWarning
            If an object has ``layers`` or ``obsm`` entries that are not asked for.
        """
        if isinstance(adata, str | os.PathLike):
            with self._all_or_none():
                for stored in stored_at(adata):
                    self._add_stored(stored)
            return self
        self._add_adata(adata, "AnnData")
        return self

    def add_datasets(
        self,
        datasets: list[BackingArray],
        obs: list[pd.DataFrame] | None = None,
        var: list[pd.DataFrame] | None = None,
    ) -> Self:
        """Add several matrices, see `add_dataset`; `obs` and `var` are lists as long as `datasets`."""
        none = [None] * len(datasets)
        with self._all_or_none():
            for args in zip(datasets, none if obs is None else obs, none if var is None else var, strict=True):
                self.add_dataset(*args)
        return self

    def add_dataset(
        self,
        dataset: BackingArray,
        obs: pd.DataFrame | None = None,
        var: pd.DataFrame | None = None,
    ) -> Self:
        """Add a data matrix.

        Parameters
        ----------
        dataset
            ``[n_obs, n_var]`` (or, dense, with more axes); types as for `add_adata`, and all of the same one.
        obs
            Annotations of its n_obs rows. Given for each dataset or for none.
        var
            Annotations of its variables. Given for each dataset, all equal, or for none.

        Raises
        ------
        TypeError
            If `dataset` cannot be read (CSC, HDF5, a remote store, ...), or `obs` or `var` is no DataFrame.
        ValueError
            If it does not fit what was added before.
        RuntimeError
            If a pass is open.
        """
        if absent := [f"{group}/{name}" for group, names in self._reader.form.wanted.items() for name in names]:
            raise ValueError(f"This loader also yields {absent}, which no matrix brings along: use `add_adata`.")
        self._add({"X": dataset}, obs, var)
        return self

    def _add_adata(self, adata: ad.AnnData, name: str) -> None:
        elements = elements_of(adata, self._reader.form.wanted, name)
        self._add(elements, adata.obs if len(adata.obs.columns) else None, adata.var)

    def _add(self, elements: dict[str, Any], obs: pd.DataFrame | None, var: pd.DataFrame | None) -> None:
        if self._num_open_iters > 0:
            # samplers are checked against n_obs when a pass begins
            raise RuntimeError(
                "Cannot add datasets while the loader is being iterated. Finish or close the iterator first."
            )
        self._hold(self._datasets.plus(elements, choose_columns(obs, self._obs_columns), var))

    def _add_stored(self, stored: StoredAnnData) -> None:
        with stored.opened() as adata:
            elements, obs, var = adata.elements(self._reader.form.wanted), adata.obs(self._obs_columns), adata.var()
        self._add(elements, obs if len(obs.columns) else None, var)

    def _hold(self, datasets: Datasets) -> None:
        if not datasets.has_x and self._reader.form.transform != Transform():
            raise ValueError(
                f"transform, dense and dtype are done to X, and {datasets.firsts[-1].path or 'the dataset'} has none. Put a "
                "layer in its place: annbatch.open(..., layer=...)."
            )
        self._datasets = datasets

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        before = self._datasets
        try:
            yield
        except BaseException:
            self._datasets = before
            raise

    # ---------------------------------------------------------------- iterating

    def __iter__(self) -> Generator[LoaderOutput[OutputInMemoryArray], None, None]:
        """Iterate over the batches of one pass.

        Until the pass ends or is closed no datasets can be added. The sampler is checked against `n_obs`, and
        reading begins, when the first batch is asked for.

        Yields
        ------
        dict
            A batch, as the class describes it.

        Raises
        ------
        ValueError
            If there are no datasets, the sampler does not fit them, or a `DataLoader` without ``batch_size=None`` asks.
        IndexError
            If the sampler asks for rows that do not exist.
        annbatch.DataError
            If a store is damaged.

        Warns
        -----
        UserWarning
            Once, if `torch.distributed` has several ranks and the sampler gives all of them the same rows.
        """
        refuse_collating(sys._getframe(1))
        self._num_open_iters += 1
        try:
            yield from self._reader.batches(self._datasets, self._batch_sampler)
        finally:
            self._num_open_iters -= 1

    # ---------------------------------------------------------------- what the core has opened

    def locate(self, rows: Sequence[int] | np.ndarray) -> list[RowPlace]:
        """Say where rows are stored.

        Parameters
        ----------
        rows
            Row numbers counted over all datasets, as ``batch["index"]`` has them.

        Returns
        -------
        list of annbatch.types.RowPlace
            For each row: ``row``; ``dataset``, the place of its dataset among those added; ``path``, the directory of
            its data matrix (``None`` in memory); ``local_row`` in it; ``obs_name``, its name in obs (``None`` without
            obs); and ``chunks``, for each element the numbers of the chunks it takes up.

        Raises
        ------
        IndexError
            If there is no such row.
        """
        return self._reader.locate(self._datasets, np.atleast_1d(np.asarray(rows, dtype=np.int64)))

    def stats(self) -> LoaderStats:
        """Return the core's statistics of the pass begun last; empty if none was.

        They move on while the pass is open; afterwards they are as they were when it was ended. Those that end in
        ``_ns`` are nanoseconds, summed over threads. A *window* is what one load request of the sampler asks for, a
        *unit* the batches of a window that are planned together: all of them, unless five eighths of a
        `memory_budget` that was asked for (half of the default one) are less.

        Returns
        -------
        annbatch.types.LoaderStats
            Reading: ``reads``, ``bytes_read`` (gaps and whole pages of `direct_io` included), ``fetch_ns`` (from issuing
            a read to its arrival), ``direct_reads_refused`` (reads that `direct_io` could not take past the cache).

            Decoding: ``chunks_decoded``, ``bytes_decoded``, ``decode_ns`` (with scattering), ``seal_ns`` (`transform`,
            `dense`, `dtype`, and narrowing values for the way to a GPU), ``chunks_general_path``
            (decoded by the slower general decoder), ``chunks_filled`` (nothing stored but the fill value),
            ``chunks_decoded_again`` (how often a chunk was planned that an earlier unit of the same pass had planned:
            what larger windows or a larger `memory_budget` could save).

            Progress: ``windows_planned``, ``units_planned``, ``plan_ns``, ``batches_ready``, ``batches_delivered``,
            ``rows_delivered``, ``bytes_delivered``, ``epochs_started``.

            Waiting, by stage: ``consumer_wait_ns`` (for a batch: loading is the bottleneck), ``budget_wait_ns`` (the
            planner, for batches to be taken: training is), ``fetch_depth_wait_ns`` (the next read, for one in flight
            to end: storage is), ``fetch_budget_wait_ns`` (the next read, for encoded bytes to be decoded: decoding is),
            ``decode_idle_ns`` (decode threads, for chunks or for room for their rows, while a unit was alive; other loaders' use of the same
            threads counts as idle). ``active_ns`` is the time during which a unit was alive.

            Now: ``reads_in_flight``, ``encoded_bytes_held`` (memory of what is read or being read and not decoded),
            ``decode_queued`` and ``decode_running`` (chunks), ``units_alive``, ``batches_undelivered`` and
            ``bytes_undelivered`` (begun and not taken), ``leases_out`` and ``leased_bytes`` (buffers of batches that
            somebody holds, delivered ones too). ``memory_budget`` is the bound on ``bytes_undelivered``
            (one that was left to the core grows with the windows).

            To a GPU (nothing for batches in host memory): ``h2d_batches``, ``h2d_copies``, ``h2d_bytes`` and ``h2d_ns`` (over
            the bus, on the GPU's clock), ``transfer_host_wait_ns`` (the transfer thread, for batches: loading is the bottleneck),
            ``transfer_room_wait_ns`` (for room in front of the consumer: training is), ``batches_widened`` (values were scattered in
            as few bytes as in batches before, and did not all fit), ``batches_on_device``,
            ``staging_bytes`` (memory on the GPU besides torch's), ``pinned`` (whether host memory is page-locked, or why not).
        """
        return self._reader.stats()

    def close(self) -> None:
        """End all open passes and let go of the files. Batches stay valid; the next pass opens the files again."""
        self._reader.close()

    def _collection(self) -> Collection:
        return self._reader.collection(self._datasets)

    # ---------------------------------------------------------------- copies and pickles

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_num_open_iters"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _num_open_iters=0)

    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin._reader = self._reader.sibling()
        return twin


# ---- what other rooms need of a loader beyond its public interface ---------------------------------------------------


def take_up(loader: Loader, datasets: Datasets) -> None:
    """Give a new loader the datasets that it is to read."""
    loader._hold(datasets)


def datasets_of(loader: Loader) -> Datasets:
    """Return what has been added to a loader."""
    return loader._datasets


def use_sampler(loader: Loader, sampler: Sampler) -> None:
    """Give a loader, a copy that belongs to the caller, another sampler for its next pass."""
    loader._batch_sampler = sampler


def copy_of_one_rank(loader: Loader) -> Loader:
    """Copy a loader for who shares rows out between ranks: the copy does not warn of ranks that read the same rows."""
    twin = copy.copy(loader)
    twin._reader.told_of_ranks = True
    return twin
