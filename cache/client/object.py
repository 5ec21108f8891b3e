"""One generation of one object, as a reader sees it: positional reads, from the local file when resident, waited for when not, from the
origin when the daemon cannot help."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import Any

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_FETCH, EXTENT_BYTES, num_extents
from cache.client.door import Door, door_at
from cache.client.link import OpenExtent
from cache.client.mapping import MAX_OPEN_EXTENTS, Mapping
from cache.errors import CacheError, CapacityError, CorruptBlock, DaemonUnavailable
from cache.residency.slots import EVICTION_WORD

log = logging.getLogger("railhead.cache.client")

REPORT_EVERY_READS = 1024
MAX_READAHEAD_BLOCKS = 8 * BLOCKS_PER_FETCH
DIRECT_WINDOW_BYTES = 1024 * 1024
"""Small reads past the daemon fetch this much at once: tar headers 512 bytes apart must not cost a request each."""


class CachedObject:
    """One generation of one object. Reads are positional; any thread may read.

    `on_disk_bytes`: how much of it was on this node's disk when it was opened (None without a daemon).
    """

    def __init__(self, door: Door, url: str, etag: str, size: int, mapping: Mapping | None) -> None:
        self._door = door
        self.url = url
        self.etag = etag
        self.size = size
        self.on_disk_bytes = mapping.on_disk_bytes if mapping is not None else None
        self._mapping = mapping
        self._lock = threading.Lock()
        self._is_closed = False
        self._next_offset = 0
        self._hinted_until = 0
        self._readahead = BLOCKS_PER_FETCH
        self._window: tuple[int, bytes] = (0, b"")
        door.members.add(self)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer only at the end of the object. Waits for what is not resident.

        Raises OriginError when they can neither be found here nor fetched; ValueError for a negative offset or length.
        """
        mapping = self._mapping
        end = offset + length
        if (
            mapping is not None
            and 0 <= offset < end <= self.size
            and offset // EXTENT_BYTES == (end - 1) // EXTENT_BYTES
        ):
            extent = mapping.resident(offset, end)
            if extent is not None:
                try:
                    data = os.pread(extent.fd, length, offset % EXTENT_BYTES)
                except OSError:
                    data = b""  # The disk failed: the slow path says so and reads the origin.
                if len(data) == length:
                    self._count_hit(mapping, offset, length)
                    return data
        length = self._clip(offset, length)
        buffer = bytearray(length)
        self._read_slowly(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fills `buffer` from `offset`; returns how many bytes there were (fewer only at the end of the object)."""
        view = memoryview(buffer).cast("B")
        length = self._clip(offset, len(view))
        self._read_slowly(offset, view[:length])
        return length

    def view(self, offset: int, length: int) -> memoryview:
        """The same bytes as `read`, read-only and without a copy when they lie in one resident extent.

        The view keeps its file on the disk: hold few of them for long. After a disk error touching it raises SIGBUS, as with any
        memory map; `read` raises an exception instead.
        """
        mapping = self._mapping
        end = offset + length
        start = offset % EXTENT_BYTES
        is_within_one = 0 <= offset < end <= self.size and offset // EXTENT_BYTES == (end - 1) // EXTENT_BYTES
        if mapping is not None and is_within_one:
            extent = mapping.resident(offset, end)
            if extent is not None:
                view = memoryview(extent.memory_map())[start : start + length]
                self._count_hit(mapping, offset, length)
                return view
        length = self._clip(offset, length)
        end = offset + length
        if length and offset // EXTENT_BYTES == (end - 1) // EXTENT_BYTES:
            extent, cause = self._wait(offset, end)
            if extent is not None:
                if cause != "hit":
                    self._door.stats.misses += 1
                    self._door.stats.miss_bytes += length
                return memoryview(extent.memory_map())[start : start + length]
        return memoryview(self.read(offset, length))

    def prefetch(self, offset: int = 0, length: int | None = None) -> None:
        """Asks the daemon to fetch these bytes; returns at once. Without a daemon it does nothing."""
        mapping = self._current()
        length = self._clip(offset, self.size if length is None else length)
        if mapping is not None and length:
            self._hint(mapping, offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)

    def fetch(self, offset: int = 0, length: int | None = None) -> bool:
        """Waits until these bytes are resident. False when they cannot be kept here (no daemon, no room). Raises OriginError."""
        length = self._clip(offset, self.size if length is None else length)
        end = offset + length
        while offset < end:
            part_end = min(end, (offset // EXTENT_BYTES + 1) * EXTENT_BYTES)
            extent, _ = self._wait(offset, part_end)
            if extent is None:
                return False
            offset = part_end
        return True

    def verify(self) -> bool | None:
        """Has every resident block read back from the disk and compared with its checksum. False: some were rotten (and are discarded);
        None: there is no daemon to ask."""
        mapping = self._current()
        if mapping is None:
            return None
        answers = []
        for extent_idx in range(num_extents(self.size)):
            request = {"op": "check", "content_id": mapping.content_id, "extent_idx": extent_idx}
            try:
                answers.append(mapping.link.request(request)[0].header["cause"])
            except DaemonUnavailable as error:
                self._door.lost(error)
                return None
        return all(answer in ("hit", "sound") for answer in answers)

    def close(self) -> None:
        """Further reads raise ValueError; the daemon may evict what only this reader held."""
        self._is_closed = True
        mapping, self._mapping = self._mapping, None
        self._window = (0, b"")
        if mapping is not None:
            mapping.extents.clear()
            mapping.link.flush_released()

    def __enter__(self) -> CachedObject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._door.socket, self.url, self.etag, self.size)

    def __repr__(self) -> str:
        return f"<CachedObject {self.url} {self.etag} {self.size} bytes>"

    # -- within --

    def _clip(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} must not be negative")
        if self._is_closed:
            raise ValueError(f"read of the closed object {self.url}")
        return max(0, min(length, self.size - offset))

    def _count_hit(self, mapping: Mapping, offset: int, length: int) -> None:
        stats = self._door.stats
        stats.hits += 1
        stats.hit_bytes += length
        if not stats.hits % REPORT_EVERY_READS:
            self._door.maybe_report()
        if mapping.words[EVICTION_WORD] != mapping.link.seen_evictions:
            mapping.link.drop_evicted()
        if offset == self._next_offset:
            self._read_ahead(mapping, offset + length)
        self._next_offset = offset + length

    def _read_slowly(self, offset: int, view: memoryview) -> None:
        """Extent by extent, waiting where it must."""
        while len(view):
            end = min(offset + len(view), (offset // EXTENT_BYTES + 1) * EXTENT_BYTES)
            part = view[: end - offset]
            extent, cause = self._wait(offset, end)
            if extent is None:
                self._read_direct(offset, part)
            elif not _pread_all(extent.fd, part, offset % EXTENT_BYTES):
                self._suspect(extent)
                self._read_direct(offset, part)
            elif cause == "hit":
                self._door.stats.hits += 1
                self._door.stats.hit_bytes += len(part)
            else:
                self._door.stats.misses += 1
                self._door.stats.miss_bytes += len(part)
                self._door.maybe_report()
            mapping = self._mapping
            if mapping is not None:
                if mapping.words[EVICTION_WORD] != mapping.link.seen_evictions:
                    mapping.link.drop_evicted()
                if offset == self._next_offset:
                    self._read_ahead(mapping, end)
            self._next_offset = end
            offset, view = end, view[len(part) :]

    def _wait(self, offset: int, end: int) -> tuple[OpenExtent | None, str]:
        """The file with [offset, end) (within one extent) and what was waited for; None: read the origin directly.

        Raises OriginError when the daemon could not fetch it.
        """
        started = time.monotonic()
        for _ in range(3):
            mapping = self._mapping
            # The files that we hold are right also when their daemon has died.
            extent = mapping.resident(offset, end) if mapping is not None else None
            if extent is not None:
                return extent, "hit"
            mapping = self._current()
            if mapping is None:
                return None, "direct"
            try:
                extent, cause = self._fault(mapping, offset, end)
            except (DaemonUnavailable, CapacityError, CorruptBlock) as error:
                if isinstance(error, DaemonUnavailable):
                    self._door.lost(error)
                log.debug("%s", error)
                self._door.stats.waited(time.monotonic() - started, "direct")
                return None, "direct"
            if extent is not None:
                # It may have been evicted again since the answer; the open file is right all the same.
                if cause != "hit":
                    self._door.stats.waited(time.monotonic() - started, cause)
                return extent, cause
        return None, "direct"

    def _fault(self, mapping: Mapping, offset: int, end: int) -> tuple[OpenExtent | None, str]:
        """The file that the daemon answers with; None when another thread let go of it meanwhile: to be asked for again."""
        extent_idx = offset // EXTENT_BYTES
        held = mapping.extents.get(extent_idx)
        request = {
            "op": "want",
            "content_id": mapping.content_id,
            "first": offset // BLOCK_BYTES,
            "end": (end - 1) // BLOCK_BYTES + 1,
            "have": held.generation if held is not None else 0,
        }
        del held
        frame, fds = mapping.link.request(request)
        generation = frame.header["generation"]
        if not fds:
            extent = mapping.extents.get(extent_idx)
            is_ours = extent is not None and extent.generation == generation
            return extent if is_ours else None, frame.header["cause"]
        extent = OpenExtent(mapping.link, (mapping.content_id, extent_idx), generation, fds[0])
        existing = mapping.extents.get(extent_idx)
        if existing is not None and existing.generation == generation:
            return existing, frame.header["cause"]  # another thread was given it at the same time; ours closes
        if len(mapping.extents) >= MAX_OPEN_EXTENTS:
            mapping.extents.pop(next(iter(mapping.extents), -1), None)
        mapping.extents[extent_idx] = extent
        mapping.link.flush_released()
        return extent, frame.header["cause"]

    def _current(self) -> Mapping | None:
        """Our place at a living daemon: the old one while it lives, a new one when the daemon came back; the old one's files go on
        being readable meanwhile."""
        mapping = self._mapping
        if mapping is not None and mapping.link.is_alive:
            return mapping
        if self._is_closed:
            return None
        with self._lock:
            if self._mapping is not None and self._mapping.link.is_alive:
                return self._mapping
            fresh = None
            try:
                fresh = self._door.map(self.url, self.etag)
            except CacheError as error:
                log.debug("%s", error)
            if fresh is not None:
                self._mapping = fresh
                self._hinted_until = 0
            # With the daemon away, what is resident in the files that we hold is still served by `read`'s fast path.
            return fresh

    def _read_direct(self, offset: int, part: memoryview) -> None:
        """From the origin, past the daemon; the pinned etag goes along, so it is this generation or an error."""
        started = time.monotonic()
        start, data = self._window
        if not start <= offset <= offset + len(part) <= start + len(data):
            is_small = len(part) < DIRECT_WINDOW_BYTES // 16 or offset == self._next_offset
            end = min(self.size, offset + (max(len(part), DIRECT_WINDOW_BYTES) if is_small else len(part)))
            start, data = offset, self._door.direct.read(self.url, self.etag, offset, end)
            self._window = (start, data) if is_small and len(data) <= DIRECT_WINDOW_BYTES else (0, b"")
        part[:] = memoryview(data)[offset - start : offset - start + len(part)]
        stats = self._door.stats
        stats.direct_reads += 1
        stats.direct_bytes += len(part)
        stats.waited(time.monotonic() - started, "direct")

    def _read_ahead(self, mapping: Mapping, position: int) -> None:
        """A reader that goes on where it stopped gets the next blocks fetched: twice as many with each block that it enters."""
        block = position // BLOCK_BYTES
        num_blocks = -(-self.size // BLOCK_BYTES)
        if block + self._readahead <= self._hinted_until or self._hinted_until >= num_blocks:
            return
        first = max(block, self._hinted_until)
        end = min(block + 1 + self._readahead, num_blocks)
        self._hinted_until = end
        self._readahead = min(2 * self._readahead, MAX_READAHEAD_BLOCKS)
        if any(not mapping.words[mapping.base + b] for b in range(first, end)):
            self._hint(mapping, first, end)

    def _suspect(self, extent: OpenExtent) -> None:
        """Tells the daemon that a file which it gave us cannot be read, so that it looks."""
        mapping = self._mapping
        if mapping is not None:
            with contextlib.suppress(DaemonUnavailable):
                mapping.link.tell({"op": "suspect", "content_id": extent.key[0], "extent_idx": extent.key[1]})

    def _hint(self, mapping: Mapping, first: int, end: int) -> None:
        with contextlib.suppress(DaemonUnavailable):
            mapping.link.tell({"op": "hint", "content_id": mapping.content_id, "first": first, "end": end})

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._mapping = None
        self._hinted_until = 0


def _reopen(socket: str, url: str, etag: str, size: int) -> CachedObject:
    return CachedObject(door_at(socket), url, etag, size, None)


def _pread_all(fd: int, view: memoryview, offset: int) -> bool:
    """Fills the view; False when the disk failed or the file is shorter than it must be."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            log.warning("reading the local copy failed (%s); reading the origin instead", error.strerror)
            return False
        if count == 0:
            return False
        done += count
    return True
