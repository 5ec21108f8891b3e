"""What is known of each origin that blocks come from: how many requests it is given, how long they take. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cache.residency.concurrency import Concurrency
from cache.residency.hedging import Hedging


def origin_of(url: str) -> str:
    """The store of a url: scheme and bucket or host.

    >>> origin_of("s3://bucket/train/0.tar"), origin_of("file:///data/x")
    ('s3://bucket', 'file://')
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


@dataclass
class OriginState:
    concurrency: Concurrency
    hedging: Hedging = field(default_factory=Hedging)
    in_flight: int = 0

    def has_room(self, *, is_demand: bool) -> bool:
        """A reader that waits may go a little beyond the limit: it must not queue behind what is fetched ahead."""
        limit = self.concurrency.limit
        return self.in_flight < (limit + max(2, limit // 4) if is_demand else limit)


class Origins:
    """One state per origin, made on first use. `cap`: requests that one origin is given at most."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._states: dict[str, OriginState] = {}

    def of(self, url: str) -> OriginState:
        name = origin_of(url)
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = OriginState(Concurrency(self._cap))
        return state

    def started(self, url: str, now: float) -> None:
        state = self.of(url)
        state.in_flight += 1
        state.concurrency.started(state.in_flight, now)

    def ended(self, url: str, now: float, num_bytes: int, seconds: float, *, throttled: bool) -> None:
        state = self.of(url)
        state.in_flight -= 1
        assert state.in_flight >= 0, url
        state.concurrency.ended(now, num_bytes, seconds, throttled=throttled)
        if throttled:
            state.hedging.throttled(now)

    def account(self) -> dict[str, Any]:
        """For `status`."""
        return {
            name: {
                "limit": state.concurrency.limit,
                "in_flight": state.in_flight,
                "reason": state.concurrency.reason,
            }
            for name, state in sorted(self._states.items())
        }
