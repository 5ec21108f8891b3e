"""What is started next. Functions over the machine's state; no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

from cache.blocks import BLOCKS_PER_EXTENT, BLOCKS_PER_FETCH, ExtentId, extent_of
from cache.errors import CapacityError
from cache.residency import messages as m
from cache.residency.blockstate import BlockMove, BlockState
from cache.residency.budget import STALE_HOLD_S
from cache.residency.health import Health
from cache.residency.policy import Uses
from cache.residency.residents import Extent
from cache.residency.room import make_room, shrink
from cache.residency.runs import reach, run_around
from cache.residency.state import State
from cache.residency.waiting import BlockKey

MAX_PLANNED_AT_ONCE = 8
"""So many of the extents beyond what was announced are fetched at the same time."""

OVERTAKE_VISITS = 64
"""By so much a fetch may overtake another, whose file is being made. (A batch or two.)"""


def pump(s: State) -> None:
    """Starts what can be started: first what readers wait for, then checks, then what readers will read, nearest first."""
    if s.health.takes_probe(s.now):
        s.actions.append(m.ProbeDisk())
    if s.budget.is_exceeded:
        shrink(s)
    for key in _startable(s):
        if s.in_flight >= s.limits.max_in_flight and key not in s.from_origin:
            # What others wait for goes on all the same: two nodes full of requests to each other would never end.
            continue
        if key not in s.demand or s.patience.must_wait(key) or not _has_room(s, key, is_demand=True):
            continue  # Not there any more: a run that began before it brings it.
        if _start_demand(s, key):
            s.demand.discard(key)
            s.room_deadline_s.pop(key, None)
    while s.check_queue and s.in_flight < s.limits.max_in_flight:
        _start_asked_check(s, s.check_queue.popleft())
    # A file that is being opened counts as well: its space is taken, and its blocks follow at once.
    max_prefetches = s.limits.max_in_flight - s.limits.demand_reserve
    while s.health.may_prefetch and not s.prefetch_is_stuck and s.in_flight + len(s.opening) < max_prefetches:
        if not _start_prefetch(s):
            # Looking again costs a look at every extent, so it waits for an event that can change the answer.
            s.prefetch_is_stuck = True


def _startable(s: State) -> Iterator[BlockKey]:
    """What readers wait for, without the extents of which no block could be started now."""
    for extent in s.demand.extents():
        for key in s.demand.of(extent):
            # Whether there is room is the same for all blocks of an extent, but for those that do not come from its owner.
            if not s.from_origin and (s.in_flight >= s.limits.max_in_flight or not _has_room(s, key, is_demand=True)):
                break
            yield key


def _start_demand(s: State, key: BlockKey) -> bool:
    """Takes the next step towards a block that a reader waits for. False: no room now (it stays queued, for a while)."""
    content_id, block = key
    extent = s.residents.of_block(content_id, block) or _new_extent(s, key, own_next_use=0, is_demand=True)
    if extent is None:
        # One that the disk refuses has been answered by now; one that only lacks room waits.
        return not s.waiting.is_wanted(key)
    is_absent = extent.is_open and extent.state(block) is BlockState.ABSENT
    if not (s.health.may_fill if is_absent else s.health.may_read):
        s.fail(key, s.disk_error)
    elif not extent.is_open:
        _await_file(s, extent, block)
    else:
        _start_run(s, extent, block, BLOCKS_PER_FETCH, block, is_demand=True)
    return True


def _start_prefetch(s: State) -> bool:
    """Starts one prefetch; False: there is nothing to prefetch, or no room for it."""
    while ready := [key for key in islice(s.hints, 256) if not s.patience.must_wait(key)][:1]:
        key = ready[0]
        if not _has_room(s, key, is_demand=False):
            return False
        extent = s.residents.of_block(*key)
        if extent is None and _may_prefetch(s, *key) and s.size_of(key[0], extent_of(key[1])) <= s.budget.bound_bytes:
            extent = _new_extent(s, key, s.next_use(key), is_demand=False)
            if extent is None:
                break
        del s.hints[key]
        if extent is not None and not extent.is_open:
            _await_file(s, extent, key[1])
            return True
        if extent is not None and _may_come(s, extent, key[1]):
            _start_run(s, extent, key[1], BLOCKS_PER_FETCH, key[1], is_demand=False)
            return True
    candidate = s.lookahead.next_candidate(partial(_is_needed, s))
    if candidate is None:
        return _start_planned(s)
    visit, block, distance = candidate
    if not _has_room(s, (visit.content_id, block), is_demand=False):
        return False
    extent = s.residents.of_block(visit.content_id, block)
    if extent is not None and extent.is_open and _overtakes(s, distance):
        return False
    if extent is None:
        return _new_extent(s, (visit.content_id, block), distance, is_demand=False) is not None
    if not extent.is_open:
        read_table(s, extent)
        return True
    size = reach(distance, visit.end - visit.first)
    _start_run(s, extent, block, size, min(visit.end, extent.block_indices.stop), is_demand=False)
    return True


def _start_planned(s: State) -> bool:
    """Starts what is worth fetching beyond all that was announced, the nearest extents first."""
    s.worth_keeping()  # Looks again at what is worth fetching, if it is time.
    planned = s.foresight.planned
    for one in list(islice(planned, MAX_PLANNED_AT_ONCE)):
        extent = s.residents.extents.get(one.extent)
        first = one.extent.extent_idx * BLOCKS_PER_EXTENT
        if not _has_room(s, (one.extent.content_id, first), is_demand=False):
            return False
        if extent is None:
            try:
                s.residents.learn(one.object_id)  # And unlearned after this step, if there is no room for it.
                s.maybe_unused.add(one.object_id.content_id)
            except CapacityError:
                planned.remove(one)
                continue
            return _new_extent(s, (one.extent.content_id, first), one.distance, is_demand=False) is not None
        if not extent.is_open:
            continue
        if any(_may_come(s, extent, block) for block in extent.block_indices):
            block = next(block for block in extent.block_indices if _may_come(s, extent, block))
            _start_run(s, extent, block, BLOCKS_PER_FETCH, block + 1, is_demand=False, is_planned=True)
            return True
        planned.remove(one)
    return False


def _overtakes(s: State, distance: float) -> bool:
    """Whether something that is needed much sooner waits for its file to be made. Files take a moment each: those that come first would
    else have all requests, for what is needed late, and the first batch would wait behind that."""
    return bool(s.opening) and distance > min(map(s.next_use_of, s.opening)) + OVERTAKE_VISITS


def _has_room(s: State, key: BlockKey, *, is_demand: bool) -> bool:
    """Whether the object's origin, or the peer that stands in for it, may be given one more request."""
    known = s.residents.objects.get(key[0])
    return known is None or s.origins.of(known.object_id.url, _source(s, key)).has_room(is_demand=is_demand)


