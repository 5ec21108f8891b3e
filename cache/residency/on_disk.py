"""Events of the disk, of workers and of time: files found and made, blocks fetched and checked. Functions over the machine's state."""

from __future__ import annotations

from collections import Counter

from cache.blocks import run_span
from cache.errors import CacheError, DiskError, OriginThrottled, PeerError
from cache.residency import messages as m
from cache.residency.blockstate import BlockMove, BlockState
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, UNKNOWN_READERS
from cache.residency.haste import hasten_what_is_near
from cache.residency.health import SLOW_S
from cache.residency.on_readers import table_is_read
from cache.residency.peerhealth import OUT_OF_USE
from cache.residency.residents import Extent
from cache.residency.state import State
from cache.residency.waiting import BlockKey


def extent_found(s: State, event: m.ExtentFound) -> None:
    s.budget.adopt(event.file_bytes + INDEX_BYTES_PER_EXTENT)
    _found(s, event)


def stock_taken(s: State, event: m.StockTaken) -> None:
    s.budget.adopt(event.file_bytes + event.num_files * INDEX_BYTES_PER_EXTENT, event.num_files)
    # New files are made before all of these are known.
    s.next_generation = max(s.next_generation, event.last_generation + 1)


def stock_found(s: State, event: m.StockFound) -> None:
    for found in event.found:
        _found(s, found)


def stock_lost(s: State, event: m.StockLost) -> None:
    s.budget.give_back(event.file_bytes + INDEX_BYTES_PER_EXTENT)


def held_found(s: State, event: m.HeldFound) -> None:
    size = event.file_bytes + INDEX_BYTES_PER_EXTENT
    s.budget.adopt(size)
    s.budget.haunt(event.extent, event.generation, size, Counter({UNKNOWN_READERS: 1}), s.now)
    s.next_generation = max(s.next_generation, event.generation + 1)


def _found(s: State, event: m.ExtentFound) -> None:
    known = s.residents.learn(event.object_id)
    # Used before anything of this run; among themselves the younger file later.
    last_use_s = -1.0 / event.generation
    size = event.file_bytes + INDEX_BYTES_PER_EXTENT
    extent = s.residents.add_extent(known, event.extent_idx, event.generation, size, last_use_s)
    s.next_generation = max(s.next_generation, event.generation + 1)
    extent.is_old = True
    if event.present is None:
        extent.needs_table = True
    else:
        _open_found(s, extent, event.present)


def extent_table_read(s: State, event: m.ExtentTableRead) -> None:
    extent = s.residents.current(event.extent, event.generation)
    if extent is not None and extent.needs_table:
        extent.needs_table = False
        _open_found(s, extent, event.present)
        table_is_read(s, extent, is_sound=True)


def _open_found(s: State, extent: Extent, present: frozenset[int]) -> None:
    for block in present:
        extent.move(block, BlockMove.FOUND)
    _open(s, extent)


def extent_created(s: State, event: m.ExtentCreated) -> None:
    extent = s.residents.current(event.extent, event.generation)
    assert extent is not None and not extent.is_open, event
    _open(s, extent)


def extent_failed(s: State, event: m.ExtentFailed) -> None:
    extent = s.residents.current(event.extent, event.generation)
    if extent is None or extent.is_open:
        return
    keys = [(event.extent.content_id, block) for block in extent.block_indices]
    if extent.needs_table:
        # A file from before this daemon that cannot be read: forget it, and fetch what is waited for.
        table_is_read(s, extent, is_sound=False)
        s.evict(extent)
        s.demand.update(key for key in keys if s.waiting.is_wanted(key))
        return
    s.patience.failed(keys, event.error, s.now)  # cools down: not fetched ahead again at once
    for key in keys:
        s.fail(key, event.error)
    s.evict(extent)
    _failed(s, event.error)


