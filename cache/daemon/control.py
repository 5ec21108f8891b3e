"""The control process: feeds the residency machine with what happened and performs what it asks for. Never touches payload.

Everything runs on one event loop. What actions mean on disk and workers is hands.py; which generation a url is now, catalogue.py.
Shutdown is a path of its own (`close`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from cache.blocks import ExtentId, ObjectId, blocks_of
from cache.daemon.catalogue import Catalogue
from cache.daemon.config import DaemonConfig
from cache.daemon.foretelling import Foretelling
from cache.daemon.hands import Hands
from cache.daemon.indexes import Indexes
from cache.daemon.lending import Lending
from cache.daemon.outlines import Outlines
from cache.daemon.peerconfig import PeerConfig
from cache.daemon.peers import Peers, listen, node_id_of
from cache.daemon.people import People
from cache.daemon.pool import Greeting, WorkerPool
from cache.daemon.restoring import Restoring
from cache.daemon.words import Words
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.budget import Budget, Floor
from cache.residency.health import Health
from cache.residency.machine import Residency
from cache.residency.slots import HEARTBEAT_WORD
from cache.residency.state import Limits
from cache.store.directory import CacheDirectory
from cache.store.files import disk_space
from cache.store.format import LABEL_BYTES

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

NUM_WORDS = 1 << 26
"""64 M words of 8 bytes: blocks of 16 TiB. Sparse, so unused ones cost nothing."""

HEARTBEAT_S = 0.5

VISITS_AT_ONCE = 256
"""Of an announced order, taken in before anybody else has a turn: about 2 ms."""


class Control:
    def __init__(self, config: DaemonConfig, directory: CacheDirectory) -> None:
        self.config = config
        self.directory = directory
        self.words = Words(NUM_WORDS)
        self.pool = WorkerPool(config.num_workers)
        space = disk_space(directory.path)
        floor = Floor(config.keep_free.of(space.total_bytes), config.keep_free_files.of(space.total_files or 0))
        self.residency = Residency(
            Budget(config.capacity_bytes, config.max_files, keep_free=floor),
            limits=Limits(config.fetches_at_once, config.fetches_at_once // 4, LABEL_BYTES, config.scrub_bytes_per_s),
            rng=random.Random(),
            num_words=NUM_WORDS,
        )
        self.catalogue = Catalogue(self.pool, self.residency, config.metadata_ttl_s)
        self.hands = Hands(directory, self.pool, self.residency.origins, self._step, self.catalogue.forget)
        self.peers: Peers | None = None
        self.daemon_id = uuid.uuid4().hex
        """Of this process: a reader must not mix two daemons' words and generations."""
        self.on_held_evicted: Callable[[Iterable[str]], None] = lambda client_ids: None
        """Called with the readers that hold a file which was evicted."""
        self.restoring = Restoring(self.hands.with_index, self._step, self.catalogue.remember, self.hands.holds.found)
        self.catalogue.all_known = self.restoring.finished
        self.started_s = time.monotonic()
        self.resident_bytes_at_start = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._request_ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[m.Answer]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._health_said_s = 0.0
        self._listener: socket.socket | None = None
        self.people = People(self)
        self.foretelling = Foretelling(self.residency)
        self.outlines = Outlines(self._step)
        self.indexes = Indexes(
            directory.path,
            lambda: self.residency.budget.capacity_bytes,
            self._ask,
            self._step,
            self._request_ids,
            lambda: self.hands.with_index(lambda directory, index: None),
        )

        if config.peers is not None:
            self._join(config.peers)

    def _join(self, config: PeerConfig) -> None:
        """Makes this daemon a peer of others. Raises CacheConfigError."""
        key, node_id = config.read_key(), node_id_of(self.directory.path)
        listener = listen(config)
        lending = Lending(self, node_id, on_loopback=config.is_loopback)
        tls = [str(path) for path in config.tls] if config.tls is not None else None
        header = {"op": "peers", "key": key.hex(), "node_id": node_id, "listener": listener.fileno(), "tls": tls}
        self.pool.greeting = Greeting(header, (listener.fileno(),), lending.answer)
        self.pool.on_gone = lending.worker_gone
        self._listener = listener
        capacity, origins = self.config.capacity_bytes, self.residency.origins
        changed = lambda: self._step(m.TimePassed())  # noqa: E731
        self.peers = Peers(config, key, node_id, self.daemon_id, capacity, origins, changed)
        self.hands.peers = self.peers

    @property
    def peer_address(self) -> str | None:
        """Where other nodes' daemons reach this one; None: they do not."""
        if self._listener is None:
            return None
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    # -- life --

    async def start(self) -> None:
        self.pool.start()
        await self.hands.open_index()
        await self.people.load_pins()
        await self.restoring.begin()
        await self.indexes.start()
        self.resident_bytes_at_start = self.residency.budget.used_bytes
        if self.residency.budget.is_exceeded:
            # The capacity was made smaller since the last run: evict down to it before anybody reads.
            await self.restoring.run()
        else:
            self._spawn(self.restoring.run())
        self._spawn(self._beat())
        self._spawn(self.foretelling.run())
        if self.peers is not None:
            # Once before anybody reads: else the first blocks would all be fetched by all.
            await self.peers.round()
            self._spawn(self.peers.run())
        self._spawn(self.hands.watch_disk(self.residency.budget))
        self._spawn(self.hands.holds.watch())
        if self.config.scrub_bytes_per_s:
            self._spawn(self._scrub())

    async def _beat(self) -> None:
        """Readers that wait watch this word: a daemon that is frozen or stuck must not hold them up."""
        for beat in itertools.count(1):
            self.words.publish(HEARTBEAT_WORD, beat)
            await asyncio.sleep(HEARTBEAT_S)

    async def _scrub(self) -> None:
        """Offers the machine a moment to read a block back; whether it is a good one is its decision."""
        while True:
            self._step(m.ScrubDue())
            await asyncio.sleep(max(0.02, self.residency.scrubber.next_s() - time.monotonic()))

    async def close(self) -> None:
        """Ends everything within about a second. What is resident stays for the next start."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.catalogue.close()
        await self.pool.close()
        if self._listener is not None:
            self._listener.close()
        self.indexes.close()
        self.hands.close()
        self.words.close()

    # -- what sessions ask --

    async def open_object(self, client_id: str, url: str, etag: str | None) -> ObjectId:
        """The object, known to the machine from now on. With `etag`: that generation, or ObjectChanged. Raises OriginError."""
        object_id = await self.catalogue.find(url, etag)
        self._step(m.ObjectOpened(client_id, object_id))
        return object_id

    async def want(
        self,
        client_id: str,
        content_id: str,
        first: int,
        end: int,
        hand_over: Callable[[m.Answer], T],
        *,
        for_peer: bool = False,
    ) -> T:
        """Waits until the blocks [first, end) of one extent are readable; `hand_over(answer)` is called while the extent cannot be
        evicted. Raises CacheError."""
        request_id = next(self._request_ids)
        try:
            return hand_over(await self._ask(m.BlocksWanted(request_id, client_id, content_id, first, end, for_peer)))
        finally:
            self._step(m.WantSettled(request_id))

    async def check(self, client_id: str, extent: ExtentId) -> m.Answer:
        return await self._ask(m.CheckAsked(next(self._request_ids), client_id, extent))

    def tell(self, event: m.Event) -> None:
        """An event that nobody waits for the answer of."""
        self._step(event)

    async def announce(
        self,
        client_id: str,
        stream_id: str,
        objects_asked: list[tuple[str, str | None]],
        visits: list[tuple[int, int, int]],
    ) -> None:
        """A reader's order: (index into the objects (url, etag), offset, length). Objects are opened on the way; of one that cannot be
        opened nothing is fetched ahead."""
        opened = [self.open_object(client_id, url, etag) for url, etag in objects_asked]
        objects = await asyncio.gather(*opened, return_exceptions=True)
        for start in range(0, len(visits), VISITS_AT_ONCE):
            planned = []
            for url_idx, offset, length in visits[start : start + VISITS_AT_ONCE]:
                object_id = objects[url_idx]
                if isinstance(object_id, BaseException):
                    # It keeps its place: the reader counts visits, and will meet the error itself.
                    planned.append(Visit("", 0, 0))
                    continue
                span = blocks_of(object_id.size_bytes, offset, length)
                planned.append(Visit(object_id.content_id, span.start, span.stop))
            self._step(m.OrderAnnounced(client_id, stream_id, tuple(planned)))
            await asyncio.sleep(0)  # What has landed meanwhile, and who waits for it, has its turn.
        for object_id in objects:
            if not isinstance(object_id, BaseException):
                self._step(
                    m.ObjectClosed(client_id, object_id.content_id)
                )  # What is announced is known for as long as that.

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
            "objects": residency.num_objects,
            "extents": residency.num_extents,
            "resident_bytes_at_start": self.resident_bytes_at_start,
            "in_flight_blocks": residency.in_flight,
            "waiting_requests": residency.num_waiting,
            "streams": residency.lookahead.num_streams,
            "announced_visits": residency.lookahead.num_announced,
            "worker_restarts": self.pool.num_restarts,
            "scrub_rounds": residency.scrubber.num_rounds,
            "disk": self._disk_status(),
            **({"peers": self.peers.account()} if self.peers is not None else {}),
            "origins": residency.origins.account(),
            "fetching": asdict(self.hands.fetcher.totals),
            "counters": asdict(residency.counters),
            "forecast": self.foretelling.account(),
            "pins": list(residency.residents.pins),
            "recovery": {
                "extents": self.restoring.stock.num_files,
                "adopted": self.restoring.stock.num_adopted,
                "discarded": self.restoring.stock.num_discarded,
                "lost": len(self.restoring.stock.lost),
                "objects_left": self.restoring.num_left,
            },
        }

    # -- the loop around the machine --

    async def _ask(self, event: m.BlocksWanted | m.CheckAsked | m.SpaceAsked) -> m.Answer:
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

    def _disk_status(self) -> dict[str, Any]:
        """The disk's health with its reasons, and what it has left for everybody."""
        health, space, now = self.residency.health, self.hands.space, time.monotonic()
        return {
            "state": health.state.value,
            "reason": health.reason,
            "for_s": round(now - health.since_s, 3) if health.since_s else None,
            "failures": dict(health.failures),
            "changes": [
                {"from": c.before.value, "to": c.after.value, "reason": c.reason, "ago_s": round(now - c.at_s, 3)}
                for c in health.history
            ],
            "free_bytes": space.free_bytes if space is not None else None,
            "free_files": space.free_files if space is not None else None,
            "bound_bytes": self.residency.budget.bound_bytes,
            "bound_files": self.residency.budget.bound_files,
        }

    def _step(self, event: m.Event) -> None:
        if isinstance(event, m.ObjectOpened) and self.restoring.num_left:
            self.restoring.learn(event.object_id)
        for action in self.residency.step(event, time.monotonic()):
            self._perform(action)
        self._say_health()
        self._set_timer()

    def _say_health(self) -> None:
        """One line per change: who reads the log learns when the disk went and came back, and why."""
        health = self.residency.health
        if health.since_s != self._health_said_s:
            self._health_said_s = health.since_s
            level = logging.INFO if health.state is Health.OK else logging.WARNING
            log.log(level, "the disk of %s is %s: %s", self.directory.path, health.state.value, health.reason)

    def _perform(self, action: m.Action) -> None:
        match action:
            case m.PublishWord(word_idx, value):
                self.words.publish(word_idx, value)
            case m.Answer(request_id):
                future = self._answers.get(request_id)
                if future is not None and not future.done():
                    future.set_result(action)
            case m.FetchBlocks():
                self._spawn(self.hands.fetch(action))
            case m.CheckBlocks():
                self._spawn(self.hands.check(action))
            case m.CreateExtent():
                self._spawn(self.hands.create(action))
            case m.RemoveExtent():
                ghost = self.residency.budget.ghosts.get((action.extent, action.generation))
                if ghost is not None:
                    self.on_held_evicted(list(ghost.holders))
                self._spawn(self.hands.remove(action))
            case m.RemoveHeld():
                self._spawn(self.hands.remove_held(action))
            case m.ComputeEpoch():
                self._spawn(self.outlines.compute(action))
            case m.ProbeDisk():
                self._spawn(self.hands.probe(action))
            case m.ReadTable():
                self._spawn(self.hands.read_table(action))

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