def _source(s: State, key: BlockKey) -> str:
    return "" if key in s.from_origin else s.origins.source_of(ExtentId(key[0], extent_of(key[1])))


def _is_needed(s: State, content_id: str, block: int) -> bool:
    """Whether something can be done now for an announced block. What waits for its file is offered again once that is there."""
    if not _may_prefetch(s, content_id, block):
        return False
    extent = s.residents.of_block(content_id, block)
    if extent is None:
        # What can never fit must not stand before what can.
        return s.size_of(content_id, extent_of(block)) <= s.budget.bound_bytes
    if not extent.is_open:
        return extent.needs_table and extent.key not in s.opening
    return extent.state(block) in (BlockState.ABSENT, BlockState.UNVERIFIED)


def _may_prefetch(s: State, content_id: str, block: int) -> bool:
    """Nobody fetches it on demand, and it has not failed a moment ago."""
    key = (content_id, block)
    if content_id not in s.residents.objects or key in s.demand or s.patience.must_wait(key):
        return False
    return not s.patience.is_cooling(key, s.now)


def _may_come(s: State, extent: Extent, block: int) -> bool:
    """Whether a prefetch of this block of an open extent would do anything now."""
    return extent.state(block) in (BlockState.ABSENT, BlockState.UNVERIFIED) and _may_prefetch(
        s, extent.key.content_id, block
    )


def _start_run(
    s: State, extent: Extent, block: int, size: int, own_end: int, *, is_demand: bool, is_planned: bool = False
) -> None:
    """Starts one fetch (or one check of what was found on disk) of a block and what may come with it."""
    state, content_id = extent.state(block), extent.key.content_id
    if state not in (BlockState.ABSENT, BlockState.UNVERIFIED):
        return

    is_from_origin, source = (content_id, block) in s.from_origin, _source(s, (content_id, block))

    def may_come(neighbour: int) -> bool:
        if neighbour not in extent.block_indices or extent.state(neighbour) is not state:
            return False
        key = (content_id, neighbour)
        if s.patience.must_wait(key) or (key in s.from_origin) != is_from_origin:
            return False
        if is_demand or key in s.demand:
            return key in s.demand
        is_to_come = is_planned or key in s.hints or s.lookahead.is_announced(*key)
        return is_to_come and not s.patience.is_cooling(key, s.now)

    run = run_around(block, size, own_end, may_come)
    for neighbour in run:
        s.hints.pop((content_id, neighbour), None)
        if s.demand.discard((content_id, neighbour)):
            s.room_deadline_s.pop((content_id, neighbour), None)
    if state is BlockState.UNVERIFIED:
        _start_check(s, extent, run)
        return
    for neighbour in run:
        extent.move(neighbour, BlockMove.FETCH)
        if source:
            s.borrowing.add((content_id, neighbour))
    extent.num_busy += 1
    s.in_flight += 1
    s.counters.demand_fetches += is_demand
    s.counters.prefetches += not is_demand
    oid, idx = extent.owner.object_id, extent.key.extent_idx
    s.origins.started(oid.url, source, len(run), s.now)
    s.actions.append(m.FetchBlocks(oid, idx, extent.generation, run.start, run.stop, is_demand, source))


