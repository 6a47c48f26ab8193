"""The sampler interface: which rows are read, in which order, and how they are cut into batches.

In: the number of rows of a loader. Out: an iterator of :class:`annbatch.types.LoadRequest`, one per preload window.

A sampler is written by implementing :meth:`Sampler._sample` (and the few properties around it) in Python. The two
stock samplers can also *describe* their order, so that the native core plans it without calling back into Python:
:meth:`Sampler._native_sampling`. Its default says "no", so every subclass is driven through :meth:`Sampler.sample`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from annbatch._base.sizes import split_given_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from annbatch.types import LoadRequest


class Sampler(ABC):
    """Decides which observations a :class:`annbatch.Loader` reads, in which order, and in which batches.

    Subclasses implement :attr:`batch_size`, :attr:`shuffle`, :meth:`n_batches`, :meth:`validate` and :meth:`_sample`.
    """

    _mask: slice = slice(0, None)
    _rng: np.random.Generator | None = None

    @property
    def mask(self) -> slice:
        """The contiguous range of observations that is sampled from."""
        return self._mask

    @mask.setter
    def mask(self, value: slice) -> None:
        self._mask = value

    @property
    def rng(self) -> np.random.Generator | None:
        """The source of randomness, or None for a sampler without one."""
        return self._rng

    @rng.setter
    def rng(self, value: np.random.Generator | None) -> None:
        self._rng = value

    @property
    @abstractmethod
    def batch_size(self) -> int | None:
        """Observations per batch, used where a request comes without ``splits``."""

    @property
    @abstractmethod
    def shuffle(self) -> bool:
        """Whether a window's rows are shuffled before they are cut, where a request comes without ``splits``.

        The order in which windows are read is the sampler's own affair.
        """

    @abstractmethod
    def n_batches(self, n_obs: int) -> int:
        """Count the batches of one pass.

        Parameters
        ----------
        n_obs
            Number of observations in the loader.
        """

    def sample(self, n_obs: int) -> Iterator[LoadRequest]:
        """Validate, then yield the load requests of one pass.

        Both happen at the first ``next``. Requests that :meth:`_sample` yields without ``splits`` get them here.

        Parameters
        ----------
        n_obs
            Number of observations in the loader.

        Yields
        ------
        annbatch.types.LoadRequest

        Raises
        ------
        ValueError
            If validation fails, or if ``splits`` are missing and :attr:`batch_size` or :attr:`shuffle` is None.
        """
        self.validate(n_obs)
        requests = self._sample(n_obs)
        try:
            for request in requests:
                if "splits" not in request:
                    request["splits"] = self._default_splits(request["requests"])
                yield request
        finally:
            # `_sample` may hold a moved mask or a count of open passes: run its cleanup now. CPython up to 3.12.3
            # does not finalise an abandoned generator that stood at a bare yield (python/cpython#118272).
            if isinstance(requests, Generator):
                requests.close()

    def _default_splits(self, requests: list[slice] | np.ndarray) -> list[np.ndarray]:
        """Cut one window into batches by :attr:`batch_size` and :attr:`shuffle`."""
        batch_size, shuffle = self.batch_size, self.shuffle
        if batch_size is None or shuffle is None:
            name = "batch_size" if batch_size is None else "shuffle"
            raise ValueError(
                f"{name} must be set when splits are not provided in LoadRequest. {type(self).__name__}.{name} is "
                f"None: give it a value, or yield 'splits' with each request."
            )
        if isinstance(requests, np.ndarray) and np.issubdtype(requests.dtype, np.integer):
            n_rows = len(requests)
        else:
            n_rows = sum(rows.stop - rows.start for rows in requests)
        if not shuffle:
            positions = np.arange(n_rows)
        else:
            # a sampler without a generator follows NumPy's global one, which scripts seed with np.random.seed
            positions = (np.random if self.rng is None else self.rng).permutation(n_rows)
        return split_given_size(positions, batch_size)

    @abstractmethod
    def validate(self, n_obs: int) -> None:
        """Check the settings against the data, at the start of each pass.

        Parameters
        ----------
        n_obs
            Number of observations in the loader.

        Raises
        ------
        ValueError
            If this sampler cannot sample from ``n_obs`` observations.
        """

    @abstractmethod
    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        """Yield the load requests of one pass. Called by :meth:`sample` after validation.

        Parameters
        ----------
        n_obs
            Number of observations in the loader.
        """

    def _native_sampling(self, n_obs: int) -> dict[str, Any] | None:
        """Describe a pass for the native core, or return None for a sampler that Python must drive.

        Parameters
        ----------
        n_obs
            Number of observations in the loader.

        Returns
        -------
        dict or None
            The ``sampling`` object of the core's configuration, without ``part``.

        Raises
        ------
        ValueError
            If a pass over ``n_obs`` observations would fail validation.
        """
        del n_obs
        return None

    def _draw_epoch_seed(self) -> int:
        """Draw the seed of one native pass, in ``[0, 2**63)``: the only draw such a pass takes from :attr:`rng`."""
        rng = np.random.default_rng() if self.rng is None else self.rng
        return int(rng.integers(np.iinfo(np.int64).max, endpoint=True))


def native_sampling(sampler: Any, n_obs: int) -> dict[str, Any] | None:
    """Describe a pass of a sampler for the native core; ``None`` for one that Python must drive.

    That is any of the user's, which need not be a :class:`Sampler`; see :meth:`Sampler._native_sampling`.
    """
    describe = getattr(sampler, "_native_sampling", None)
    return None if describe is None else describe(n_obs)


def draw_epoch_seed(sampler: Sampler, worker: Any) -> int:
    """One int64 that names the order of a pass.

    Parameters
    ----------
    sampler
        Its generator is advanced by one draw.
    worker
        `torch.utils.data.get_worker_info`'s answer. All workers of a `DataLoader` hold copies of one generator and so
        draw the same number; unless they persist they do so in every epoch, which is why the loader's base seed (new
        for each epoch, the same for all its workers) is mixed in.
    """
    if worker is None:
        return sampler._draw_epoch_seed()
    # without a generator each worker would make one of its own, and their orders would not fit together
    drawn = 0 if sampler.rng is None else sampler._draw_epoch_seed()
    entropy = [drawn, (worker.seed - worker.id) % 2**64]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64).view(np.int64)[0])
