"""A cold epoch in simulated time: the daemon's own machine over a modelled link, one reader, faults if wanted. Deterministic.

Everything that is decided is decided by `cache.residency`; what is modelled is the link of benchmarks/shaping_proxy.py (time to the first
byte, a rate per connection and in all, pieces of 256 KiB sent in the order in which they may go), a reader that takes one sample after the
other, and steps that run while the next batch is read. Computing costs no time, so what an epoch loses here was lost by decisions.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.shaping import TokenBucket
from cache.blocks import ExtentId, ObjectId, blocks_of, run_span
from cache.daemon.config import AT_ONCE
from cache.errors import OriginThrottled
from cache.order.batches import Cursor
from cache.order.lookahead import Visit
from cache.order.schedule import Schedule
from cache.order.shuffle import Full
from cache.residency import messages as m
from cache.residency.budget import Budget
from cache.residency.machine import Residency
from cache.residency.state import Limits

PIECE_BYTES = 256 * 1024
FIRST_VISITS = 64
"""Told by a reader before the rest of its order."""

HEADER_BYTES = 8192


@dataclass(frozen=True)
class Link:
    """`throttle_share` of the requests are refused with Retry-After: `retry_after_s`; the body of `cut_share` ends somewhere."""

    first_byte_s: float = 0.03
    rate_per_connection: float = 60e6
    rate_total: float = 200e6
    throttle_share: float = 0.0
    cut_share: float = 0.0
    retry_after_s: float = 1.0


@dataclass(frozen=True)
class Task:
    """`step_s`: 0 for none. `starts_s`: when the order is known, after the listing and the index. `stride`: from sample to sample."""

    num_shards: int
    samples_per_shard: int
    sample_bytes: int = 192 * 1024
    stride: int = 192 * 1024 + 512
    batch_size: int = 16
    step_s: float = 0.0
    starts_s: float = 0.075
    seed: int = 1

    def visits(self) -> list[Visit]:
        """In the order of reading."""
        sizes = (self.samples_per_shard,) * self.num_shards
        schedule = Schedule(sizes, self.batch_size, self.seed, Full())
        visits = []
        for place, samples in schedule.batches(Cursor(0, 0), rank=0, world_size=1):
            if place.epoch > 0:
                break
            for sample in samples.tolist():
                shard_idx, nth = divmod(sample, self.samples_per_shard)
                shard = self.shard(shard_idx)
                start = nth * self.stride + self.stride - self.sample_bytes
                span = blocks_of(shard.size_bytes, start, self.sample_bytes)
                visits.append(Visit(shard.content_id, span.start, span.stop))
        return visits

    def shard(self, idx: int) -> ObjectId:
        return ObjectId(f"s3://data/{idx:05d}.tar", '"1"', self.samples_per_shard * self.stride)


@dataclass
class Result:
    """`busy`: share of the time in which the accelerator computes; `link`: samples' bytes, of what the link could bring in that time."""

    elapsed_s: float
    first_batch_s: float
    busy: float
    link: float
    num_requests: int
    num_refused: int
    num_cut: int


