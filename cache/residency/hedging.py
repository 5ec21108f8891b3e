"""When a request that takes long gets a second one beside it, and when silence is a dead connection. Pure; `now` is an argument.

A hedge goes out when a block has taken longer than nineteen of twenty others (Dean and Barroso, "The Tail at Scale", 2013), and begins at
the last byte that has come, so it costs the rest of the block and not all of it. Hedges are paid from a budget of 5 % of the requests:
when everything is slow, doubling it would only make it slower. An origin that has just refused gets none.
"""

from __future__ import annotations

from collections import defaultdict, deque

SAMPLES = 200
MIN_SAMPLES = 20
BUDGET_SHARE = 0.05
BUDGET_BURST = 4.0
EARLY_SHARE = 0.15
EARLY_BURST = 16.0
"""So many refused requests come again before they were asked for, of those that succeed. (What is refused comes again in any case: this
bounds how much of it comes early.)"""

QUIET_AFTER_THROTTLE_S = 10.0

STALL_FACTOR = 4.0
STALL_FLOOR_S = 2.0
STALL_CEILING_S = 15.0
"""Object stores under pressure answer the first byte after a second or two; nothing for this long is a dead connection."""


class Hedging:
    """Of one origin."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=SAMPLES))
        """By magnitude: a fetch is late among those of about its size."""
        self._first_byte_s: deque[float] = deque(maxlen=SAMPLES)
        self._tokens = 1.0
        self._early_tries = EARLY_BURST
        self._quiet_until_s = 0.0

    def landed(self, num_bytes: int, seconds: float, first_byte_s: float) -> None:
        """A request brought all its bytes."""
        self._seconds[num_bytes.bit_length()].append(seconds)
        self._first_byte_s.append(first_byte_s)
        self._tokens = min(BUDGET_BURST, self._tokens + BUDGET_SHARE)
        self._early_tries = min(EARLY_BURST, self._early_tries + EARLY_SHARE)

    def throttled(self, now: float) -> None:
        self._quiet_until_s = now + QUIET_AFTER_THROTTLE_S

    def hedge_after_s(self, num_bytes: int) -> float | None:
        """After how long a request of this size is late; None: not enough is known to say."""
        seconds = self._seconds[num_bytes.bit_length()]
        return _percentile(seconds, 0.95) if len(seconds) >= MIN_SAMPLES else None

    def take(self, now: float) -> bool:
        """Whether a late request gets a hedge; the budget is less by one then."""
        if now < self._quiet_until_s or self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def take_early_try(self) -> bool:
        """Whether a block that is needed soon is tried again before its origin asked for it (haste.py)."""
        if self._early_tries < 1.0:
            return False
        self._early_tries -= 1.0
        return True

    @property
    def stall_s(self) -> float:
        """Silence after which a connection is given up: a few times the slowest answers seen."""
        if len(self._first_byte_s) < MIN_SAMPLES:
            return STALL_CEILING_S
        return min(STALL_CEILING_S, max(STALL_FLOOR_S, STALL_FACTOR * _percentile(self._first_byte_s, 0.99)))


def _percentile(values: deque[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
