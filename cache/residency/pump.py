"""What is started next, and what must go to make room for it. Functions over the machine's state; no I/O."""

from __future__ import annotations

from functools import partial
from itertools import islice

from cache.blocks import extent_of
from cache.residency import messages as m
from cache.residency.blockstate import BlockMove, BlockState
from cache.residency.budget import STALE_HOLD_S
from cache.residency.policy import Candidate
from cache.residency.residents import Extent
from cache.residency.state import State
from cache.residency.waiting import BlockKey


def pump(s: State) -> None:
    """Starts what can be started: first what readers wait for, then checks, then what readers will read, nearest first."""
    if s.budget.is_exceeded:
        _shrink(s)
    for key in list(s.demand):
        if s.in_flight >= s.limits.max_in_flight:
            return
        if s.patience.must_wait(key):
            continue
        if _start(s, key, own_next_use=0, is_demand=True):
            s.demand.pop(key, None)
            s.room_deadline_s.pop(key, None)
    while s.check_queue and s.in_flight < s.limits.max_in_flight:
        _start_asked_check(s, s.check_queue.popleft())
    # A file that is being opened counts as well: its space is taken, and its blocks follow at once.
    max_prefetches = s.limits.max_in_flight - s.limits.demand_reserve
    while not s.prefetch_is_stuck and s.in_flight + len(s.opening) < max_prefetches:
        if not _start_prefetch(s):
            # Looking again costs a look at every extent, so it waits for an event that can change the answer.
            s.prefetch_is_stuck = True


def _start_prefetch(s: State) -> bool:
    """Starts one prefetch; False: there is nothing to prefetch, or no room for it."""
    while s.backlog:
        key = s.backlog.popleft()
        if _is_needed(s, *key):
            return _start(s, key, own_next_use=s.next_use(key), is_demand=False)
    while ready := [key for key in islice(s.hints, 64) if not s.patience.must_wait(key)][:1]:
        key = ready[0]
        if not _is_needed(s, *key):
            del s.hints[key]
            continue
        if not _start(s, key, own_next_use=s.next_use(key), is_demand=False):
            break
        del s.hints[key]
        return True
    candidate = s.lookahead.next_candidate(partial(_is_needed, s))
    if candidate is None:
        return False
    content_id, block, distance = candidate
    return _start(s, (content_id, block), own_next_use=distance, is_demand=False)


def _is_needed(s: State, content_id: str, block: int) -> bool:
    """Whether a prefetch of this block would do anything now."""
    key = (content_id, block)
    if content_id not in s.residents.objects or key in s.demand or s.patience.must_wait(key):
        return False
    if s.patience.is_cooling(key, s.now):
        return False
    extent = s.residents.of_block(content_id, block)
    if extent is None:
        # What can never fit must not stand before what can.
        return s.size_of(content_id, extent_of(block)) <= s.budget.capacity_bytes
    if not extent.is_open:
        return block not in extent.backlog
    return extent.state(block) in (BlockState.ABSENT, BlockState.UNVERIFIED)


def _start(s: State, key: BlockKey, *, own_next_use: float, is_demand: bool) -> bool:
    """Takes the next step towards a readable block. False: no room now (a demand stays queued, for a while)."""
    content_id, block = key
    extent = s.residents.of_block(content_id, block) or _new_extent(s, key, own_next_use, is_demand)
    if extent is None:
        # A demand that the disk refuses has been answered by now; one that only lacks room waits.
        return is_demand and not s.waiting.is_wanted(key)
    if not extent.is_open:
        if extent.needs_table and not extent.backlog:
            s.opening.add(extent.key)
            s.actions.append(m.ReadTable(extent.key, extent.generation))
        if block not in extent.backlog:
            extent.backlog.append(block)
    elif extent.state(block) is BlockState.UNVERIFIED:
        _start_check(s, extent, block)
    elif extent.state(block) is BlockState.ABSENT:
        extent.move(block, BlockMove.FETCH)
        extent.num_busy += 1
        s.in_flight += 1
        s.counters.demand_fetches += is_demand
        s.counters.prefetches += not is_demand
        oid, idx = extent.owner.object_id, extent.key.extent_idx
        s.actions.append(m.FetchBlock(oid, idx, extent.generation, block, is_demand))
    return True


def _start_asked_check(s: State, key: BlockKey) -> None:
    extent = s.residents.of_block(*key)
    # Since it was asked for, its reader may have gone, or another request may have had it checked.
    if extent is None or not s.waiting.is_check_wanted(extent.key, key[1]):
        return
    if extent.state(key[1]) in (BlockState.RESIDENT, BlockState.UNVERIFIED):
        _start_check(s, extent, key[1])


def _start_check(s: State, extent: Extent, block: int) -> None:
    extent.move(block, BlockMove.CHECK)
    extent.num_busy += 1
    s.in_flight += 1
    oid, idx = extent.owner.object_id, extent.key.extent_idx
    s.actions.append(m.CheckBlock(oid, idx, extent.generation, block))


def _new_extent(s: State, key: BlockKey, own_next_use: float, is_demand: bool) -> Extent | None:
    """Decides for a new file, with its space taken; None when the disk refuses files just now, or there is no room."""
    known = s.residents.objects[key[0]]
    if s.now < s.no_files_until_s:
        if is_demand and s.disk_error is not None:
            s.fail(key, s.disk_error)
        return None
    extent_idx = extent_of(key[1])
    size = s.size_of(key[0], extent_idx)
    if not _make_room(s, size, 1, own_next_use):
        if is_demand and size > s.budget.capacity_bytes:
            s.refuse_for_room(key)  # Waiting would not help.
        elif is_demand:
            s.room_deadline_s.setdefault(key, s.now + STALE_HOLD_S)
        return None
    generation, s.next_generation = s.next_generation, s.next_generation + 1
    extent = s.residents.add_extent(known, extent_idx, generation, size, s.now)
    extent.num_waiters = s.waiting.count_for(extent.key)
    s.budget.take(size)
    s.opening.add(extent.key)
    s.actions.append(m.CreateExtent(known.object_id, extent_idx, generation))
    return extent


def _make_room(s: State, need_bytes: int, need_files: int, own_next_use: float) -> bool:
    """True when `need_bytes` are free now. Evicts if that is worth it; what readers still hold comes free later."""
    budget = s.budget
    if need_bytes > budget.capacity_bytes:
        return False
    back_bytes, back_files = budget.expected_back(s.now)
    short = need_bytes - budget.free_bytes - back_bytes
    short_files = need_files - (budget.max_files - budget.num_files) - back_files
    if short > 0 or short_files > 0:
        for victim in s.policy.choose(short, _candidates(s), own_next_use, short_files).victims:
            s.evict(s.residents.extents[victim])
    return need_bytes <= budget.free_bytes and budget.num_files + need_files <= budget.max_files


def _shrink(s: State) -> None:
    """The bound was made smaller than what is there: evicts what it can now, the rest when nobody needs it to stay."""
    budget = s.budget
    candidates = _candidates(s)
    back_bytes, back_files = budget.expected_back(s.now)
    short = min(-budget.free_bytes - back_bytes, sum(candidate.size_bytes for candidate in candidates))
    short_files = min(budget.num_files - budget.max_files - back_files, len(candidates))
    for victim in s.policy.choose(short, candidates, -1, short_files).victims:
        s.evict(s.residents.extents[victim])


def _candidates(s: State) -> list[Candidate]:
    return [
        Candidate(e.key, e.size_bytes, s.next_use_of(e.key), e.last_use_s, bool(e.holders))
        for e in s.residents.extents.values()
        if e.is_evictable
    ]
