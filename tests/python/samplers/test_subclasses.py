"""Samplers of clients, subclasses of ours: what they reach of annbatch 0.3.1 is there, and means the same."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from annbatch import Loader
from support import upstream, upstream_calls
from support.upstream_calls import classes, other_classes


@pytest.mark.parametrize("name", upstream.names("subclass"))
def test_subclasses_run_as_on_upstream(name):
    upstream.check(name)


@pytest.mark.parametrize("kind", upstream_calls.EXAMPLES)
def test_the_members_of_upstream_are_there(kind):
    assert set(upstream.table()["members"][kind]) <= set(upstream_calls.members()[kind])


def rows_of(sampler, n_obs: int, *, passes: int = 2) -> list[list[int]]:
    """The rows of each batch that a loader gives."""
    loader = Loader(batch_sampler=sampler, return_index=True).add_dataset(np.zeros((n_obs, 1), dtype="float32"))
    return [batch["index"].tolist() for _ in range(passes) for batch in loader]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
@pytest.mark.parametrize("kind", ["ClassSampler", "WeightedClassSampler", "Following", "RandomSampler", "SubRandom"])
def test_loaders_over_copies_of_a_sampler_read_the_same_rows(kind, duplicate):
    made = {
        "Following": lambda: upstream_calls.following(upstream_calls.by_class("ClassSampler", sizes=(2, 6, 6))),
        "RandomSampler": upstream_calls.CHUNKED["random"],
        "SubRandom": lambda: SubRandom(4, 3, 6, rng=np.random.default_rng(2)),
    }
    sampler = made[kind]() if kind in made else upstream_calls.by_class(kind)
    n_obs = getattr(sampler, "_n_obs", 43)
    rows_of(sampler, n_obs)  # the generator is under way when the copy is made
    twin = duplicate(sampler)
    expected = rows_of(sampler, n_obs)
    assert rows_of(twin, n_obs) == expected
    assert rows_of(sampler, n_obs) == rows_of(twin, n_obs) != expected


class SubRandom(upstream_calls.samplers.RandomSampler):
    """A subclass that changes nothing is driven in Python all the same."""


def test_a_follower_keeps_step_with_the_loader_that_it_follows():
    leader = upstream_calls.by_class("ClassSampler", sizes=(2, 6, 6), drop_last=True)
    follower = upstream_calls.following(copy.deepcopy(leader))
    led, followed = rows_of(leader, 40), rows_of(follower, 35)
    assert len(led) == len(followed) == 10
    for there, here in zip(led, followed, strict=True):
        assert len(set(classes().codes[there]) | set(other_classes().codes[here])) == 1


def test_a_shallow_copy_keeps_its_own_range():
    sampler = upstream_calls.by_class("ClassSampler")
    twin = copy.copy(sampler)
    twin.mask = slice(12, 40)
    assert (sampler.mask, twin.mask) == (slice(0, 40), slice(12, 40))
    assert sampler._rle_manager.codes.tolist() == [0, 1, 2]
