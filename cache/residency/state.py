"""What the daemon knows at one moment, and the moves that several rooms of the machine need. No I/O, no clock, no decisions of its own.

The rooms: on_readers.py and on_disk.py take events in, pump.py decides what is started next, machine.py is the door. Each is a set of
functions over this one state; what they want done they append to `actions`.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from dataclasses import dataclass

from cache.blocks import ExtentId, ObjectId, extent_of, extent_span
from cache.errors import CacheError, CapacityError
from cache.order.lookahead import Lookahead
from cache.residency import messages as m
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, UNKNOWN_READERS, Budget
from cache.residency.demand import Demand
from cache.residency.foresight import Foresight
from cache.residency.health import DiskHealth
from cache.residency.origins import Origins
from cache.residency.patience import Patience
from cache.residency.policy import UNKNOWN_USE, EvictionPolicy
from cache.residency.residents import Extent, Residents
from cache.residency.scrub import Scrubber
from cache.residency.slots import EVICTION_WORD, Slots
from cache.residency.waiting import BlockKey, Check, Waiting, Want


@dataclass(frozen=True)
class Limits:
    """How much may be under way. `max_in_flight`: fetches and checks, from all origins together; how many one origin is given is found
    out (concurrency.py). `demand_reserve`: of these, how many prefetches leave free for readers that wait. `scrub_bytes_per_s`: how fast
    blocks are read back while nobody needs the disk; 0: never. `full_look`: up to so many extents, each search for room
    looks at all of them."""

    max_in_flight: int = 32
    demand_reserve: int = 8
    label_bytes: int = 8192
    scrub_bytes_per_s: int = 0
    full_look: int = 512


@dataclass
class Totals:
    """Totals since the daemon started."""

    fetched_blocks: int = 0
    fetched_bytes: int = 0
    borrowed_bytes: int = 0
    lent_bytes: int = 0
    peer_bypasses: int = 0
    demand_fetches: int = 0
    """Requests to the origin that a reader waited for."""
    prefetches: int = 0
    """Requests ahead of a reader."""
    delayed_hits: int = 0
    verified_blocks: int = 0
    rotten_blocks: int = 0
    retries: int = 0
    failed_blocks: int = 0
    evicted_extents: int = 0
    evicted_bytes: int = 0
    refused_for_room: int = 0
    scrubbed_blocks: int = 0
    lost_extents: int = 0


class State:
    """Tables and queues of one node's cache. `now` and `actions` belong to the step under way."""

    def __init__(
        self,
        budget: Budget,
        limits: Limits,
        policy: EvictionPolicy,
        patience: Patience,
        rng: random.Random,
        num_words: int,
    ) -> None:
        self.budget = budget
        self.limits = limits
        self.policy = policy
        self.patience = patience
        self.counters = Totals()
        self.lookahead = Lookahead()
        self.foresight = Foresight(self.lookahead)
        self.residents = Residents(Slots(num_words))
        self.in_flight = 0
        self.origins = Origins(limits.max_in_flight)
        self.from_origin: set[BlockKey] = set()
        """Blocks that come from it whoever owns them: another node waits for them here, or their owner could not lend them."""
        self.borrowing: set[BlockKey] = set()
        """Blocks that another node is being asked for just now."""
        self.waiting = Waiting()
        self.demand = Demand()
        self.room_deadline_s: dict[BlockKey, float] = {}
        self.hints: OrderedDict[BlockKey, None] = OrderedDict()
        """Blocks that somebody will probably read."""
        self.opening: set[ExtentId] = set()
        self.check_queue: deque[BlockKey] = deque()
        self.suspects: set[BlockKey] = set()
        """Blocks in `check_queue` that nobody waits for: a reader could not read them."""
        self.opened_by: dict[str, set[str]] = {}
        """Per client, the objects that it has opened (some of them may be forgotten by now)."""
        self.held_by: dict[str, set[ExtentId]] = {}
        """Per client, the extents whose files it may hold open."""
        self.checks_of_table: dict[ExtentId, list[m.CheckAsked]] = {}
        """Checks of files of which it is not known yet what they hold."""
        self.health = DiskHealth()
        self.disk_error: CacheError = CapacityError("the disk was refused for no reason")
        """Why the disk is not used just now."""
        self.scrubber = Scrubber(limits.scrub_bytes_per_s, rng)
        self.shortlist: deque[ExtentId] = deque()
        """Who goes next, as the last look at all extents had it."""
        self.next_full_look_s = 0.0
        self.prefetch_is_stuck = False
        self.all_is_worth_keeping = False
        """Nothing could go for a fetch ahead; to look again for every block that lands would cost a look at every extent."""
        self.maybe_unused: set[str] = set()
        self.next_generation = 1
        self.num_evictions = 0
        self.use_clock = 0
        self.now = 0.0
        self.actions: list[m.Action] = []

    def know(self, client_id: str, object_id: ObjectId) -> None:
        """An object that a reader has open. Raises CapacityError when the table of words is full."""
        clients = self.residents.learn(object_id).clients
        clients[client_id] = clients.get(client_id, 0) + 1
        self.opened_by.setdefault(client_id, set()).add(object_id.content_id)

    def queue(self, key: BlockKey, *, first: bool = False) -> None:
        """The block is to come: demanded if somebody waits for it, else when there is room. `first`: before all others."""
        if self.waiting.is_wanted(key):
            self.demand.add_first(key) if first else self.demand.add(key)
            return
        self.hints[key] = None
        if first:
            self.hints.move_to_end(key, last=False)

    def over(self, extent: Extent, blocks: range) -> None:
        """A fetch of these blocks is over, however it went."""
        for block in blocks:
            self.borrowing.discard((extent.key.content_id, block))

    def publish(self, word_idx: int, value: int) -> None:
        self.actions.append(m.PublishWord(word_idx, value))

    def evict(self, extent: Extent) -> None:
        """Words to zero, then unlink; the bytes come free now, or, of a file that somebody had, when the last reader has let go and the
        disk has said that it is gone: what a dead reader's kernel, his child or a reader of a former daemon keeps is on the disk still."""
        assert extent.num_busy == 0, extent
        for block in extent.block_indices:
            if extent.state(block).is_readable:
                self.publish(extent.owner.word_of_block(block), 0)
        self.publish(extent.owner.word_of_extent(extent.key.extent_idx), 0)
        self.num_evictions += 1
        self.publish(EVICTION_WORD, self.num_evictions)
        is_held, is_old = bool(extent.holders), extent.is_old
        self.actions.append(m.RemoveExtent(extent.key, extent.generation, is_held, is_old))
        if is_held or is_old:
            extent.holders[UNKNOWN_READERS] = 1
        del self.residents.extents[extent.key]
        self.foresight.changed()
        self.opening.discard(extent.key)
        if extent.holders:
            self.budget.haunt(extent.key, extent.generation, extent.size_bytes, extent.holders, self.now)
        else:
            self.budget.give_back(extent.size_bytes)
        self.counters.evicted_extents += 1
        self.counters.evicted_bytes += extent.size_bytes
        self.lookahead.offer_again(extent.key)
        self.maybe_unused.add(extent.key.content_id)

    def make_readable(self, extent: Extent, block: int) -> None:
        self.publish(extent.owner.word_of_block(block), extent.generation)
        key = (extent.key.content_id, block)
        self.demand.discard(key)
        self.from_origin.discard(key)
        for want, answer in self.waiting.arrived(key, extent.generation):
            self.ended(want)
            self.answer(want, extent, answer)

    def used(self, extent: Extent) -> None:
        """A reader is at it."""
        extent.last_use_s = self.now
        if extent.uses.is_another_pass(self.use_clock, len(self.residents.extents)):
            extent.uses = extent.uses.touched(self.tick())

    def tick(self) -> int:
        """An extent is touched afresh; the clock of uses."""
        self.use_clock += 1
        return self.use_clock

    def answer(self, want: Want, extent: Extent, answer: m.Answer) -> None:
        self.used(extent)
        extent.num_waiters += 1
        self.waiting.answered[want.event.request_id] = want
        self.actions.append(answer)

    def fail(self, key: BlockKey, error: CacheError) -> None:
        """Everybody who waits for this block is told."""
        self.patience.forget(key)
        self.hints.pop(key, None)
        self.demand.discard(key)
        self.from_origin.discard(key)
        self.room_deadline_s.pop(key, None)
        for want, answer in self.waiting.failed(key, error):
            self.ended(want)
            self.actions.append(answer)

    def refuse_for_room(self, key: BlockKey) -> None:
        self.counters.refused_for_room += 1
        budget = self.budget
        message = (
            f"no room for block {key[1]}: {budget.used_bytes} of {budget.bound_bytes} bytes are used, "
            f"{budget.held_bytes} of them evicted but still open in readers"
        )
        advice = "the reader goes on with the origin; a larger --capacity would keep the block"
        self.fail(key, CapacityError(message, advice=advice))

    def ended(self, want: Want) -> None:
        """A want is over: what only it was waiting for is no longer demanded."""
        extent = self.residents.extents.get(want.extent)
        if extent is not None:
            extent.num_waiters -= 1
            assert extent.num_waiters >= 0, want
        for block in want.missing:
            key = (want.event.content_id, block)
            if not self.waiting.is_wanted(key):
                self.demand.discard(key)
                self.from_origin.discard(key)
                self.room_deadline_s.pop(key, None)

    def check_ended(self, check: Check) -> None:
        extent = self.residents.extents.get(check.event.extent)
        if extent is not None:
            extent.num_waiters -= 1

    def finished(self, extent: ExtentId, generation: int) -> Extent:
        state = self.residents.current(extent, generation)
        assert state is not None, f"{extent} (generation {generation}) was removed while a worker had a block of it"
        state.num_busy -= 1
        self.in_flight -= 1
        return state

    def maybe_forget(self, content_id: str) -> None:
        """An object that nobody has open, nobody announced and of which nothing is on disk gives its words back."""
        known = self.residents.objects.get(content_id)
        if known is None or known.clients or next(self.residents.extents_of(known), None) is not None:
            return
        if self.waiting.is_object_wanted(content_id):
            return  # Who asked has closed it meanwhile; he is answered all the same.
        if not self.lookahead.uses_object(content_id, known.num_extents):
            for block in range(known.num_blocks):
                self.hints.pop((content_id, block), None)
                self.patience.forget((content_id, block))
            self.residents.forget(known)

    def size_of(self, content_id: str, extent_idx: int) -> int:
        """What an extent takes of the budget."""
        start, end = extent_span(self.residents.objects[content_id].object_id.size_bytes, extent_idx)
        return self.limits.label_bytes + end - start + INDEX_BYTES_PER_EXTENT

    def next_use(self, key: BlockKey) -> float:
        return self.next_use_of(ExtentId(key[0], extent_of(key[1])))

    def next_use_of(self, extent: ExtentId) -> float:
        distance = self.lookahead.next_use(extent)
        return self.foresight.prospect.next_use(extent, UNKNOWN_USE if distance is None else distance)

    def worth_keeping(self) -> float:
        """The next use up to which a fetch ahead of its reader displaces nothing (residency/keeping.py)."""
        beside = self.limits.label_bytes + INDEX_BYTES_PER_EXTENT
        return self.foresight.horizon(self.residents.extents, self.budget.bound_bytes, beside)
