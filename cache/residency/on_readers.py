"""Events of readers and of people: what they open, want, hint, hold, announce, and that they have gone."""

from __future__ import annotations

from cache.blocks import BLOCKS_PER_FETCH, ExtentId, extent_of
from cache.errors import CacheError, PeerError
from cache.residency import messages as m
from cache.residency.blockstate import BlockState
from cache.residency.budget import release
from cache.residency.haste import hasten, hasten_what_is_near
from cache.residency.pump import read_table
from cache.residency.residents import Extent, KnownObject
from cache.residency.state import State
from cache.residency.waiting import BlockKey, Check, Want

MAX_HINTS = 131_072
"""Blocks; 32 GiB."""

CAUSES = ("hit", "delayed hit", "disk", "peer", "origin", "order unknown")
"""What a request is said to have waited for: the costliest of its blocks' causes. `order unknown`: it came from the origin or a peer, and
nobody had said before that it would be read, so it could not be here in time; `origin`, `peer`: it was announced, and came too late."""


def object_opened(s: State, event: m.ObjectOpened) -> None:
    s.know(event.client_id, event.object_id)


def object_closed(s: State, event: m.ObjectClosed) -> None:
    known = s.residents.objects.get(event.content_id)
    if known is None or event.client_id not in known.clients:
        return
    known.clients[event.client_id] -= 1
    if not known.clients[event.client_id]:
        del known.clients[event.client_id]
        opened = s.opened_by[event.client_id]
        opened.discard(event.content_id)
        if not opened:
            del s.opened_by[event.client_id]
        s.maybe_unused.add(event.content_id)


def blocks_wanted(s: State, event: m.BlocksWanted) -> None:
    known = s.residents.objects.get(event.content_id)
    if known is None or event.end > known.num_blocks:
        what = "unknown object" if known is None else f"there is no block {event.end - 1} in"
        error = CacheError(f"{what} {event.content_id}", advice="open the object first, and read within its size")
        s.actions.append(m.Answer(event.request_id, cause="error", error=error))
        return
    extent = s.residents.of_block(event.content_id, event.first)
    keys = [(event.content_id, block) for block in range(event.first, event.end)]
    if event.for_peer and not s.borrowing.isdisjoint(keys):
        # Two nodes that each take the other for the owner would wait for each other.
        error = PeerError("this node asks another one for these blocks itself", reason="not-owner")
        s.actions.append(m.Answer(event.request_id, cause="error", error=error))
        return
    want = Want(event, set(), "hit")
    for block in range(event.first, event.end):
        state = extent.state(block) if extent is not None else BlockState.ABSENT
        if state.is_readable:
            continue
        key = (event.content_id, block)
        want.missing.add(block)
        if event.for_peer:
            s.from_origin.add(key)
        want.cause = max(want.cause, _cause(s, key, state, extent), key=CAUSES.index)
        if not state.is_busy:
            s.demand.add(key)
            s.hints.pop(key, None)
    if extent is not None:
        s.used(extent)
    if not want.missing and extent is not None:
        s.answer(want, extent, m.Answer(event.request_id, extent.generation))
        return
    s.counters.delayed_hits += want.cause == "delayed hit"
    s.waiting.add(want)
    hasten(s, keys)
    if s.lookahead.next_use(want.extent) is None:
        _hint_around(s, known, event)
    if extent is not None:
        extent.num_waiters += 1


