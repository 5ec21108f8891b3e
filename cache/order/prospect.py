"""What the jobs of a node will use beyond what their readers have announced visit by visit. Pure: no I/O, no clock.

Readers of one job (same data, same order, whatever their rank) form a group: the windows of a shuffle are used by all of them together. A
group knows its place from how far its readers have come (the rearmost counts), and its future from the spans of the epochs around it, which
somebody else computes (outline.py) and hands in: `wanted_epochs` says which are missing. Distances are in visits, as in lookahead.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from cache.blocks import ExtentId
from cache.order.lookahead import Lookahead

if TYPE_CHECKING:  # A daemon whose readers tell no outline has no need of numpy: 25 MB and a tenth of a second.
    from cache.order.outline import Spans, Table
    from cache.order.schedule import Schedule

EPOCHS_AHEAD = 2
"""Beyond the one that is being read. What is read now is used again within the next epoch, so that one decides; the one after it is there
when the end of this one has come."""


@dataclass(frozen=True)
class Outline:
    """One reader's far future: `rank` of `world_size` reads `schedule` over `table` from `first_step` on, counted from the first epoch's
    beginning; that is the stream's visit number `first_visit`, and each step takes about `visits_per_step` of its visits."""

    table: Table
    schedule: Schedule
    rank: int
    world_size: int
    first_step: int
    first_visit: int
    visits_per_step: float

    @property
    def group(self) -> tuple[object, ...]:
        """Equal for readers of one job."""
        return id(self.table), self.schedule, self.world_size


@dataclass
class Group:
    """The readers of one job on this node. Steps are counted from the first epoch's beginning."""

    number: int
    table: Table
    schedule: Schedule
    world_size: int
    members: dict[str, Outline] = field(default_factory=dict)
    epochs: dict[int, Spans] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    at_step: float = 0.0
    """Where its rearmost reader is."""
    told_until: float = 0.0
    """Up to which step all of its readers have announced their visits."""
    visits_per_step: float = 1.0
    _beyond: list[tuple[int, memoryview, memoryview]] = field(default_factory=list)
    """Of the epochs that are not all announced: their first step, and first and last uses in a form that is quick to look up."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(member.rank for member in self.members.values()))

    @cached_property
    def num_steps(self) -> int:
        return self.schedule.plan.num_steps

    def refresh(self, lookahead: Lookahead) -> None:
        places, ends = [], []
        for stream_id, member in self.members.items():
            position, end = lookahead.progress(stream_id)
            places.append(member.first_step + max(0, position - member.first_visit) / member.visits_per_step)
            ends.append(member.first_step + max(0, end - member.first_visit) / member.visits_per_step)
        self.at_step, self.told_until = min(places), min(ends)
        self.visits_per_step = min(member.visits_per_step for member in self.members.values())
        for epoch in [epoch for epoch in self.epochs if epoch < int(self.at_step) // self.num_steps]:
            del self.epochs[epoch]
        self._look_beyond()

    def computed(self, epoch: int, spans: Spans) -> None:
        self.epochs[epoch] = spans
        self._look_beyond()

    @property
    def told_visits(self) -> float:
        """How far ahead of its rearmost reader all visits are announced."""
        return (self.told_until - self.at_step) * self.visits_per_step

    @property
    def known_until(self) -> float:
        """The step up to which its spans are here."""
        epoch = int(self.at_step) // self.num_steps
        while epoch in self.epochs:
            epoch += 1
        return float(epoch * self.num_steps)

    def next_use(self, row: int) -> float:
        """Visits until the first use beyond what was announced; inf when none is known."""
        for base, first, last in self._beyond:
            if base + last[row] > self.told_until:
                return (max(base + first[row], self.told_until) - self.at_step) * self.visits_per_step
        return math.inf

    def _look_beyond(self) -> None:
        told = int(self.told_until) // self.num_steps
        self._beyond = [
            (epoch * self.num_steps, spans.first.data, spans.last.data)
            for epoch, spans in sorted(self.epochs.items())
            if epoch >= told
        ]


class Prospect:
    """The groups of a node. `refresh` after readers have come further or announced more."""

    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead
        self._groups: dict[tuple[object, ...], Group] = {}
        self._group_of: dict[str, Group] = {}
        self._num_groups = 0
        self.version = 0
        """Rises with everything that changes what is known, but for readers coming further."""

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    def group_of(self, stream_id: str) -> Group | None:
        return self._group_of.get(stream_id)

    def outline(self, stream_id: str, outline: Outline) -> None:
        """A reader's far future; it replaces an earlier one."""
        self.close(stream_id)
        group = self._groups.get(outline.group)
        if group is None:
            self._num_groups += 1
            group = Group(self._num_groups, outline.table, outline.schedule, outline.world_size)
            self._groups[outline.group] = group
        group.members[stream_id] = outline
        self._group_of[stream_id] = group
        group.asked.clear()  # Which extents are used may depend on the ranks.
        group.refresh(self._lookahead)
        self.version += 1

    def close(self, stream_id: str) -> None:
        group = self._group_of.pop(stream_id, None)
        if group is None:
            return
        outline = group.members.pop(stream_id)
        if not group.members:
            del self._groups[outline.group]
        self.version += 1

    def refresh(self, stream_id: str) -> None:
        group = self._group_of.get(stream_id)
        if group is not None:
            group.refresh(self._lookahead)

    def wanted_epochs(self, stream_id: str) -> Iterator[tuple[Group, int]]:
        """Epochs whose spans this reader's group needs and has not asked for; each is said once."""
        group = self._group_of.get(stream_id)
        if group is None:
            return
        now = int(group.at_step) // group.num_steps
        for epoch in range(now, now + EPOCHS_AHEAD + 1):
            if epoch not in group.asked:
                group.asked.add(epoch)
                yield group, epoch
        group.asked -= {epoch for epoch in group.asked if epoch < now}

    def computed(self, number: int, epoch: int, spans: Spans) -> None:
        """The spans of an epoch are here (of a group that is gone by now: ignored)."""
        for group in self._groups.values():
            if group.number == number:
                group.computed(epoch, spans)
                self.version += 1

    def next_use(self, extent: ExtentId, announced: float = math.inf) -> float:
        """Visits until an extent's next use, `announced` or beyond; inf when none is known."""
        nearest = announced
        for group in self._groups.values():
            if nearest <= group.told_visits:
                continue
            row = group.table.row_of(extent)
            if row is not None:
                nearest = min(nearest, group.next_use(row))
        return nearest
