"""The objects that one process of a data set holds open: opened on first use, closed when there are too many.

Opening asks the daemon (two requests, 0.1 ms); reading from an open shard asks nobody. So as many stay open as
descriptors allow.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import cast

from cache.blocks import num_extents
from cache.client.client import Cache
from cache.client.formats.index import Shard
from cache.client.object import CachedObject

MAX_DESCRIPTORS = 65536
"""The soft limit of descriptors (usually 1,024) is raised up to this or the hard limit; half of it is for shards."""


class OpenShards:
    """Shards by their number in the index. Any thread may call. A forked child begins with none of the parent's."""

    def __init__(self, cache: Cache, shards: Sequence[Shard]) -> None:
        self._cache = cache
        self._shards = shards
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, CachedObject] = OrderedDict()
        self._num_descriptors = 0
        self._max_descriptors = _raise_descriptor_limit() // 2

    def get(self, shard_idx: int) -> CachedObject:
        """The opened shard, at the etag that was indexed. Raises ObjectChanged if it is another one now, and the
        origin's errors."""
        return self.get_each((shard_idx,))[0]

    def get_each(self, shard_idxs: Iterable[int]) -> list[CachedObject]:
        """The same for each of these: once for a batch is cheaper than once for a sample."""
        if self._pid != os.getpid():
            # The lock may have been held by a thread that the child does not have: it is replaced, not taken.
            self._begin()
        handles: list[CachedObject | None] = []
        missing: list[tuple[int, int]] = []
        with self._lock:
            for shard_idx in shard_idxs:
                handle = self._open.get(shard_idx)
                if handle is None:
                    missing.append((len(handles), shard_idx))
                else:
                    self._open.move_to_end(shard_idx)
                handles.append(handle)
        for place, shard_idx in missing:
            handles[place] = self._opened(shard_idx)
        return cast(list[CachedObject], handles)

    def _opened(self, shard_idx: int) -> CachedObject:
        with self._lock:
            handle = self._open.get(shard_idx)
        if handle is not None:
            return handle  # a moment ago, for another sample of the batch, or by another thread
        shard = self._shards[shard_idx]
        opened = self._cache.open(shard.url, etag=shard.etag)
        with self._lock:
            handle = self._open.get(shard_idx)
            if handle is not None:
                return handle
            self._open[shard_idx] = opened
            self._num_descriptors += num_extents(shard.size_bytes)
            while self._num_descriptors > self._max_descriptors and len(self._open) > 1:
                # Not closed by hand: another thread may be reading from it. It closes when nobody refers to it any more.
                gone, _ = self._open.popitem(last=False)
                self._num_descriptors -= num_extents(self._shards[gone].size_bytes)
        return opened


def _raise_descriptor_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard_limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    wanted = max(soft, min(hard_limit, MAX_DESCRIPTORS))
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(wanted, MAX_DESCRIPTORS) if wanted > 0 else MAX_DESCRIPTORS
