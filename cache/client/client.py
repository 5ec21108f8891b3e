"""Reading objects through the node's cache daemon; past it when it is away.

    cache = Cache()
    with cache.open("s3://bucket/train/0.tar") as f:
        header = f.read(0, 512)

A hit is a look at a word in shared memory and a read of a local file: no request, no lock. Everything here may be called from any
thread, pickled, and forked at any moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing import util as mp_util
from typing import Any

from cache.blocks import BLOCK_BYTES, EXTENT_BYTES, num_extents
from cache.client.direct import DirectReader
from cache.client.link import Link, OpenExtent
from cache.client.stats import ReaderStats
from cache.daemon import wire
from cache.errors import CacheError, CapacityError, DaemonUnavailable, ObjectChanged
from cache.origin.ports import ObjectInfo
from cache.origin.urls import canonical_url
from cache.residency.slots import EVICTION_WORD
from cache.store.format import HEADER_BYTES

log = logging.getLogger("railhead.cache.client")

SOCKET_VARIABLE = "RAILHEAD_CACHE_SOCKET"

FIRST_CONNECT_WAIT_S = 3.0
"""A socket that is named but does not answer yet may belong to a daemon that starts beside us: it gets this long, once."""

RECONNECT_S = 1.0
"""While the daemon is away, how often to look whether it is back."""

REPORT_EVERY_READS = 1024
MAX_OPEN_EXTENTS = 512
"""Extent files that one process keeps open (32 GiB of data); the usual limit of descriptors is 1,024."""

MAX_READAHEAD_BLOCKS = 8
DIRECT_WINDOW_BYTES = 1024 * 1024
"""Small reads past the daemon fetch this much at once: tar headers 512 bytes apart must not cost a request each."""

_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


class Cache:
    """A process's door to the cache.

    `socket`: the daemon's Unix socket; by default what RAILHEAD_CACHE_SOCKET says. Without either, or while the daemon is away, objects
    are read from the origin directly: slower, never wrong.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None) -> None:
        self.socket = os.fspath(socket) if socket is not None else os.environ.get(SOCKET_VARIABLE, "")
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._was_connected = False
        self._next_connect_s = 0.0
        self._direct = DirectReader()
        self._stats = ReaderStats()
        self._objects: weakref.WeakSet[CachedObject] = weakref.WeakSet()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._reported_s = 0.0
        _finalize_at_exit(self)
        mp_util.register_after_fork(self, _finalize_at_exit)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.socket,)

    # -- objects --

    def open(self, url: str, etag: str | None = None) -> CachedObject:
        """The object as it is now, or at `etag`. What is read from it later is of this generation or an error.

        Raises ObjectNotFound, AccessDenied, OriginMisconfigured, OriginUnavailable; ObjectChanged when it is no longer at `etag`.
        """
        started = time.monotonic()
        url = canonical_url(url)
        try:
            mapping = self._map(url, etag)
            if mapping is not None:
                return CachedObject(self, mapping.url, mapping.etag, mapping.size, mapping)
            info = self._direct.head(url)
        finally:
            self._stats.waited(time.monotonic() - started, "open")
        if etag is not None and info.etag != etag:
            raise ObjectChanged(
                f"{url} was {etag} when it was opened and is {info.etag} now", advice="open it again", url=url
            )
        return CachedObject(self, info.url, info.etag, info.size_bytes, None)

    def list(self, url: str) -> list[ObjectInfo]:
        """All objects below a prefix, sorted by url; the object itself if the url names one. Raises ObjectNotFound when there is none."""
        url = canonical_url(url)
        link = self._connected()
        if link is not None:
            try:
                frame, _ = link.request({"op": "list", "url": url})
                return [ObjectInfo(o["url"], o["size_bytes"], o["etag"]) for o in frame.header["objects"]]
            except DaemonUnavailable as error:
                self._lost(error)
        return self._direct.list(url)

    # -- the known order --

    def stream(self, name: str) -> Stream:
        """A reader's known order (one per sampler). Without a daemon it does nothing."""
        stream = Stream(self, name)
        self._streams.add(stream)
        return stream

    # -- accounts --

    def stats(self) -> ReaderStats:
        """This process's account; the live object, so copy it before comparing."""
        return self._stats

    def daemon_status(self) -> dict[str, Any] | None:
        """The daemon's account, None without a daemon."""
        link = self._connected()
        if link is None:
            return None
        try:
            self._report(link)
            frame, _ = link.request({"op": "status"})
        except DaemonUnavailable as error:
            self._lost(error)
            return None
        return dict(frame.header["status"])

    def ask_daemon(self, header: dict[str, Any]) -> dict[str, Any]:
        """A request of the command line's (check, evict). Raises DaemonUnavailable without a daemon."""
        link = self._connected()
        if link is None:
            raise DaemonUnavailable(f"no cache daemon answers at {self.socket or '(no socket given)'}")
        return link.request(header)[0].header

    def close(self) -> None:
        """Gives the last account to the daemon and closes connections. Objects stay readable: they connect again."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(DaemonUnavailable):
                self._report(link)
            link.close()
        for obj in list(self._objects):
            obj._mapping = None
        self._direct.close()

    # -- within --

    def _connected(self) -> Link | None:
        """The link to a living daemon, None while there is none. Connects, at most once a second."""
        link = self._link
        if link is not None and link.is_alive:
            return link
        if not self.socket or time.monotonic() < self._next_connect_s:
            return None
        with self._lock:
            if self._link is not None and self._link.is_alive:
                return self._link
            deadline_s = time.monotonic() + (0.0 if self._was_connected else FIRST_CONNECT_WAIT_S)
            while True:
                try:
                    self._link = Link(self.socket)
                except DaemonUnavailable as error:
                    if time.monotonic() < deadline_s:
                        time.sleep(0.05)
                        continue
                    if not self._next_connect_s:
                        log.warning("%s; reading the origin directly until it does", error.message)
                    self._was_connected = True
                    self._next_connect_s = time.monotonic() + RECONNECT_S
                    return None
                if self._next_connect_s:
                    log.warning("the cache daemon at %s answers again", self.socket)
                self._was_connected = True
                self._next_connect_s = 0.0
                return self._link

    def _lost(self, error: DaemonUnavailable) -> None:
        log.warning("%s; reading the origin directly until it is back", error.message)
        self._next_connect_s = time.monotonic() + RECONNECT_S

    def _map(self, url: str, etag: str | None) -> _Mapping | None:
        """The object's place at the daemon; None when there is no daemon or it has no room."""
        link = self._connected()
        if link is None:
            return None
        try:
            frame, _ = link.request({"op": "open", "url": url, "etag": etag})
        except DaemonUnavailable as error:
            self._lost(error)
            return None
        except CapacityError as error:
            log.warning("%s", error)
            return None
        return _Mapping(link, frame.header)

    def _report(self, link: Link) -> None:
        self._reported_s = time.monotonic()
        link.tell({"op": "report", "stats": self._stats.flat()})

    def _maybe_report(self) -> None:
        link = self._link
        if link is not None and link.is_alive and time.monotonic() - self._reported_s > 1.0:
            with contextlib.suppress(DaemonUnavailable):
                self._report(link)

    def _after_fork(self) -> None:
        """In the child: nothing of the parent's connections is used; objects open again when they are read."""
        objects, streams = list(self._objects), list(self._streams)
        link, direct = self._link, self._direct
        self._start()
        if link is not None:
            link.close()
        direct.forget()
        for obj in objects:
            obj._after_fork()
            self._objects.add(obj)
        for stream in streams:
            stream._is_mine = False


