"""Which rows belong to which split: decided once, from the number of rows, labels and a seed.

In come the user's wish (fractions, masks, row numbers, groups of an obs column) and ``n_obs``; out come
:class:`~annbatch._splits.rows.RowSet` objects, sorted and disjoint. Nothing here reads data or knows about batches, so that the promise
"no row in two splits" can be tested on its own.

===============  =========================================================================================
``unit``         how a split by fraction cuts the observation axis
===============  =========================================================================================
``contiguous``   one stretch per split, in the order given: fair only on stores that are shuffled already
``block``        blocks of ``block_rows`` neighbouring rows are dealt by the seed; reads stay long
``row``          every row is dealt by the seed: the fairest, and every read touches chunks of all splits
===============  =========================================================================================
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from annbatch._base.warn import stacklevel_outside_package
from annbatch._splits.rows import RowSet

SPLIT_NAMES = ("train", "val", "test", "predict")
SPLIT_UNITS = ("contiguous", "block", "row")
# Predictions are often wanted for rows that were trained on, so "predict" may share rows with the others.
_EXCLUSIVE = frozenset({"train", "val", "test"})
_GROUP_DEALS = 32


def split_by_fraction(
    n_obs: int, fractions: Mapping[str, float], *, unit: str, block_rows: int, seed: int
) -> dict[str, RowSet]:
    """Deal ``n_obs`` rows to named splits.

    Parameters
    ----------
    n_obs
        Number of rows.
    fractions
        Share of the rows for each name; the sum is at most 1 and what is left over belongs to no split.
        Each split has ``round(fraction * n_obs)`` rows, give or take one.
    unit
        ``"contiguous"``, ``"block"`` or ``"row"``; see the table at the top of this module.
    block_rows
        Rows of a block for ``unit="block"``. A block on the border of two splits is divided between them.
    seed
        Decides the deal, with ``n_obs``, ``unit`` and ``block_rows`` and nothing else.

    Returns
    -------
    dict[str, RowSet]
        Disjoint sets under the names of `fractions`.
    """
    names, edges = _edges(n_obs, fractions)
    if unit not in SPLIT_UNITS:
        raise ValueError(f"split_unit must be one of {SPLIT_UNITS}, got {unit!r}")
    rng = np.random.default_rng([seed, 0x5B117])
    if unit == "contiguous":
        sets = [RowSet.from_range(a, b) for a, b in itertools.pairwise(edges)]
    elif unit == "row":
        order = rng.permutation(n_obs)
        sets = [RowSet.from_rows(order[a:b]) for a, b in itertools.pairwise(edges)]
    else:
        firsts = np.arange(0, n_obs, block_rows)
        order = rng.permutation(firsts.size)
        starts = firsts[order]
        stops = np.minimum(starts + block_rows, n_obs)
        # Positions in the dealt order, at which each split takes over from the one before.
        dealt = np.concatenate([[0], np.cumsum(stops - starts)])
        sets = []
        for a, b in itertools.pairwise(edges):
            take = np.clip(dealt, a, b)
            begin = starts + (take[:-1] - dealt[:-1])
            sets.append(_merged(begin, begin + np.diff(take)))
    return dict(zip(names, sets, strict=True))


def split_by_rows(n_obs: int, wanted: Mapping[str, Any]) -> dict[str, RowSet]:
    """Turn masks, slices or row numbers into row sets.

    Parameters
    ----------
    n_obs
        Number of rows.
    wanted
        For each name a boolean array [n_obs], a slice with step 1, or integer row numbers. Rows may be left out.

    Raises
    ------
    ValueError
        If a mask has another length, or a row is out of range, or in two of train, val and test.
    """
    sets = {name: _row_set(name, rows, n_obs) for name, rows in wanted.items()}
    _require_disjoint(sets)
    return sets


def split_by_group(labels: pd.Series | np.ndarray, wanted: Mapping[str, Any], *, seed: int) -> dict[str, RowSet]:
    """Deal whole groups of rows to named splits.

    Parameters
    ----------
    labels
        The group of each row [n_obs]. Rows whose label is missing (None, NaN, ``pd.NA``) stay together, with a warning where groups are
        dealt: which groups they are of is not known.
    wanted
        Per name either a fraction of the rows, which is met as closely as whole groups allow, or the labels of its
        groups (None for rows without one). Groups that are not named belong to no split.
    seed
        Decides how groups are dealt for fractions.

    Raises
    ------
    ValueError
        If a label is unknown, is named for two of train, val and test, or there are fewer groups than splits.

    Warns
    -----
    UserWarning
        If groups are dealt and labels are missing.
    """
    codes, groups = pd.factorize(labels, use_na_sentinel=False)
    is_missing = pd.isna(np.asarray(groups))
    if _are_fractions(wanted):
        n_rows = np.bincount(codes, minlength=len(groups))
        if n_missing := n_rows[is_missing].sum():
            warnings.warn(
                f"{n_missing} of {len(codes)} rows have no label in {getattr(labels, 'name', None) or 'the labels'}, by which "
                "they are split: they stay together as one group, though they may be of groups that another split has. "
                "Leave them out by naming the groups of each split, or give them labels.",
                UserWarning,
                stacklevel=stacklevel_outside_package(),
            )
        names, owner = _deal_groups(n_rows, wanted, seed)
        return {name: RowSet.from_mask((owner == i)[codes]) for i, name in enumerate(names)}
    known = {
        None if missing else group: code for code, (group, missing) in enumerate(zip(groups, is_missing, strict=True))
    }
    sets = {}
    for name, members in wanted.items():
        members = [members] if isinstance(members, str) or not isinstance(members, Iterable) else members
        members = [None if pd.isna(member) else member for member in members]
        unknown = [m for m in members if m not in known]
        if unknown:
            raise ValueError(f"split {name!r} names groups that no row has: {unknown}; known are {list(known)[:20]}")
        sets[name] = RowSet.from_mask(np.isin(codes, [known[m] for m in members]))
    _require_disjoint(sets)
    return sets


def make_splits(
    n_obs: int,
    split: Any,
    *,
    labels: pd.Series | np.ndarray | None = None,
    unit: str = "block",
    block_rows: int = 512,
    seed: int = 0,
) -> dict[str, RowSet]:
    """Turn the ``split`` and ``split_by`` arguments of the data module into row sets.

    Parameters
    ----------
    n_obs
        Number of rows, at least 1.
    split
        None (all rows train), a sequence of fractions for train, val and test, or a mapping from names to fractions,
        rows (see :func:`split_by_rows`) or, with `labels`, groups (see :func:`split_by_group`).
    labels
        Group of each row, or None.
    unit, block_rows, seed
        See :func:`split_by_fraction`.
    """
    if n_obs == 0:
        raise ValueError("there are no rows to split: the data have 0 observations")
    if split is None:
        if labels is not None:
            raise ValueError("split_by needs split: fractions, or the groups of each split")
        return {"train": RowSet.from_range(0, n_obs)}
    if not isinstance(split, Mapping):
        split = _named_fractions(split)
    unknown = set(split) - set(SPLIT_NAMES)
    if unknown or not split:
        raise ValueError(f"split names must be among {SPLIT_NAMES}, got {sorted(map(str, split))}")
    if labels is not None:
        if len(labels) != n_obs:
            raise ValueError(f"the labels of split_by have {len(labels)} rows, the data {n_obs}")
        sets = split_by_group(labels, split, seed=seed)
    elif _are_fractions(split):
        sets = split_by_fraction(n_obs, split, unit=unit, block_rows=block_rows, seed=seed)
    else:
        sets = split_by_rows(n_obs, split)
    empty = [name for name, rows in sets.items() if len(rows) == 0]
    if empty:
        raise ValueError(f"split {empty[0]!r} has no rows out of {n_obs}; enlarge it or leave it out")
    return sets


def _edges(n_obs: int, fractions: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Return the names and, in the dealt order, the position at which each split begins, int64 [n_splits + 1]."""
    shares = np.array([float(f) for f in fractions.values()])
    if (shares < 0).any() or not np.isfinite(shares).all() or shares.sum() > 1 + 1e-9:
        raise ValueError(f"split fractions must be non-negative with a sum of at most 1, got {dict(fractions)}")
    edges = np.concatenate([[0.0], np.cumsum(shares)]) * n_obs
    return list(fractions), np.minimum(np.rint(edges), n_obs).astype(np.int64)


