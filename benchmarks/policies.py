"""Eviction as other caches do it, to compare with: the daemon's own machine runs them in the simulator (`--policy`).

None of them knows the future; each is a `cache.residency.policy.EvictionPolicy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from cache.blocks import ExtentId
from cache.residency.policy import Candidate, Decision, EvictionPolicy, FarthestNextUse


class _Ranked(ABC):
    """Evicts in the order of a key, whatever comes."""

    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        victims: list[ExtentId] = []
        freed = 0
        for candidate in sorted(candidates, key=self.rank):
            if freed >= need_bytes and len(victims) >= need_files:
                break
            victims.append(candidate.extent)
            freed += candidate.size_bytes
        is_enough = freed >= need_bytes and len(victims) >= need_files
        return Decision(tuple(victims) if is_enough else (), type(self).__name__)

    @abstractmethod
    def rank(self, candidate: Candidate) -> Any:
        """What sorts first goes first."""


class LeastRecentlyUsed(_Ranked):
    """What filecache, LitData, MosaicML and the page cache do."""

    def rank(self, candidate: Candidate) -> Any:
        return candidate.last_use_s, candidate.extent


class FirstInFirstOut(_Ranked):
    """What was seen first goes first. Remembers when it first saw an extent, and forgets it once it is chosen."""

    def __init__(self) -> None:
        self._seen: dict[ExtentId, int] = {}

    def rank(self, candidate: Candidate) -> Any:
        return self._seen.setdefault(candidate.extent, len(self._seen))

    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        decision = super().choose(need_bytes, list(candidates), own_next_use, need_files)
        for victim in decision.victims:
            # Dropped and put behind all others, should it come back.
            self._seen = {extent: order for order, extent in enumerate(e for e in self._seen if e != victim)}
        return decision


class WithoutProof(FarthestNextUse):
    """The daemon's own without its memory of passes: the longest unused first where nothing was announced."""

    def choose(
        self, need_bytes: int, candidates: Iterable[Candidate], own_next_use: float, need_files: int = 0
    ) -> Decision:
        unproven = [replace(candidate, is_proven=False) for candidate in candidates]
        return super().choose(need_bytes, unproven, own_next_use, need_files)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "farthest": FarthestNextUse,
    "lru": LeastRecentlyUsed,
    "fifo": FirstInFirstOut,
    "no-proof": WithoutProof,
}
"""By the name that `--policy` takes."""