def _await_file(s: State, extent: Extent, block: int) -> None:
    """The block is started once its file is open."""
    if extent.needs_table:
        read_table(s, extent)
    extent.backlog[block] = None


def read_table(s: State, extent: Extent) -> None:
    if extent.key not in s.opening:
        s.opening.add(extent.key)
        s.actions.append(m.ReadTable(extent.key, extent.generation))


def scrub(s: State, event: m.ScrubDue) -> None:
    """Some neighbouring blocks read back, if nobody needs the disk for something better."""
    if not s.scrubber.is_due(s.now):
        return
    is_busy = bool(s.demand or s.check_queue) or s.in_flight >= max(1, s.limits.demand_reserve)
    if is_busy or s.health.state is not Health.OK:
        s.scrubber.postpone(s.now)
        return
    taken = s.scrubber.take(lambda: s.residents.extents, partial(_scrubbable, s), s.now)
    if taken is None:
        return
    key, run = taken
    extent = s.residents.extents[key]
    if run is None:
        read_table(s, extent)
    else:
        s.counters.scrubbed_blocks += len(run)
        _start_check(s, extent, run)


def _scrubbable(s: State, key: ExtentId) -> list[int] | None:
    extent = s.residents.extents.get(key)
    if extent is None or extent.key in s.opening or not (extent.is_open or extent.needs_table):
        return []
    if extent.needs_table:
        return None
    return [b for b in extent.block_indices if extent.state(b) in (BlockState.RESIDENT, BlockState.UNVERIFIED)]


def _start_asked_check(s: State, key: BlockKey) -> None:
    """Checks this block, and those behind it in the queue that follow it on the disk."""
    extent = s.residents.of_block(*key)
    # Since it was asked for, its reader may have gone, or another request may have had it checked.
    if extent is None:
        s.suspects.discard(key)
    if extent is None or not _is_check_due(s, extent, key[1]):
        return
    end = key[1] + 1
    while s.check_queue and s.check_queue[0] == (key[0], end) and end - key[1] < BLOCKS_PER_FETCH:
        if end not in extent.block_indices or not _is_check_due(s, extent, end):
            break
        s.check_queue.popleft()
        end += 1
    _start_check(s, extent, range(key[1], end))


def _is_check_due(s: State, extent: Extent, block: int) -> bool:
    is_at_rest = extent.state(block) in (BlockState.RESIDENT, BlockState.UNVERIFIED)
    is_suspect = (extent.key.content_id, block) in s.suspects
    s.suspects.discard((extent.key.content_id, block))
    return is_at_rest and (is_suspect or s.waiting.is_check_wanted(extent.key, block))


def _start_check(s: State, extent: Extent, run: range) -> None:
    is_readable = all(extent.state(block).is_readable for block in run)
    for block in run:
        extent.move(block, BlockMove.CHECK)
    extent.num_busy += 1
    s.in_flight += 1
    oid, idx = extent.owner.object_id, extent.key.extent_idx
    s.actions.append(m.CheckBlocks(oid, idx, extent.generation, run.start, run.stop, from_device=is_readable))


def _new_extent(s: State, key: BlockKey, own_next_use: float, is_demand: bool) -> Extent | None:
    """Decides for a new file, with its space taken; None when the disk refuses files just now, or there is no room."""
    known = s.residents.objects[key[0]]
    if not (s.health.may_write if is_demand else s.health.may_prefetch):
        if is_demand:
            s.fail(key, s.disk_error)
        return None
    extent_idx = extent_of(key[1])
    size = s.size_of(key[0], extent_idx)
    if not make_room(s, size, 1, own_next_use, is_ahead=not is_demand):
        if is_demand and size > s.budget.bound_bytes:
            s.refuse_for_room(key)  # Waiting would not help.
        elif is_demand:
            s.room_deadline_s.setdefault(key, s.now + STALE_HOLD_S)
        return None
    generation, s.next_generation = s.next_generation, s.next_generation + 1
    extent = s.residents.add_extent(known, extent_idx, generation, size, s.now, Uses(s.tick()))
    extent.num_waiters = s.waiting.count_for(extent.key)
    s.budget.take(size)
    s.foresight.changed()
    s.opening.add(extent.key)
    s.actions.append(m.CreateExtent(known.object_id, extent_idx, generation))
    return extent
