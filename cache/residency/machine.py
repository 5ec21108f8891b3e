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
from collections.abc import Callable, Iterator
from typing import Any

from cache.blocks import ExtentId, ObjectId
from cache.order.lookahead import Lookahead
from cache.order.prospect import Prospect
from cache.residency import messages as m
from cache.residency import on_disk, on_readers, on_shelf
from cache.residency.budget import Budget
from cache.residency.health import DiskHealth
from cache.residency.origins import Origins
from cache.residency.patience import Patience
from cache.residency.policy import EvictionPolicy, FarthestNextUse
from cache.residency.pump import pump, scrub
from cache.residency.residents import Residents
from cache.residency.retry import RetryPolicy
from cache.residency.scrub import Scrubber
from cache.residency.state import Limits, State, Totals


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
        rng = rng or random.Random(0)
        patience = Patience(retry or RetryPolicy(), rng)
        self._state = State(budget, limits or Limits(), policy or FarthestNextUse(), patience, rng, num_words)

    # -- what the shell asks --

    def step(self, event: m.Event, now: float) -> list[m.Action]:
        """What to do now that `event` happened. `now`: seconds, never going back.

        Raises CapacityError for an ObjectOpened when the table of words is full; nothing has changed then.
        """
        s = self._state
        s.now = max(now, s.now)
        s.actions = []
        s.prefetch_is_stuck &= isinstance(event, _CHANGES_NO_PREFETCH)
        s.all_is_worth_keeping &= not isinstance(event, _CHANGES_WORTH)
        _HANDLERS[type(event)](s, event)
        pump(s)
        for content_id in s.maybe_unused:
            s.maybe_forget(content_id)
        s.maybe_unused.clear()
        actions, s.actions = s.actions, []
        return actions

    def next_deadline_s(self) -> float | None:
        """When TimePassed should come at the latest; None: nothing waits for time."""
        s = self._state
        others = [s.patience.next_deadline_s(), s.health.next_deadline_s()]
        return min([*s.room_deadline_s.values(), *(at_s for at_s in others if at_s is not None)], default=None)

    @property
    def budget(self) -> Budget:
        return self._state.budget

    @property
    def limits(self) -> Limits:
        return self._state.limits

    @property
    def counters(self) -> Totals:
        return self._state.counters

    @property
    def lookahead(self) -> Lookahead:
        return self._state.lookahead

    @property
    def prospect(self) -> Prospect:
        return self._state.foresight.prospect

    @property
    def residents(self) -> Residents:
        return self._state.residents

    @property
    def health(self) -> DiskHealth:
        return self._state.health

    @property
    def scrubber(self) -> Scrubber:
        return self._state.scrubber

    @property
    def origins(self) -> Origins:
        return self._state.origins

    @property
    def in_flight(self) -> int:
        return self._state.in_flight

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
        return len(self._state.waiting.wants)


_HANDLERS: dict[type, Callable[[State, Any], None]] = {
    m.ObjectOpened: on_readers.object_opened,
    m.ObjectClosed: on_readers.object_closed,
    m.ExtentFound: on_disk.extent_found,
    m.StockTaken: on_disk.stock_taken,
    m.StockFound: on_disk.stock_found,
    m.StockLost: on_disk.stock_lost,
    m.HeldFound: on_disk.held_found,
    m.ExtentTableRead: on_disk.extent_table_read,
    m.BlocksWanted: on_readers.blocks_wanted,
    m.WantSettled: on_readers.want_settled,
    m.BlocksHinted: on_readers.blocks_hinted,
    m.CheckAsked: on_readers.check_asked,
    m.ExtentHeld: on_readers.extent_held,
    m.ExtentReleased: on_readers.extent_released,
    m.ClientGone: on_readers.client_gone,
    m.OrderAnnounced: on_readers.order_announced,
    m.OrderOutlined: on_readers.order_outlined,
    m.EpochComputed: on_readers.epoch_computed,
    m.OrderAdvanced: on_readers.order_advanced,
    m.StreamClosed: on_readers.stream_closed,
    m.ExtentCreated: on_disk.extent_created,
    m.ExtentFailed: on_disk.extent_failed,
    m.BlocksLanded: on_disk.blocks_landed,
    m.BlocksFailed: on_disk.blocks_failed,
    m.BlocksChecked: on_disk.blocks_checked,
    m.EvictAsked: on_readers.evict_asked,
    m.PinsChanged: on_readers.pins_changed,
    m.CapacityChanged: on_disk.capacity_changed,
    m.DiskSeen: on_disk.disk_seen,
    m.DiskTroubled: on_disk.disk_troubled,
    m.DiskProbed: on_disk.disk_probed,
    m.ExtentSuspected: on_readers.extent_suspected,
    m.ScrubDue: scrub,
    m.SpaceFound: on_shelf.space_found,
    m.SpaceAsked: on_shelf.space_asked,
    m.SpaceReturned: on_shelf.space_returned,
    m.TimePassed: on_disk.time_passed,
}

_CHANGES_WORTH = (
    m.OrderAdvanced,
    m.OrderOutlined,
    m.EpochComputed,
    m.StreamClosed,
    m.ClientGone,
    m.CapacityChanged,
    m.DiskSeen,
    m.TimePassed,
)
"""After these, an extent that was worth keeping may be so no longer."""

_CHANGES_NO_PREFETCH = (m.BlocksChecked, m.BlocksWanted, m.ExtentHeld, m.ObjectOpened, m.CheckAsked, m.ScrubDue)
