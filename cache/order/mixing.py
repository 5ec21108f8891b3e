"""Several data sets in one stream of global batches, in exact proportions. Pure.

A *window* is the smallest number of global batches in which the weights come out as whole numbers of samples: of 7 : 3 in batches
of 8, five batches with 28 and 12. Within a window no data set is ever a whole sample ahead of its share or behind it (Tijdeman,
"The chairman assignment problem", 1980); within a batch the places are shuffled, so that no rank has one data set only.

The k-th sample that is drawn from a data set is the k-th of its own epochs, laid end to end: each of its samples comes once in each
pass over it, whatever the weights and however long the mixture's epochs are. All of it is computed from the step: nothing is
remembered, so a resume reads nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from cache.order.batches import BatchPlan, Cursor
from cache.order.permutation import Indices, mix
from cache.order.schedule import CHUNK_SAMPLES, shuffle_name
from cache.order.shuffle import EpochOrder, Full, Shuffle, epoch_order

MAX_WINDOW_SAMPLES = 2**16
"""Weights that come out even only in longer windows are rounded to this one: to less than 16 parts in a million."""

Weight = int | float | Fraction


@dataclass(frozen=True)
class Mixture:
    """Like a Schedule, over several data sets. Samples are numbered through all of them, in their order."""

    part_sizes: tuple[tuple[int, ...], ...]
    """Of each data set the sizes of its shards."""
    weights: tuple[Weight, ...]
    """How many samples of each, relative to each other. 0.7 means 7/10, not the nearest binary fraction."""
    global_batch_size: int
    seed: int = 0
    shuffle: Shuffle = field(default_factory=Full)
    epoch_samples: int | None = None
    """Length of what is called an epoch, cut to whole batches; None: as many samples as all data sets have together."""

    def __post_init__(self) -> None:
        if len(self.part_sizes) != len(self.weights) or not self.weights:
            raise ValueError(f"{len(self.weights)} weights for {len(self.part_sizes)} data sets")
        for number, (sizes, weight) in enumerate(zip(self.part_sizes, self.weights, strict=True)):
            if not weight > 0 or weight == float("inf"):
                raise ValueError(f"data set {number} has the weight {weight}; leave out what is not to be mixed in")
            if sum(sizes) < 1:
                raise ValueError(f"data set {number} has no samples")
        if min(self.counts) < 1:
            rare = self.counts.index(0)
            raise ValueError(
                f"data set {rare} has the weight {self.weights[rare]} of {sum(map(_exact, self.weights))}: less than one sample in "
                f"{self.window_steps * self.global_batch_size:,}"
            )

    @cached_property
    def plan(self) -> BatchPlan:
        total = sum(self.sizes) if self.epoch_samples is None else self.epoch_samples
        steps = BatchPlan(total, self.global_batch_size).num_steps
        return BatchPlan(steps * self.global_batch_size, self.global_batch_size)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each data set."""
        return tuple(map(sum, self.part_sizes))

    @cached_property
    def shares(self) -> tuple[Fraction, ...]:
        """What each data set is asked to have of the samples; they add up to 1."""
        exact = [_exact(weight) for weight in self.weights]
        return tuple(weight / sum(exact) for weight in exact)

    @cached_property
    def window_steps(self) -> int:
        """Global batches after which every data set has had exactly its share."""
        longest = max(1, MAX_WINDOW_SAMPLES // self.global_batch_size)
        steps = 1
        for share in self.shares:
            share = share * self.global_batch_size
            steps = math.lcm(steps, share.denominator)
            if steps > longest:
                return longest
        return steps

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each data set in a window."""
        total = self.window_steps * self.global_batch_size
        wanted = [share * total for share in self.shares]
        counts = [int(count) for count in wanted]
        # Where the window is too short for whole numbers, what is missing goes to the largest remainders.
        by_remainder = sorted(range(len(counts)), key=lambda idx: (counts[idx] - wanted[idx], idx))
        for idx in by_remainder[: total - sum(counts)]:
            counts[idx] += 1
        return tuple(counts)

    def global_batch(self, cursor: Cursor) -> Indices:
        """The samples of the batch that follows `cursor`, in order."""
        place = self.plan.normalised(cursor)
        step = place.epoch * self.plan.num_steps + place.step
        batch: Indices = self._steps(range(step, step + 1), slice(None))[0]
        return batch

    def batches(self, cursor: Cursor, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Cursor, Indices]]:
        """A rank's batches from `cursor` on, for ever: (the place before the batch, its samples)."""
        place = self.plan.normalised(cursor)
        local_size = self.plan.local_batch_size(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}")
        mine = slice(rank * local_size, (rank + 1) * local_size)
        most_at_once = max(1, CHUNK_SAMPLES // self.global_batch_size)
        steps_at_once = 1
        step = place.epoch * self.plan.num_steps + place.step
        while True:
            # Drawing from an order costs less by the thousand, but the first batch is waited for.
            for batch in self._steps(range(step, step + steps_at_once), mine):
                yield Cursor(*divmod(step, self.plan.num_steps)), batch
                step += 1
            steps_at_once = min(2 * steps_at_once, most_at_once)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a saved (epoch, step) to mean the same place; JSON-able."""
        return {
            "num_samples": self.plan.num_samples,
            "num_shards": sum(map(len, self.part_sizes)),
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shuffle": shuffle_name(self.shuffle),
            "mixture": [[size, str(share)] for size, share in zip(self.sizes, self.shares, strict=True)],
        }

    # -- within --

    @cached_property
    def _pattern(self) -> tuple[Indices, Indices]:
        """Of each place of a window: the data set, and how many samples of it stand before."""
        owners = np.array(_assign(self.counts), dtype=np.int64)
        ranks = np.empty_like(owners)
        for number, count in enumerate(self.counts):
            ranks[owners == number] = np.arange(count)
        return owners, ranks

    def _steps(self, steps: range, mine: slice) -> Indices:
        """A slice of the global batches of these steps of the whole run, one a row."""
        size = self.global_batch_size
        owners, draws = self._pattern
        rows = np.arange(steps.start * size, steps.stop * size, dtype=np.int64).reshape(len(steps), size)
        # Within a batch the order is by a hash of the place in the run, which costs a tenth of a permutation for each batch.
        shuffled = np.argsort(mix(rows.astype(np.uint64), self._key), axis=1, kind="stable")[:, mine]
        at = np.take_along_axis(rows, shuffled, axis=1).ravel()
        window, place = np.divmod(at, len(owners))
        owner = owners[place]
        draw = window * np.array(self.counts)[owner] + draws[place]
        samples = np.empty_like(at)
        first = 0
        for number, num_samples in enumerate(self.sizes):
            places = np.flatnonzero(owner == number)
            passes, positions = np.divmod(draw[places], num_samples)
            for epoch in np.unique(passes).tolist():
                of_pass = passes == epoch
                samples[places[of_pass]] = first + self._order(number, epoch).samples_at(positions[of_pass])
            first += num_samples
        return samples.reshape(len(steps), -1)

    @cached_property
    def _key(self) -> np.uint64:
        digest = hashlib.blake2b(f"mixture/{self.seed}".encode(), digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "little"))

    @cached_property
    def _orders(self) -> dict[int, tuple[int, EpochOrder]]:
        """Of each data set the order that was used last: making one of a windowed shuffle permutes all shards."""
        return {}

    def _order(self, number: int, epoch: int) -> EpochOrder:
        known = self._orders.get(number)
        if known is not None and known[0] == epoch:
            return known[1]
        # Two data sets of the same size must not be walked in the same order: each has a seed of its own.
        seed = hashlib.blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        sizes = np.asarray(self.part_sizes[number], dtype=np.int64)
        order = epoch_order(self.shuffle, sizes, seed=int.from_bytes(seed, "little"), epoch=epoch)
        self._orders[number] = (epoch, order)
        return order


def _exact(weight: Weight) -> Fraction:
    """
    >>> _exact(0.7)
    Fraction(7, 10)
    """
    return Fraction(str(weight)) if isinstance(weight, float) else Fraction(weight)


def _assign(counts: tuple[int, ...]) -> list[int]:
    """A sequence in which number d stands counts[d] times, so that each of its beginnings has of every d its share, give or take less
    than one. At each place, of those that lag far enough, the one that must come soonest.

    >>> _assign((1, 2))
    [1, 0, 1]
    """
    total, num = sum(counts), len(counts)
    if num == 1:
        return [0] * total
    width = 2 * num - 2
    had = [0] * num
    sequence = []
    for place in range(1, total + 1):
        best, best_slack = -1, math.inf
        for number, count in enumerate(counts):
            lag = count * place - had[number] * total
            if width * lag >= total:
                slack = ((width - 1) * total - width * lag) / count
                if slack < best_slack:
                    best, best_slack = number, slack
        had[best] += 1
        sequence.append(best)
    return sequence
