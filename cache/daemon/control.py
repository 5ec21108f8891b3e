"""The control process: feeds the residency machine with what happened and performs what it asks for. Never touches payload.

Everything runs on one event loop; blocking work on the disk goes to one thread, in order, so that an unlink always precedes the file
that is made in its place. Shutdown is a path of its own (`close`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from cache.blocks import BLOCKS_PER_EXTENT, EXTENT_BYTES, ExtentId, ObjectId, block_span, blocks_of
from cache.daemon import wire
from cache.daemon.config import DaemonConfig
from cache.daemon.pool import WorkerPool
from cache.daemon.words import Words
from cache.errors import CacheError, CorruptBlock, ObjectChanged, OriginUnavailable
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.budget import Budget
from cache.residency.machine import Residency
from cache.residency.retry import RetryPolicy
from cache.residency.slots import HEARTBEAT_WORD
from cache.residency.state import Limits
from cache.store.directory import CacheDirectory
from cache.store.files import create_extent, remove_extent
from cache.store.format import HEADER_BYTES, ExtentHeader
from cache.store.index import Index, IndexRow
from cache.store.recovery import Recovered, recover

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

NUM_WORDS = 1 << 24
"""16 M words of 8 bytes: blocks of 64 TiB. Sparse, so unused ones cost nothing."""

HEARTBEAT_S = 0.5

MAX_HEADS_AT_ONCE = 64
"""A window of an announced order may name thousands of objects; asking for all at once is how 503s begin."""

MAX_HEADS = 16_384
"""How many answers to HEAD are kept before those that have expired are thrown out."""

HEAD_RETRY = RetryPolicy(max_attempts=5, base_s=0.1, cap_s=2.0)


class Control:
    def __init__(self, config: DaemonConfig, directory: CacheDirectory) -> None:
        self.config = config
        self.directory = directory
        self.words = Words(NUM_WORDS)
        self.pool = WorkerPool(config.num_workers)
        self.residency = Residency(
            Budget(config.capacity_bytes, config.max_files),
            limits=Limits(config.max_in_flight, config.max_in_flight // 4, HEADER_BYTES),
            rng=random.Random(),
            num_words=NUM_WORDS,
        )
        self.daemon_id = uuid.uuid4().hex
        """Of this process: a reader must not mix two daemons' words and generations."""
        self.on_held_evicted: Callable[[Iterable[str]], None] = lambda client_ids: None
        """Called with the readers that hold a file which was evicted."""
        self.recovered = Recovered()
        self.started_s = time.monotonic()
        self.resident_bytes_at_start = 0
        self._index: Index | None = None
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._tasks: set[asyncio.Task[None]] = set()
        self._request_ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[m.Answer]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._heads: dict[str, tuple[float, asyncio.Task[ObjectId]]] = {}
        self._latest: dict[str, ObjectId] = {}
        self._generations: dict[tuple[str, str], ObjectId] = {}
        self._rng = random.Random()
        self._head_slots = asyncio.Semaphore(MAX_HEADS_AT_ONCE)

    # -- life --

    async def start(self) -> None:
        self.pool.start()
        self._index, self.recovered = await self._on_disk(self._recover)
        for row in sorted(self.recovered.rows, key=lambda row: row.generation):
            self._step(m.ExtentFound(row.object_id, row.extent_idx, row.generation, row.file_bytes, None))
            self._remember(row.object_id)
        self.resident_bytes_at_start = self.residency.budget.used_bytes
        # The capacity may have been made smaller since the last run: evict down to it before anybody reads.
        self._step(m.CapacityChanged(self.config.capacity_bytes))
        self._spawn(self._beat())

    async def _beat(self) -> None:
        """Readers that wait watch this word: a daemon that is frozen or stuck must not hold them up."""
        for beat in itertools.count(1):
            self.words.publish(HEARTBEAT_WORD, beat)
            await asyncio.sleep(HEARTBEAT_S)

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

    async def close(self) -> None:
        """Ends everything within about a second. What is resident stays for the next start."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._tasks, *(task for _, task in self._heads.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.pool.close()
        self._disk.shutdown(wait=True, cancel_futures=True)
        if self._index is not None:
            self._index.close()
        self.words.close()

    # -- what sessions ask --

    async def open_object(self, client_id: str, url: str, etag: str | None) -> ObjectId:
        """The object, known to the machine from now on. With `etag`: that generation, or ObjectChanged. Raises OriginError."""
        known = self._generations.get((url, etag)) if etag is not None else None
        # A generation that is still known here serves those who opened it, also after the origin has a newer one.
        object_id = known if known is not None else await self._head(url)
        if etag is not None and object_id.etag != etag:
            raise ObjectChanged(
                f"{url} was {etag} when it was opened and is {object_id.etag} now",
                advice="open it again to read the new generation",
                url=url,
            )
        self._step(m.ObjectOpened(client_id, object_id))
        return object_id

    async def want(
        self, client_id: str, content_id: str, first: int, end: int, hand_over: Callable[[m.Answer], T]
    ) -> T:
        """Waits until the blocks [first, end) of one extent are readable; `hand_over(answer)` is called while the extent cannot be
        evicted. Raises CacheError."""
        request_id = next(self._request_ids)
        try:
            return hand_over(await self._ask(m.BlocksWanted(request_id, client_id, content_id, first, end)))
        finally:
            self._step(m.WantSettled(request_id))

    async def check(self, client_id: str, extent: ExtentId) -> m.Answer:
        return await self._ask(m.CheckAsked(next(self._request_ids), client_id, extent))

    def tell(self, event: m.Event) -> None:
        """An event that nobody waits for the answer of."""
        self._step(event)

    async def announce(
        self, client_id: str, stream_id: str, urls: list[str], visits: list[tuple[int, int, int]]
    ) -> None:
        """A reader's order: (index into urls, offset, length). Objects are opened on the way; of one that cannot be opened nothing
        is fetched ahead."""
        opened = [self.open_object(client_id, url, None) for url in urls]
        objects = await asyncio.gather(*opened, return_exceptions=True)
        planned = []
        for url_idx, offset, length in visits:
            object_id = objects[url_idx]
            if isinstance(object_id, BaseException):
                # It keeps its place: the reader counts visits, and will meet the error itself.
                planned.append(Visit("", 0, 0))
                continue
            span = blocks_of(object_id.size_bytes, offset, length)
            planned.append(Visit(object_id.content_id, span.start, span.stop))
        self._step(m.OrderAnnounced(client_id, stream_id, tuple(planned)))

    async def list_objects(self, url: str) -> list[dict[str, Any]]:
        frame = await self._with_retry(lambda: self.pool.request({"op": "list", "url": url}))
        return list(frame.header["objects"])

    def status(self) -> dict[str, Any]:
        """The daemon's account; the keys are documented in docs/cache.md."""
        residency = self.residency
        budget = residency.budget
        return {
            "daemon_id": self.daemon_id,
            "dir": str(self.config.dir),
            "socket": str(self.config.socket),
            "uptime_s": round(time.monotonic() - self.started_s, 3),
            "capacity_bytes": budget.capacity_bytes,
            "used_bytes": budget.used_bytes,
            "held_bytes": budget.held_bytes,
            "max_files": budget.max_files,
            "files": budget.num_files,
            "extents": residency.num_extents,
            "resident_bytes_at_start": self.resident_bytes_at_start,
            "in_flight_blocks": residency.in_flight,
            "waiting_requests": residency.num_waiting,
            "streams": residency.lookahead.num_streams,
            "announced_visits": residency.lookahead.num_announced,
            "worker_restarts": self.pool.num_restarts,
            "counters": asdict(residency.counters),
            "recovery": {
                "extents": len(self.recovered.rows),
                "adopted": self.recovered.num_adopted,
                "discarded": self.recovered.num_discarded,
                "lost": self.recovered.num_lost,
            },
        }

    # -- metadata --

    async def _head(self, url: str) -> ObjectId:
        """HEAD, shared by all who ask within the time to live. When the origin is away the generation seen last serves on."""
        now = time.monotonic()
        if len(self._heads) > MAX_HEADS:
            ttl_s = self.config.metadata_ttl_s
            self._heads = {u: (s, t) for u, (s, t) in self._heads.items() if not t.done() or now - s < ttl_s}
        cached = self._heads.get(url)
        if cached is not None and (not cached[1].done() or now - cached[0] < self.config.metadata_ttl_s):
            task = cached[1]
        else:
            task = asyncio.create_task(self._head_origin(url))
            self._heads[url] = (now, task)
        try:
            # Shielded: one reader that goes away must not take the answer from the others.
            object_id = await asyncio.shield(task)
        except OriginUnavailable:
            self._heads.pop(url, None)
            known = self._latest.get(url)
            if known is None:
                raise
            log.warning("%s: the origin does not answer; going on with the generation seen last (%s)", url, known.etag)
            return known
        except CacheError:
            self._heads.pop(url, None)
            raise
        self._latest[url] = object_id
        self._remember(object_id)
        return object_id

    def _remember(self, object_id: ObjectId) -> None:
        if len(self._generations) > 2 * self.residency.num_objects + 1000:
            # What the machine has forgotten (closed everywhere, nothing on disk) need not be remembered here.
            is_known = self.residency.is_known
            self._generations = {key: oid for key, oid in self._generations.items() if is_known(oid.content_id)}
            self._latest = {url: oid for url, oid in self._latest.items() if is_known(oid.content_id)}
        self._latest[object_id.url] = object_id
        self._generations[object_id.url, object_id.etag] = object_id

    async def _head_origin(self, url: str) -> ObjectId:
        async with self._head_slots:
            frame = await self._with_retry(lambda: self.pool.request({"op": "head", "url": url}))
        info = frame.header["info"]
        return ObjectId(info["url"], info["etag"], info["size_bytes"])

    async def _with_retry(self, request: Callable[[], Awaitable[T]]) -> T:
        attempts = 0
        while True:
            try:
                return await request()
            except CacheError as error:
                attempts += 1
                asked_s = getattr(error, "retry_after_s", None)
                delay_s = HEAD_RETRY.delay_s(attempts, asked_s, self._rng) if error.is_retryable else None
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)

    async def _from_worker(self, request: dict[str, Any]) -> wire.Frame:
        """A worker's answer about a local file; asked again when the worker dies meanwhile, which is not the file's fault."""
        for _ in range(HEAD_RETRY.max_attempts - 1):
            try:
                return await self.pool.request(request)
            except OriginUnavailable:
                await asyncio.sleep(HEAD_RETRY.base_s)
        return await self.pool.request(request)

    # -- the loop around the machine --

    async def _ask(self, event: m.BlocksWanted | m.CheckAsked) -> m.Answer:
        future: asyncio.Future[m.Answer] = asyncio.get_running_loop().create_future()
        self._answers[event.request_id] = future
        try:
            self._step(event)
            answer = await future
        finally:
            self._answers.pop(event.request_id, None)
        if answer.error is not None:
            raise answer.error
        return answer

    def _step(self, event: m.Event) -> None:
        for action in self.residency.step(event, time.monotonic()):
            self._perform(action)
        self._set_timer()

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.PublishWord(word_idx, value):
                self.words.publish(word_idx, value)
            case m.Answer(request_id):
                future = self._answers.get(request_id)
                if future is not None and not future.done():
                    future.set_result(action)
            case m.FetchBlock():
                self._spawn(self._fetch(action))
            case m.CheckBlock():
                self._spawn(self._check(action))
            case m.CreateExtent():
                self._spawn(self._create(action, self._on_disk(self._create_on_disk, action)))
            case m.RemoveExtent():
                ghost = self.residency.budget.ghosts.get((action.extent, action.generation))
                if ghost is not None:
                    self.on_held_evicted(list(ghost.holders))
                self._spawn(self._remove(self._on_disk(self._remove_on_disk, action)))
            case m.ReadTable():
                self._spawn(self._read_table(action))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self.residency.next_deadline_s()
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, lambda: self._step(m.TimePassed()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the daemon failed", exc_info=task.exception())

    def _on_disk(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, work, *args)

    # -- actions --

    async def _fetch(self, action: m.FetchBlock) -> None:
        oid = action.object_id
        extent = ExtentId(oid.content_id, action.extent_idx)
        start, end = block_span(oid.size_bytes, action.block)
        request = {
            "op": "fetch",
            "url": oid.url,
            "etag": oid.etag,
            "start": start,
            "end": end,
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.block % BLOCKS_PER_EXTENT,
            "offset": start - action.extent_idx * EXTENT_BYTES,
        }
        try:
            await self.pool.request(request)
        except CacheError as error:
            if isinstance(error, ObjectChanged):
                self._forget_head(oid)
            self._step(m.BlockFailed(extent, action.generation, action.block, error))
        else:
            self._step(m.BlockLanded(extent, action.generation, action.block, end - start))

    def _forget_head(self, object_id: ObjectId) -> None:
        """The origin has another generation: the next open must ask."""
        log.warning("%s changed at the origin; it was %s", object_id.url, object_id.etag)
        self._heads.pop(object_id.url, None)
        if self._latest.get(object_id.url) == object_id:
            del self._latest[object_id.url]

    async def _check(self, action: m.CheckBlock) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        start, end = block_span(action.object_id.size_bytes, action.block)
        request = {
            "op": "check",
            "path": str(self.directory.extent_path(extent, action.generation)),
            "slot": action.block % BLOCKS_PER_EXTENT,
            "offset": start - action.extent_idx * EXTENT_BYTES,
            "length": end - start,
        }
        is_sound = False
        with contextlib.suppress(CacheError):
            is_sound = bool((await self._from_worker(request)).header["is_sound"])
        if not is_sound:
            log.warning("block %d of %s does not match its checksum: discarded", action.block, action.object_id.url)
        self._step(m.BlockChecked(extent, action.generation, action.block, is_sound))

    async def _create(self, action: m.CreateExtent, made: asyncio.Future[None]) -> None:
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        try:
            await made
        except CacheError as error:
            log.warning("%s", error)
            self._step(m.ExtentFailed(extent, action.generation, error))
        else:
            self._step(m.ExtentCreated(extent, action.generation))

    def _create_on_disk(self, action: m.CreateExtent) -> None:
        assert self._index is not None
        header = ExtentHeader(action.object_id, action.extent_idx)
        create_extent(self.directory, header, action.generation)
        with _index_errors():
            self._index.add([IndexRow(action.object_id, action.extent_idx, action.generation, header.file_bytes)])

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

    async def _read_table(self, action: m.ReadTable) -> None:
        path = str(self.directory.extent_path(action.extent, action.generation))
        try:
            frame = await self._from_worker({"op": "table", "path": path})
            if frame.header["content_id"] != action.extent.content_id:
                raise CorruptBlock(f"{path} says it belongs to {frame.header['content_id']}")
        except CacheError as error:
            log.warning("%s: fetched again", error.message)
            self._step(m.ExtentFailed(action.extent, action.generation, error))
            return
        first = action.extent.extent_idx * BLOCKS_PER_EXTENT
        present = frozenset(first + slot for slot in frame.header["present"])
        self._step(m.ExtentTableRead(action.extent, action.generation, present))


@contextlib.contextmanager
def _index_errors() -> Iterator[None]:
    """The index only saves time at the next start: that it cannot be written is said and survived."""
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the index cannot be written (%s); the next start reads the files instead", error)
