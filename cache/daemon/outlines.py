"""Outlines of orders as readers tell them: read, and worked out epoch by epoch, in a thread so that nobody is held up."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from cache.blocks import ObjectId
from cache.daemon import wire
from cache.order.prospect import Outline
from cache.residency import messages as m

if TYPE_CHECKING:
    from cache.order.outline import Spans, Table


class Outlines:
    """Belongs to the event loop. `step` takes events in."""

    def __init__(self, step: Callable[[m.Event], None]) -> None:
        self._step = step
        self._tables: WeakValueDictionary[bytes, Table] = WeakValueDictionary()
        """Of one data set there is one table, whoever tells of it: readers of one job are known by that."""

    async def told(self, client_id: str, stream_id: str, frame: wire.Frame) -> None:
        """Raises ProtocolError, KeyError, TypeError or ValueError when the frame makes no sense."""
        digest = hashlib.blake2b(frame.body).digest()
        table = self._tables.get(digest)
        if table is None:
            table = await asyncio.to_thread(_table, frame.body)
            table = self._tables.setdefault(digest, table)
        outline = await asyncio.to_thread(_outline, table, frame)
        self._step(m.OrderOutlined(client_id, stream_id, outline))

    async def compute(self, action: m.ComputeEpoch) -> None:
        spans = await asyncio.to_thread(_spans, action)
        self._step(m.EpochComputed(action.group, action.epoch, spans))


def _table(body: bytes) -> Table:
    from cache.order.outline import Part, Table

    objects, parts = wire.unpack_outlined(body)
    table = Table(tuple(ObjectId(*each) for each in objects), tuple(Part(*each) for each in parts))
    table.prepare()
    return table


def _outline(table: Table, frame: wire.Frame) -> Outline:
    from cache.order.schedule import Schedule, parse_shuffle

    told = frame.header
    rank, world_size, visits_per_step = int(told["rank"]), int(told["world_size"]), float(told["visits_per_step"])
    if not (0 <= rank < world_size and visits_per_step > 0 and int(told["first_step"]) >= 0):
        raise wire.ProtocolError(f"an outline of rank {rank} of {world_size}, {visits_per_step} visits for each step")
    batch_size, shuffle = int(told["global_batch_size"]), parse_shuffle(str(told["shuffle"]))
    schedule = Schedule(table.part_sizes, batch_size, int(told["seed"]), shuffle, bool(told["drop_last"]))
    schedule.plan.local_batch_size(world_size)
    first_step, first_visit = int(told["first_step"]), int(told["first_visit"])
    return Outline(table, schedule, rank, world_size, first_step, first_visit, visits_per_step)


def _spans(action: m.ComputeEpoch) -> Spans:
    from cache.order.outline import spans

    return spans(action.table, action.schedule, action.epoch, ranks=action.ranks, world_size=action.world_size)
