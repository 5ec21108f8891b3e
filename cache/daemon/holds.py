"""Evicted files that somebody holds open who will not tell this daemon when he lets go: readers of the daemon before it, children that go
on with a map of their dead parent, and the dead whose files the kernel is still closing; and those that the disk refuses to remove. They
count, and are looked at twice a second, by the kernel's word (store/holding.py), until they are gone."""

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
        self._refused: set[File] = set()
        """Of these it was said that the disk does not remove them."""

    def found(self, extent: ExtentId, generation: int, file_bytes: int) -> None:
        """Set aside by a former daemon, and still held."""
        self._counted.add((extent, generation))
        self._tell(m.HeldFound(extent, generation, file_bytes))

    def was_evicted(self, action: m.RemoveExtent, is_left: bool, file_bytes: int) -> None:
        """The disk has carried the action out, or refused it. `is_left`: the file is there still; its bytes."""
        file = (action.extent, action.generation)
        if is_left and action.is_old:
            self._counted.add(file)
        elif is_left and not action.is_held:
            self.found(*file, file_bytes)  # Let go of by all that were given it, but not by a child of theirs.
        elif not is_left and (action.is_old or action.is_held):
            self._tell(m.ExtentReleased(UNKNOWN_READERS, *file))

    def was_let_go(self, action: m.RemoveHeld, is_left: bool) -> None:
        """The disk has carried the action out."""
        file = (action.extent, action.generation)
        if is_left:
            self._counted.add(file)
        else:
            self._counted.discard(file)
            self._tell(m.ExtentReleased(UNKNOWN_READERS, *file))

    async def watch(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._counted:
                await self.look()

    async def look(self) -> None:
        """Once at each of them."""
        files = list(self._counted)
        gone = await self._on_disk(lambda directory, _: {file for file in files if self._is_gone(directory, file)})
        for file in self._counted & gone:
            self._counted.discard(file)
            self._tell(m.ExtentReleased(UNKNOWN_READERS, *file))

    def _is_gone(self, directory: CacheDirectory, file: File) -> bool:
        """On the disk's thread."""
        try:
            is_gone = remove_if_let_go(directory, *file)
        except OSError as error:
            if file not in self._refused:
                log.warning("cannot remove an evicted file, which counts until it can be: %s", error)
            self._refused.add(file)
            return False
        self._refused.discard(file)
        return is_gone