class _Mapping:
    """One object at one daemon: where its words are, and the extent files that we were given."""

    __slots__ = (
        "base",
        "content_id",
        "etag",
        "extents",
        "link",
        "on_disk_bytes",
        "seen_evictions",
        "size",
        "url",
        "words",
    )

    def __init__(self, link: Link, header: dict[str, Any]) -> None:
        self.link = link
        self.words = link.words
        self.content_id: str = header["content_id"]
        self.base: int = header["base"]
        self.url: str = header["url"]
        self.etag: str = header["etag"]
        self.size: int = header["size_bytes"]
        self.on_disk_bytes: int = header["on_disk_bytes"]
        self.extents: dict[int, OpenExtent] = {}
        self.seen_evictions = self.words[EVICTION_WORD]

    def resident(self, offset: int, end: int) -> OpenExtent | None:
        """The open file that holds [offset, end), which lies within one extent, if all of it is resident there."""
        extent = self.extents.get(offset // EXTENT_BYTES)
        if extent is None:
            return None
        words, base, generation = self.words, self.base, extent.generation
        for block in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            if words[base + block] != generation:
                return None
        return extent

    def drop_evicted(self) -> None:
        """Lets go of files that the daemon has evicted, so that their bytes come free."""
        self.seen_evictions = self.words[EVICTION_WORD]
        extent_words = self.base + -(-self.size // BLOCK_BYTES)
        held = list(self.extents.items())
        gone = [extent_idx for extent_idx, extent in held if self.words[extent_words + extent_idx] != extent.generation]
        del held
        for extent_idx in gone:
            self.extents.pop(extent_idx, None)
        self.link.flush_released()


class CachedObject:
    """One generation of one object. Reads are positional; any thread may read.

    `on_disk_bytes`: how much of it was on this node's disk when it was opened (None without a daemon).
    """

    def __init__(self, cache: Cache, url: str, etag: str, size: int, mapping: _Mapping | None) -> None:
        self.cache = cache
        self.url = url
        self.etag = etag
        self.size = size
        self.on_disk_bytes = mapping.on_disk_bytes if mapping is not None else None
        self._mapping = mapping
        self._lock = threading.Lock()
        self._is_closed = False
        self._next_offset = 0
        self._hinted_until = 0
        self._readahead = 1
        self._window: tuple[int, bytes] = (0, b"")
        cache._objects.add(self)

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
                data = os.pread(extent.fd, length, HEADER_BYTES + offset % EXTENT_BYTES)
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
        length = self._clip(offset, length)
        end = offset + length
        if length and offset // EXTENT_BYTES == (end - 1) // EXTENT_BYTES:
            extent, _ = self._wait(offset, end)
            if extent is not None:
                start = HEADER_BYTES + offset % EXTENT_BYTES
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
                self.cache._lost(error)
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
        return _reopen, (self.cache, self.url, self.etag, self.size)

    def __repr__(self) -> str:
        return f"<CachedObject {self.url} {self.etag} {self.size} bytes>"

    # -- within --

    def _clip(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0:
            raise ValueError(f"offset {offset} and length {length} must not be negative")
        if self._is_closed:
            raise ValueError(f"read of the closed object {self.url}")
        return max(0, min(length, self.size - offset))

    def _count_hit(self, mapping: _Mapping, offset: int, length: int) -> None:
        stats = self.cache._stats
        stats.hits += 1
        stats.hit_bytes += length
        if not stats.hits % REPORT_EVERY_READS:
            self.cache._maybe_report()
        if mapping.words[EVICTION_WORD] != mapping.seen_evictions:
            mapping.drop_evicted()
        if offset == self._next_offset:
            self._read_ahead(mapping, offset + length)
        self._next_offset = offset + length

    def _read_slowly(self, offset: int, view: memoryview) -> None:
        """Extent by extent, waiting where it must."""
        while len(view):
            end = min(offset + len(view), (offset // EXTENT_BYTES + 1) * EXTENT_BYTES)
            part = view[: end - offset]
            extent, cause = self._wait(offset, end)
            if extent is None or not _pread_all(extent.fd, part, HEADER_BYTES + offset % EXTENT_BYTES):
                self._read_direct(offset, part)
            elif cause == "hit":
                self.cache._stats.hits += 1
                self.cache._stats.hit_bytes += len(part)
            else:
                self.cache._stats.misses += 1
                self.cache._stats.miss_bytes += len(part)
                self.cache._maybe_report()
            mapping = self._mapping
            if mapping is not None:
                if mapping.words[EVICTION_WORD] != mapping.seen_evictions:
                    mapping.drop_evicted()
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
            except DaemonUnavailable as error:
                self.cache._lost(error)
                return None, "direct"
            except CapacityError as error:
                log.debug("%s", error)
                return None, "direct"
            # Between the answer and now it may have been evicted again: then ask once more.
            if mapping.resident(offset, end) is extent:
                if cause != "hit":
                    self.cache._stats.waited(time.monotonic() - started, cause)
                return extent, cause
        return None, "direct"

    def _fault(self, mapping: _Mapping, offset: int, end: int) -> tuple[OpenExtent, str]:
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
            if extent is None or extent.generation != generation:
                raise CapacityError(f"another thread let go of extent {extent_idx} of {self.url}")
            return extent, frame.header["cause"]
        extent = OpenExtent(mapping.link, (mapping.content_id, extent_idx), generation, fds[0])
        existing = mapping.extents.get(extent_idx)
        if existing is not None and existing.generation == generation:
            return existing, frame.header["cause"]  # another thread was given it at the same time; ours closes
        if len(mapping.extents) >= MAX_OPEN_EXTENTS:
            mapping.extents.pop(next(iter(mapping.extents)), None)
        mapping.extents[extent_idx] = extent
        mapping.link.flush_released()
        return extent, frame.header["cause"]

    def _current(self) -> _Mapping | None:
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
                fresh = self.cache._map(self.url, self.etag)
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
            start, data = offset, self.cache._direct.read(self.url, self.etag, offset, end)
            self._window = (start, data) if is_small else (0, b"")
        part[:] = memoryview(data)[offset - start : offset - start + len(part)]
        stats = self.cache._stats
        stats.direct_reads += 1
        stats.direct_bytes += len(part)
        stats.waited(time.monotonic() - started, "direct")

    def _read_ahead(self, mapping: _Mapping, position: int) -> None:
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

    def _hint(self, mapping: _Mapping, first: int, end: int) -> None:
        with contextlib.suppress(DaemonUnavailable):
            mapping.link.tell({"op": "hint", "content_id": mapping.content_id, "first": first, "end": end})

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._mapping = None
        self._hinted_until = 0


class Stream:
    """The known order of one reader. `announce` what will be read, `advance` as it is read; the daemon fetches and evicts by it.

    It belongs to the process that made it: in a forked child every call does nothing. One thread at a time.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name
        self._link: Link | None = None
        self._is_mine = True
        self._ahead: deque[tuple[str, int, int]] = deque()
        self._num_behind = 0
        self._link_offset = 0

    def announce(self, visits: Sequence[tuple[str, int, int]]) -> None:
        """Appends visits (url, offset, length), in the order in which they will be read."""
        if not self._is_mine:
            return
        link = self._linked()
        self._ahead.extend(visits)
        if link is not None:
            self._tell_visits(link, visits)

    def advance(self, num_visits: int) -> None:
        """The first `num_visits` announced visits, counted from the stream's beginning, are behind the reader."""
        if not self._is_mine:
            return
        while self._ahead and self._num_behind < num_visits:
            self._ahead.popleft()
            self._num_behind += 1
        link = self._linked()
        if link is not None:
            self._tell(
                link, {"op": "advance", "stream": self._name, "num_visits": self._num_behind - self._link_offset}
            )
            self._cache._maybe_report()

    def close(self) -> None:
        """Nothing more will be read in this order."""
        link = self._link
        if self._is_mine and link is not None and link.is_alive:
            self._tell(link, {"op": "close_stream", "stream": self._name})
        self._link = None
        self._ahead.clear()

    def _linked(self) -> Link | None:
        """The daemon that follows us. One that is new (the old one died) is told what lies ahead; its count begins there."""
        link = self._cache._connected()
        if link is not None and link is not self._link:
            self._link = link
            self._link_offset = self._num_behind
            if self._ahead:
                self._tell_visits(link, list(self._ahead))
        return link

    def _tell_visits(self, link: Link, visits: Sequence[tuple[str, int, int]]) -> None:
        urls: dict[str, int] = {}
        packed = [(urls.setdefault(url, len(urls)), offset, length) for url, offset, length in visits]
        fields, body = wire.pack_visits([canonical_url(url) for url in urls], packed)
        self._tell(link, {"op": "announce", "stream": self._name, **fields}, body)

    def _tell(self, link: Link, header: dict[str, Any], body: bytes = b"") -> None:
        try:
            link.tell(header, body)
        except DaemonUnavailable as error:
            self._cache._lost(error)


def _reopen(cache: Cache, url: str, etag: str, size: int) -> CachedObject:
    return CachedObject(cache, url, etag, size, None)


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


def _finalize(reference: weakref.ref[Cache]) -> None:
    cache = reference()
    if cache is not None:
        with contextlib.suppress(CacheError):
            cache.close()


def _finalize_at_exit(cache: Cache) -> None:
    """At the end of this process, a multiprocessing child included (there atexit is not run, and finalizers are reset at its start)."""
    mp_util.Finalize(cache, _finalize, args=(weakref.ref(cache),), exitpriority=10)


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
