"""When to try again. Exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015)."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """`max_attempts`: tries in all, the first included. Eight tries with these delays span about half a minute of an origin that
    is away; a longer outage becomes an error that the reader sees. `base_s`, `cap_s`: bounds of the delay before the second and
    the later tries."""

    max_attempts: int = 8
    base_s: float = 0.1
    cap_s: float = 10.0

    def delay_s(self, attempts: int, asked_s: float | None, rng: random.Random) -> float | None:
        """Seconds to wait after `attempts` failed tries, at least what the origin asked for; None: give up."""
        if attempts >= self.max_attempts:
            return None
        ceiling = min(self.cap_s, self.base_s * 2.0 ** (attempts - 1))
        delay = ceiling * rng.uniform(0.5, 1.0)
        return max(delay, min(asked_s, 30.0)) if asked_s is not None else delay
