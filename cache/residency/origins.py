"""What is known of each origin that blocks come from: how many requests it is given, how long they take. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cache.blocks import BLOCK_BYTES, ExtentId
from cache.residency.concurrency import LARGE_BYTES, Concurrency
from cache.residency.hedging import Hedging
from cache.residency.pipe import Pipe
from cache.residency.placement import Placement


def origin_of(url: str) -> str:
    """The store of a url: scheme and bucket or host.

    >>> origin_of("s3://bucket/train/0.tar"), origin_of("file:///data/x")
    ('s3://bucket', 'file://')
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


FULL_BLOCKS = LARGE_BYTES // BLOCK_BYTES
"""A request for so many blocks, or more, counts as one; a smaller one as a part of one. A limit that is found with requests of 4 MiB says
how much an origin may be sending at once: of single blocks it takes more at once to keep it sending, for each spends most of its time on
the way to the first byte (30 ms are 6 MB of a link of 200 MB/s; sixteen small requests kept that link half idle)."""


PEER = "peer:"


@dataclass
class OriginState:
    concurrency: Concurrency
    hedging: Hedging = field(default_factory=Hedging)
    in_flight: int = 0
    load: int = 0
    """Requests in flight, in parts of 1 / FULL_BLOCKS."""
    blocks: int = 0
    """Of the requests in flight."""
    pipe: Pipe = field(default_factory=Pipe)
    is_peer: bool = False
    """Then a small request counts as a whole one, and nothing more may be on its way than the limit says: what a daemon of the next rack
    is short of is processor time, for each request as much, and not round trips."""

    def weight(self, num_blocks: int) -> int:
        return FULL_BLOCKS if self.is_peer else min(num_blocks, FULL_BLOCKS)

    def landed(self, num_bytes: int, seconds: float, first_byte_s: float, now: float) -> None:
        """A request brought all its bytes."""
        self.hedging.landed(num_bytes, seconds, first_byte_s)
        self.pipe.landed(num_bytes, first_byte_s, now)

    def has_room(self, *, is_demand: bool) -> bool:
        """A reader that waits may go a little beyond the limit: it must not queue behind what is fetched ahead."""
        limit = self.concurrency.limit
        if self.load < FULL_BLOCKS * (limit + max(2, limit // 4) if is_demand else limit):
            return True
        return not self.is_peer and self.blocks * BLOCK_BYTES < self.pipe.num_bytes and not self.concurrency.is_cut


class Origins:
    """One state per origin, made on first use. `cap`: requests that one origin is given at most."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._states: dict[str, OriginState] = {}
        self.placement: Placement | None = None
        """Who fetches what in a cluster; None: this node is alone."""

    def source_of(self, extent: ExtentId) -> str:
        """The peer that an extent is to be taken from; empty: its origin."""
        return (self.placement.lender(extent) if self.placement is not None else None) or ""

    def of(self, url: str, source: str = "") -> OriginState:
        """`source`: the peer that stands in for the origin. Peers are asked beside the origin, with a number of their own: what waits for
        another node must not hold up what other nodes wait for."""
        name = f"{PEER}{source}" if source else origin_of(url)
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = OriginState(Concurrency(self._cap), is_peer=bool(source))
        return state

    def started(self, url: str, source: str, num_blocks: int, now: float) -> None:
        state = self.of(url, source)
        state.in_flight += 1
        state.load += state.weight(num_blocks)
        state.blocks += num_blocks
        state.concurrency.started(-(-state.load // FULL_BLOCKS), now)

    def ended(
        self,
        url: str,
        source: str,
        num_blocks: int,
        now: float,
        num_bytes: int = 0,
        seconds: float = 0.0,
        *,
        throttled: bool = False,
    ) -> None:
        """`num_blocks`: as many as when it was started; `num_bytes`: what came."""
        state = self.of(url, source)
        state.in_flight -= 1
        state.load -= state.weight(num_blocks)
        state.blocks -= num_blocks
        assert state.in_flight >= 0 and state.load >= 0, url
        state.concurrency.ended(now, num_bytes, seconds, throttled=throttled)
        if throttled and not state.concurrency.refusals_are_rare:
            state.hedging.throttled(now)

    @property
    def on_the_way_bytes(self) -> int:
        """From origins, not from peers, at most."""
        return sum(state.blocks for state in self._sending()) * BLOCK_BYTES

    @property
    def are_busy(self) -> bool:
        """Every origin that is sending is given all requests that it may have: what comes is what it gives."""
        return self.on_the_way_bytes > 0 and not any(state.has_room(is_demand=False) for state in self._sending())

    def _sending(self) -> Iterator[OriginState]:
        return (state for name, state in self._states.items() if state.in_flight and not name.startswith(PEER))

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
