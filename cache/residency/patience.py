"""Which blocks must wait for time before they are tried again, and for how long. No clock: `now` is an argument."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cache.errors import CacheError
from cache.residency.retry import RetryPolicy
from cache.residency.waiting import BlockKey

COOLING_S = 5.0
"""A block that could not be fetched is not prefetched again for this long; a reader that asks for it still makes us try."""

MAX_COOLING = 65_536


class Patience:
    def __init__(self, policy: RetryPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._attempts: dict[BlockKey, int] = {}
        self._retry_at_s: dict[BlockKey, float] = {}
        self._cooling_until_s: dict[BlockKey, float] = {}

    def failed(self, keys: Sequence[BlockKey], error: CacheError, now: float) -> bool:
        """A fetch of these blocks failed. True: they will be tried again later; False: they are given up (and cool down)."""
        attempts = max(self._attempts.get(key, 0) for key in keys) + 1
        delay_s = None
        if error.is_retryable:
            delay_s = self._policy.delay_s(attempts, getattr(error, "retry_after_s", None), self._rng)
        if delay_s is None:
            for key in keys:
                self.forget(key)
                self._cool(key, now)
            return False
        for key in keys:
            self._attempts[key] = attempts
            self._retry_at_s[key] = now + delay_s
        return True

    def forget(self, key: BlockKey) -> None:
        """It came, or nobody wants it any more."""
        self._attempts.pop(key, None)
        self._retry_at_s.pop(key, None)

    def must_wait(self, key: BlockKey) -> bool:
        return key in self._retry_at_s

    def is_cooling(self, key: BlockKey, now: float) -> bool:
        return self._cooling_until_s.get(key, 0.0) > now

    def time_passed(self, now: float) -> None:
        for key in [key for key, at_s in self._retry_at_s.items() if at_s <= now]:
            del self._retry_at_s[key]

    def next_deadline_s(self) -> float | None:
        return min(self._retry_at_s.values(), default=None)

    def _cool(self, key: BlockKey, now: float) -> None:
        self._cooling_until_s[key] = now + COOLING_S
        if len(self._cooling_until_s) > MAX_COOLING:
            self._cooling_until_s = {k: until_s for k, until_s in self._cooling_until_s.items() if until_s > now}
