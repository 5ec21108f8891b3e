"""The control process's hands: each action of the machine on disk and workers, and the event that tells the machine how it went.

Blocking work on the disk goes to one thread, in order, so that an unlink always precedes the file that is made in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cache.blocks import BLOCKS_PER_EXTENT, ExtentId, ObjectId, run_span
from cache.daemon import wire
from cache.daemon.pool import WorkerPool
from cache.errors import CacheError, CorruptBlock, ObjectChanged, OriginUnavailable
from cache.residency import messages as m
from cache.residency.retry import RetryPolicy
from cache.store.directory import CacheDirectory
from cache.store.files import create_extent, remove_extent
from cache.store.format import ExtentHeader
from cache.store.index import Index, IndexRow
from cache.store.recovery import Recovered, recover

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

WORKER_RETRY = RetryPolicy(max_attempts=5, base_s=0.1, cap_s=2.0)


class Hands:
    """`tell(event)`: how the machine is told of results. `on_changed`: called with an object that the origin replaced."""

    def __init__(
        self,
        directory: CacheDirectory,
        pool: WorkerPool,
        tell: Callable[[m.Event], None],
        on_changed: Callable[[ObjectId], None],
    ) -> None:
        self.directory = directory
        self.pool = pool
        self._tell = tell
        self._on_changed = on_changed
        self._index: Index | None = None
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")

    async def recover(self) -> Recovered:
        """Opens the index and says which extents are there. Once, before anything else."""
        self._index, recovered = await self._on_disk(self._recover)
        return recovered

    def close(self) -> None:
        """Waits for what the disk has in hand."""
        self._disk.shutdown(wait=True, cancel_futures=True)
        if self._index is not None:
            self._index.close()

    def _recover(self) -> tuple[Index, Recovered]:
        index = Index(self.directory.index_path)
        if index.was_damaged:
            log.warning("the index was damaged and is made again from the files")
        recovered = recover(self.directory, index)
        if recovered.num_adopted or recovered.num_discarded or recovered.num_lost:
            log.info(
                "recovery: %d extents, of which %d were missing in the index; %d files discarded, %d rows without file",
                len(recovered.rows),
                recovered.num_adopted,
                recovered.num_discarded,
                recovered.num_lost,
            )
        return index, recovered

    def _on_disk(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, work, *args)

    async def _from_worker(self, request: dict[str, Any]) -> wire.Frame:
        """A worker's answer about a local file; asked again when the worker dies meanwhile, which is not the file's fault."""
        for _ in range(WORKER_RETRY.max_attempts - 1):
            try:
                return await self.pool.request(request)
            except OriginUnavailable:
                await asyncio.sleep(WORKER_RETRY.base_s)
        return await self.pool.request(request)

    async def fetch(self, action: m.FetchBlocks) -> None:
        oid = action.object_id
        extent = ExtentId(oid.content_id, action.extent_idx)
        start, end = run_span(oid.size_bytes, action.first, action.end)
        request = {
            "op": "fetch",
            "url": oid.url,
            "etag": oid.etag,
            "start": start,
            "end": end,
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.first % BLOCKS_PER_EXTENT,
        }
        try:
            await self.pool.request(request)
        except CacheError as error:
            if isinstance(error, ObjectChanged):
                self._on_changed(oid)
            self._tell(m.BlocksFailed(extent, action.generation, action.first, action.end, error))
        else:
            self._tell(m.BlocksLanded(extent, action.generation, action.first, action.end, end - start))

    async def check(self, action: m.CheckBlocks) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        start, end = run_span(action.object_id.size_bytes, action.first, action.end)
        request = {
            "op": "check",
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.first % BLOCKS_PER_EXTENT,
            "length": end - start,
        }
        sound = (False,) * (action.end - action.first)
        with contextlib.suppress(CacheError):
            sound = tuple(map(bool, (await self._from_worker(request)).header["sound"]))
        for block in (block for block, is_sound in enumerate(sound, start=action.first) if not is_sound):
            log.warning("block %d of %s does not match its checksum: discarded", block, action.object_id.url)
        self._tell(m.BlocksChecked(extent, action.generation, action.first, sound))

    def create(self, action: m.CreateExtent) -> Coroutine[Any, Any, None]:
        """Queues the work at once, so that the disk sees files come and go in the machine's order; what is returned waits for it."""
        return self._create(action, self._on_disk(self._create_on_disk, action))

    async def _create(self, action: m.CreateExtent, made: asyncio.Future[None]) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        try:
            await made
        except CacheError as error:
            log.warning("%s", error)
            self._tell(m.ExtentFailed(extent, action.generation, error))
        else:
            self._tell(m.ExtentCreated(extent, action.generation))

    def _create_on_disk(self, action: m.CreateExtent) -> None:
        assert self._index is not None
        header = ExtentHeader(action.object_id, action.extent_idx)
        create_extent(self.directory, header, action.generation)
        with _index_errors():
            self._index.add([IndexRow(action.object_id, action.extent_idx, action.generation, header.file_bytes)])

    def remove(self, action: m.RemoveExtent) -> Coroutine[Any, Any, None]:
        """As `create`."""
        return self._remove(self._on_disk(self._remove_on_disk, action))

    async def _remove(self, removed: asyncio.Future[None]) -> None:
        try:
            await removed
        except (OSError, CacheError) as error:
            log.warning("cannot remove an evicted file: %s", error)

    def _remove_on_disk(self, action: m.RemoveExtent) -> None:
        assert self._index is not None
        remove_extent(self.directory, action.extent, action.generation)
        with _index_errors():
            self._index.remove([(action.extent, action.generation)])

    async def read_table(self, action: m.ReadTable) -> None:
        path = str(self.directory.extent_path(action.extent, action.generation))
        try:
            frame = await self._from_worker({"op": "table", "path": path})
            if frame.header["content_id"] != action.extent.content_id:
                raise CorruptBlock(f"{path} says it belongs to {frame.header['content_id']}")
        except CacheError as error:
            log.warning("%s: fetched again", error.message)
            self._tell(m.ExtentFailed(action.extent, action.generation, error))
            return
        first = action.extent.extent_idx * BLOCKS_PER_EXTENT
        present = frozenset(first + slot for slot in frame.header["present"])
        self._tell(m.ExtentTableRead(action.extent, action.generation, present))


@contextlib.contextmanager
def _index_errors() -> Iterator[None]:
    """The index only saves time at the next start: that it cannot be written is said and survived."""
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the index cannot be written (%s); the next start reads the files instead", error)
