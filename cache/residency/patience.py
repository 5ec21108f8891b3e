"""Which blocks must wait for time before they are tried again, and for how long. No clock: `now` is an argument."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from cache.errors import CacheError
from cache.residency.retry import RetryPolicy
from cache.residency.waiting import BlockKey

COOLING_S = 5.0
"""A block that could not be fetched is not prefetched again for this long; a reader that asks for it still makes us try."""

HASTY_S = 0.04
"""How long what cannot wait waits, times its tries so far."""

MAX_COOLING = 65_536


class Patience:
    def __init__(self, policy: RetryPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._attempts: dict[BlockKey, int] = {}
        self._retry_at_s: dict[BlockKey, float] = {}
        self._asked: set[BlockKey] = set()
        """Of those that wait: an origin asked for it (Retry-After), and nobody has hurried yet."""
        self._cooling_until_s: dict[BlockKey, float] = {}

    def failed(self, keys: Sequence[BlockKey], error: CacheError, now: float) -> bool:
        """A fetch of these blocks failed. True: they will be tried again later; False: they are given up (and cool down)."""
        attempts = max(self._attempts.get(key, 0) for key in keys) + 1
        delay_s, asked_s = None, getattr(error, "retry_after_s", None)
        if error.is_retryable:
            delay_s = self._policy.delay_s(attempts, asked_s, self._rng)
        if delay_s is None:
            for key in keys:
                self.forget(key)
                self._cool(key, now)
            return False
        for key in keys:
            self._attempts[key] = attempts
            self._retry_at_s[key] = now + delay_s
        if asked_s:
            self._asked.update(keys)
        return True

    @property
    def is_asked_to_wait(self) -> bool:
        return bool(self._asked)

    def asked_to_wait(self) -> Iterable[BlockKey]:
        return self._asked

    def may_hasten(self, key: BlockKey) -> bool:
        return key in self._asked

    def hasten(self, keys: Sequence[BlockKey], now: float) -> None:
        """They are tried again in a moment, whatever the origin has asked for."""
        at_s = now + HASTY_S * max(self._attempts[key] for key in keys) * self._rng.uniform(0.5, 1.0)
        for key in keys:
            self._asked.discard(key)
            self._retry_at_s[key] = min(self._retry_at_s[key], at_s)

    def forget(self, key: BlockKey) -> None:
        """It came, or nobody wants it any more."""
        self._attempts.pop(key, None)
        self._retry_at_s.pop(key, None)
        self._asked.discard(key)

    def must_wait(self, key: BlockKey) -> bool:
        return key in self._retry_at_s

    def is_cooling(self, key: BlockKey, now: float) -> bool:
        return self._cooling_until_s.get(key, 0.0) > now

    def time_passed(self, now: float) -> None:
        for key in [key for key, at_s in self._retry_at_s.items() if at_s <= now]:
            del self._retry_at_s[key]
            self._asked.discard(key)

    def next_deadline_s(self) -> float | None:
        return min(self._retry_at_s.values(), default=None)

    def _cool(self, key: BlockKey, now: float) -> None:
        self._cooling_until_s[key] = now + COOLING_S
        if len(self._cooling_until_s) > MAX_COOLING:
            self._cooling_until_s = {k: until_s for k, until_s in self._cooling_until_s.items() if until_s > now}
