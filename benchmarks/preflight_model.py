"""Gangs whose measurements are drawn: a speed for each node, noise always, now and then a stumble. For judging the judgement."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from launcher.fabric import reduce_check
from launcher.fabric.preflight import MAX_ROUNDS, Suspects, Transfer, confirmed, retests, schedule, suspects
from launcher.fabric.reduce_check import Outcome

Rounds = Sequence[Sequence[tuple[int, int]]]

STUMBLE = 0.03
"""Share of the measurements that are disturbed, to 30–90 % of what they would have been."""


class NoisyNetwork:
    """Transfers: each is as fast as its slower end."""

    noise = 0.04
    max_rounds = MAX_ROUNDS

    def __init__(
        self, rates: Sequence[float], seed: int, slow_links: Mapping[tuple[int, int], float] | None = None
    ) -> None:
        self.rates, self.random, self.slow_links = rates, random.Random(seed), slow_links or {}

    def draw(self, source: int, target: int) -> float:
        rate = min(self.rates[source], self.rates[target]) * self.slow_links.get((source, target), 1.0)
        rate *= self.random.gauss(1.0, self.noise)
        if self.random.random() < STUMBLE:
            rate *= self.random.uniform(0.3, 0.9)
        return max(rate, 1.0)

    def measure(self, rounds: Rounds) -> list[Transfer]:
        return [
            Transfer(source, target, self.draw(source, target))
            for one, other in (pair for pairs in rounds for pair in pairs)
            for source, target in ((one, other), (other, one))
        ]

    def verdict(self) -> Suspects:
        """What the preflight would say, in its own order."""
        transfers = self.measure(schedule(len(self.rates), max_rounds=self.max_rounds))
        first = suspects(transfers)
        again = self.measure(retests(first, transfers)) if first else []
        return confirmed(first, transfers, again)


class NoisyReduces(NoisyNetwork):
    """All-reduces of pairs: two partners for each node, and one measurement for both ways."""

    noise = 0.05
    max_rounds = reduce_check.ROUNDS

    def measure(self, rounds: Rounds) -> list[Transfer]:
        return reduce_check.transfers(
            [
                Outcome(pair, 1e6 / self.draw(*pair), 1_000_000, 2)
                for pair in (pair for pairs in rounds for pair in pairs)
            ]
        )
