"""Indices of data sets that readers keep on this node, within the cache's capacity and at most a sixteenth of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cache.errors import CacheError, CapacityError
from cache.residency import messages as m
from cache.store.shelf import FILE_OVERHEAD_BYTES, Shelf, is_shelf_key

T = TypeVar("T")

SHARE = 16
"""The inverse of what indices may take of the capacity."""

_SHELF_CLIENT = "shelf"


class Indexes:
    """`ask`: the machine's answer to a request; `tell`: an event that nobody waits for; `evicted`: returns when what the machine has
    evicted until now has left the disk, which another thread sees to. Runs on the event loop."""

    def __init__(
        self,
        directory: Path,
        capacity_bytes: Callable[[], int],
        ask: Callable[[m.SpaceAsked], Awaitable[m.Answer]],
        tell: Callable[[m.Event], None],
        request_ids: itertools.count[int],
        evicted: Callable[[], Awaitable[None]],
    ) -> None:
        self._shelf = Shelf(directory / "indexes")
        self._capacity_bytes = capacity_bytes
        self._ask, self._tell = ask, tell
        self._request_ids = request_ids
        self._evicted = evicted
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = asyncio.Lock()
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="indexes")

    async def start(self) -> None:
        """Counts what a former daemon left."""
        for key, size in (await self._on_disk(self._shelf.sizes)).items():
            self._sizes[key] = size
            self._tell(m.SpaceFound(size))

    def open(self, key: str) -> int | None:
        """A descriptor, None when it is not here. A few microseconds; the caller closes it."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        try:
            return self._shelf.open(key)
        except OSError:
            return None

    async def keep(self, key: str, data: bytes) -> None:
        """Raises CapacityError when there is no room; DiskError when the disk has none, or refuses; ValueError for what is no key."""
        if not is_shelf_key(key):
            raise ValueError(f"{key!r} is no key of an index")
        size = len(data) + FILE_OVERHEAD_BYTES
        async with self._lock:
            limit = self._capacity_bytes() // SHARE
            if size > limit:
                raise CapacityError(f"an index of {size} bytes; on this node they may take {limit}")
            await self._drop(key)
            while self._sizes and sum(self._sizes.values()) + size > limit:
                await self._drop(next(iter(self._sizes)))
            await self._ask(m.SpaceAsked(next(self._request_ids), _SHELF_CLIENT, size))
            try:
                await self._evicted()
                await self._on_disk(self._shelf.put, key, data)
            except CacheError:
                self._tell(m.SpaceReturned(size))
                raise
            self._sizes[key] = size

    async def _drop(self, key: str) -> None:
        if key in self._sizes:
            await self._on_disk(self._shelf.remove, key)
            self._tell(m.SpaceReturned(self._sizes.pop(key)))

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._disk.shutdown(wait=True, cancel_futures=True)

    def _on_disk(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, work, *args)
