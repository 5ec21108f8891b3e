"""The daemon's mind: `step(event, now)` returns what to do. No I/O, no clock, no randomness of its own.

Guarantees, each a test in tests/cache/test_residency_machine.py:
- a block has at most one fetch in flight, however many readers wait for it;
- a word is published only after its block landed or was verified, and zeroed before its file is removed;
- the bytes of all files, evicted ones that readers hold included, never exceed the capacity;
- an extent that a worker writes or checks is never removed;
- every request is answered exactly once, unless its client has gone;
- a prefetch never displaces what is needed sooner than the block that it fetches.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cache.blocks import (
    BLOCKS_PER_EXTENT,
    ExtentId,
    ObjectId,
    block_span,
    extent_of,
    extent_span,
    num_blocks,
    num_extents,
)
from cache.errors import CacheError, CapacityError
from cache.order.lookahead import Lookahead
from cache.residency import messages as m
from cache.residency.blockstate import BlockMove, BlockState, moved
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, STALE_HOLD_S, Budget, release
from cache.residency.policy import UNKNOWN_USE, Candidate, EvictionPolicy, FarthestNextUse
from cache.residency.retry import RetryPolicy
from cache.residency.slots import EVICTION_WORD, Slots

BlockKey = tuple[str, int]
"""Content id and block index within the object."""

MAX_HINTS = 65_536

COOLING_S = 5.0
"""A block that could not be fetched is not prefetched again for this long; a reader that asks for it still makes us try."""

MAX_COOLING = 4096

DISK_PAUSE_S = 5.0
"""After the disk refused a new file no other is tried for this long: readers are sent to the origin at once."""


@dataclass(frozen=True)
class Limits:
    """How much may be under way. `max_in_flight`: blocks being fetched or checked (each costs its worker up to a block of memory).
    `demand_reserve`: of these, how many prefetches leave free for readers that wait."""

    max_in_flight: int = 16
    demand_reserve: int = 4
    header_bytes: int = 4096


@dataclass
class _Object:
    object_id: ObjectId
    base: int
    clients: set[str] = field(default_factory=set)

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.object_id.size_bytes)

    def word_of_block(self, block: int) -> int:
        return self.base + block

    def word_of_extent(self, extent_idx: int) -> int:
        return self.base + self.num_blocks + extent_idx


@dataclass
class _Extent:
    generation: int
    size_bytes: int
    is_open: bool
    """False while its file is being made, or while its table has not been read."""
    last_use_s: float
    blocks: list[BlockState]
    needs_table: bool = False
    holders: Counter[str] = field(default_factory=Counter)
    """Per reader, how many times it was given the file and has not let go of it."""
    backlog: list[int] = field(default_factory=list)
    """Blocks to prefetch once the file is there."""
    num_busy: int = 0
    num_waiters: int = 0

    @property
    def is_pinned(self) -> bool:
        return not self.is_open or self.num_busy > 0 or self.num_waiters > 0


@dataclass
class _Want:
    event: m.BlocksWanted
    missing: set[int]
    cause: str


@dataclass
class _Check:
    event: m.CheckAsked
    missing: set[int]
    num_rotten: int = 0


@dataclass
class Totals:
    """Totals since the daemon started."""

    fetched_blocks: int = 0
    fetched_bytes: int = 0
    demand_fetches: int = 0
    prefetches: int = 0
    delayed_hits: int = 0
    verified_blocks: int = 0
    rotten_blocks: int = 0
    retries: int = 0
    failed_blocks: int = 0
    evicted_extents: int = 0
    evicted_bytes: int = 0
    refused_for_room: int = 0


class Residency:
    """One node's cache. Feed events with a monotonic `now`; perform the returned actions in their order."""

    def __init__(
        self,
        budget: Budget,
        *,
        limits: Limits | None = None,
        policy: EvictionPolicy | None = None,
        retry: RetryPolicy | None = None,
        rng: random.Random | None = None,
        num_words: int = 1 << 24,
    ) -> None:
        self.budget = budget
        self.limits = limits or Limits()
        self.counters = Totals()
        self.lookahead = Lookahead()
        self.slots = Slots(num_words)
        self.in_flight = 0
        self._policy = policy or FarthestNextUse()
        self._retry = retry or RetryPolicy()
        self._rng = rng or random.Random(0)
        self._objects: dict[str, _Object] = {}
        self._extents: dict[ExtentId, _Extent] = {}
        self._wants: dict[int, _Want] = {}
        self._checks: dict[int, _Check] = {}
        self._waiters: dict[BlockKey, list[int]] = {}
        self._demand: OrderedDict[BlockKey, None] = OrderedDict()
        self._room_deadline_s: dict[BlockKey, float] = {}
        self._attempts: dict[BlockKey, int] = {}
        self._retry_at_s: dict[BlockKey, float] = {}
        self._hints: OrderedDict[BlockKey, None] = OrderedDict()
        self._backlog: deque[BlockKey] = deque()
        self._cooling_until_s: dict[BlockKey, float] = {}
        self._no_files_until_s = 0.0
        self._disk_error: CacheError | None = None
        self._prefetch_is_stuck = False
        self._maybe_unused: set[str] = set()
        self._next_generation = 1
        self._num_evictions = 0
        self._now = 0.0
        self._actions: list[m.Action] = []

    # -- what the shell asks --

    def step(self, event: m.Event, now: float) -> list[m.Action]:
        """What to do now that `event` happened. `now`: seconds, never going back."""
        self._now = max(now, self._now)
        self._actions = []
        self._prefetch_is_stuck &= isinstance(event, _CHANGES_NO_PREFETCH)
        _HANDLERS[type(event)](self, event)
        self._pump()
        for content_id in self._maybe_unused:
            self._maybe_forget(content_id)
        self._maybe_unused.clear()
        actions, self._actions = self._actions, []
        return actions

    def next_deadline_s(self) -> float | None:
        """When TimePassed should come at the latest; None: nothing waits for time."""
        times = [*self._retry_at_s.values(), *self._room_deadline_s.values()]
        return min(times) if times else None

    def word_base(self, content_id: str) -> int:
        return self._objects[content_id].base

    def is_known(self, content_id: str) -> bool:
        return content_id in self._objects

    def extent_generation(self, extent: ExtentId) -> int:
        """The extent's file, 0 when there is none that can be opened."""
        state = self._extents.get(extent)
        return state.generation if state is not None and state.is_open else 0

    def resident_blocks(self, content_id: str) -> int:
        obj = self._objects.get(content_id)
        return 0 if obj is None else sum(s.is_readable for _, e in self._extents_of(obj) for s in e.blocks)

    def on_disk_bytes(self, content_id: str) -> int:
        """Bytes of an object that are on disk, verified or not (of an extent whose table is unread: all of them)."""
        obj = self._objects.get(content_id)
        if obj is None:
            return 0
        total = 0
        for extent_idx, state in self._extents_of(obj):
            for slot, block in enumerate(state.blocks):
                if (
                    state.needs_table
                    or block is BlockState.UNVERIFIED
                    or block.is_readable
                    or block is BlockState.VERIFYING
                ):
                    start, end = block_span(obj.object_id.size_bytes, extent_idx * BLOCKS_PER_EXTENT + slot)
                    total += end - start
        return total

    def objects(self) -> Iterator[ObjectId]:
        return (obj.object_id for obj in self._objects.values())

    @property
    def num_objects(self) -> int:
        return len(self._objects)

    @property
    def num_extents(self) -> int:
        return len(self._extents)

    @property
    def num_waiting(self) -> int:
        return len(self._wants)

    # -- events --

    def _object_opened(self, event: m.ObjectOpened) -> None:
        self._object(event.object_id).clients.add(event.client_id)

    def _object(self, object_id: ObjectId) -> _Object:
        obj = self._objects.get(object_id.content_id)
        if obj is None:
            size = object_id.size_bytes
            obj = _Object(object_id, self.slots.take(num_blocks(size) + num_extents(size)))
            self._objects[object_id.content_id] = obj
        return obj

    def _extent_found(self, event: m.ExtentFound) -> None:
        obj = self._object(event.object_id)
        extent = ExtentId(event.object_id.content_id, event.extent_idx)
        size = event.file_bytes + INDEX_BYTES_PER_EXTENT
        state = self._new_extent(obj, event.extent_idx, event.generation, size)
        state.last_use_s = -1.0 / event.generation  # before anything of this run; the younger file later
        state.needs_table = event.present is None
        self._extents[extent] = state
        self.budget.adopt(size)
        self._next_generation = max(self._next_generation, event.generation + 1)
        if event.present is not None:
            self._open_found(extent, state, event.present)

    def _extent_table_read(self, event: m.ExtentTableRead) -> None:
        state = self._current(event.extent, event.generation)
        if state is not None and state.needs_table:
            state.needs_table = False
            self._open_found(event.extent, state, event.present)

    def _open_found(self, extent: ExtentId, state: _Extent, present: frozenset[int]) -> None:
        for block in present:
            self._move(extent, state, block, BlockMove.FOUND)
        self._open_extent(extent, state)

    def _blocks_wanted(self, event: m.BlocksWanted) -> None:
        obj = self._objects.get(event.content_id)
        if obj is None or event.end > obj.num_blocks:
            what = "unknown object" if obj is None else f"there is no block {event.end - 1} in"
            error = CacheError(f"{what} {event.content_id}", advice="open the object first, and read within its size")
            self._actions.append(m.Answer(event.request_id, cause="error", error=error))
            return
        extent = ExtentId(event.content_id, extent_of(event.first))
        state = self._extents.get(extent)
        want = _Want(event, set(), "hit")
        for block in range(event.first, event.end):
            now_in = self._block_state(state, block)
            if now_in.is_readable:
                continue
            want.missing.add(block)
            key = (event.content_id, block)
            self._waiters.setdefault(key, []).append(event.request_id)
            if now_in is BlockState.FETCHING or key in self._demand:
                self.counters.delayed_hits += 1
                want.cause = "delayed hit" if want.cause == "hit" else want.cause
            elif now_in in (BlockState.VERIFYING, BlockState.UNVERIFIED) or (state is not None and state.needs_table):
                want.cause = "disk" if want.cause != "origin" else want.cause
            else:
                want.cause = "origin"
            if not now_in.is_busy:
                self._demand[key] = None
                self._hints.pop(key, None)
        if state is not None:
            state.last_use_s = self._now
        if want.missing:
            self._wants[event.request_id] = want
            if state is not None:
                state.num_waiters += 1
        else:
            self._actions.append(m.Answer(event.request_id, self.extent_generation(extent)))

    def _blocks_hinted(self, event: m.BlocksHinted) -> None:
        obj = self._objects.get(event.content_id)
        if obj is None:
            return
        for block in range(event.first, min(event.end, obj.num_blocks)):
            if len(self._hints) >= MAX_HINTS:
                break
            self._hints[event.content_id, block] = None

    def _check_asked(self, event: m.CheckAsked) -> None:
        state = self._extents.get(event.extent)
        obj = self._objects.get(event.extent.content_id)
        check = _Check(event, set())
        if state is not None and obj is not None and state.is_open:
            first = event.extent.extent_idx * BLOCKS_PER_EXTENT
            for slot, now_in in enumerate(state.blocks):
                if now_in in (BlockState.RESIDENT, BlockState.UNVERIFIED):
                    self._start_check(obj, event.extent, state, first + slot)
                if state.blocks[slot] in (BlockState.CHECKING, BlockState.VERIFYING):
                    check.missing.add(first + slot)
        if check.missing:
            self._checks[event.request_id] = check
        else:
            self._actions.append(m.Answer(event.request_id))

    def _extent_held(self, event: m.ExtentHeld) -> None:
        state = self._current(event.extent, event.generation)
        if state is not None:
            state.holders[event.client_id] += 1
            return
        ghost = self.budget.ghosts.get((event.extent, event.generation))
        if ghost is not None:
            ghost.holders[event.client_id] += 1

    def _extent_released(self, event: m.ExtentReleased) -> None:
        state = self._current(event.extent, event.generation)
        if state is not None:
            release(state.holders, event.client_id)
        else:
            self.budget.let_go(event.extent, event.generation, event.client_id)

    def _client_gone(self, event: m.ClientGone) -> None:
        for state in self._extents.values():
            del state.holders[event.client_id]
        self.budget.forget_client(event.client_id)
        for request_id, want in list(self._wants.items()):
            if want.event.client_id == event.client_id:
                self._drop_want(request_id)
        for request_id, check in list(self._checks.items()):
            if check.event.client_id == event.client_id:
                del self._checks[request_id]
        for content_id, obj in self._objects.items():
            if event.client_id in obj.clients:
                obj.clients.discard(event.client_id)
                self._maybe_unused.add(content_id)

    def _order_announced(self, event: m.OrderAnnounced) -> None:
        self.lookahead.announce(event.stream_id, event.visits)

    def _order_advanced(self, event: m.OrderAdvanced) -> None:
        self.lookahead.advance(event.stream_id, event.num_visits)

    def _stream_closed(self, event: m.StreamClosed) -> None:
        self.lookahead.close(event.stream_id)

    def _extent_created(self, event: m.ExtentCreated) -> None:
        state = self._current(event.extent, event.generation)
        assert state is not None and not state.is_open, event
        self._open_extent(event.extent, state)

    def _extent_failed(self, event: m.ExtentFailed) -> None:
        state = self._current(event.extent, event.generation)
        if state is None or state.is_open:
            return
        first = event.extent.extent_idx * BLOCKS_PER_EXTENT
        keys = [(event.extent.content_id, first + slot) for slot in range(len(state.blocks))]
        if state.needs_table:
            # A file from before this daemon that cannot be read: forget it, and fetch what is waited for.
            self._evict(event.extent, state)
            self._demand.update((key, None) for key in keys if key in self._waiters)
            return
        self._no_files_until_s = self._now + DISK_PAUSE_S
        self._disk_error = event.error
        for key in keys:
            self._fail_block(key, event.error)
        self._evict(event.extent, state)

    def _block_landed(self, event: m.BlockLanded) -> None:
        obj, state = self._finished(event.extent, event.generation)
        self.counters.fetched_blocks += 1
        self.counters.fetched_bytes += event.num_bytes
        self._move(event.extent, state, event.block, BlockMove.LANDED)
        self._attempts.pop((event.extent.content_id, event.block), None)
        self._make_readable(obj, event.extent, state, event.block)

    def _block_failed(self, event: m.BlockFailed) -> None:
        _, state = self._finished(event.extent, event.generation)
        self._move(event.extent, state, event.block, BlockMove.FAILED)
        key = (event.extent.content_id, event.block)
        attempts = self._attempts.get(key, 0) + 1
        delay_s = None
        if event.error.is_retryable:
            asked_s = getattr(event.error, "retry_after_s", None)
            delay_s = self._retry.delay_s(attempts, asked_s, self._rng)
        if delay_s is None:
            self.counters.failed_blocks += 1
            self._cooling_until_s[key] = self._now + COOLING_S
            if len(self._cooling_until_s) > MAX_COOLING:
                cooling = self._cooling_until_s
                self._cooling_until_s = {key: until_s for key, until_s in cooling.items() if until_s > self._now}
            self._fail_block(key, event.error)
        else:
            self.counters.retries += 1
            self._attempts[key] = attempts
            self._retry_at_s[key] = self._now + delay_s
            if key in self._waiters:
                self._demand[key] = None
            else:
                self._hints[key] = None

    def _block_checked(self, event: m.BlockChecked) -> None:
        obj, state = self._finished(event.extent, event.generation)
        was = self._block_state(state, event.block)
        self._move(event.extent, state, event.block, BlockMove.SOUND if event.is_sound else BlockMove.ROTTEN)
        if event.is_sound:
            self.counters.verified_blocks += 1
            if was is BlockState.VERIFYING:
                self._make_readable(obj, event.extent, state, event.block)
        else:
            self.counters.rotten_blocks += 1
            self._actions.append(m.PublishWord(obj.word_of_block(event.block), 0))
            if (event.extent.content_id, event.block) in self._waiters:
                self._demand[event.extent.content_id, event.block] = None
        for request_id, check in list(self._checks.items()):
            if check.event.extent == event.extent and event.block in check.missing:
                check.missing.discard(event.block)
                check.num_rotten += not event.is_sound
                if not check.missing:
                    del self._checks[request_id]
                    cause = "sound" if check.num_rotten == 0 else f"{check.num_rotten} rotten"
                    self._actions.append(m.Answer(request_id, event.generation, cause))

    def _evict_asked(self, event: m.EvictAsked) -> None:
        obj = self._objects.get(event.content_id)
        if obj is None:
            return
        for extent_idx, state in list(self._extents_of(obj)):
            if not state.is_pinned or state.needs_table:
                self._evict(ExtentId(event.content_id, extent_idx), state)
        self._maybe_unused.add(event.content_id)

    def _capacity_changed(self, event: m.CapacityChanged) -> None:
        self.budget.capacity_bytes = event.capacity_bytes
        if self.budget.free_bytes < 0:
            self._make_room(0, 0, own_next_use=-1)

    def _time_passed(self, event: m.TimePassed) -> None:
        for key, deadline_s in list(self._room_deadline_s.items()):
            if deadline_s <= self._now:
                del self._room_deadline_s[key]
                self._demand.pop(key, None)
                self.counters.refused_for_room += 1
                budget = self.budget
                error = CapacityError(
                    f"no room for block {key[1]}: {budget.used_bytes} of {budget.capacity_bytes} bytes are used, "
                    f"{budget.held_bytes} of them evicted but still open in readers",
                    advice="the reader goes on with the origin; a larger --capacity would keep the block",
                )
                self._fail_block(key, error)
        for key in [key for key, at_s in self._retry_at_s.items() if at_s <= self._now]:
            del self._retry_at_s[key]

    # -- deciding what is next --

    def _pump(self) -> None:
        """Starts what can be started: first what readers wait for, then what they will read, nearest first."""
        for key in list(self._demand):
            if self.in_flight >= self.limits.max_in_flight:
                return
            if key in self._retry_at_s:
                continue
            if self._start(key, own_next_use=0, is_demand=True):
                self._demand.pop(key, None)
                self._room_deadline_s.pop(key, None)
        while not self._prefetch_is_stuck and self.in_flight < self.limits.max_in_flight - self.limits.demand_reserve:
            if not self._start_prefetch():
                # Looking again costs a look at every extent, so it waits for an event that can change the answer.
                self._prefetch_is_stuck = True

    def _start_prefetch(self) -> bool:
        """Starts one prefetch; False: there is nothing to prefetch, or no room for it."""
        while self._backlog:
            key = self._backlog.popleft()
            if self._is_needed(*key):
                self._start(key, own_next_use=self._own_next_use(key), is_demand=False)
                return True
        while self._hints:
            ready = [k for k in islice(self._hints, 64) if k not in self._retry_at_s][:1]
            if not ready:
                break
            key = ready[0]
            if not self._is_needed(*key):
                del self._hints[key]
                continue
            if not self._start(key, own_next_use=self._own_next_use(key), is_demand=False):
                break
            del self._hints[key]
            return True
        candidate = self.lookahead.next_candidate(self._is_needed)
        if candidate is None:
            return False
        content_id, block, distance = candidate
        return self._start((content_id, block), own_next_use=distance, is_demand=False)

    def _own_next_use(self, key: BlockKey) -> float:
        distance = self.lookahead.next_use(ExtentId(key[0], extent_of(key[1])))
        # A hinted block is about to be read by a reader without known order: it may displace the unknown, nothing that is known.
        return distance if distance is not None else UNKNOWN_USE

    def _is_needed(self, content_id: str, block: int) -> bool:
        """Whether a prefetch of this block would do anything now."""
        key = (content_id, block)
        if content_id not in self._objects or key in self._demand or key in self._retry_at_s:
            return False
        if self._cooling_until_s.get(key, 0.0) > self._now:
            return False
        state = self._extents.get(ExtentId(content_id, extent_of(block)))
        if state is None:
            return True
        if not state.is_open:
            return block not in state.backlog
        return self._block_state(state, block) in (BlockState.ABSENT, BlockState.UNVERIFIED)

    def _start(self, key: BlockKey, *, own_next_use: float, is_demand: bool) -> bool:
        """Takes the next step towards a readable block. False: no room now (a demand stays queued and is told by deadline)."""
        content_id, block = key
        obj = self._objects[content_id]
        extent = ExtentId(content_id, extent_of(block))
        state = self._extents.get(extent)
        if state is None and self._now < self._no_files_until_s:
            if is_demand and self._disk_error is not None:
                self._fail_block(key, self._disk_error)
            return is_demand
        if state is None:
            start, end = extent_span(obj.object_id.size_bytes, extent.extent_idx)
            size = self.limits.header_bytes + end - start + INDEX_BYTES_PER_EXTENT
            if not self._make_room(size, 1, own_next_use):
                if is_demand:
                    self._room_deadline_s.setdefault(key, self._now + STALE_HOLD_S)
                return False
            generation, self._next_generation = self._next_generation, self._next_generation + 1
            state = self._new_extent(obj, extent.extent_idx, generation, size)
            state.num_waiters = self._count_wants(extent)
            self._extents[extent] = state
            self.budget.take(size)
            self._actions.append(m.CreateExtent(obj.object_id, extent.extent_idx, generation))
        if not state.is_open:
            if state.needs_table and not state.backlog:
                self._actions.append(m.ReadTable(extent, state.generation))
            if block not in state.backlog:
                state.backlog.append(block)
            return True
        now_in = self._block_state(state, block)
        if now_in is BlockState.UNVERIFIED:
            self._start_check(obj, extent, state, block)
        elif now_in is BlockState.ABSENT:
            self._move(extent, state, block, BlockMove.FETCH)
            state.num_busy += 1
            self.in_flight += 1
            self.counters.demand_fetches += is_demand
            self.counters.prefetches += not is_demand
            self._actions.append(m.FetchBlock(obj.object_id, extent.extent_idx, state.generation, block, is_demand))
        return True

    def _start_check(self, obj: _Object, extent: ExtentId, state: _Extent, block: int) -> None:
        self._move(extent, state, block, BlockMove.CHECK)
        state.num_busy += 1
        self.in_flight += 1
        self._actions.append(m.CheckBlock(obj.object_id, extent.extent_idx, state.generation, block))

    def _make_room(self, need_bytes: int, need_files: int, own_next_use: float) -> bool:
        """True when `need_bytes` are free now. Evicts if that is worth it; what readers still hold comes free later."""
        budget = self.budget
        if need_bytes > budget.capacity_bytes:
            return False
        back_bytes, back_files = budget.expected_back(self._now)
        short = need_bytes - budget.free_bytes
        short_files = need_files - (budget.max_files - budget.num_files)
        if short - back_bytes > 0 or short_files - back_files > 0:
            candidates = [
                Candidate(extent, state.size_bytes, self._next_use(extent), state.last_use_s, bool(state.holders))
                for extent, state in self._extents.items()
                if not state.is_pinned or (state.needs_table and state.num_waiters == 0 and not state.backlog)
            ]
            decision = self._policy.choose(max(short - back_bytes, 1), candidates, own_next_use)
            for extent in decision.victims:
                self._evict(extent, self._extents[extent])
        return need_bytes <= budget.free_bytes and budget.num_files + need_files <= budget.max_files

    def _next_use(self, extent: ExtentId) -> float:
        distance = self.lookahead.next_use(extent)
        return distance if distance is not None else UNKNOWN_USE

    # -- mechanics --

    def _new_extent(self, obj: _Object, extent_idx: int, generation: int, size_bytes: int) -> _Extent:
        start, end = extent_span(obj.object_id.size_bytes, extent_idx)
        blocks = [BlockState.ABSENT] * num_blocks(end - start)
        return _Extent(generation, size_bytes, False, self._now, blocks)

    def _open_extent(self, extent: ExtentId, state: _Extent) -> None:
        state.is_open = True
        obj = self._objects[extent.content_id]
        self._actions.append(m.PublishWord(obj.word_of_extent(extent.extent_idx), state.generation))
        for block in state.backlog:
            key = (extent.content_id, block)
            if key in self._waiters:
                self._demand[key] = None
            else:
                self._backlog.append(key)
        state.backlog.clear()

    def _evict(self, extent: ExtentId, state: _Extent) -> None:
        """Words to zero, then unlink; the bytes come free now, or when the last reader lets go."""
        obj = self._objects[extent.content_id]
        first = extent.extent_idx * BLOCKS_PER_EXTENT
        for slot, now_in in enumerate(state.blocks):
            assert not now_in.is_busy, (extent, slot, now_in)
            if now_in.is_readable:
                self._actions.append(m.PublishWord(obj.word_of_block(first + slot), 0))
        self._actions.append(m.PublishWord(obj.word_of_extent(extent.extent_idx), 0))
        self._num_evictions += 1
        self._actions.append(m.PublishWord(EVICTION_WORD, self._num_evictions))
        self._actions.append(m.RemoveExtent(extent, state.generation))
        del self._extents[extent]
        if state.holders:
            self.budget.haunt(extent, state.generation, state.size_bytes, state.holders, self._now)
        else:
            self.budget.give_back(state.size_bytes)
        self.counters.evicted_extents += 1
        self.counters.evicted_bytes += state.size_bytes
        self.lookahead.lost(extent)
        self._maybe_unused.add(extent.content_id)

    def _make_readable(self, obj: _Object, extent: ExtentId, state: _Extent, block: int) -> None:
        self._actions.append(m.PublishWord(obj.word_of_block(block), state.generation))
        key = (extent.content_id, block)
        self._demand.pop(key, None)
        for request_id in self._waiters.pop(key, []):
            want = self._wants[request_id]
            want.missing.discard(block)
            if not want.missing:
                self._finish_want(request_id, m.Answer(request_id, state.generation, want.cause))

    def _fail_block(self, key: BlockKey, error: CacheError) -> None:
        """Everybody who waits for this block is told."""
        self._attempts.pop(key, None)
        self._retry_at_s.pop(key, None)
        self._hints.pop(key, None)
        for request_id in list(self._waiters.get(key, [])):
            self._finish_want(request_id, m.Answer(request_id, cause="error", error=error))
        self._demand.pop(key, None)
        self._room_deadline_s.pop(key, None)

    def _finish_want(self, request_id: int, answer: m.Answer) -> None:
        self._drop_want(request_id)
        self._actions.append(answer)

    def _drop_want(self, request_id: int) -> None:
        want = self._wants.pop(request_id)
        content_id = want.event.content_id
        for block in want.missing:
            key = (content_id, block)
            waiting = self._waiters.get(key)
            if waiting is None:
                continue
            waiting.remove(request_id)
            if not waiting:
                del self._waiters[key]
                self._demand.pop(key, None)
                self._room_deadline_s.pop(key, None)
        state = self._extents.get(ExtentId(content_id, extent_of(want.event.first)))
        if state is not None:
            state.num_waiters -= 1
            assert state.num_waiters >= 0, want

    def _count_wants(self, extent: ExtentId) -> int:
        return sum(
            ExtentId(want.event.content_id, extent_of(want.event.first)) == extent for want in self._wants.values()
        )

    def _finished(self, extent: ExtentId, generation: int) -> tuple[_Object, _Extent]:
        state = self._current(extent, generation)
        assert state is not None, (
            f"a worker finished a block of {extent} generation {generation}, which was removed under it"
        )
        state.num_busy -= 1
        self.in_flight -= 1
        return self._objects[extent.content_id], state

    def _current(self, extent: ExtentId, generation: int) -> _Extent | None:
        state = self._extents.get(extent)
        return state if state is not None and state.generation == generation else None

    def _move(self, extent: ExtentId, state: _Extent, block: int, move: BlockMove) -> None:
        slot = block % BLOCKS_PER_EXTENT
        state.blocks[slot] = moved(state.blocks[slot], move, (extent, block))

    @staticmethod
    def _block_state(state: _Extent | None, block: int) -> BlockState:
        return BlockState.ABSENT if state is None else state.blocks[block % BLOCKS_PER_EXTENT]

    def _extents_of(self, obj: _Object) -> Iterator[tuple[int, _Extent]]:
        content_id = obj.object_id.content_id
        for extent_idx in range(num_extents(obj.object_id.size_bytes)):
            state = self._extents.get(ExtentId(content_id, extent_idx))
            if state is not None:
                yield extent_idx, state

    def _maybe_forget(self, content_id: str) -> None:
        """An object that nobody has open, nobody announced and of which nothing is on disk gives its words back."""
        obj = self._objects.get(content_id)
        if obj is None:
            return
        count = num_extents(obj.object_id.size_bytes)
        if (
            obj.clients
            or self.lookahead.uses_object(content_id, count)
            or next(self._extents_of(obj), None) is not None
        ):
            return
        del self._objects[content_id]
        self.slots.give_back(obj.base, obj.num_blocks + count)