def _merged(starts: np.ndarray, stops: np.ndarray) -> RowSet:
    """Return the set of disjoint ranges given in any order, some of them perhaps empty."""
    keep = stops > starts
    starts, stops = starts[keep], stops[keep]
    order = np.argsort(starts)
    starts, stops = starts[order], stops[order]
    opens = np.ones(starts.size, dtype=bool)
    opens[1:] = starts[1:] != stops[:-1]
    return RowSet(starts[opens], stops[np.append(opens[1:], True)] if starts.size else stops)


def _row_set(name: str, rows: Any, n_obs: int) -> RowSet:
    if isinstance(rows, RowSet):
        found = rows
    elif isinstance(rows, slice):
        start, stop, step = rows.indices(n_obs)
        if step != 1:
            raise ValueError(f"split {name!r}: a slice must have step 1, got {rows}")
        found = RowSet.from_range(start, stop)
    else:
        rows = np.asarray(rows)
        if rows.ndim != 1:
            raise ValueError(f"split {name!r}: expected one dimension, got shape {rows.shape}")
        if rows.dtype == bool:
            if rows.size != n_obs:
                raise ValueError(f"split {name!r}: the mask has {rows.size} rows, the data {n_obs}")
            found = RowSet.from_mask(rows)
        elif np.issubdtype(rows.dtype, np.integer):
            try:
                found = RowSet.from_rows(rows)
            except ValueError as error:
                raise ValueError(f"split {name!r}: {error}") from None
        else:
            raise TypeError(f"split {name!r}: expected a mask, a slice or row numbers, got dtype {rows.dtype}")
    if len(found) and ((first := found.rows(0, 1)[0]) < 0 or found.last >= n_obs):
        raise ValueError(f"split {name!r} has rows outside 0 to {n_obs - 1}: they go from {first} to {found.last}")
    return found


