"""Room on the disk: what must go for what comes. Functions over the machine's state; no I/O.

Whom to evict is the policy's word (policy.py). To ask it about every extent for every new file would cost a node with 100,000 extents
seconds for each, so one look at all of them yields a shortlist, and as long as that lasts only its head is looked at again, as it is then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from cache.blocks import ExtentId
from cache.residency.policy import UNKNOWN_USE, Candidate
from cache.residency.residents import Extent
from cache.residency.state import State

SHORTLIST_SHARE = 32
"""What follows behind the victims of a look at all extents: this part of all of them."""
HEAD = 64
"""How many of the shortlist are looked at again for each new file."""
PAUSE_S_PER_EXTENT = 2e-5
"""After a look at all extents that freed nothing: about as long as that look took, so that looking is never most of what is done."""


def make_room(s: State, need_bytes: int, need_files: int, own_next_use: float, *, is_ahead: bool = False) -> bool:
    """True when `need_bytes` are free now. Evicts if that is worth it; what readers still hold comes free later. `is_ahead`: nobody waits
    for what comes, so it displaces only what would go anyway before its next use (keeping.py)."""
    budget = s.budget
    if need_bytes > budget.bound_bytes:
        return False
    back_bytes, back_files = budget.expected_back(s.now)
    short = need_bytes - budget.free_bytes - back_bytes
    short_files = need_files - budget.free_files - back_files
    if short > 0 or short_files > 0:
        worth_keeping = s.worth_keeping() if is_ahead else 0.0
        if own_next_use <= s.foresight.near:
            worth_keeping = 0.0
        if worth_keeping and (s.all_is_worth_keeping or worth_keeping < own_next_use < UNKNOWN_USE):
            return False  # What comes would itself go before it is used.
        victims = _victims(s, short, short_files, max(own_next_use, worth_keeping))
        s.all_is_worth_keeping = bool(worth_keeping) and not victims
        for victim in victims:
            s.evict(s.residents.extents[victim])
    return need_bytes <= budget.free_bytes and need_files <= budget.free_files


def shrink(s: State) -> None:
    """The bound was made smaller than what is there: evicts what it can now, the rest when nobody needs it to stay. What is pinned goes
    only if the rest is not enough: a bound is a bound, whatever somebody wanted to keep."""
    budget = s.budget
    for is_pinned in (False, True):
        candidates = list(_candidates(s, s.residents.extents.values(), is_pinned=is_pinned))
        back_bytes, back_files = budget.expected_back(s.now)
        short = min(-budget.free_bytes - back_bytes, sum(candidate.size_bytes for candidate in candidates))
        short_files = min(-budget.free_files - back_files, len(candidates))
        if short > 0 or short_files > 0:
            for victim in s.policy.choose(short, candidates, -1, short_files).victims:
                s.evict(s.residents.extents[victim])


def _victims(s: State, short: int, short_files: int, own_next_use: float) -> tuple[ExtentId, ...]:
    num_extents = len(s.residents.extents)
    if num_extents <= s.limits.full_look:
        candidates = _candidates(s, s.residents.extents.values())
        return s.policy.choose(short, candidates, own_next_use, short_files).victims
    victims = _from_shortlist(s, short, short_files, own_next_use)
    if victims or s.now < s.next_full_look_s:
        return victims
    everyone = list(_candidates(s, s.residents.extents.values()))
    mean_bytes = s.budget.used_bytes // num_extents
    ample = short + mean_bytes * (num_extents // SHORTLIST_SHARE)
    found = s.policy.choose(ample, everyone, own_next_use, short_files).victims
    victims = _enough(s, found, short, short_files)
    s.shortlist = deque(found[len(victims) :])
    victims = victims or s.policy.choose(short, everyone, own_next_use, short_files).victims
    if not victims:
        s.next_full_look_s = s.now + num_extents * PAUSE_S_PER_EXTENT
    return victims


def _from_shortlist(s: State, short: int, short_files: int, own_next_use: float) -> tuple[ExtentId, ...]:
    """Of the head of the shortlist, as these extents are now; those that can't go any more leave the list."""
    head: list[ExtentId] = []
    candidates: list[Candidate] = []
    while s.shortlist and len(head) < HEAD:
        key = s.shortlist.popleft()
        found = next(_candidates(s, _present(s, key)), None)
        if found is not None:
            head.append(key)
            candidates.append(found)
    victims = s.policy.choose(short, candidates, own_next_use, short_files).victims
    gone = set(victims)
    s.shortlist.extendleft(key for key in reversed(head) if key not in gone)
    return victims


def _present(s: State, key: ExtentId) -> Iterator[Extent]:
    extent = s.residents.extents.get(key)
    if extent is not None:
        yield extent


def _enough(s: State, ranked: tuple[ExtentId, ...], short: int, short_files: int) -> tuple[ExtentId, ...]:
    """The first of them that make up what is short."""
    freed = 0
    for count, key in enumerate(ranked):
        if freed >= short and count >= short_files:
            return ranked[:count]
        freed += s.residents.extents[key].size_bytes
    return ranked


def _candidates(s: State, extents: Iterable[Extent], *, is_pinned: bool = False) -> Iterator[Candidate]:
    num_extents = len(s.residents.extents)
    for e in extents:
        if e.is_evictable and e.owner.is_pinned is is_pinned:
            yield Candidate(
                e.key,
                e.size_bytes,
                s.next_use_of(e.key),
                e.last_use_s,
                bool(e.holders),
                is_borrowed=bool(s.origins.source_of(e.key)),
                is_proven=e.uses.is_proven(s.use_clock, num_extents),
            )