def _hint_around(s: State, known: KnownObject, event: m.BlocksWanted) -> None:
    """Nobody has said what will be read here. Who reads one thing usually reads what is beside it: the rest of the 4 MiB around it come
    behind what is waited for."""
    first = event.first // BLOCKS_PER_FETCH * BLOCKS_PER_FETCH
    end = min(-(-event.end // BLOCKS_PER_FETCH) * BLOCKS_PER_FETCH, known.num_blocks)
    for block in range(first, end):
        key = (event.content_id, block)
        if not event.first <= block < event.end and not s.waiting.is_wanted(key) and len(s.hints) < MAX_HINTS:
            s.hints[key] = None


def _cause(s: State, key: BlockKey, state: BlockState, extent: Extent | None) -> str:
    if state in (BlockState.VERIFYING, BlockState.UNVERIFIED) or (extent is not None and extent.needs_table):
        return "disk"
    is_coming = key in s.demand or s.waiting.is_wanted(key) or (extent is not None and key[1] in extent.backlog)
    if is_coming or state is BlockState.FETCHING:
        return "delayed hit"
    if not s.lookahead.is_announced(*key):
        return "order unknown"
    is_borrowed = key not in s.from_origin and s.origins.source_of(ExtentId(key[0], extent_of(key[1])))
    return "peer" if is_borrowed else "origin"


def want_settled(s: State, event: m.WantSettled) -> None:
    want = s.waiting.answered.pop(event.request_id, None)
    if want is not None:
        s.residents.extents[want.extent].num_waiters -= 1
    elif event.request_id in s.waiting.wants:
        s.ended(s.waiting.drop(event.request_id))


def blocks_hinted(s: State, event: m.BlocksHinted) -> None:
    known = s.residents.objects.get(event.content_id)
    if known is None:
        return
    for block in range(max(event.first, 0), min(event.end, known.num_blocks)):
        if len(s.hints) >= MAX_HINTS:
            break
        s.hints[event.content_id, block] = None


def check_asked(s: State, event: m.CheckAsked) -> None:
    extent = s.residents.extents.get(event.extent)
    if extent is not None and extent.needs_table:
        _await_table(s, extent, event)
        return
    check = Check(event, set())
    if extent is not None and extent.is_open:
        for block in extent.block_indices:
            if extent.state(block) in (BlockState.RESIDENT, BlockState.UNVERIFIED):
                s.check_queue.append((event.extent.content_id, block))
                check.missing.add(block)
            elif extent.state(block) in (BlockState.CHECKING, BlockState.VERIFYING):
                check.missing.add(block)
    if extent is not None and check.missing:
        s.waiting.checks[event.request_id] = check
        extent.num_waiters += 1
    else:
        s.actions.append(m.Answer(event.request_id))


def _await_table(s: State, extent: Extent, event: m.CheckAsked) -> None:
    """Which blocks there are to check is not known yet; the check goes on when it is (`checks_of_table`)."""
    s.checks_of_table.setdefault(event.extent, []).append(event)
    extent.num_waiters += 1
    read_table(s, extent)


def table_is_read(s: State, extent: Extent, *, is_sound: bool) -> None:
    """Checks that waited for it go on; of a file that cannot be read they say so."""
    for event in s.checks_of_table.pop(extent.key, ()):
        extent.num_waiters -= 1
        if is_sound:
            check_asked(s, event)
        else:
            s.actions.append(m.Answer(event.request_id, cause="1 rotten"))


def extent_suspected(s: State, event: m.ExtentSuspected) -> None:
    extent = s.residents.extents.get(event.extent)
    if extent is None or not extent.is_open:
        return
    for block in extent.block_indices:
        key = (event.extent.content_id, block)
        if extent.state(block) is BlockState.RESIDENT and key not in s.suspects:
            s.suspects.add(key)
            s.check_queue.append(key)


def extent_held(s: State, event: m.ExtentHeld) -> None:
    extent = s.residents.current(event.extent, event.generation)
    ghost = s.budget.ghosts.get((event.extent, event.generation))
    if extent is not None:
        extent.holders[event.client_id] += 1
        s.used(extent)
        s.held_by.setdefault(event.client_id, set()).add(event.extent)
    elif ghost is not None:
        ghost.holders[event.client_id] += 1


def extent_released(s: State, event: m.ExtentReleased) -> None:
    extent = s.residents.current(event.extent, event.generation)
    if extent is not None:
        release(extent.holders, event.client_id)
        if event.client_id not in extent.holders:
            s.held_by.get(event.client_id, set()).discard(event.extent)
    elif s.budget.let_go(event.extent, event.generation, event.client_id):
        s.actions.append(m.RemoveHeld(event.extent, event.generation))


def client_gone(s: State, event: m.ClientGone) -> None:
    # By what is known of this client: to look at 100,000 extents each time somebody has gone would hold everybody up.
    for key in s.held_by.pop(event.client_id, ()):
        if (extent := s.residents.extents.get(key)) is not None and event.client_id in extent.holders:
            del extent.holders[event.client_id]
            extent.is_old = (
                True  # His socket is closed; his files may be so a moment later, or live on in a child of his.
            )
    for extent_id, generation in s.budget.forget_client(event.client_id):
        s.actions.append(m.RemoveHeld(extent_id, generation))
    for request_id in s.waiting.of_client(event.client_id):
        s.ended(s.waiting.drop(request_id))
    for request_id in s.waiting.answered_of(event.client_id):
        want_settled(s, m.WantSettled(request_id))
    for check in s.waiting.drop_checks_of(event.client_id):
        s.check_ended(check)
    for key, events in list(s.checks_of_table.items()):
        others = [e for e in events if e.client_id != event.client_id]
        s.residents.extents[key].num_waiters -= len(events) - len(others)
        s.checks_of_table[key] = others
        if not others:
            del s.checks_of_table[key]
    for content_id in s.opened_by.pop(event.client_id, ()):
        if (known := s.residents.objects.get(content_id)) is not None:
            known.clients.pop(event.client_id, None)
            s.maybe_unused.add(content_id)


def order_announced(s: State, event: m.OrderAnnounced) -> None:
    s.lookahead.announce(event.stream_id, event.visits)
    s.foresight.prospect.refresh(event.stream_id)


def order_outlined(s: State, event: m.OrderOutlined) -> None:
    s.foresight.prospect.outline(event.stream_id, event.outline)
    _compute_epochs(s, event.stream_id)


def epoch_computed(s: State, event: m.EpochComputed) -> None:
    s.foresight.prospect.computed(event.group, event.epoch, event.spans)


def _compute_epochs(s: State, stream_id: str) -> None:
    for group, epoch in s.foresight.prospect.wanted_epochs(stream_id):
        s.actions.append(
            m.ComputeEpoch(group.number, epoch, group.table, group.schedule, group.ranks, group.world_size)
        )


def order_advanced(s: State, event: m.OrderAdvanced) -> None:
    s.maybe_unused |= s.lookahead.advance(event.stream_id, event.num_visits)
    hasten_what_is_near(s)
    s.foresight.prospect.refresh(event.stream_id)
    _compute_epochs(s, event.stream_id)


def stream_closed(s: State, event: m.StreamClosed) -> None:
    s.maybe_unused |= s.lookahead.close(event.stream_id)
    s.foresight.close(event.stream_id)


def evict_asked(s: State, event: m.EvictAsked) -> None:
    known = s.residents.objects.get(event.content_id)
    if known is None:
        return
    for extent in list(s.residents.extents_of(known)):
        if extent.is_evictable and not known.is_pinned:
            s.evict(extent)
    s.maybe_unused.add(event.content_id)


def pins_changed(s: State, event: m.PinsChanged) -> None:
    s.residents.pin(event.urls)
