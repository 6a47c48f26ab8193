"""A Lightning data module over annotated data: which rows each stage and each rank sees, and when stores close.

In come a collection, AnnData stores or objects, or ready loaders, and the wish for a split; out come the four
data loaders that a ``Trainer`` asks for. The batches are the dictionaries of :class:`annbatch.Loader`, unchanged.

::

    data ──► _splits.sources.open_source ──► Loader (one per set of loader options, copied for each split)
    split ─► _splits.splits.make_splits ──► RowSet per split
                                        │
    rank, seed, epoch ─► _splits.sampler.split_sampler ──► sampler of this rank and epoch
                                        │
                   _splits.loader.SplitLoader: one pass = one epoch
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from annbatch._output.batch import moved
from annbatch._splits.loader import SplitLoader, ready_dataloader, window_sizes
from annbatch._splits.rows import RowSet
from annbatch._splits.sampler import WindowSizes
from annbatch._splits.sources import labels_of, open_source, places_of
from annbatch._splits.splits import SPLIT_NAMES, make_splits
from annbatch.loader import Loader, copy_of_one_rank

if TYPE_CHECKING:
    import anndata as ad
    import numpy as np
    import torch
    import zarr


def _lightning_base() -> type:
    """Return the ``LightningDataModule`` of the Lightning package that this process uses.

    The package has two names, whose classes are strangers to each other. Where both are installed, the one that is
    imported already is the one whose ``Trainer`` will be handed this module.
    """
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            module: Any = __import__(name, fromlist=["LightningDataModule"])
            base: type = module.LightningDataModule
            return base
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
                raise
    raise ImportError("annbatch.lightning needs Lightning: pip install 'annbatch[lightning]'")


_SAMPLING = {"chunk_size", "preload_nchunks", "batch_size", "drop_last", "shuffle"}
# These concern the order of training alone; for another stage they must be asked for by its name.
_TRAIN_ONLY = {"drop_last", "shuffle"}
_REFUSED = {
    "rng": "the order comes from seed",
    "batch_sampler": "pass a ready Loader for the stage instead, e.g. train=Loader(batch_sampler=...)",
}


class AnnbatchDataModule(_lightning_base()):  # type: ignore[misc]  # one of two classes, known at import
    """Annotated data for a Lightning ``Trainer``: training, validation, test and prediction.

    Parameters
    ----------
    data
        What is to be split: a :class:`annbatch.DatasetCollection`; the path or ``zarr.Group`` of a collection or of an
        AnnData store; the path of an h5ad file; an :class:`anndata.AnnData`; a list of the latter four; or a :class:`annbatch.Loader`, whose
        datasets and options (not its order) are used.
    train, val, test, predict
        A source of its own for a stage, instead of a part of `data`. A Loader given here is used as it is, with its
        own sampler and order.
    split
        How `data` is divided. A sequence of fractions for train, val and test, or a mapping from the names "train",
        "val", "test", "predict" to

        - fractions with a sum of at most 1;
        - boolean masks [n_obs], slices, or integer row numbers;
        - with `split_by`: fractions of the rows, met as closely as whole groups allow, or lists of groups.

        Rows never belong to two of train, val and test. Without "predict", all rows of `data` are for prediction;
        without `split`, all rows are for training.
    split_by
        Column of ``obs`` whose values (a donor, a plate) must not be divided between splits.
    split_unit
        How fractions are dealt: "block" (the default; blocks of neighbouring rows), "row" (every row by itself:
        slowest to read), or "contiguous" (one stretch per split, fastest; for collections that are shuffled already).
    seed
        Decides the split and the order of every epoch. Must be the same on all ranks.
    load_adata
        How a group becomes an AnnData, as for :meth:`annbatch.Loader.use_collection`.
    dist_info
        "auto": the rank and number of ranks of the trainer, or of ``torch.distributed``. A callable that returns
        ``(rank, world_size)``. None: every rank sees all rows.
    stage_options
        Options for single stages, such as ``{"val": {"batch_size": 4096}}``; they win over `loader_options`.
    **loader_options
        Passed to :class:`annbatch.Loader`: `chunk_size`, `preload_nchunks`, `batch_size`, `layers`, `obsm`,
        `obs_columns`, `return_index` and so on. `to` is "torch" if not given. `shuffle` (default True) and `drop_last`
        are for training only unless `stage_options` says otherwise.

    Raises
    ------
    ImportError
        On import of this module, if neither ``lightning`` nor ``pytorch_lightning`` is installed.
    ValueError
        If arguments contradict each other, splits share rows, or a split is empty.

    Notes
    -----
    On several ranks each reads a contiguous share of a split, and all have equally many batches. Validation, test and
    prediction lose no row: shares differ by at most one row. Training with `drop_last` (the default on several ranks)
    follows :class:`annbatch.samplers.DistributedSampler`: full batches only; which rows are left over changes from epoch
    to epoch. With ``drop_last=False`` no row is lost there either.

    Pass ``batch_size=`` to ``self.log``: Lightning's guess does not understand the ``obs`` of a batch.

    Examples
    --------
    >>> data = AnnbatchDataModule(
    ...     "collection.zarr", split=(0.8, 0.1, 0.1), split_by="donor", batch_size=1024, chunk_size=64
    ... )
    >>> trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        data: Any = None,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        predict: Any = None,
        split: Any = None,
        split_by: str | None = None,
        split_unit: str = "block",
        seed: int = 0,
        load_adata: Callable[[zarr.Group], ad.AnnData] | None = None,
        dist_info: str | Callable[[], tuple[int, int]] | None = "auto",
        stage_options: Mapping[str, Mapping[str, Any]] | None = None,
        **loader_options: Any,
    ):
        super().__init__()
        own = {"train": train, "val": val, "test": test, "predict": predict}
        self._own = {name: source for name, source in own.items() if source is not None}
        self._data = data
        self._split, self._split_by, self._split_unit = split, split_by, split_unit
        self._seed, self._epoch = seed, 0
        self._load_adata = load_adata
        self._dist_info = dist_info
        self._loader_options = loader_options
        self._stage_options = {name: dict(options) for name, options in (stage_options or {}).items()}
        self._check_arguments()
        self._restored_splits: dict[str, int] | None = None
        self._forget()

    # ------------------------------------------------------------------------------------------------ Lightning hooks

    def prepare_data(self) -> None:
        """Check that the stores exist: runs once, before other processes are started.

        Raises
        ------
        FileNotFoundError
            If a path leads nowhere.
        """
        for source in [self._data, *self._own.values()]:
            for item in source if isinstance(source, list | tuple) else [source]:
                if isinstance(item, str | os.PathLike):
                    places_of(item)

    def setup(self, stage: str | None = None) -> None:
        """Open what `stage` needs ("fit", "validate", "test", "predict"; None: everything) and divide the rows."""
        names = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        needed = [name for name in names.get(str(stage), SPLIT_NAMES) if self._has(name)]
        for name in needed:
            self.loader(name)
        if any(name not in self._own for name in needed):
            self._splits()  # so that a split that cannot be made fails before anything is trained

    def teardown(self, stage: str | None = None) -> None:
        """Close the stores; the next stage opens them again."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the stores when training fails."""
        self._close()

    def train_dataloader(self) -> SplitLoader | Loader:
        """Return the batches of the training rows, in another order each epoch."""
        return self._dataloader("train")

    def val_dataloader(self) -> SplitLoader | Loader | list[Any]:
        """Return the batches for validation, in order; an empty list if there is no such split."""
        # To Trainer.fit a missing split means no validation; Trainer.validate would go through nothing, and say so to no one.
        must_be_there = self.trainer is not None and getattr(self.trainer.state.fn, "value", None) == "validate"
        return self._dataloader("val") if self._has("val") or must_be_there else []

    def test_dataloader(self) -> SplitLoader | Loader:
        """Return the batches for the test, in order."""
        return self._dataloader("test")

    def predict_dataloader(self) -> SplitLoader | Loader:
        """Return the batches for prediction, in order: by default of all rows."""
        return self._dataloader("predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch with its tensors, CSR tensors included, on `device`; obs frames stay in host memory."""
        return moved(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """Return what makes the next epoch come in the same order: the seed and the epoch, with a check of the split.

        During a pass the epoch is the one that is running: it will begin again.
        """
        digests = {name: rows.digest for name, rows in self._splits().items()} if self._data is not None else {}
        return {"seed": self._seed, "epoch": self._current_epoch(), "splits": digests}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, with the same split; warns if the data give another one."""
        self._close()  # splits and orders made with another seed must not survive
        self._seed, self._epoch = int(state_dict["seed"]), int(state_dict["epoch"])
        self._restored_splits = dict(state_dict["splits"])

    # ------------------------------------------------------------------------------------------------- own interface

    def rows(self, name: str) -> np.ndarray:
        """Return the global row numbers of a split on all ranks together, int64 [n_rows], in increasing order.

        Raises
        ------
        KeyError
            If there is no such split, or a ready Loader decides about it.
        """
        if name in self._own and not isinstance(self._own[name], Loader):
            return RowSet.from_range(0, self._base(name).n_obs).rows()
        if name in self._own or not self._has(name):
            why = "a ready Loader decides about it" if name in self._own else "there is no such split"
            raise KeyError(f"there are no rows known for {name!r}: {why}")
        return self._row_set(name).rows()

    def loader(self, name: str) -> Loader:
        """Return the Loader that reads a split, for its `var`, `stats()`, `locate()` and so on."""
        if name not in self._loaders:
            ready = self._own.get(name)
            # what it reads is this rank's share, or was chosen with dist_info=None
            self._loaders[name] = copy_of_one_rank(ready if isinstance(ready, Loader) else self._base(name))
        return self._loaders[name]

    # ------------------------------------------------------------------------------------------------------- details

    def _check_arguments(self) -> None:
        if self._data is None and not self._own:
            raise ValueError("AnnbatchDataModule needs data, or a source for at least one of train, val, test, predict")
        if self._data is None and (self._split is not None or self._split_by is not None):
            raise ValueError("split and split_by divide data, which is not given")
        if isinstance(self._split, Mapping) and (twice := sorted(set(self._split) & set(self._own))):
            raise ValueError(f"{twice[0]!r} is given both as a source of its own and as a split of data")
        for name, options in {"": self._loader_options, **self._stage_options}.items():
            if name and name not in SPLIT_NAMES:
                raise ValueError(f"stage_options has no stage {name!r}; stages are {SPLIT_NAMES}")
            for refused in _REFUSED.keys() & options.keys():
                raise ValueError(f"{refused} cannot be passed to AnnbatchDataModule: {_REFUSED[refused]}")
        for name in SPLIT_NAMES:
            source = self._own.get(name)
            given = set(self._stage_options.get(name, {}))
            if isinstance(source, Loader) and given:
                raise ValueError(f"{sorted(given)} of stage {name!r} are controlled by the ready Loader passed for it")
            given = (given | set(self._loader_options)) - _SAMPLING
            if source is None and isinstance(self._data, Loader) and given:
                raise ValueError(f"{sorted(given)} are controlled by the Loader passed as data; set them there")

    def _forget(self) -> None:
        self._bases: dict[Any, Loader] = {}
        self._loaders: dict[str, Loader] = {}
        self._split_loaders: dict[str, SplitLoader] = {}
        self._made_splits: dict[str, RowSet] | None = None

    def _close(self) -> None:
        self._epoch = self._current_epoch()
        for loader in [*self._loaders.values(), *self._bases.values()]:
            loader.close()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Ranks that are spawned open their own stores, and divide the rows by the same seed.
        state = dict(self.__dict__, _epoch=self._current_epoch())
        return {**state, "_bases": {}, "_loaders": {}, "_split_loaders": {}, "_made_splits": None}

    def _current_epoch(self) -> int:
        train = self._split_loaders.get("train") if hasattr(self, "_split_loaders") else None
        return self._epoch if train is None else train.epoch

    def _has(self, name: str) -> bool:
        if name in self._own or self._data is None:
            return name in self._own
        if name == "predict":
            return True
        if isinstance(self._split, Mapping):
            return name in self._split
        return SPLIT_NAMES.index(name) < (1 if self._split is None else len(self._split))

    def _options(self, name: str) -> dict[str, Any]:
        shared = {k: v for k, v in self._loader_options.items() if name == "train" or k not in _TRAIN_ONLY}
        return {**shared, **self._stage_options.get(name, {})}

    def _base(self, name: str) -> Loader:
        """Return the open Loader whose copies read this split; splits with the same options share it."""
        options = {k: v for k, v in self._options(name).items() if k not in _SAMPLING}
        source = self._own.get(name, self._data)
        key = (id(source), *sorted((k, repr(v)) for k, v in options.items()))
        if key not in self._bases:
            self._bases[key] = open_source(source, self._load_adata, options)
        return self._bases[key]

    def _splits(self) -> dict[str, RowSet]:
        if self._made_splits is None:
            base = self._base(next(name for name in SPLIT_NAMES if self._has(name) and name not in self._own))
            labels = None if self._split_by is None else labels_of(self._data, base, self._split_by)
            chunk_size = self._options("train").get("chunk_size", WindowSizes().chunk_size)
            self._made_splits = make_splits(
                base.n_obs,
                self._split,
                labels=labels,
                unit=self._split_unit,
                # Small data still gets some hundred blocks, so that fractions are a fair sample.
                block_rows=max(1, min(chunk_size, base.n_obs // 256)),
                seed=self._seed,
            )
            made = {name: rows.digest for name, rows in self._made_splits.items()}
            if self._restored_splits is not None and made != self._restored_splits:
                warnings.warn(
                    "The checkpoint was made with other splits than these data and arguments give: rows that were "
                    "trained on may now be in another split.",
                    stacklevel=2,
                )
            self._restored_splits = None
        return self._made_splits

    def _row_set(self, name: str) -> RowSet:
        if name in self._own:
            return RowSet.from_range(0, self._base(name).n_obs)
        splits = self._splits()
        return splits[name] if name in splits else RowSet.from_range(0, self._base(name).n_obs)

    def _dataloader(self, name: str) -> SplitLoader | Loader:
        if not self._has(name):
            raise ValueError(f"there is no {name!r} split: name it in split, or pass {name}= to AnnbatchDataModule")
        rank, world_size = self._rank_and_world_size()
        loader = self.loader(name)
        if isinstance(self._own.get(name), Loader):
            return ready_dataloader(self._own[name], loader, name, rank, world_size)
        options = self._options(name)
        sampler = loader.batch_sampler if isinstance(self._own.get(name, self._data), Loader) else None
        made = SplitLoader(
            loader,
            self._row_set(name),
            window_sizes(sampler, options),
            epoch=self._current_epoch() if name == "train" else 0,
            shuffle=options.get("shuffle", name == "train"),
            drop_last=options.get("drop_last", name == "train" and world_size > 1),
            rank=rank,
            world_size=world_size,
            seed=self._seed,
        )
        self._split_loaders[name] = made
        return made

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self._dist_info is None:
            return 0, 1
        if callable(self._dist_info):
            return self._dist_info()
        if self._dist_info != "auto":
            raise ValueError(f'dist_info must be "auto", a callable or None, got {self._dist_info!r}')
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        if kwargs is not None:
            return kwargs["rank"], kwargs["num_replicas"]
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1