class ColdEpoch:
    """`run()` once."""

    def __init__(self, task: Task, link: Link) -> None:
        self._task, self._link = task, link
        budget = Budget(2 * task.num_shards * task.samples_per_shard * task.stride, 1_000_000)
        limits = Limits(AT_ONCE, AT_ONCE // 4, HEADER_BYTES)
        self._machine = Residency(budget, limits=limits, rng=random.Random(task.seed), num_words=1 << 26)
        self._rng = random.Random(task.seed)
        self._now = task.starts_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._total = TokenBucket(link.rate_total)
        self._deadline_s: float | None = None
        self._answered: dict[int, Callable[[], None]] = {}
        self._visits = task.visits()
        self._num_read = 0
        self._free_s = 0.0
        self._first_batch_s = 0.0
        self._num = {"requests": 0, "refused": 0, "cut": 0}

    def run(self) -> Result:
        task = self._task
        for idx in range(task.num_shards):
            self._step(m.ObjectOpened("reader", task.shard(idx)))
        for visits in (self._visits[:FIRST_VISITS], self._visits[FIRST_VISITS:]):
            self._step(m.OrderAnnounced("reader", "order", tuple(visits)))
        self._read()
        while self._num_read < len(self._visits):
            self._now, _, act = heapq.heappop(self._events)
            act()
        num_bytes, num_steps = len(self._visits) * task.sample_bytes, len(self._visits) // task.batch_size
        elapsed_s = max(self._free_s, self._now)
        share = num_bytes / elapsed_s / self._link.rate_total
        num = self._num
        return Result(
            elapsed_s,
            self._first_batch_s,
            num_steps * task.step_s / elapsed_s,
            share,
            num["requests"],
            num["refused"],
            num["cut"],
        )

    # -- the reader --

    def _read(self) -> None:
        request_id, visit = self._num_read + 1, self._visits[self._num_read]
        self._answered[request_id] = lambda: self._came(request_id)
        self._step(m.BlocksWanted(request_id, "reader", visit.content_id, visit.first, visit.end))

    def _came(self, request_id: int) -> None:
        self._step(m.WantSettled(request_id))
        self._num_read += 1
        begins_s = self._now
        if self._num_read % self._task.batch_size == 0:
            self._first_batch_s = self._first_batch_s or self._now
            begins_s = max(self._now, self._free_s)
            self._free_s = begins_s + self._task.step_s
            if self._num_read % FIRST_VISITS == 0:
                self._step(m.OrderAdvanced("order", self._num_read))
        if self._num_read < len(self._visits):
            self._at(begins_s, self._read)  # The next batch is read while this one's step runs.

    # -- the world around the machine --

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def _step(self, event: m.Event) -> None:
        for action in self._machine.step(event, self._now):
            match action:
                case m.CreateExtent(object_id, extent_idx, generation):
                    created = m.ExtentCreated(ExtentId(object_id.content_id, extent_idx), generation)
                    self._at(self._now, lambda created=created: self._step(created))  # type: ignore[misc]
                case m.FetchBlocks():
                    start, end = run_span(action.object_id.size_bytes, action.first, action.end)
                    self._request(action, end - start, self._now)
                case m.Answer(request_id, _, _, error):
                    assert error is None, error
                    self._at(self._now, self._answered.pop(request_id))
                case _:
                    pass
        deadline_s = self._machine.next_deadline_s()
        if deadline_s is not None and deadline_s != self._deadline_s:
            self._deadline_s = deadline_s
            self._at(max(self._now, deadline_s), self._time_passed)

    def _time_passed(self) -> None:
        self._deadline_s = None
        self._step(m.TimePassed())

    def _request(self, action: m.FetchBlocks, missing: int, began_s: float) -> None:
        """What is missing of a run; what a cut leaves is asked for at once, as the daemon's fetcher does."""
        self._num["requests"] += 1
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        draw = self._rng.random()
        if draw < self._link.throttle_share:
            self._num["refused"] += 1
            error = OriginThrottled("SlowDown", url=action.object_id.url, retry_after_s=self._link.retry_after_s)
            failed = m.BlocksFailed(extent, action.generation, action.first, action.end, error)
            self._at(self._now + 0.001, lambda: self._step(failed))
            return
        is_cut = draw < self._link.throttle_share + self._link.cut_share
        self._num["cut"] += is_cut
        comes = int(missing * self._rng.random()) if is_cut else missing

        def done() -> None:
            if comes < missing:
                self._request(action, missing - comes, 0.0)
                return
            seconds = self._now - began_s if began_s else 0.0
            start, end = run_span(action.object_id.size_bytes, action.first, action.end)
            origin = self._machine.origins.of(action.object_id.url)
            if began_s:
                origin.landed(end - start, seconds, self._link.first_byte_s, self._now)
            landed = m.BlocksLanded(extent, action.generation, action.first, action.end, end - start, 0.0, seconds)
            self._step(landed)

        own = TokenBucket(self._link.rate_per_connection)
        self._at(self._now + self._link.first_byte_s, lambda: self._send(comes, own, done))

    def _send(self, left: int, own: TokenBucket, done: Callable[[], None]) -> None:
        if left == 0:
            done()
            return
        piece = min(left, PIECE_BYTES)
        wait_s = max(own.reserve(piece, self._now), self._total.reserve(piece, self._now))
        self._at(self._now + wait_s, lambda: self._send(left - piece, own, done))
