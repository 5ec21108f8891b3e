"""Whom to evict, and whether what comes is worth it. Pure functions of what is known; no I/O, no clock.

Source of the order: Belady 1966 (farthest next use is optimal for equal sizes). Extents without known use go first. Among these a scan may
displace only what was read in one pass itself: what has come back for a second pass stays, until it has not been read for so long
that several caches full were read (the idea of 2Q, Johnson and Shasha 1994, on what the daemon sees: hits are local reads, so it
sees passes, not accesses). With fresh permutations of data larger than the cache LRU keeps what is about to be needed last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from cache.blocks import ExtentId

UNKNOWN_USE = math.inf


@dataclass(frozen=True)
class Candidate:
    """An extent that may be evicted now.

    `next_use`: how many visits away its next known use is (UNKNOWN_USE: none known). `last_use_s`: when a reader last asked for it.
    `is_held`: a live reader has it open, so its bytes come free only when it lets go. `is_borrowed`: another node owns it and can lend
    it again; what this node owns would have to come from the origin. `is_proven`: read in more than one pass, the last not long ago.
    """

    extent: ExtentId
    size_bytes: int
    next_use: float
    last_use_s: float
    is_held: bool
    is_borrowed: bool = False
    is_proven: bool = False


@dataclass(frozen=True)
class Decision:
    """Victims in the order of eviction, or none and why."""

    victims: tuple[ExtentId, ...]
    reason: str


class EvictionPolicy(Protocol):
    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        """Victims, at least `need_files` of them, whose sizes add up to at least `need_bytes`, or none. A victim is never needed
        sooner than what comes (`own_next_use` visits away; UNKNOWN_USE: a reader without known order is near it, so it may displace
        what nobody announced)."""
        ...


PASS_SHARE = 8
"""A use is another pass, not more of the same, once an eighth as many extents were touched in between as there are."""
PROOF_LASTS = 8
"""What was proven is no longer so once eight times as many extents as there are were touched without another use of it."""


@dataclass(frozen=True)
class Uses:
    """What is known of the past of an extent, on a clock that ticks once for each extent that is touched afresh (new, or in another pass):
    a reader that goes to and fro within a few shards does not age the others, and time alone displaces nothing.

    >>> once = Uses(0)
    >>> once.is_another_pass(8, num_extents=80), once.is_another_pass(11, num_extents=80)
    (False, True)
    >>> again = once.touched(40)
    >>> once.is_proven(50, 80), again.is_proven(50, 80), again.is_proven(40 + 8 * 80 + 1, 80)
    (False, True, False)
    """

    last: int
    """The clock when it was last touched."""
    num_passes: int = 1

    def is_another_pass(self, clock: int, num_extents: int) -> bool:
        """Whether a use now would be."""
        return (clock - self.last) * PASS_SHARE > num_extents

    def touched(self, clock: int) -> Uses:
        return Uses(clock, self.num_passes + 1)

    def is_proven(self, clock: int, num_extents: int) -> bool:
        return self.num_passes > 1 and clock - self.last <= PROOF_LASTS * num_extents


class FarthestNextUse:
    """Evicts what is needed last; of those whose future is unknown, what only one pass has read before what has come back, and of those
    what was used longest ago. What another node can lend again goes first; then prefers what nobody holds open.

    >>> old = Candidate(ExtentId("a", 0), 10, next_use=5, last_use_s=0, is_held=False)
    >>> far = Candidate(ExtentId("b", 0), 10, next_use=90, last_use_s=0, is_held=False)
    >>> FarthestNextUse().choose(10, [old, far], own_next_use=7).victims
    (ExtentId(content_id='b', extent_idx=0),)
    >>> FarthestNextUse().choose(20, [old, far], own_next_use=7).reason
    'what could go is needed sooner: 10 of 20 bytes could be freed for a use 7 visits away'
    """

    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        ranked = sorted(candidates, key=_order(own_next_use))
        victims: list[ExtentId] = []
        freed = 0
        for candidate in ranked:
            is_enough = freed >= need_bytes and len(victims) >= need_files
            if is_enough or not (candidate.next_use > own_next_use or candidate.next_use == UNKNOWN_USE):
                break
            victims.append(candidate.extent)
            freed += candidate.size_bytes
        if freed >= need_bytes and len(victims) >= need_files:
            return Decision(tuple(victims), "farthest next use")
        return Decision(
            (),
            f"what could go is needed sooner: {freed} of {need_bytes} bytes could be freed for a use {own_next_use:g} visits away",
        )


def _order(own_next_use: float) -> Callable[[Candidate], tuple[Any, ...]]:
    """Borrowed ones first, as far as they may go at all."""

    def rank(c: Candidate) -> tuple[Any, ...]:
        may_go = c.next_use > own_next_use or c.next_use == UNKNOWN_USE
        return (not may_go, not c.is_borrowed, -c.next_use, c.is_proven, c.is_held, c.last_use_s, c.extent)

    return rank