_HANDLERS: dict[type, Callable[[Residency, Any], None]] = {
    m.ObjectOpened: Residency._object_opened,
    m.ExtentFound: Residency._extent_found,
    m.ExtentTableRead: Residency._extent_table_read,
    m.BlocksWanted: Residency._blocks_wanted,
    m.BlocksHinted: Residency._blocks_hinted,
    m.CheckAsked: Residency._check_asked,
    m.ExtentHeld: Residency._extent_held,
    m.ExtentReleased: Residency._extent_released,
    m.ClientGone: Residency._client_gone,
    m.OrderAnnounced: Residency._order_announced,
    m.OrderAdvanced: Residency._order_advanced,
    m.StreamClosed: Residency._stream_closed,
    m.ExtentCreated: Residency._extent_created,
    m.ExtentFailed: Residency._extent_failed,
    m.BlockLanded: Residency._block_landed,
    m.BlockFailed: Residency._block_failed,
    m.BlockChecked: Residency._block_checked,
    m.EvictAsked: Residency._evict_asked,
    m.CapacityChanged: Residency._capacity_changed,
    m.TimePassed: Residency._time_passed,
}

_CHANGES_NO_PREFETCH = (m.BlockChecked, m.BlocksWanted, m.ExtentHeld, m.ObjectOpened, m.CheckAsked)