def _require_disjoint(sets: Mapping[str, RowSet]) -> None:
    names = [name for name in sets if name in _EXCLUSIVE]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            row = sets[a].first_common(sets[b])
            if row is not None:
                raise ValueError(
                    f"splits {a!r} and {b!r} share rows, the first of which is {row}; give each row to one of them"
                )


def _are_fractions(wanted: Mapping[str, Any]) -> bool:
    kinds = [isinstance(v, Real) and not isinstance(v, bool | np.bool_) for v in wanted.values()]
    if any(kinds) and not all(kinds):
        raise ValueError("a split is given by fractions for all names, or by rows or groups for all, not by a mixture")
    return all(kinds)


def _named_fractions(split: Iterable[float]) -> dict[str, float]:
    fractions = list(split)
    if not 1 <= len(fractions) <= 3:
        raise ValueError(f"split needs 1 to 3 fractions, for train, val and test, got {len(fractions)} numbers")
    return dict(zip(SPLIT_NAMES, fractions, strict=False))


def _deal_groups(n_rows: np.ndarray, fractions: Mapping[str, float], seed: int) -> tuple[list[str], np.ndarray]:
    """Return the names and the split of each group, int64 [n_groups] (-1: none).

    Groups are dealt in a random order, each to the split that lacks most rows; of several such deals the one nearest
    to the fractions is kept, because one large group that comes last can spoil a deal.
    """
    names, _ = _edges(0, fractions)  # checks the fractions; whole groups need no rounded targets
    shares = np.array([float(f) for f in fractions.values()])
    targets = np.append(shares, 1 - shares.sum()) * n_rows.sum()  # the last entry: rows of no split
    wanted = shares > 0
    if n_rows.size < wanted.sum():
        raise ValueError(f"{n_rows.size} groups cannot fill {wanted.sum()} splits; choose a column with more groups")
    rng = np.random.default_rng([seed, 0x6E0])
    best, best_miss = np.empty(0, dtype=np.int64), math.inf
    for _ in range(_GROUP_DEALS):
        owner = np.empty(n_rows.size, dtype=np.int64)
        lacking = targets.copy()
        empty = np.append(wanted, False)
        for n_dealt, group in enumerate(rng.permutation(n_rows.size)):
            must_fill = n_rows.size - n_dealt <= empty.sum()
            owner[group] = np.argmax(np.where(empty, lacking, -np.inf) if must_fill else lacking)
            empty[owner[group]] = False
            lacking[owner[group]] -= n_rows[group]
        miss = float(np.abs(lacking).sum())
        if miss < best_miss:
            best, best_miss = owner, miss
    return names, np.where(best == len(names), -1, best)
