"""The control process's hands: each action of the machine on disk and workers, and the event that tells the machine how it went.

Blocking work on the disk goes to one thread, in order, so that an unlink always precedes the file that is made in its place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cache.blocks import BLOCKS_PER_EXTENT, ExtentId, ObjectId, run_span
from cache.daemon import wire
from cache.daemon.fetcher import Fetcher, FetchResult
from cache.daemon.holds import Holds
from cache.daemon.peers import Peers
from cache.daemon.pool import WorkerPool
from cache.daemon.starvation import Starvation
from cache.errors import CacheError, CorruptBlock, DiskError, ObjectChanged, OriginUnavailable, PeerError
from cache.residency import messages as m
from cache.residency.budget import Budget
from cache.residency.health import SLOW_S
from cache.residency.origins import Origins, OriginState
from cache.residency.peerhealth import OUT_OF_USE
from cache.residency.retry import RetryPolicy
from cache.store.directory import CacheDirectory
from cache.store.files import DiskSpace, create_extent, disk_space, probe_disk, slow_disk_error
from cache.store.format import ExtentLabel
from cache.store.holding import held_bytes, remove_if_let_go, retire_extent
from cache.store.index import Index, IndexRow, index_errors

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

WATCH_EVERY_S = 2.0
"""How often to look at what the file system has left for its other users."""

DISK_TIMEOUT_S = 10.0
"""A disk that has not answered a question about itself (or a probe of 1 MiB) for this long is in trouble; so is who waits for it."""

WORKER_RETRY = RetryPolicy(max_attempts=5, base_s=0.1, cap_s=2.0)


class Hands:
    """`tell(event)`: how the machine is told of results. `on_changed`: called with an object that the origin replaced."""

    def __init__(
        self,
        directory: CacheDirectory,
        pool: WorkerPool,
        origins: Origins,
        tell: Callable[[m.Event], None],
        on_changed: Callable[[ObjectId], None],
    ) -> None:
        self.directory = directory
        self.pool = pool
        self.fetcher = Fetcher(pool)
        self._origins = origins
        self._tell = tell
        self._on_changed = on_changed
        self.peers: Peers | None = None
        self.space: DiskSpace | None = None
        """What the file system had left when it was looked at last."""
        self.holds = Holds(self.with_index, tell)
        self._starvation = Starvation()
        self._index: Index | None = None
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")

    async def open_index(self) -> None:
        """Once, before anything else."""
        self._index = await self._on_disk(Index, self.directory.index_path)
        if self._index.was_damaged:
            log.warning("the index was damaged and is made again from the files")

    def with_index(self, work: Callable[[CacheDirectory, Index], T]) -> asyncio.Future[T]:
        """Work on the directory and its index, in its turn on the disk's thread."""
        assert self._index is not None
        return self._on_disk(work, self.directory, self._index)

    def close(self) -> None:
        """Waits for what the disk has in hand."""
        self._disk.shutdown(wait=True, cancel_futures=True)
        if self._index is not None:
            self._index.close()

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
            "url": oid.url,
            "etag": oid.etag,
            "start": start,
            "end": end,
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.first % BLOCKS_PER_EXTENT,
        }
        state = self._origins.of(oid.url, action.source)
        if action.source:
            result = await self._borrow(action, request, state)
        else:
            result = await self.fetcher.fetch(request, state)
        first, end_block = action.first, action.end
        if result.error is None:
            took = (result.write_s, result.seconds, action.source, action.source)
            self._tell(m.BlocksLanded(extent, action.generation, first, end_block, end - start, *took))
            return
        if isinstance(result.error, ObjectChanged):
            self._on_changed(oid)
        landed = first + result.num_whole_blocks
        self._tell(m.BlocksFailed(extent, action.generation, first, end_block, result.error, landed, action.source))

    async def _borrow(self, action: m.FetchBlocks, request: dict[str, Any], state: OriginState) -> FetchResult:
        assert self.peers is not None
        oid, address = action.object_id, self.peers.address_of(action.source)
        silence_s = 0.0
        if address is None:
            result = FetchResult(error=PeerError(f"peer {action.source} is known no longer", reason="dead"))
        else:
            peer = {"node": action.source, "host": address[0], "port": address[1], "size_bytes": oid.size_bytes}
            peer |= {"content_id": oid.content_id, "first": action.first, "end": action.end}
            silence_s = self.peers.silence_s(action.source)
            result = await self.fetcher.borrow(request, peer, state, self._origins.of(oid.url), silence_s)
        if result.error is None:
            self.peers.heard(action.source, result.silence_s)
        elif isinstance(result.error, PeerError):
            is_out = self.peers.failed(action.source, result.error, silence_s)
            if not is_out and result.error.reason in OUT_OF_USE:
                # It is still the owner, so these blocks come from the origin.
                result = FetchResult(error=PeerError(result.error.message, reason="busy"))
        elif isinstance(result.error, OriginUnavailable):
            # Our own worker died.
            result = FetchResult(error=PeerError(result.error.message, reason="failed"))
        return result

    async def check(self, action: m.CheckBlocks) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        start, end = run_span(action.object_id.size_bytes, action.first, action.end)
        request = {
            "op": "check",
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.first % BLOCKS_PER_EXTENT,
            "length": end - start,
            "from_device": action.from_device,
        }
        sound, read_s, disk_error = (False,) * (action.end - action.first), 0.0, None
        try:
            header = (await self._from_worker(request)).header
            sound, read_s = tuple(map(bool, header["sound"])), float(header["read_s"])
        except CacheError as error:
            disk_error = error if isinstance(error, DiskError) else None
            log.warning(
                "blocks %d to %d of %s cannot be read back: %s", action.first, action.end, action.object_id.url, error
            )
        for block in (block for block, is_sound in enumerate(sound, start=action.first) if not is_sound):
            log.warning("block %d of %s is not what was written: discarded", block, action.object_id.url)
        self._tell(m.BlocksChecked(extent, action.generation, action.first, sound, disk_error, read_s))

    def create(self, action: m.CreateExtent) -> Coroutine[Any, Any, None]:
        """Queues the work at once, so that the disk sees files come and go in the machine's order; what is returned waits for it."""
        return self._create(action, self._on_disk(self._create_on_disk, action))

    async def probe(self, action: m.ProbeDisk) -> None:
        """A probe that takes long is one that failed."""
        error: DiskError | None = None
        started = time.monotonic()
        try:
            async with asyncio.timeout(DISK_TIMEOUT_S):
                await self._on_disk(probe_disk, self.directory)
        except DiskError as failed:
            error = failed
        except TimeoutError:
            error = slow_disk_error("the probe of the disk", DISK_TIMEOUT_S)
        seconds = time.monotonic() - started
        if error is None and seconds > SLOW_S:
            error = slow_disk_error("the probe of the disk", seconds)
        self._tell(m.DiskProbed(error))

    async def watch_disk(self, budget: Budget) -> None:
        """Looks now and then at what the file system has left, and whether it answers at all. Never returns."""
        while True:
            # What the disk thread has been given until now is done before it looks, so these are the figures of that moment.
            used_bytes, num_files = budget.used_bytes, budget.num_files
            look = self._on_disk(disk_space, self.directory.path)
            try:
                # Not wait_for: until Python 3.12 it loses a cancellation that comes with the answer, and the daemon would never end.
                async with asyncio.timeout(DISK_TIMEOUT_S):
                    space = await asyncio.shield(look)
                self.space = space
                self._tell(m.DiskSeen(used_bytes, num_files, space.free_bytes, space.free_files))
            except DiskError as error:
                self._tell(m.DiskTroubled(error))
            except TimeoutError:
                self._tell(m.DiskTroubled(slow_disk_error("a look at the disk", DISK_TIMEOUT_S)))
                await asyncio.wait([look])
            await asyncio.sleep(WATCH_EVERY_S)

    async def _create(self, action: m.CreateExtent, made: asyncio.Future[None]) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        started = time.monotonic()
        with self._starvation.watch() as watch:
            try:
                await made
            except CacheError as error:
                log.warning("%s", error)
                self._tell(m.ExtentFailed(extent, action.generation, error))
                return
            seconds = watch.without(time.monotonic() - started)
        self._tell(m.ExtentCreated(extent, action.generation))
        if seconds > SLOW_S:
            self._tell(m.DiskTroubled(slow_disk_error("making a file", seconds)))

    def _create_on_disk(self, action: m.CreateExtent) -> None:
        assert self._index is not None
        label = ExtentLabel(action.object_id, action.extent_idx)
        create_extent(self.directory, label, action.generation)
        with index_errors():
            self._index.add([IndexRow(action.object_id, action.extent_idx, action.generation, label.file_bytes)])

    def remove(self, action: m.RemoveExtent) -> Coroutine[Any, Any, None]:
        """As `create`."""
        return self._remove(action, self._on_disk(self._remove_on_disk, action))

    async def _remove(self, action: m.RemoveExtent, removed: asyncio.Future[int]) -> None:
        size = await removed
        self.holds.was_evicted(action, size > 0, size)

    def _remove_on_disk(self, action: m.RemoveExtent) -> int:
        """Bytes of a file that is held by somebody, or that the disk refuses to remove; 0 when it has gone."""
        assert self._index is not None
        try:
            is_left = retire_extent(self.directory, action.extent, action.generation)
        except OSError as error:
            log.warning("cannot remove an evicted file, which counts until it can be: %s", error)
            is_left = True
        with index_errors():
            self._index.remove([(action.extent, action.generation)])
        return held_bytes(self.directory, action.extent, action.generation) if is_left else 0

    def remove_held(self, action: m.RemoveHeld) -> Coroutine[Any, Any, None]:
        """As `create`."""
        return self._remove_held(action, self._on_disk(self._remove_held_on_disk, action))

    async def _remove_held(self, action: m.RemoveHeld, removed: asyncio.Future[bool]) -> None:
        self.holds.was_let_go(action, not await removed)

    def _remove_held_on_disk(self, action: m.RemoveHeld) -> bool:
        """Whether it is gone."""
        try:
            return remove_if_let_go(self.directory, action.extent, action.generation)
        except OSError as error:
            log.warning("cannot remove an evicted file, which counts until it can be: %s", error)
            return False

    async def read_table(self, action: m.ReadTable) -> None:
        path = str(self.directory.extent_path(action.extent, action.generation))
        try:
            frame = await self._from_worker({"op": "table", "path": path})
            said = ExtentId(frame.header["content_id"], frame.header["extent_idx"])
            if said != action.extent:
                raise CorruptBlock(f"{path} says that it is {said}")
        except CacheError as error:
            log.warning("%s: fetched again", error.message)
            self._tell(m.ExtentFailed(action.extent, action.generation, error))
            return
        first = action.extent.extent_idx * BLOCKS_PER_EXTENT
        present = frozenset(first + slot for slot in frame.header["present"])
        self._tell(m.ExtentTableRead(action.extent, action.generation, present))
