"""What a former daemon left on the disk, made known to the machine: its amount at once, its files while readers are already served.

100,000 files take the machine seconds to learn. So their bytes count from the first moment (the bound holds), an object that somebody
opens is learned before its reader is answered (nothing that is here is fetched again), and the rest follows, the oldest first: what is
evicted first is known first. What needs to know all of it waits for `finished` (decisions/0066).
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from cache.blocks import ExtentId, ObjectId
from cache.daemon.holds import DiskWork
from cache.residency import messages as m
from cache.store import recovery
from cache.store.index import IndexRow
from cache.store.recovery import FoundFile, Stock

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

OBJECTS_AT_ONCE = 128
"""Learned before anybody else has a turn: 2 to 3 ms."""

ROWS_AT_ONCE = 8192
"""Written to the index in one transaction: each changes as many pages as it has rows, and is synced. A thousand small ones took 100 s."""


class Restoring:
    """`on_disk(work)`: runs it on the disk's thread. `tell`: the machine. `remember`: called with each object found; `on_held`: with each
    file that cannot be used but is held open by a reader of the former daemon, and with its size. On the event loop."""

    def __init__(
        self,
        on_disk: DiskWork,
        tell: Callable[[m.Event], None],
        remember: Callable[[ObjectId], None],
        on_held: Callable[[ExtentId, int, int], None],
    ) -> None:
        self.stock = Stock()
        self._on_disk, self._tell, self._remember, self._on_held = on_disk, tell, remember, on_held
        self._finished = asyncio.Event()
        self._adopted: list[IndexRow] = []
        self._bad: list[tuple[ExtentId, int, int]] = []

    @property
    def num_left(self) -> int:
        """Objects on the disk that the machine has not learned yet."""
        return len(self.stock.files)

    async def begin(self) -> None:
        """Counts what is there. Once, before anything else."""
        # Nothing of what is made from here on is garbage, but there is much of it to look through. Until `run` is done.
        gc.disable()
        self.stock = await self._on_disk(recovery.take_stock)
        self._tell(m.StockTaken(self.stock.num_bytes, self.stock.num_files, self.stock.last_generation))
        for held in self.stock.held:
            self._on_held(*held)

    def learn(self, object_id: ObjectId) -> None:
        """The machine knows all that is here of this object, from now on."""
        files = self.stock.files.pop(object_id.content_id, None)
        if files is not None:
            self._learn([(object_id, files)])

    async def run(self) -> None:
        """Makes all known that is left, a few at a time. Once."""
        try:
            await self._on_disk(lambda _, index: recovery.forget(index, self.stock.lost))
            while batch := list(islice(self.stock.files.items(), OBJECTS_AT_ONCE)):
                await self._learn_batch(batch)
                if len(self._adopted) + len(self._bad) >= ROWS_AT_ONCE:
                    await self._settle()
            await self._settle()
        finally:
            self._finished.set()
            gc.enable()
        stock = self.stock
        if stock.num_adopted or stock.num_discarded or stock.lost:
            log.info(
                "recovery: %d extents, of which %d were missing in the index; %d files discarded, %d rows without file",
                stock.num_files,
                stock.num_adopted,
                stock.num_discarded,
                len(stock.lost),
            )
        gc.freeze()  # It lives long: collections need not look through it again and again (0.2 s for 100,000 extents).

    async def finished(self) -> None:
        """Until everything is known."""
        await self._finished.wait()

    async def _learn_batch(self, batch: list[tuple[str, list[FoundFile]]]) -> None:
        objects = []
        for content_id, object_id in await self._on_disk(lambda folder, index: recovery.identify(folder, index, batch)):
            files = self.stock.files.pop(content_id, None)
            if files is None:
                continue  # A reader opened it meanwhile, and so it was learned.
            if object_id is None:
                self._refuse(content_id, files)
            else:
                objects.append((object_id, files))
                self._remember(object_id)
        self._learn(objects)

    def _learn(self, objects: list[tuple[ObjectId, list[FoundFile]]]) -> None:
        found = []
        for object_id, files in objects:
            for file in files:
                if not recovery.fits(object_id, file):
                    self._refuse(object_id.content_id, [file])
                    continue
                found.append(m.ExtentFound(object_id, file.extent_idx, file.generation, file.file_bytes, None))
                if not file.is_indexed:
                    self._adopted.append(IndexRow(object_id, file.extent_idx, file.generation, file.file_bytes))
        if found:
            self._tell(m.StockFound(tuple(found)))

    def _refuse(self, content_id: str, files: list[FoundFile]) -> None:
        for file in files:
            self.stock.num_discarded += 1
            self._bad.append((ExtentId(content_id, file.extent_idx), file.generation, file.file_bytes))

    async def _settle(self) -> None:
        """On the disk, too: the index learns of files that it did not know; what cannot be used goes, and counts until it has gone."""
        adopted, self._adopted = self._adopted, []
        bad, self._bad = self._bad, []
        if adopted or bad:
            files = [(extent, generation) for extent, generation, _ in bad]
            for held in await self._on_disk(lambda folder, index: recovery.settle(folder, index, adopted, files)):
                self._on_held(*held)
        for _, _, file_bytes in bad:
            self._tell(m.StockLost(file_bytes))
