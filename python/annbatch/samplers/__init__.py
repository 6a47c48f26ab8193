"""Samplers: the order in which a loader reads observations."""

from ._class_samplers import ClassSampler, WeightedClassSampler
from ._distributed_sampler import DistributedSampler
from ._random_sampler import RandomSampler
from ._sequential_sampler import SequentialSampler

__all__ = ["ClassSampler", "DistributedSampler", "RandomSampler", "SequentialSampler", "WeightedClassSampler"]
