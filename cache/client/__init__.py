"""Readers of the cache: what a training process imports."""

from cache.client.client import Cache, CachedObject, Stream
from cache.client.stats import ReaderStats

__all__ = ["Cache", "CachedObject", "ReaderStats", "Stream"]
