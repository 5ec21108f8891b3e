"""Evicted files that somebody holds open who will not tell this daemon when he lets go: readers of the daemon before it, and children that
go on with a map of their dead parent. Looked at twice a second, by the kernel's word (store/holding.py), until they are let go of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from cache.blocks import ExtentId
from cache.residency import messages as m
from cache.residency.budget import UNKNOWN_READERS
from cache.store.directory import CacheDirectory
from cache.store.holding import remove_if_let_go
from cache.store.index import Index

log = logging.getLogger("railhead.cache")

LOOK_EVERY_S = 0.5

T = TypeVar("T")
File = tuple[ExtentId, int]
"""Extent and generation."""


class DiskWork(Protocol):
    def __call__(self, work: Callable[[CacheDirectory, Index], T]) -> Awaitable[T]: ...


class Holds:
    """`on_disk(work)`: runs it on the disk's thread. `tell`: the machine. On the event loop."""

    def __init__(self, on_disk: DiskWork, tell: Callable[[m.Event], None]) -> None:
        self._on_disk, self._tell = on_disk, tell
        self._counted: set[File] = set()
        """The machine counts them, and waits to be told."""
        self._doubtful: dict[File, int] = {}
        """Given back already, but open at the last look; their bytes. Who has just died may close his files a moment after his socket."""

    def found(self, extent: ExtentId, generation: int, file_bytes: int) -> None:
        """Set aside by a former daemon, and still held."""
        self._counted.add((extent, generation))
        self._tell(m.HeldFound(extent, generation, file_bytes))

    def was_evicted(self, action: m.RemoveExtent, is_open_somewhere: bool, file_bytes: int) -> None:
        """The disk has carried the action out."""
        file = (action.extent, action.generation)
        if action.is_old and is_open_somewhere:
            self._counted.add(file)
        elif action.is_old:
            self._tell(m.ExtentReleased(UNKNOWN_READERS, *file))
        elif is_open_somewhere and not action.is_held:
            self._doubtful[file] = file_bytes

    def was_let_go(self, action: m.RemoveHeld, is_open_somewhere: bool, file_bytes: int) -> None:
        """The disk has carried the action out."""
        if is_open_somewhere:
            self._doubtful[action.extent, action.generation] = file_bytes

    async def watch(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._counted or self._doubtful:
                await self.look()

    async def look(self) -> None:
        """Once at each of them."""
        files = [*self._counted, *self._doubtful]
        gone = await self._on_disk(lambda directory, _: {file for file in files if _is_gone(directory, file)})
        for file in self._counted & gone:
            self._counted.discard(file)
            self._tell(m.ExtentReleased(UNKNOWN_READERS, *file))
        for file in [file for file in self._doubtful if file in files]:
            file_bytes = self._doubtful.pop(file)
            if file not in gone:
                self.found(*file, file_bytes)


def _is_gone(directory: CacheDirectory, file: File) -> bool:
    try:
        return remove_if_let_go(directory, *file)
    except OSError as error:
        log.warning("cannot remove an evicted file: %s", error)
        return True
