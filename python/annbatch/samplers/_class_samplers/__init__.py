"""Samplers that draw observations by class."""

from ._class_sampler import ClassSampler
from ._weighted_class_sampler import WeightedClassSampler

__all__ = ["ClassSampler", "WeightedClassSampler"]
