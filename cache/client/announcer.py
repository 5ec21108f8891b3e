"""Tells the cache what a rank will read, a bounded way ahead of what it has read.

The daemon fetches by this and evicts by it. Announcing costs about 2 µs for a sample, so it is done in portions of
some hundred samples: a step never pays for thousands at once (the first excepted).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from cache.client.client import Cache
from cache.client.formats.index import Ints
from cache.client.stream import Stream
from cache.order.batches import Cursor
from cache.order.mixing import Mixture
from cache.order.permutation import Indices
from cache.order.schedule import Schedule, shuffle_name

LOOKAHEAD_SAMPLES = 8192
"""How far ahead of the reader visits are announced. At 100 KB a sample this is 0.8 GB, more than a fetch window
needs; the tuples take 1 MB."""

PORTION_SAMPLES = 512
FIRST_SAMPLES = 64
ADVANCE_SAMPLES = 64
"""A message to the daemon takes 10 to 20 µs: with tiny batches it is sent every 64 samples, not at every step."""
ADVANCE_EVERY_S = 0.02
"""Nor more often than this: a reader of resident data passes 64 samples within 2 ms, and each message wakes the daemon, perhaps on the very
core that reads. What is behind the reader for so long could only be evicted a moment earlier."""


class Visitable(Protocol):
    @property
    def cache(self) -> Cache: ...

    @property
    def etags(self) -> Mapping[str, str]:
        """At which etag each shard will be read."""
        ...

    def visits(self, samples: Ints) -> tuple[list[tuple[str, int, int]], Ints]: ...

    def outlined_objects(self) -> bytes | None:
        """All shards and the parts that shuffles permute, as wire.pack_outlined makes it; None where that cannot be said."""
        ...


class Announcer:
    """The lookahead of one rank. Belongs to one thread; in a forked child it does nothing (see Stream)."""

    def __init__(
        self,
        dataset: Visitable,
        schedule: Schedule | Mixture,
        *,
        rank: int,
        world_size: int,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dataset = dataset
        self._schedule = schedule
        self._rank, self._world_size = rank, world_size
        self._local_size = schedule.plan.local_batch_size(world_size)
        self._portion = max(PORTION_SAMPLES, self._local_size)
        self._lookahead = max(LOOKAHEAD_SAMPLES, 4 * self._portion)
        self._name = name
        self._stream: Stream | None = None
        self._batches: Iterator[tuple[Cursor, Indices]] = iter(())
        self._consumed = Cursor(0, 0)
        self._announced = Cursor(0, 0)
        self._visits_until: deque[int] = deque()
        self._num_visits = 0
        self._num_behind = 0
        self._samples_since_told = 0
        self._clock = clock
        self._told_s = -ADVANCE_EVERY_S

    def seek(self, cursor: Cursor) -> None:
        """Reading goes on at this place. If it lies within what is announced, what is before it counts as read; else
        the stream begins anew."""
        cursor = self._schedule.plan.normalised(cursor)
        if self._stream is not None:
            num_batches = self._schedule.plan.steps_between(self._consumed, cursor)
            if 0 <= num_batches <= len(self._visits_until):
                self.consumed(cursor)
                return
        self.close()
        self._stream = self._dataset.cache.stream(self._name)
        self._batches = self._schedule.batches(cursor, rank=self._rank, world_size=self._world_size)
        self._consumed = self._announced = cursor
        self._visits_until.clear()
        self._num_visits = self._num_behind = self._samples_since_told = 0
        # The nearest first, so that they are being fetched while the rest is told: nothing is more urgent than filling an empty pipeline.
        self._announce_up_to(FIRST_SAMPLES)
        self._announce_up_to(self._lookahead)
        self._outline()

    def _outline(self) -> None:
        """What comes behind the announced visits, as the function that it is."""
        assert self._stream is not None
        objects = self._dataset.outlined_objects()
        if isinstance(self._schedule, Mixture) or objects is None or not self._visits_until:
            return
        order = {
            "global_batch_size": self._schedule.global_batch_size,
            "seed": self._schedule.seed,
            "shuffle": shuffle_name(self._schedule.shuffle),
            "drop_last": self._schedule.drop_last,
            "rank": self._rank,
            "world_size": self._world_size,
            "first_step": self._consumed.epoch * self._schedule.plan.num_steps + self._consumed.step,
            "visits_per_step": self._num_visits / len(self._visits_until),
        }
        self._stream.outline(order, objects)

    def consumed(self, cursor: Cursor, waited_s: float | None = None) -> None:
        """All batches before this place have been read. `waited_s`: as in Stream.advance."""
        cursor = self._schedule.plan.normalised(cursor)
        num_batches = self._schedule.plan.steps_between(self._consumed, cursor)
        if self._stream is None or num_batches <= 0:
            return
        if num_batches > len(self._visits_until):  # the reader is beyond what it was known to read
            self.seek(cursor)
            return
        self._consumed = cursor
        for _ in range(num_batches):
            self._num_behind = self._visits_until.popleft()
        self._samples_since_told += num_batches * self._local_size
        if self._samples_since_told >= ADVANCE_SAMPLES and self._clock() - self._told_s >= ADVANCE_EVERY_S:
            self._stream.advance(self._num_behind, waited_s)
            self._samples_since_told, self._told_s = 0, self._clock()
        ahead = self._schedule.plan.steps_between(cursor, self._announced) * self._local_size
        if ahead + self._portion <= self._lookahead:
            # To the full, not by a portion: a reader may take several batches between two calls.
            self._announce_up_to(self._lookahead)

    def close(self) -> None:
        """Nothing of what was announced will be read."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _announce_up_to(self, num_samples: int) -> None:
        """Announces until `num_samples` lie ahead."""
        assert self._stream is not None
        batches = []
        while self._schedule.plan.steps_between(self._consumed, self._announced) * self._local_size < num_samples:
            _, samples = next(self._batches)
            self._announced = self._schedule.plan.after(self._announced, 1)
            batches.append(samples)
        if not batches:
            return
        visits, counts = self._dataset.visits(np.concatenate(batches))
        for num_visits in counts.reshape(-1, self._local_size).sum(axis=1).tolist():
            self._num_visits += num_visits
            self._visits_until.append(self._num_visits)
        self._stream.announce(visits, self._dataset.etags)
