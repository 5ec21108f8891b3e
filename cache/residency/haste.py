"""Blocks that a store has asked to wait for, and that are needed before: asked for once more, soon. Over the machine's state; no I/O.

A store that refuses one request in ten, whatever is asked of it, says `Retry-After: 1` each time, and a reader that needs the block at
once would stand still for that second. Retry-After is meant for load, so it is kept to where there is time, and where refusals are many.
Where they are rare, a block that is read next is tried again after a moment: once per refusal, each time a little later, within a
budget of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from cache.blocks import ExtentId, extent_of
from cache.residency.state import State
from cache.residency.waiting import BlockKey

NEAR_VISITS = 512
"""What is read next: a few batches, about as much as a loader reads ahead."""


def hasten_what_is_near(s: State) -> None:
    """What readers wait for, and what they will read next."""
    if not s.patience.is_asked_to_wait:
        return
    wanted = sorted(key for key in s.patience.asked_to_wait() if s.waiting.is_wanted(key))
    for first, end in _runs(wanted):
        hasten(s, [(first[0], block) for block in range(first[1], end)])
    for visit in s.lookahead.next_visits(NEAR_VISITS):
        hasten(s, [(visit.content_id, block) for block in range(visit.first, visit.end)])


def hasten(s: State, keys: Iterable[BlockKey]) -> None:
    """Neighbouring blocks, which one request brings: as one."""
    waiting = [key for key in keys if s.patience.may_hasten(key)]
    if not waiting:
        return
    content_id, block = waiting[0]
    known = s.residents.objects.get(content_id)
    if known is None:
        return
    source = s.origins.source_of(ExtentId(content_id, extent_of(block))) if waiting[0] not in s.from_origin else ""
    origin = s.origins.of(known.object_id.url, source)
    if origin.concurrency.refusals_are_rare and origin.hedging.take_early_try():
        s.patience.hasten(waiting, s.now)


def _runs(keys: list[BlockKey]) -> Iterable[tuple[BlockKey, int]]:
    """Sorted keys as runs: the first and the end."""
    idx = 0
    while idx < len(keys):
        first, end = keys[idx], keys[idx][1] + 1
        while idx + 1 < len(keys) and keys[idx + 1] == (first[0], end):
            idx, end = idx + 1, end + 1
        yield first, end
        idx += 1
