"""Readers of the cache: what a training process imports."""

from cache.client.client import Cache
from cache.client.object import CachedObject
from cache.client.stats import ReaderStats
from cache.client.stream import Stream

__all__ = ["Cache", "CachedObject", "ReaderStats", "Stream"]
