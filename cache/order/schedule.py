"""Seed, epoch, step → the samples of a global batch, of a rank, and of everything after it.

Joins shuffle.py and batches.py. All that a sampler, an audit or a simulation needs to know of the future, without
reading a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cache.order.batches import BatchPlan, Cursor
from cache.order.permutation import Indices
from cache.order.shuffle import EpochOrder, Full, Sequential, Shuffle, Windowed, epoch_order

CHUNK_SAMPLES = 8192
"""Samples of a rank that are computed at once: 2 ms of work that numpy does in one go, where one batch at a time
would cost 0.4 ms each."""


@dataclass(frozen=True)
class Schedule:
    """The whole training run's order. Two schedules with the same fields give the same batches, always and
    everywhere."""

    shard_sizes: tuple[int, ...]
    """Samples in each shard; their sum is the data set."""
    global_batch_size: int
    seed: int = 0
    shuffle: Shuffle = field(default_factory=Full)
    drop_last: bool = True

    @cached_property
    def plan(self) -> BatchPlan:
        return BatchPlan(sum(self.shard_sizes), self.global_batch_size, self.drop_last)

    def order(self, epoch: int) -> EpochOrder:
        """The order of any epoch, past or future; costs nothing that grows with the number of samples."""
        return epoch_order(self.shuffle, np.asarray(self.shard_sizes, dtype=np.int64), seed=self.seed, epoch=epoch)

    def global_batch(self, cursor: Cursor) -> Indices:
        """The samples of the batch that follows `cursor`, in order."""
        place = self.plan.normalised(cursor)
        return self.order(place.epoch).samples_at(self.plan.positions(place.step))

    def batches(self, cursor: Cursor, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Cursor, Indices]]:
        """A rank's batches from `cursor` on, over the ends of epochs, for ever: (the place before the batch, its
        samples)."""
        place = self.plan.normalised(cursor)
        local_size = self.plan.local_batch_size(world_size)
        while True:
            order = self.order(place.epoch)
            for first in range(place.step, self.plan.num_steps, max(1, CHUNK_SAMPLES // local_size)):
                last = min(first + max(1, CHUNK_SAMPLES // local_size), self.plan.num_steps)
                steps = range(first, last)
                positions = [self.plan.positions(step, rank=rank, world_size=world_size) for step in steps]
                samples = order.samples_at(np.concatenate(positions))
                for step, batch in zip(steps, samples.reshape(-1, local_size), strict=True):
                    yield Cursor(place.epoch, step), batch
            place = Cursor(place.epoch + 1, 0)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a saved (epoch, step) to mean the same place; JSON-able."""
        return {
            "num_samples": self.plan.num_samples,
            "num_shards": len(self.shard_sizes),
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shuffle": shuffle_name(self.shuffle),
            "drop_last": self.drop_last,
        }


def shuffle_name(shuffle: Shuffle) -> str:
    """A shuffle in one word, for state and command lines; `parse_shuffle` is the inverse.

    >>> shuffle_name(Windowed(8)), parse_shuffle("windowed:8")
    ('windowed:8', Windowed(num_shards=8))
    """
    match shuffle:
        case Sequential():
            return "sequential"
        case Full():
            return "full"
        case Windowed(num_shards):
            return f"windowed:{num_shards}"


def parse_shuffle(name: str) -> Shuffle:
    """ValueError if it is none of `sequential`, `full` and `windowed:W`."""
    kind, _, window = name.partition(":")
    if kind == "windowed" and window.isdecimal() and int(window) >= 1:
        return Windowed(int(window))
    if name == "full":
        return Full()
    if name == "sequential":
        return Sequential()
    raise ValueError(
        f"shuffle {name!r} is none of 'full', 'sequential', 'windowed:W' (W shards in a window, at least 1)"
    )
