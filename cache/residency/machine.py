"""The daemon's mind: `step(event, now)` returns what to do. No I/O, no clock, no randomness of its own.

Guarantees, each a test in tests/cache/test_residency_machine.py, all of them checked over generated histories in test_residency_model.py:
- a block has at most one fetch in flight, however many readers wait for it;
- a word is published only after its block landed or was verified, and zeroed before its file is removed;
- the bytes of all files, evicted ones that readers hold included, never exceed the capacity;
- an extent that a worker writes or checks is never removed;
- every request is answered exactly once, unless its client has gone;
- a prefetch never displaces what is needed sooner than the block that it fetches.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cache.blocks import ExtentId, ObjectId, extent_of, extent_span
from cache.errors import CacheError, CapacityError
from cache.order.lookahead import Lookahead
from cache.residency import messages as m
from cache.residency.blockstate import BlockMove, BlockState
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, STALE_HOLD_S, Budget, release
from cache.residency.patience import Patience
from cache.residency.policy import UNKNOWN_USE, Candidate, EvictionPolicy, FarthestNextUse
from cache.residency.residents import Extent, Residents
from cache.residency.retry import RetryPolicy
from cache.residency.slots import EVICTION_WORD, Slots
from cache.residency.waiting import BlockKey, Check, Waiting, Want

MAX_HINTS = 65_536

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
        self.residents = Residents(Slots(num_words))
        self.in_flight = 0
        self._policy = policy or FarthestNextUse()
        self._patience = Patience(retry or RetryPolicy(), rng or random.Random(0))
        self._waiting = Waiting()
        self._demand: OrderedDict[BlockKey, None] = OrderedDict()
        self._room_deadline_s: dict[BlockKey, float] = {}
        self._hints: OrderedDict[BlockKey, None] = OrderedDict()
        self._backlog: deque[BlockKey] = deque()
        self._opening: set[ExtentId] = set()
        self._check_queue: deque[BlockKey] = deque()
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
        """What to do now that `event` happened. `now`: seconds, never going back.

        Raises CapacityError for an ObjectOpened when the table of words is full; nothing has changed then.
        """
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
        retry_s = self._patience.next_deadline_s()
        return min([*self._room_deadline_s.values(), *([] if retry_s is None else [retry_s])], default=None)

    def word_base(self, content_id: str) -> int:
        return self.residents.objects[content_id].base

    def is_known(self, content_id: str) -> bool:
        return content_id in self.residents.objects

    def extent_generation(self, extent: ExtentId) -> int:
        """The extent's file, 0 when there is none that can be opened."""
        state = self.residents.extents.get(extent)
        return state.generation if state is not None and state.is_open else 0

    def on_disk_bytes(self, content_id: str) -> int:
        """Bytes of an object on disk, verified or not."""
        return self.residents.on_disk_bytes(content_id)

    def resident_blocks(self, content_id: str) -> int:
        return self.residents.resident_blocks(content_id)

    def objects(self) -> Iterator[ObjectId]:
        return (known.object_id for known in self.residents.objects.values())

    @property
    def num_objects(self) -> int:
        return len(self.residents.objects)

    @property
    def num_extents(self) -> int:
        return len(self.residents.extents)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting.wants)

    # -- events: what is on disk --

    def _extent_found(self, event: m.ExtentFound) -> None:
        size = event.file_bytes + INDEX_BYTES_PER_EXTENT
        known = self.residents.learn(event.object_id)
        # Used before anything of this run; among themselves the younger file later.
        last_use_s = -1.0 / event.generation
        extent = self.residents.add_extent(known, event.extent_idx, event.generation, size, last_use_s)
        self.budget.adopt(size)
        self._next_generation = max(self._next_generation, event.generation + 1)
        if event.present is None:
            extent.needs_table = True
        else:
            self._open_found(extent, event.present)

    def _extent_table_read(self, event: m.ExtentTableRead) -> None:
        extent = self.residents.current(event.extent, event.generation)
        if extent is not None and extent.needs_table:
            extent.needs_table = False
            self._open_found(extent, event.present)

    def _open_found(self, extent: Extent, present: frozenset[int]) -> None:
        for block in present:
            extent.move(block, BlockMove.FOUND)
        self._open(extent)

    def _extent_created(self, event: m.ExtentCreated) -> None:
        extent = self.residents.current(event.extent, event.generation)
        assert extent is not None and not extent.is_open, event
        self._open(extent)

    def _extent_failed(self, event: m.ExtentFailed) -> None:
        extent = self.residents.current(event.extent, event.generation)
        if extent is None or extent.is_open:
            return
        keys = [(event.extent.content_id, block) for block in extent.block_indices]
        if extent.needs_table:
            # A file from before this daemon that cannot be read: forget it, and fetch what is waited for.
            self._evict(extent)
            self._demand.update((key, None) for key in keys if self._waiting.is_wanted(key))
            return
        self._no_files_until_s = self._now + DISK_PAUSE_S
        self._disk_error = event.error
        for key in keys:
            self._fail(key, event.error)
        self._evict(extent)

    def _open(self, extent: Extent) -> None:
        extent.is_open = True
        self._opening.discard(extent.key)
        self._publish(extent.owner.word_of_extent(extent.key.extent_idx), extent.generation)
        for block in extent.backlog:
            key = (extent.key.content_id, block)
            if self._waiting.is_wanted(key):
                self._demand[key] = None
            else:
                self._backlog.append(key)
        extent.backlog.clear()

    # -- events: readers --

    def _object_opened(self, event: m.ObjectOpened) -> None:
        self.residents.learn(event.object_id).clients.add(event.client_id)

    def _blocks_wanted(self, event: m.BlocksWanted) -> None:
        known = self.residents.objects.get(event.content_id)
        if known is None or event.end > known.num_blocks:
            what = "unknown object" if known is None else f"there is no block {event.end - 1} in"
            error = CacheError(f"{what} {event.content_id}", advice="open the object first, and read within its size")
            self._actions.append(m.Answer(event.request_id, cause="error", error=error))
            return
        extent = self.residents.of_block(event.content_id, event.first)
        want = Want(event, set(), "hit")
        for block in range(event.first, event.end):
            state = extent.state(block) if extent is not None else BlockState.ABSENT
            if state.is_readable:
                continue
            key = (event.content_id, block)
            want.missing.add(block)
            want.cause = max(want.cause, self._cause(key, state, extent), key=_CAUSES.index)
            if not state.is_busy:
                self._demand[key] = None
                self._hints.pop(key, None)
        if extent is not None:
            extent.last_use_s = self._now
        if not want.missing and extent is not None:
            self._answer(want, extent, m.Answer(event.request_id, extent.generation))
            return
        self.counters.delayed_hits += want.cause == "delayed hit"
        self._waiting.add(want)
        if extent is not None:
            extent.num_waiters += 1

    def _want_settled(self, event: m.WantSettled) -> None:
        want = self._waiting.answered.pop(event.request_id, None)
        if want is not None:
            self.residents.extents[want.extent].num_waiters -= 1
        elif event.request_id in self._waiting.wants:
            self._ended(self._waiting.drop(event.request_id))

    def _cause(self, key: BlockKey, state: BlockState, extent: Extent | None) -> str:
        if state in (BlockState.VERIFYING, BlockState.UNVERIFIED) or (extent is not None and extent.needs_table):
            return "disk"
        is_coming = (
            key in self._demand or self._waiting.is_wanted(key) or (extent is not None and key[1] in extent.backlog)
        )
        return "delayed hit" if is_coming or state is BlockState.FETCHING else "origin"

    def _blocks_hinted(self, event: m.BlocksHinted) -> None:
        known = self.residents.objects.get(event.content_id)
        if known is None:
            return
        for block in range(max(event.first, 0), min(event.end, known.num_blocks)):
            if len(self._hints) >= MAX_HINTS:
                break
            self._hints[event.content_id, block] = None

    def _check_asked(self, event: m.CheckAsked) -> None:
        extent = self.residents.extents.get(event.extent)
        check = Check(event, set())
        if extent is not None and extent.is_open:
            for block in extent.block_indices:
                if extent.state(block) in (BlockState.RESIDENT, BlockState.UNVERIFIED):
                    self._check_queue.append((event.extent.content_id, block))
                    check.missing.add(block)
                elif extent.state(block) in (BlockState.CHECKING, BlockState.VERIFYING):
                    check.missing.add(block)
        if extent is not None and check.missing:
            self._waiting.checks[event.request_id] = check
            extent.num_waiters += 1
        else:
            self._actions.append(m.Answer(event.request_id))

    def _extent_held(self, event: m.ExtentHeld) -> None:
        extent = self.residents.current(event.extent, event.generation)
        ghost = self.budget.ghosts.get((event.extent, event.generation))
        if extent is not None:
            extent.holders[event.client_id] += 1
        elif ghost is not None:
            ghost.holders[event.client_id] += 1

    def _extent_released(self, event: m.ExtentReleased) -> None:
        extent = self.residents.current(event.extent, event.generation)
        if extent is not None:
            release(extent.holders, event.client_id)
        else:
            self.budget.let_go(event.extent, event.generation, event.client_id)

    def _client_gone(self, event: m.ClientGone) -> None:
        for extent in self.residents.extents.values():
            del extent.holders[event.client_id]
        self.budget.forget_client(event.client_id)
        for request_id in self._waiting.of_client(event.client_id):
            self._ended(self._waiting.drop(request_id))
        for request_id in self._waiting.answered_of(event.client_id):
            self._want_settled(m.WantSettled(request_id))
        for check in self._waiting.drop_checks_of(event.client_id):
            self._check_ended(check)
        for content_id, known in self.residents.objects.items():
            if event.client_id in known.clients:
                known.clients.discard(event.client_id)
                self._maybe_unused.add(content_id)

    def _order_announced(self, event: m.OrderAnnounced) -> None:
        self.lookahead.announce(event.stream_id, event.visits)

    def _order_advanced(self, event: m.OrderAdvanced) -> None:
        self.lookahead.advance(event.stream_id, event.num_visits)

    def _stream_closed(self, event: m.StreamClosed) -> None:
        self.lookahead.close(event.stream_id)

    def _evict_asked(self, event: m.EvictAsked) -> None:
        known = self.residents.objects.get(event.content_id)
        if known is None:
            return
        for extent in list(self.residents.extents_of(known)):
            if extent.is_evictable:
                self._evict(extent)
        self._maybe_unused.add(event.content_id)

    def _capacity_changed(self, event: m.CapacityChanged) -> None:
        self.budget.capacity_bytes = event.capacity_bytes

    # -- events: workers and time --

    def _block_landed(self, event: m.BlockLanded) -> None:
        extent = self._finished(event.extent, event.generation)
        self.counters.fetched_blocks += 1
        self.counters.fetched_bytes += event.num_bytes
        extent.move(event.block, BlockMove.LANDED)
        self._patience.forget((event.extent.content_id, event.block))
        self._make_readable(extent, event.block)

    def _block_failed(self, event: m.BlockFailed) -> None:
        extent = self._finished(event.extent, event.generation)
        extent.move(event.block, BlockMove.FAILED)
        key = (event.extent.content_id, event.block)
        if not self._patience.failed(key, event.error, self._now):
            self.counters.failed_blocks += 1
            self._fail(key, event.error)
            return
        self.counters.retries += 1
        queue = self._demand if self._waiting.is_wanted(key) else self._hints
        queue[key] = None

    def _block_checked(self, event: m.BlockChecked) -> None:
        extent = self._finished(event.extent, event.generation)
        was = extent.state(event.block)
        extent.move(event.block, BlockMove.SOUND if event.is_sound else BlockMove.ROTTEN)
        if event.is_sound:
            self.counters.verified_blocks += 1
            if was is BlockState.VERIFYING:
                self._make_readable(extent, event.block)
        else:
            self.counters.rotten_blocks += 1
            self._publish(extent.owner.word_of_block(event.block), 0)
            key = (event.extent.content_id, event.block)
            if self._waiting.is_wanted(key):
                self._demand[key] = None
        for check, answer in self._waiting.checked(event.extent, event.generation, event.block, event.is_sound):
            self._check_ended(check)
            self._actions.append(answer)

    def _time_passed(self, event: m.TimePassed) -> None:
        self._patience.time_passed(self._now)
        for key in [key for key, deadline_s in self._room_deadline_s.items() if deadline_s <= self._now]:
            self._refuse_for_room(key)

    def _refuse_for_room(self, key: BlockKey) -> None:
        self.counters.refused_for_room += 1
        budget = self.budget
        message = (
            f"no room for block {key[1]}: {budget.used_bytes} of {budget.capacity_bytes} bytes are used, "
            f"{budget.held_bytes} of them evicted but still open in readers"
        )
        advice = "the reader goes on with the origin; a larger --capacity would keep the block"
        self._fail(key, CapacityError(message, advice=advice))

    # -- deciding what is next --

    def _pump(self) -> None:
        """Starts what can be started: first what readers wait for, then checks, then what readers will read, nearest first."""
        if self.budget.is_exceeded:
            self._shrink()
        for key in list(self._demand):
            if self.in_flight >= self.limits.max_in_flight:
                return
            if self._patience.must_wait(key):
                continue
            if self._start(key, own_next_use=0, is_demand=True):
                self._demand.pop(key, None)
                self._room_deadline_s.pop(key, None)
        while self._check_queue and self.in_flight < self.limits.max_in_flight:
            self._start_asked_check(self._check_queue.popleft())
        # A file that is being opened counts as well: its space is taken, and its blocks follow at once.
        max_prefetches = self.limits.max_in_flight - self.limits.demand_reserve
        while not self._prefetch_is_stuck and self.in_flight + len(self._opening) < max_prefetches:
            if not self._start_prefetch():
                # Looking again costs a look at every extent, so it waits for an event that can change the answer.
                self._prefetch_is_stuck = True

    def _start_prefetch(self) -> bool:
        """Starts one prefetch; False: there is nothing to prefetch, or no room for it."""
        while self._backlog:
            key = self._backlog.popleft()
            if self._is_needed(*key):
                return self._start(key, own_next_use=self._next_use(key), is_demand=False)
        while ready := [key for key in islice(self._hints, 64) if not self._patience.must_wait(key)][:1]:
            key = ready[0]
            if not self._is_needed(*key):
                del self._hints[key]
                continue
            if not self._start(key, own_next_use=self._next_use(key), is_demand=False):
                break
            del self._hints[key]
            return True
        candidate = self.lookahead.next_candidate(self._is_needed)
        if candidate is None:
            return False
        content_id, block, distance = candidate
        return self._start((content_id, block), own_next_use=distance, is_demand=False)

    def _is_needed(self, content_id: str, block: int) -> bool:
        """Whether a prefetch of this block would do anything now."""
        key = (content_id, block)
        if content_id not in self.residents.objects or key in self._demand or self._patience.must_wait(key):
            return False
        if self._patience.is_cooling(key, self._now):
            return False
        extent = self.residents.of_block(content_id, block)
        if extent is None:
            # What can never fit must not stand before what can.
            return self._size_of(content_id, extent_of(block)) <= self.budget.capacity_bytes
        if not extent.is_open:
            return block not in extent.backlog
        return extent.state(block) in (BlockState.ABSENT, BlockState.UNVERIFIED)

    def _start(self, key: BlockKey, *, own_next_use: float, is_demand: bool) -> bool:
        """Takes the next step towards a readable block. False: no room now (a demand stays queued, for a while)."""
        content_id, block = key
        extent = self.residents.of_block(content_id, block) or self._new_extent(key, own_next_use, is_demand)
        if extent is None:
            # A demand that the disk refuses has been answered by now; one that only lacks room waits.
            return is_demand and not self._waiting.is_wanted(key)
        if not extent.is_open:
            if extent.needs_table and not extent.backlog:
                self._opening.add(extent.key)
                self._actions.append(m.ReadTable(extent.key, extent.generation))
            if block not in extent.backlog:
                extent.backlog.append(block)
        elif extent.state(block) is BlockState.UNVERIFIED:
            self._start_check(extent, block)
        elif extent.state(block) is BlockState.ABSENT:
            extent.move(block, BlockMove.FETCH)
            extent.num_busy += 1
            self.in_flight += 1
            self.counters.demand_fetches += is_demand
            self.counters.prefetches += not is_demand
            oid, idx = extent.owner.object_id, extent.key.extent_idx
            self._actions.append(m.FetchBlock(oid, idx, extent.generation, block, is_demand))
        return True

    def _start_asked_check(self, key: BlockKey) -> None:
        extent = self.residents.of_block(*key)
        # Since it was asked for, its reader may have gone, or another request may have had it checked.
        if extent is None or not self._waiting.is_check_wanted(extent.key, key[1]):
            return
        if extent.state(key[1]) in (BlockState.RESIDENT, BlockState.UNVERIFIED):
            self._start_check(extent, key[1])

    def _start_check(self, extent: Extent, block: int) -> None:
        extent.move(block, BlockMove.CHECK)
        extent.num_busy += 1
        self.in_flight += 1
        oid, idx = extent.owner.object_id, extent.key.extent_idx
        self._actions.append(m.CheckBlock(oid, idx, extent.generation, block))

    def _new_extent(self, key: BlockKey, own_next_use: float, is_demand: bool) -> Extent | None:
        """Decides for a new file, with its space taken; None when the disk refuses files just now, or there is no room."""
        known = self.residents.objects[key[0]]
        if self._now < self._no_files_until_s:
            if is_demand and self._disk_error is not None:
                self._fail(key, self._disk_error)
            return None
        extent_idx = extent_of(key[1])
        size = self._size_of(key[0], extent_idx)
        if not self._make_room(size, 1, own_next_use):
            if is_demand and size > self.budget.capacity_bytes:
                self._refuse_for_room(key)  # Waiting would not help.
            elif is_demand:
                self._room_deadline_s.setdefault(key, self._now + STALE_HOLD_S)
            return None
        generation, self._next_generation = self._next_generation, self._next_generation + 1
        extent = self.residents.add_extent(known, extent_idx, generation, size, self._now)
        extent.num_waiters = self._waiting.count_for(extent.key)
        self.budget.take(size)
        self._opening.add(extent.key)
        self._actions.append(m.CreateExtent(known.object_id, extent_idx, generation))
        return extent

    def _make_room(self, need_bytes: int, need_files: int, own_next_use: float) -> bool:
        """True when `need_bytes` are free now. Evicts if that is worth it; what readers still hold comes free later."""
        budget = self.budget
        if need_bytes > budget.capacity_bytes:
            return False
        back_bytes, back_files = budget.expected_back(self._now)
        short = need_bytes - budget.free_bytes - back_bytes
        short_files = need_files - (budget.max_files - budget.num_files) - back_files
        if short > 0 or short_files > 0:
            for victim in self._policy.choose(short, self._candidates(), own_next_use, short_files).victims:
                self._evict(self.residents.extents[victim])
        return need_bytes <= budget.free_bytes and budget.num_files + need_files <= budget.max_files

    def _shrink(self) -> None:
        """The bound was made smaller than what is there: evicts what it can now, the rest when nobody needs it to stay."""
        budget = self.budget
        candidates = self._candidates()
        back_bytes, back_files = budget.expected_back(self._now)
        short = min(-budget.free_bytes - back_bytes, sum(candidate.size_bytes for candidate in candidates))
        short_files = min(budget.num_files - budget.max_files - back_files, len(candidates))
        for victim in self._policy.choose(short, candidates, -1, short_files).victims:
            self._evict(self.residents.extents[victim])

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(e.key, e.size_bytes, self._next_use_of(e.key), e.last_use_s, bool(e.holders))
            for e in self.residents.extents.values()
            if e.is_evictable
        ]

    def _size_of(self, content_id: str, extent_idx: int) -> int:
        """What an extent takes of the budget."""
        start, end = extent_span(self.residents.objects[content_id].object_id.size_bytes, extent_idx)
        return self.limits.header_bytes + end - start + INDEX_BYTES_PER_EXTENT

    def _next_use(self, key: BlockKey) -> float:
        return self._next_use_of(ExtentId(key[0], extent_of(key[1])))

    def _next_use_of(self, extent: ExtentId) -> float:
        distance = self.lookahead.next_use(extent)
        return distance if distance is not None else UNKNOWN_USE

    # -- mechanics --

    def _evict(self, extent: Extent) -> None:
        """Words to zero, then unlink; the bytes come free now, or when the last reader lets go."""
        assert extent.num_busy == 0, extent
        for block in extent.block_indices:
            if extent.state(block).is_readable:
                self._publish(extent.owner.word_of_block(block), 0)
        self._publish(extent.owner.word_of_extent(extent.key.extent_idx), 0)
        self._num_evictions += 1
        self._publish(EVICTION_WORD, self._num_evictions)
        self._actions.append(m.RemoveExtent(extent.key, extent.generation))
        del self.residents.extents[extent.key]
        self._opening.discard(extent.key)
        if extent.holders:
            self.budget.haunt(extent.key, extent.generation, extent.size_bytes, extent.holders, self._now)
        else:
            self.budget.give_back(extent.size_bytes)
        self.counters.evicted_extents += 1
        self.counters.evicted_bytes += extent.size_bytes
        self.lookahead.lost(extent.key)
        self._maybe_unused.add(extent.key.content_id)

    def _make_readable(self, extent: Extent, block: int) -> None:
        self._publish(extent.owner.word_of_block(block), extent.generation)
        key = (extent.key.content_id, block)
        self._demand.pop(key, None)
        for want, answer in self._waiting.arrived(key, extent.generation):
            self._ended(want)
            self._answer(want, extent, answer)

    def _answer(self, want: Want, extent: Extent, answer: m.Answer) -> None:
        extent.last_use_s = self._now
        extent.num_waiters += 1
        self._waiting.answered[want.event.request_id] = want
        self._actions.append(answer)

    def _fail(self, key: BlockKey, error: CacheError) -> None:
        """Everybody who waits for this block is told."""
        self._patience.forget(key)
        self._hints.pop(key, None)
        self._demand.pop(key, None)
        self._room_deadline_s.pop(key, None)
        for want, answer in self._waiting.failed(key, error):
            self._ended(want)
            self._actions.append(answer)

    def _ended(self, want: Want) -> None:
        """A want is over: what only it was waiting for is no longer demanded."""
        extent = self.residents.extents.get(want.extent)
        if extent is not None:
            extent.num_waiters -= 1
            assert extent.num_waiters >= 0, want
        for block in want.missing:
            key = (want.event.content_id, block)
            if not self._waiting.is_wanted(key):
                self._demand.pop(key, None)
                self._room_deadline_s.pop(key, None)

    def _check_ended(self, check: Check) -> None:
        extent = self.residents.extents.get(check.event.extent)
        if extent is not None:
            extent.num_waiters -= 1

    def _finished(self, extent: ExtentId, generation: int) -> Extent:
        state = self.residents.current(extent, generation)
        assert state is not None, f"{extent} (generation {generation}) was removed while a worker had a block of it"
        state.num_busy -= 1
        self.in_flight -= 1
        return state

    def _publish(self, word_idx: int, value: int) -> None:
        self._actions.append(m.PublishWord(word_idx, value))

    def _maybe_forget(self, content_id: str) -> None:
        """An object that nobody has open, nobody announced and of which nothing is on disk gives its words back."""
        known = self.residents.objects.get(content_id)
        if known is None or known.clients or next(self.residents.extents_of(known), None) is not None:
            return
        if not self.lookahead.uses_object(content_id, known.num_extents):
            for block in range(known.num_blocks):
                self._hints.pop((content_id, block), None)
            self.residents.forget(known)


_CAUSES = ("hit", "delayed hit", "disk", "origin")
"""What a request is said to have waited for: the costliest of its blocks' causes."""

_HANDLERS: dict[type, Callable[[Residency, Any], None]] = {
    m.ObjectOpened: Residency._object_opened,
    m.ExtentFound: Residency._extent_found,
    m.ExtentTableRead: Residency._extent_table_read,
    m.BlocksWanted: Residency._blocks_wanted,
    m.WantSettled: Residency._want_settled,
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
