"""The data loaders that a Lightning ``Trainer`` is given: one pass is one epoch of one split on one rank.

In come a :class:`annbatch.Loader` and the rows it is to read; out come its batches, unchanged. Free of Lightning, of
which only two habits matter here: it makes iterators before it says which epoch they are for, and it stops at the
length of a loader without asking for the end.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from annbatch._splits.rows import RowSet
from annbatch._splits.sampler import WindowSizes, split_sampler
from annbatch.loader import use_sampler
from annbatch.samplers import DistributedSampler, SequentialSampler
from annbatch.samplers._utils import known_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from annbatch.abc import Sampler
    from annbatch.loader import Loader


class SplitLoader:
    """The rows of one split on one rank; each pass is one epoch with an order of its own.

    An iterable with a length, which is all that Lightning asks of a data loader. The order of epoch ``e`` is a function
    of the seed, ``e`` and the rank, not of the passes made before.

    Parameters
    ----------
    loader
        Loads the batches; its sampler is replaced for each pass.
    rows
        The rows of the split, on all ranks together.
    sizes
        Sizes of chunks, requests and batches.
    epoch
        The epoch of the next pass.
    **order
        `shuffle`, `drop_last`, `rank`, `world_size` and `seed` of :func:`annbatch._splits.sampler.split_sampler`.

    Attributes
    ----------
    epoch
        The epoch of the pass that is running, or of the next one if none is.
    batch_sampler
        None: Lightning looks here too, after `sampler`.
    """

    batch_sampler = None

    def __init__(self, loader: Loader, rows: RowSet, sizes: WindowSizes, *, epoch: int = 0, **order: Any):
        self.loader = loader
        self.rows = rows
        self._sizes = sizes
        self._order = order
        self._next_epoch = epoch
        self._running_epoch: int | None = None
        self._n_batches = self._sampler(epoch).n_batches(loader.n_obs)

    def __len__(self) -> int:
        return self._n_batches

    @property
    def epoch(self) -> int:
        """The epoch of the pass that is running, or of the next one if none is."""
        return self._next_epoch if self._running_epoch is None else self._running_epoch

    @property
    def sampler(self) -> SplitLoader:
        """Itself: Lightning looks for ``set_epoch`` on the ``sampler`` of a data loader."""
        return self

    def __getitem__(self, number: Any) -> NoReturn:
        """Refuse to be the dataset of a `DataLoader`, which would take rows by their numbers."""
        raise TypeError(
            "This is a data loader already: hand it, or the AnnbatchDataModule that made it, to the Trainer, or iterate "
            "over it. Do not wrap it in a torch DataLoader (around an annbatch.Loader: with batch_size=None)."
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Lightning makes iterators before it says which epoch they are for: nothing may happen before the first next().
        epoch = self._next_epoch
        self._next_epoch = epoch + 1
        self._running_epoch = epoch
        use_sampler(self.loader, self._sampler(epoch))
        batches = iter(self.loader)
        try:
            for number, batch in enumerate(batches, start=1):
                if number == len(self):
                    # Lightning stops at the length and never asks again, so the pass has to end here: a checkpoint
                    # taken after the last step must hold the next epoch.
                    batches.close()
                    self._running_epoch = None
                yield batch
                if number == len(self):
                    return
            raise RuntimeError(f"the loader ended after fewer than {len(self)} batches")
        finally:
            batches.close()
            if self._running_epoch == epoch:
                self._running_epoch = None

    def _sampler(self, epoch: int) -> Sampler:
        return split_sampler(self.rows, self._sizes, epoch=epoch, **self._order)


def window_sizes(sampler: Sampler | None, options: Mapping[str, Any]) -> WindowSizes:
    """Return the sizes that `options` ask for; those it leaves out are the sampler's, or the defaults of the Loader."""
    asked_for = {name: value for name, value in options.items() if value is not None}
    settings = {**known_settings(sampler), **asked_for}
    names = ("chunk_size", "preload_nchunks", "batch_size")
    return WindowSizes(**{name: settings[name] for name in names if name in settings})


def ready_dataloader(ready: Loader, loader: Loader, name: str, rank: int, world_size: int) -> Loader:
    """Return a Loader that reads what a ready one does, in its order; on several ranks, this rank's part of it.

    For training the sampler, with its mask, is wrapped in :class:`annbatch.samplers.DistributedSampler`. Otherwise no row may be lost, which takes a sampler whose rows
    are known: a SequentialSampler and no class derived from it.

    Parameters
    ----------
    ready
        The Loader that the user made.
    loader
        A copy of it, which is returned and whose sampler is replaced if need be.
    name
        The stage, "train", "val", "test" or "predict".
    rank, world_size
        Which part, of how many.
    """
    sampler = ready.batch_sampler
    use_sampler(loader, sampler)
    if world_size == 1 or isinstance(sampler, DistributedSampler):
        return loader
    if name == "train":
        shard = DistributedSampler(sampler, dist_info=lambda: (rank, world_size))
        shard.mask = sampler.mask  # otherwise the rows kept from training would be among the shards
        use_sampler(loader, shard)
    elif type(sampler) is SequentialSampler:
        start, stop, _ = sampler.mask.indices(loader.n_obs)
        of_rank = split_sampler(
            RowSet.from_range(start, stop),
            window_sizes(sampler, {}),
            shuffle=False,
            drop_last=known_settings(sampler)["drop_last"],
            rank=rank,
            world_size=world_size,
        )
        use_sampler(loader, of_rank)
    else:
        warnings.warn(
            f"Every rank reads all rows of the Loader passed for {name!r}: the rows of a {type(sampler).__name__} "
            "cannot be shared between ranks without loss. Give it a SequentialSampler or a DistributedSampler.",
            stacklevel=2,
        )
    return loader
