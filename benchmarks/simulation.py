"""A node's cache in simulated time: the product's own residency machine, policy and schedules over a modelled link and modelled readers.

What is modelled is small: the link hands bytes over one after the other at `origin_bytes_per_s`, each request after `first_byte_s`; a
reader takes a step's samples as soon as they are resident and computes for as long as its rate says, while the next step's samples are
already asked for. Everything that is decided (what is fetched, in which order, what goes) is decided by `cache.residency`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cache.blocks import ExtentId, ObjectId, blocks_of, run_span
from cache.order.batches import Cursor
from cache.order.lookahead import Visit
from cache.order.outline import Part, Table, spans
from cache.order.prospect import Outline
from cache.order.schedule import Schedule, parse_shuffle
from cache.residency import messages as m
from cache.residency.budget import Budget
from cache.residency.machine import Residency
from cache.residency.policy import EvictionPolicy
from cache.residency.state import Limits


@dataclass(frozen=True)
class Data:
    """`num_shards` objects with `samples_per_shard` samples of `sample_bytes`."""

    num_shards: int
    samples_per_shard: int
    sample_bytes: int
    name: str = "data"

    @property
    def num_bytes(self) -> int:
        return self.num_shards * self.samples_per_shard * self.sample_bytes

    def shard(self, shard_idx: int) -> ObjectId:
        return ObjectId(f"s3://{self.name}/{shard_idx:05d}.tar", '"1"', self.samples_per_shard * self.sample_bytes)

    def table(self) -> Table:
        shards = tuple(self.shard(idx) for idx in range(self.num_shards))
        parts = (Part(idx, 0, shard.size_bytes, self.samples_per_shard) for idx, shard in enumerate(shards))
        return Table(shards, tuple(parts))


@dataclass(frozen=True)
class Job:
    """A reader: it needs `samples_per_s`; `lookahead` is how many samples it announces; `starts_at_s` after the first."""

    data: Data
    samples_per_s: float
    batch_size: int = 16
    shuffle: str = "full"
    seed: int = 0
    num_epochs: int = 3
    lookahead: int = 8192
    rank: int = 0
    world_size: int = 1
    starts_at_s: float = 0.0
    announces: bool = True
    outlines: bool = True
    """Whether it says, beyond its announced visits, what function its order is."""

    @property
    def schedule(self) -> Schedule:
        sizes = (self.data.samples_per_shard,) * self.data.num_shards
        return Schedule(sizes, self.batch_size, self.seed, parse_shuffle(self.shuffle))


@dataclass(frozen=True)
class Node:
    capacity_bytes: int
    origin_bytes_per_s: float
    first_byte_s: float = 0.03
    max_in_flight: int = 32


@dataclass
class EpochResult:
    """Of one epoch of one job. `utilisation`: computing, of the time that it took; `hit_ratio`: samples that were resident when they were
    asked for, of all; `origin_bytes`: what the node fetched while it ran (for all jobs)."""

    utilisation: float = 0.0
    hit_ratio: float = 0.0
    origin_bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Reader:
    job: Job
    name: str
    batches: Iterator[list[Visit]]
    ahead: list[list[Visit]] = field(default_factory=list)
    """Batches that were announced and not asked for yet."""
    num_announced: int = 0
    num_read: int = 0
    step: int = 0
    missing: int = 0
    free_at: float = 0.0
    began_at: float = 0.0
    num_waits: int = 0
    bytes_before: int = 0
    results: list[EpochResult] = field(default_factory=list)


class Simulation:
    """`run()` gives each job's epochs. Deterministic."""

    def __init__(self, node: Node, jobs: list[Job], policy: EvictionPolicy | None = None) -> None:
        self._node = node
        self._machine = Residency(
            Budget(node.capacity_bytes, 1_000_000),
            limits=Limits(node.max_in_flight, node.max_in_flight // 4),
            policy=policy,
            num_words=1 << 30,
        )
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._link_free_at = 0.0
        self._requests: dict[int, Callable[[], None]] = {}
        self._request_ids = itertools.count(1)
        self._readers = [_Reader(job, f"job{idx}", _visits(job)) for idx, job in enumerate(jobs)]
        self._tables: dict[Data, Table] = {}
        self.peak_bytes = 0

    def run(self) -> list[list[EpochResult]]:
        for reader in self._readers:
            self._at(reader.job.starts_at_s, lambda reader=reader: self._begin(reader))  # type: ignore[misc]
        while self._events:
            self._now, _, action = heapq.heappop(self._events)
            action()
            self.peak_bytes = max(self.peak_bytes, self._machine.budget.used_bytes)
        return [reader.results for reader in self._readers]

    # -- readers --

    def _begin(self, reader: _Reader) -> None:
        job = reader.job
        for shard_idx in range(job.data.num_shards):
            self._step(m.ObjectOpened(reader.name, job.data.shard(shard_idx)))
        reader.began_at = reader.free_at = self._now
        reader.bytes_before = self._machine.counters.fetched_bytes
        self._announce(reader)
        self._ask(reader)

    def _announce(self, reader: _Reader) -> None:
        local_size = reader.job.batch_size // reader.job.world_size
        visits: list[Visit] = []
        while len(reader.ahead) * local_size < reader.job.lookahead:
            batch = next(reader.batches, None)
            if batch is None:
                break
            reader.ahead.append(batch)
            visits += batch
        if visits and reader.job.announces:
            self._step(m.OrderAnnounced(reader.name, reader.name, tuple(visits)))
            if reader.job.outlines and not reader.num_announced:
                self._step(m.OrderOutlined(reader.name, reader.name, self._outline(reader.job)))
        reader.num_announced += len(visits)

    def _outline(self, job: Job) -> Outline:
        table = self._tables.setdefault(job.data, job.data.table())
        return Outline(table, job.schedule, job.rank, job.world_size, 0, 0, job.batch_size / job.world_size)

    def _ask(self, reader: _Reader) -> None:
        """The next step's samples are asked for, while the last step computes."""
        batch = reader.ahead.pop(0)
        reader.num_read += len(batch)
        reader.missing = len(batch)
        for visit in batch:
            request_id = next(self._request_ids)
            asked_at = self._now

            def came(request_id: int = request_id, asked_at: float = asked_at) -> None:
                reader.num_waits += self._now > asked_at
                self._step(m.WantSettled(request_id))
                reader.missing -= 1
                if not reader.missing:
                    self._at(max(self._now, reader.free_at), lambda: self._compute(reader))

            self._requests[request_id] = came
            self._step(m.BlocksWanted(request_id, reader.name, visit.content_id, visit.first, visit.end))

    def _compute(self, reader: _Reader) -> None:
        job = reader.job
        compute_s = job.batch_size / job.world_size / job.samples_per_s
        reader.free_at = self._now + compute_s
        reader.step += 1
        self._step(m.OrderAdvanced(reader.name, reader.num_read))
        steps = job.schedule.plan.num_steps
        if reader.step % steps == 0:
            seconds = reader.free_at - reader.began_at
            local_samples = steps * job.batch_size // job.world_size
            fetched = self._machine.counters.fetched_bytes
            reader.results.append(
                EpochResult(
                    utilisation=steps * compute_s / seconds,
                    hit_ratio=1 - reader.num_waits / local_samples,
                    origin_bytes=fetched - reader.bytes_before,
                    seconds=seconds,
                )
            )
            reader.began_at, reader.num_waits, reader.bytes_before = reader.free_at, 0, fetched
        if reader.step == steps * job.num_epochs:
            self._step(m.StreamClosed(reader.name))
            self._step(m.ClientGone(reader.name))
            return
        self._announce(reader)
        self._ask(reader)

    # -- the world around the machine --

    def _at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), action))

    def _step(self, event: m.Event) -> None:
        for action in self._machine.step(event, self._now):
            match action:
                case m.CreateExtent(object_id, extent_idx, generation):
                    extent = ExtentId(object_id.content_id, extent_idx)
                    self._tell(0.0, m.ExtentCreated(extent, generation))
                case m.FetchBlocks():
                    self._fetch(action)
                case m.Answer(request_id, _, _, error):
                    assert error is None, error
                    self._at(self._now, self._requests.pop(request_id))
                case m.ComputeEpoch(group, epoch, table, schedule, ranks, world_size):
                    found = spans(table, schedule, epoch, ranks=ranks, world_size=world_size)
                    self._tell(0.0, m.EpochComputed(group, epoch, found))
                case _:
                    pass

    def _fetch(self, action: m.FetchBlocks) -> None:
        num_bytes = _run_bytes(action)
        begins_at = max(self._now + self._node.first_byte_s, self._link_free_at)
        self._link_free_at = begins_at + num_bytes / self._node.origin_bytes_per_s
        extent = ExtentId(action.object_id.content_id, action.extent_idx)
        landed = m.BlocksLanded(extent, action.generation, action.first, action.end, num_bytes)
        self._tell(self._link_free_at - self._now, landed)

    def _tell(self, after_s: float, event: m.Event) -> None:
        self._at(self._now + after_s, lambda: self._step(event))


def _run_bytes(action: m.FetchBlocks) -> int:
    start, end = run_span(action.object_id.size_bytes, action.first, action.end)
    return end - start


def _visits(job: Job) -> Iterator[list[Visit]]:
    """What a job reads, batch by batch, over all its epochs."""
    data = job.data
    shards = [data.shard(idx) for idx in range(data.num_shards)]
    for place, samples in job.schedule.batches(Cursor(0, 0), rank=job.rank, world_size=job.world_size):
        if place.epoch >= job.num_epochs:
            return
        batch = []
        for sample in samples.tolist():
            shard = shards[sample // data.samples_per_shard]
            offset = sample % data.samples_per_shard * data.sample_bytes
            span = blocks_of(shard.size_bytes, offset, data.sample_bytes)
            batch.append(Visit(shard.content_id, span.start, span.stop))
        yield batch