def _open(s: State, extent: Extent) -> None:
    extent.is_open = True
    s.opening.discard(extent.key)
    s.publish(extent.owner.word_of_extent(extent.key.extent_idx), extent.generation)
    for block in reversed(extent.backlog):
        # First in line: behind others' blocks this file could go for one of theirs before it got anything, and that one for it, without
        # end.
        s.queue((extent.key.content_id, block), first=True)
    extent.backlog.clear()
    s.lookahead.offer_again(extent.key)


def blocks_landed(s: State, event: m.BlocksLanded) -> None:
    extent = s.finished(event.extent, event.generation)
    if event.lender:
        s.counters.borrowed_bytes += event.num_bytes
    else:
        s.counters.fetched_bytes += event.num_bytes
    url, num_blocks = extent.owner.object_id.url, event.end - event.first
    s.origins.ended(url, event.source, num_blocks, s.now, event.num_bytes, event.seconds)
    s.over(extent, range(event.first, event.end))
    _landed(s, extent, event.first, event.end)
    _worked(s, event.write_s, "writing blocks")
    _doubt_if_unreadable(s, extent)


def _landed(s: State, extent: Extent, first: int, end: int) -> None:
    s.counters.fetched_blocks += end - first
    for block in range(first, end):
        extent.move(block, BlockMove.LANDED)
        s.patience.forget((extent.key.content_id, block))
        s.make_readable(extent, block)


def blocks_failed(s: State, event: m.BlocksFailed) -> None:
    extent = s.finished(event.extent, event.generation)
    is_throttled = isinstance(event.error, OriginThrottled)
    url, num_blocks = extent.owner.object_id.url, event.end - event.first
    s.origins.ended(url, event.source, num_blocks, s.now, throttled=is_throttled)
    s.over(extent, range(event.first, event.end))
    first = max(event.first, event.landed)
    if first > event.first:
        start, end = run_span(extent.owner.object_id.size_bytes, event.first, first)
        s.counters.fetched_bytes += end - start
        _landed(s, extent, event.first, first)
    keys = [(event.extent.content_id, block) for block in range(first, event.end)]
    for block in range(first, event.end):
        extent.move(block, BlockMove.FAILED)
    if _is_lost(event.error):
        _lost(s, extent, keys)
        return
    if isinstance(event.error, PeerError):
        _not_lent(s, keys, event.error)
        return
    _failed(s, event.error)
    if not s.patience.failed(keys, event.error, s.now):
        s.counters.failed_blocks += len(keys)
        for key in keys:
            s.fail(key, event.error)
        return
    s.counters.retries += 1
    for key in keys:
        s.queue(key)
    if is_throttled:
        hasten_what_is_near(s)


def _not_lent(s: State, keys: list[BlockKey], error: PeerError) -> None:
    """At once, and from somebody else: where the peer is at fault the members have changed and there is another owner; where it only would
    not or could not, the origin."""
    s.counters.peer_bypasses += 1
    for key in keys:
        if error.reason not in OUT_OF_USE:
            s.from_origin.add(key)
        s.queue(key, first=True)


def blocks_checked(s: State, event: m.BlocksChecked) -> None:
    extent = s.finished(event.extent, event.generation)
    for block, is_sound in enumerate(event.sound, start=event.first):
        _block_checked(s, extent, block, is_sound)
    if event.disk_error is None:
        _worked(s, event.read_s, "reading blocks back")
    elif _is_lost(event.disk_error):
        blocks = range(event.first, event.first + len(event.sound))
        _lost(s, extent, [(event.extent.content_id, block) for block in blocks])
    else:
        _failed(s, event.disk_error, on_read=True)
    _doubt_if_unreadable(s, extent)


