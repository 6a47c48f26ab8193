"""Base classes to build on."""

from .sampler import Sampler

__all__ = ["Sampler"]
