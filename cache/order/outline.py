"""The far future of a job, computed instead of listed: in which steps of any epoch an extent is used.

The visits that a reader announces one by one (lookahead.py) reach some thousand samples ahead. Whom to evict depends on the next epoch too,
and the order of every epoch is a function: an outline holds what that function needs, and yields per epoch two numbers for each extent, its
first and its last use. What it takes grows with the number of objects, not with samples or epochs. Pure.

Exact up to a window where samples are shuffled in windows of shards, which are used from the window's beginning to its end. Under a full
shuffle an extent with several samples is used all through the epoch, and nothing is computed; where samples are objects of their own,
each one's place is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.blocks import EXTENT_BYTES, ExtentId, ObjectId, extent_span, num_extents
from cache.order.permutation import Indices
from cache.order.schedule import Schedule
from cache.order.shuffle import Full, Sequential, Windowed, part_windows

Floats = NDArray[np.float64]

SCATTERED = 4
"""Under a full shuffle, an extent with more samples than this is taken to be used all the time: its first use lies in the first
fifth of the epoch, its last one in the last."""

CHUNK = 1 << 16
"""Positions that are permuted at once: 13 ms, and 2 MB for each array on the way."""


class Spans(NamedTuple):
    """Of one epoch, for each extent of the table: where its use begins and ends, in steps from the epoch's beginning; (inf, -inf) if it
    is not used."""

    first: Floats
    last: Floats


class Pieces(NamedTuple):
    """Pairs of a part and an extent that holds some of it, as arrays; `share_start` and `share_end`: which share of the part it is."""

    part: Indices
    row: Indices
    share_start: Floats
    share_end: Floats


@dataclass(frozen=True)
class Part:
    """Neighbouring samples that a shuffle moves together: the bytes [start, end) of one object."""

    object_idx: int
    start: int
    end: int
    num_samples: int


@dataclass(frozen=True)
class Table:
    """The objects of a data set and the parts that its shuffle permutes, in the order of their samples' numbers."""

    objects: tuple[ObjectId, ...]
    parts: tuple[Part, ...]

    @cached_property
    def first_row(self) -> dict[str, int]:
        """By content id, the row of an object's first extent."""
        rows, first = {}, 0
        for object_id in self.objects:
            rows[object_id.content_id] = first
            first += num_extents(object_id.size_bytes)
        return rows

    @cached_property
    def extents(self) -> list[ExtentId]:
        """The extent of each row."""
        return [ExtentId(o.content_id, idx) for o in self.objects for idx in range(num_extents(o.size_bytes))]

    @cached_property
    def row_bytes(self) -> Floats:
        spans = (extent_span(o.size_bytes, idx) for o in self.objects for idx in range(num_extents(o.size_bytes)))
        return np.array([end - start for start, end in spans], dtype=np.float64)

    @cached_property
    def row_objects(self) -> list[ObjectId]:
        """The object of each row."""
        return [o for o in self.objects for _ in range(num_extents(o.size_bytes))]

    @cached_property
    def pieces(self) -> Pieces:
        """Every part with every extent that it touches."""
        parts: list[int] = []
        rows: list[int] = []
        shares: list[tuple[float, float]] = []
        starts = [self.first_row[o.content_id] for o in self.objects]
        for number, part in enumerate(self.parts):
            if part.end <= part.start or not part.num_samples:
                continue
            for idx in range(part.start // EXTENT_BYTES, (part.end - 1) // EXTENT_BYTES + 1):
                parts.append(number)
                rows.append(starts[part.object_idx] + idx)
                size = part.end - part.start
                within = idx * EXTENT_BYTES - part.start
                shares.append((max(0.0, within / size), min(1.0, (within + EXTENT_BYTES) / size)))
        each = np.array(shares, dtype=np.float64).reshape(-1, 2)
        return Pieces(np.array(parts, dtype=np.int64), np.array(rows, dtype=np.int64), each[:, 0], each[:, 1])

    def prepare(self) -> None:
        """Works out what is worked out once, which for very many objects takes a second: in a thread, say."""
        _ = self.first_row, self.extents, self.row_bytes, self.row_objects, self.pieces

    def row_of(self, extent: ExtentId) -> int | None:
        first = self.first_row.get(extent.content_id)
        return None if first is None else first + extent.extent_idx

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return tuple(part.num_samples for part in self.parts)


def spans(table: Table, schedule: Schedule, epoch: int, *, ranks: Iterable[int], world_size: int) -> Spans:
    """When these ranks use each extent of the table in an epoch."""
    pieces = table.pieces
    size, num_samples, num_steps = schedule.global_batch_size, schedule.plan.num_samples, schedule.plan.num_steps
    first, last = np.full(len(table.extents), np.inf), np.full(len(table.extents), -np.inf)
    match schedule.shuffle:
        case Windowed():
            starts, ends = (edges[pieces.part] for edges in part_windows(schedule.order(epoch)))
            from_step, to_step = starts / size, ends / size
        case Sequential():
            counts = np.asarray(schedule.shard_sizes, dtype=np.int64)
            starts = (np.cumsum(counts) - counts)[pieces.part]
            from_step = (starts + pieces.share_start * counts[pieces.part]) / size
            to_step = (starts + pieces.share_end * counts[pieces.part]) / size
        case Full() if num_samples > SCATTERED * len(pieces.row):
            from_step, to_step = np.zeros(len(pieces.row)), np.full(len(pieces.row), float(num_steps))
        case Full():
            earliest, latest = _places(schedule, epoch, set(ranks), world_size)
            from_step, to_step = earliest[pieces.part], latest[pieces.part]
    np.minimum.at(first, pieces.row, from_step)
    np.maximum.at(last, pieces.row, to_step)
    is_unused = (first >= num_steps) | (last < 0)
    first[is_unused], last[is_unused] = np.inf, -np.inf
    return Spans(first, np.minimum(last, num_steps))


def _places(schedule: Schedule, epoch: int, ranks: set[int], world_size: int) -> tuple[Floats, Floats]:
    """The first and the last step in which these ranks read a sample of each part."""
    order, plan = schedule.order(epoch), schedule.plan
    local_size = plan.local_batch_size(world_size)
    part_ends = np.cumsum(schedule.shard_sizes)
    first, last = np.full(len(part_ends), np.inf), np.full(len(part_ends), -np.inf)
    is_ours = np.isin(np.arange(world_size), sorted(ranks))
    for begin in range(0, plan.num_steps * schedule.global_batch_size, CHUNK):
        places = np.arange(begin, min(begin + CHUNK, plan.num_steps * schedule.global_batch_size), dtype=np.int64)
        places = places[is_ours[places % schedule.global_batch_size // local_size]]
        parts = np.searchsorted(part_ends, order.samples_at(places % plan.num_samples), side="right")
        steps = (places // schedule.global_batch_size).astype(np.float64)
        np.minimum.at(first, parts, steps)
        np.maximum.at(last, parts, steps + 1)
    return first, last