def _block_checked(s: State, extent: Extent, block: int, is_sound: bool) -> None:
    was = extent.state(block)
    extent.move(block, BlockMove.SOUND if is_sound else BlockMove.ROTTEN)
    if is_sound:
        s.counters.verified_blocks += 1
        if was is BlockState.VERIFYING:
            s.make_readable(extent, block)
    else:
        s.counters.rotten_blocks += 1
        s.publish(extent.owner.word_of_block(block), 0)
        key = (extent.key.content_id, block)
        s.waiting.lost(key)
        if s.waiting.is_wanted(key):
            s.demand.add(key)
    for check, answer in s.waiting.checked(extent.key, extent.generation, block, is_sound):
        s.check_ended(check)
        s.actions.append(answer)


def capacity_changed(s: State, event: m.CapacityChanged) -> None:
    s.budget.capacity_bytes = event.capacity_bytes
    if event.max_files is not None:
        s.budget.max_files = event.max_files


def time_passed(s: State, event: m.TimePassed) -> None:
    s.patience.time_passed(s.now)
    if s.health.time_passed(s.now):
        _health_changed(s)
    for key in [key for key, deadline_s in s.room_deadline_s.items() if deadline_s <= s.now]:
        s.refuse_for_room(key)


def disk_seen(s: State, event: m.DiskSeen) -> None:
    s.budget.keep_free.seen(event.used_bytes, event.free_bytes, event.num_files, event.free_files)


def disk_troubled(s: State, event: m.DiskTroubled) -> None:
    _failed(s, event.error)


def disk_probed(s: State, event: m.DiskProbed) -> None:
    if event.error is not None:
        s.disk_error = event.error
    if s.health.probed(None if event.error is None else event.error.message, s.now):
        _health_changed(s)


def _failed(s: State, error: CacheError, *, on_read: bool = False) -> None:
    """An error, of which only the local disk's own say something about the disk."""
    if isinstance(error, DiskError):
        if s.health.may_write:
            s.disk_error = error
        if s.health.failed(error.kind, error.message, s.now, on_read=on_read):
            s.disk_error = error
            _health_changed(s)


def _worked(s: State, seconds: float, what: str) -> None:
    if seconds > SLOW_S:
        _failed(s, DiskError(f"{what} took {seconds:.1f} s", kind="slow"))
    elif s.health.worked(s.now):
        _health_changed(s)


def _health_changed(s: State) -> None:
    s.prefetch_is_stuck = False
    if not s.health.may_read:
        for extent in s.residents.extents.values():
            _doubt(s, extent)
    if not s.health.may_write:
        # Files that are being made may never come: a disk that hangs must not hold up who can read elsewhere.
        for key in list(s.opening):
            extent = s.residents.extents[key]
            if not (extent.needs_table and s.health.may_read):
                for block in extent.block_indices:
                    s.fail((key.content_id, block), s.disk_error)


def _doubt_if_unreadable(s: State, extent: Extent) -> None:
    if not s.health.may_read:
        _doubt(s, extent)


def _doubt(s: State, extent: Extent) -> None:
    """The disk cannot be read: readers are no longer led to it, and what is there is compared again before it is served."""
    for block in extent.block_indices:
        if extent.state(block) is BlockState.RESIDENT:
            s.publish(extent.owner.word_of_block(block), 0)
            extent.move(block, BlockMove.DOUBT)


def _is_lost(error: CacheError) -> bool:
    return isinstance(error, DiskError) and error.kind == "lost"


def _lost(s: State, extent: Extent, keys: list[BlockKey]) -> None:
    """Somebody removed its file, or cut or damaged it beyond use: made anew for who waits, if nothing else refers to the old one; else who
    waits is told, and the next request finds it lost again."""
    if extent.num_busy or extent.num_waiters > s.waiting.count_for(extent.key):
        for key in keys:
            s.fail(
                key,
                DiskError(f"the file of an extent of {extent.owner.object_id.url} was removed or damaged", kind="lost"),
            )
        return
    wanted = [k for k in ((extent.key.content_id, b) for b in extent.block_indices) if s.waiting.is_wanted(k)]
    s.counters.lost_extents += 1
    s.evict(extent)
    s.demand.update(wanted)
