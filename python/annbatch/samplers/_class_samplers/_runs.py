"""Where each class lies in a range of observations, and how to draw chunks from it.

Observations of one class come in *runs*: maximal stretches of consecutive rows. A chunk of ``chunk_size`` rows may
start at any of the ``length - chunk_size + 1`` first rows of a run. All such start rows, class by class and run by
run, are numbered through; drawing a chunk of a class is then drawing one number from that class's interval and one
binary search for the run it falls in. Memory is proportional to the number of runs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from annbatch.samplers._utils import validate_mask_n_obs_and_resolve


def resolve_class_weights(classes: pd.Categorical, class_weights: np.ndarray | None) -> np.ndarray:
    """Return one float64 weight per category; equal weights for None.

    Raises
    ------
    TypeError
        For a Series, whose index would be ignored.
    ValueError
        If there is not one weight per category, or none is positive.
    """
    n_classes = len(classes.categories)
    if isinstance(class_weights, pd.Series):
        raise TypeError(
            "class_weights must be an array, not a pandas Series: its index would be ignored. "
            "Pass class_weights.reindex(classes.categories).to_numpy()."
        )
    weights = np.ones(n_classes) if class_weights is None else np.array(class_weights, dtype=float)
    if weights.shape != (n_classes,):
        raise ValueError(
            "class_weights must have one weight per class in classes.categories "
            f"(expected shape ({n_classes},), got {weights.shape})."
        )
    if not (weights > 0).any():
        raise ValueError(
            "class_weights must have at least one positive weight. "
            f"None of the {n_classes} for {classes.categories.tolist()[:10]} is; a class without one is left out."
        )
    return weights


class ClassRuns:
    """The drawable runs of a masked range.

    Subclasses of :class:`~annbatch.samplers.ClassSampler` reach it as ``_rle_manager``, under the names that scverse
    annbatch 0.3.1 gives to :attr:`codes`, :attr:`weights`, :attr:`mask`, :attr:`n_classes` and
    :meth:`slices_from_classes`.

    Parameters
    ----------
    classes
        Class of every observation, without missing values.
    weights
        One weight per category, of any sum; classes of weight 0 or below are left out.
    chunk_size
        Rows per chunk: the shortest run a drawable class may have.
    mask
        Range of observations, start and stop set.

    Attributes
    ----------
    codes
        Codes of the drawable classes, ascending.
    weights
        Their weights, scaled to sum to 1; float64, same length as ``codes``.

    Raises
    ------
    ValueError
        If no class is drawable, or a run of a drawable class is shorter than ``chunk_size``.
    """

    def __init__(self, classes: pd.Categorical, weights: np.ndarray, *, chunk_size: int, mask: slice) -> None:
        self._classes = classes
        self._class_weights = weights
        self._chunk_size = chunk_size
        self.mask = mask

    @property
    def mask(self) -> slice:
        """The range, start and stop set; setting it finds the runs anew, or raises and leaves everything as it was."""
        return self._mask

    @mask.setter
    def mask(self, value: slice) -> None:
        start, stop = validate_mask_n_obs_and_resolve(value, len(self._classes))
        self._find_runs(start, stop)
        self._mask = slice(start, stop)

    @property
    def n_classes(self) -> int:
        """Number of drawable classes."""
        return self.codes.size

    def _find_runs(self, start: int, stop: int) -> None:
        weights = self._class_weights
        codes = np.asarray(self._classes.codes[start:stop])
        edges = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [codes.size]])
        run_codes, run_starts, run_lengths = codes[edges[:-1]], edges[:-1] + start, np.diff(edges)
        kept = weights[run_codes] > 0
        if not kept.any():
            raise ValueError(
                f"No class with positive weight is present in the current mask range [{start}, {stop}); "
                "there is nothing to draw. Widen the mask, or give a class in it a positive weight."
            )
        self._refuse_short_runs(run_codes, run_lengths, kept)

        by_class = np.flatnonzero(kept)
        by_class = by_class[np.argsort(run_codes[by_class], kind="stable")]
        self._run_starts = run_starts[by_class]
        n_starts = run_lengths[by_class] - self._chunk_size + 1
        # Number of the first start row of each run, and one past the last number at the end.
        self._numbers = np.concatenate([[0], np.cumsum(n_starts)])

        self.codes, first_run = np.unique(run_codes[by_class], return_index=True)
        self.weights = weights[self.codes] / weights[self.codes].sum()
        self._class_numbers = self._numbers[np.append(first_run, by_class.size)]
        self._position_of_code = np.full(weights.size, -1)
        self._position_of_code[self.codes] = np.arange(self.codes.size)

    def _refuse_short_runs(self, run_codes: np.ndarray, run_lengths: np.ndarray, kept: np.ndarray) -> None:
        too_short = kept & (run_lengths < self._chunk_size)
        if not too_short.any():
            return
        labels = self._classes.categories[np.unique(run_codes[too_short])].tolist()
        raise ValueError(
            f"Every contiguous run must be at least chunk_size ({self._chunk_size}) observations long, "
            f"but {int(too_short.sum())} run(s) are shorter (classes {labels}). Lower chunk_size, store the data "
            "sorted by class (e.g. `DatasetCollection.add_adatas(groupby=...)`), or give these classes weight zero."
        )

    def draw_classes(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw ``n`` class codes by weight."""
        return rng.choice(self.codes, size=n, p=self.weights)

    def slices_from_classes(self, classes: np.ndarray, rng: np.random.Generator) -> list[slice]:
        """Draw one chunk of each class given, uniformly over the class's start rows.

        Parameters
        ----------
        classes
            Class codes, integer, one per chunk.
        rng
            Source of the draw.

        Returns
        -------
        list of slice
            ``chunk_size`` rows each, in global row numbers.

        Raises
        ------
        ValueError
            If a class is not drawable here.
        """
        position = self._position_of_code[classes]
        if (position < 0).any():
            label = self._classes.categories[classes[position < 0][0]]
            raise ValueError(
                f"Class {label!r} is not drawable in the current range [{self.mask.start}, {self.mask.stop}): "
                "it is absent or has no positive weight. Those of `codes` are."
            )
        first_number = self._class_numbers[position]
        number = first_number + rng.integers(self._class_numbers[position + 1] - first_number)
        run = np.searchsorted(self._numbers, number, side="right") - 1
        rows = self._run_starts[run] + number - self._numbers[run]
        return [slice(row, row + self._chunk_size) for row in rows.tolist()]
