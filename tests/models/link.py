"""A link to an object store as a fluid: requests share its rate, each connection has a rate of its own, and some answers are refusals."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_FETCH
from cache.residency.concurrency import Concurrency

FETCH_BYTES = BLOCK_BYTES * BLOCKS_PER_FETCH


@dataclass
class Link:
    """`refuse(in_flight, rng)`: whether a request that comes now is refused."""

    rate_total: float
    rate_per_connection: float
    first_byte_s: float = 0.03
    refuse: Callable[[int, random.Random], bool] = lambda in_flight, rng: False
    jitter: float = 0.2


def drive(link: Link, control: Concurrency, seconds: float, *, seed: int = 0, start_s: float = 1.0) -> list[float]:
    """Keeps as many requests going as the controller allows; bytes per second in each second."""
    rng = random.Random(seed)
    now, step_s = start_s, 0.005
    waiting: list[tuple[float, float]] = []  # (first byte at, began at)
    moving: list[list[float]] = []  # [bytes left, began at]
    goodput = [0.0] * int(seconds)
    while now - start_s < seconds:
        while len(waiting) + len(moving) < control.limit:
            in_flight = len(waiting) + len(moving) + 1
            control.started(in_flight, now)
            if link.refuse(in_flight, rng):
                control.ended(now, 0, throttled=True)
                break  # it is tried again a little later
            waiting.append((now + link.first_byte_s * rng.uniform(1, 1 + link.jitter), now))
        moving += [[FETCH_BYTES, began] for at, began in waiting if at <= now]
        waiting = [(at, began) for at, began in waiting if at > now]
        if moving:
            rate = min(link.rate_per_connection, link.rate_total / len(moving))
            for block in moving:
                block[0] -= rate * step_s * rng.uniform(1 - link.jitter, 1 + link.jitter)
        for block in [block for block in moving if block[0] <= 0]:
            moving.remove(block)
            control.ended(now, FETCH_BYTES, now - block[1])
            goodput[min(int(now - start_s), len(goodput) - 1)] += FETCH_BYTES
        now += step_s
    return goodput
