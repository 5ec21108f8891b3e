"""The objects that one process of a data set holds open: opened on first use, closed when there are too many.

Opening asks the daemon (two requests, 0.1 ms); reading from an open shard asks nobody. So as many stay open as
descriptors allow.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict

from cache.blocks import num_extents
from cache.client.client import Cache
from cache.client.formats.index import Shard
from cache.client.object import CachedObject

MAX_DESCRIPTORS = 65536
"""The soft limit of descriptors (usually 1,024) is raised up to this or the hard limit; half of it is for shards."""


class OpenShards:
    """Any thread may call. A forked child begins with none of the parent's."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[Shard, CachedObject] = OrderedDict()
        self._num_descriptors = 0
        self._max_descriptors = _raise_descriptor_limit() // 2

    def get(self, shard: Shard) -> CachedObject:
        """The opened shard, at the etag that was indexed. Raises ObjectChanged if it is another one now, and the
        origin's errors."""
        if self._pid != os.getpid():
            # The lock may have been held by a thread that the child does not have: it is replaced, not taken.
            self._begin()
        with self._lock:
            handle = self._open.get(shard)
            if handle is not None:
                self._open.move_to_end(shard)
                return handle
        opened = self._cache.open(shard.url, etag=shard.etag)
        with self._lock:
            handle = self._open.get(shard)
            if handle is not None:
                return handle
            self._open[shard] = opened
            self._num_descriptors += num_extents(shard.size_bytes)
            while self._num_descriptors > self._max_descriptors and len(self._open) > 1:
                # Not closed by hand: another thread may be reading from it. It closes when nobody refers to it any more.
                gone, _ = self._open.popitem(last=False)
                self._num_descriptors -= num_extents(gone.size_bytes)
        return opened


def _raise_descriptor_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard_limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    wanted = max(soft, min(hard_limit, MAX_DESCRIPTORS))
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(wanted, MAX_DESCRIPTORS) if wanted > 0 else MAX_DESCRIPTORS
