"""The association of one process with one daemon: connections, the residency words, the extent files that it was given.

It outlives the daemon: words and open files stay right after the daemon died, only requests fail.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from cache.daemon import wire
from cache.daemon.channel import Channel, close_all
from cache.daemon.words import WordsView
from cache.errors import CacheError, DaemonUnavailable
from cache.residency.slots import EVICTION_WORD, HEARTBEAT_WORD

HELLO_TIMEOUT_S = 5.0

HEARTBEAT_WATCH_S = 5.0
"""A daemon whose heart (two beats a second) stands still for this long is taken for dead."""

CLOSED_AT_ONCE = 32
"""Objects that were closed are told of together: a data set of small files closes thousands a second."""


class _Hold:
    """While it lives, the daemon is told nothing: this process may still touch the file's bytes."""

    __slots__ = ("_name", "_released")

    def __init__(self, released: deque[tuple[str, int, int]], name: tuple[str, int, int]) -> None:
        self._released, self._name = released, name

    def __del__(self) -> None:
        self._released.append(self._name)


class OpenExtent:
    """An extent file that the daemon handed over. Its descriptor closes when nobody refers to it any more, never before: a thread that
    is about to read cannot have it closed, and its number reused, under its hands."""

    __slots__ = ("__weakref__", "_hold", "_map", "fd", "generation", "key")

    def __init__(self, link: Link, key: tuple[str, int], generation: int, fd: int) -> None:
        self.fd = fd
        self.generation = generation
        self.key = key
        self._hold = _Hold(link.released, (*key, generation))
        self._map: _ExtentMap | None = None

    def memory_map(self) -> mmap.mmap:
        """The whole file, read-only. It stays for as long as this extent is open, so that its pages are faulted in once; views of it
        outlive the extent, and the daemon counts the file's bytes until the last of them is gone."""
        existing = self._map
        if existing is None:
            existing = _ExtentMap(self.fd, 0, prot=mmap.PROT_READ)
            # Not the extent itself: a map and an extent that held each other would both stay until the garbage collector comes by.
            existing.hold = self._hold
            self._map = existing
        return existing

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class _ExtentMap(mmap.mmap):
    hold: _Hold


class Link:
    """Raises DaemonUnavailable when nobody answers. Any thread may call."""

    def __init__(self, socket_path: str) -> None:
        self.client_id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.is_alive = True
        self.released: deque[tuple[str, int, int]] = deque()
        self.closed: deque[str] = deque()
        """Objects that nobody in this process refers to any more, once for each time that they were opened."""
        self.mappings: weakref.WeakSet[Any] = weakref.WeakSet()
        self._socket_path = socket_path
        self._channels: set[Channel] = set()
        self._daemon_id = ""
        channel, fd, num_words = self._connect()
        self._words = WordsView(fd, num_words)
        self.words = self._words.view
        self.seen_evictions = self.words[EVICTION_WORD]
        self._idle: deque[Channel] = deque([channel])
        # What is told must arrive in the order in which it was said (an order, then how much of it is done), so it has a connection
        # of its own; requests take whichever is idle.
        self._teller: Channel | None = None
        self._tell_lock = threading.Lock()

    def request(self, header: dict[str, Any], body: bytes = b"") -> tuple[wire.Frame, list[int]]:
        """Waits as long as the daemon works: how long a fetch may take is its decision. Raises CacheError of the daemon, or
        DaemonUnavailable when it went away or its heart stopped; the link is dead then."""
        channel = self._take()
        try:
            answer = channel.request(
                header, body, timeout_s=HEARTBEAT_WATCH_S, is_working=self._beats(), on_nudge=self.drop_evicted
            )
        except CacheError as error:
            if isinstance(error, DaemonUnavailable):
                self._drop(channel)
                self.close()
            else:
                self._idle.append(channel)
            raise
        except BaseException:
            # An interrupt in mid-answer: what is left of the answer would be taken for the next one.
            self._drop(channel)
            self.close()
            raise
        self._idle.append(channel)
        if not self.is_alive:
            self.close()  # Another thread found the daemon dead meanwhile: nobody will use this connection again.
        return answer

    def tell(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Sends without waiting for an answer; all that is told arrives in order. Raises DaemonUnavailable; the link is dead then."""
        try:
            with self._tell_lock:
                if self._teller is None:
                    self._teller = self._connect_again()
                self._teller.tell(header, body)
        except BaseException:
            self.close()
            raise

    def drop_evicted(self) -> None:
        """Lets go of every file that the daemon has evicted, so that their bytes come free: also of objects that nobody reads just now."""
        self.seen_evictions = self.words[EVICTION_WORD]
        for mapping in list(self.mappings):
            mapping.drop_evicted()
        self.flush_released()

    def let_go(self) -> None:
        """The files of a daemon that is gone, for another has taken its place: it may evict what lies beside them only if they go, too."""
        for mapping in list(self.mappings):
            mapping.extents.clear()

    def flush_released(self) -> None:
        """Tells the daemon which files this process no longer holds, and, some at a time, which objects it has closed. Best effort: a
        daemon that is gone needs no telling."""
        with contextlib.suppress(IndexError, CacheError):
            while self.is_alive:
                content_id, extent_idx, generation = self.released.popleft()
                self.tell(
                    {"op": "release", "content_id": content_id, "extent_idx": extent_idx, "generation": generation}
                )
        with contextlib.suppress(IndexError, CacheError):
            while self.is_alive and len(self.closed) >= CLOSED_AT_ONCE:
                self.tell({"op": "close", "content_ids": [self.closed.popleft() for _ in range(CLOSED_AT_ONCE)]})

    def close(self) -> None:
        """Ends the connections: to the daemon this reader is gone. Words and files go with the last object that refers to them."""
        self.is_alive = False
        for channel in list(self._channels):
            channel.shut()
        with contextlib.suppress(IndexError):
            while True:
                self._drop(self._idle.popleft())
        teller, self._teller = self._teller, None
        if teller is not None:
            self._drop(teller)

    def abandon(self) -> None:
        """In a forked child: closes its copies of the parent's connections, those too that a thread of the parent is using; else the
        daemon would take the parent for alive for as long as the child lives."""
        self.is_alive = False
        for channel in list(self._channels):
            channel.close()

    def _beats(self) -> Callable[[], bool]:
        """Says whether the daemon's heart has beaten since the last time it was asked."""
        seen = self.words[HEARTBEAT_WORD]

        def has_beaten() -> bool:
            nonlocal seen
            before, seen = seen, self.words[HEARTBEAT_WORD]
            return bool(seen != before)

        return has_beaten

    def _take(self) -> Channel:
        if not self.is_alive:
            raise DaemonUnavailable("the cache daemon is gone")
        try:
            return self._idle.popleft()
        except IndexError:
            return self._connect_again()

    def _connect_again(self) -> Channel:
        try:
            channel, fd, _ = self._connect()
        except DaemonUnavailable:
            self.close()
            raise
        os.close(fd)
        return channel

    def _connect(self) -> tuple[Channel, int, int]:
        """A channel that said hello, the descriptor of the words and how many there are."""
        channel = Channel.connect(self._socket_path)
        hello = {"op": "hello", "version": wire.PROTOCOL_VERSION, "client_id": self.client_id, "pid": os.getpid()}
        try:
            frame, fds = self._greet(channel, hello)
            daemon_id = str(frame.header.get("daemon_id", ""))
            if len(fds) != 1:
                close_all(fds)
                raise DaemonUnavailable(
                    f"what answers at {self._socket_path} is not a cache daemon: it passed no words"
                )
            if self._daemon_id not in ("", daemon_id):
                # Its generations mean other files than those of our words.
                close_all(fds)
                raise DaemonUnavailable("the cache daemon was restarted")
        except BaseException:
            channel.close()
            raise
        self._daemon_id = daemon_id
        self._channels.add(channel)
        return channel, fds[0], int(frame.header["num_words"])

    def _greet(self, channel: Channel, hello: dict[str, Any]) -> tuple[wire.Frame, list[int]]:
        """A daemon that will not have us (it is of another version, perhaps) is none for us: a reader goes on without."""
        try:
            return channel.request(hello, timeout_s=HELLO_TIMEOUT_S)
        except DaemonUnavailable:
            raise
        except CacheError as error:
            raise DaemonUnavailable(
                f"the cache daemon at {self._socket_path} has refused this reader: {error.message} ({error.advice})"
            ) from error

    def _drop(self, channel: Channel) -> None:
        channel.close()
        self._channels.discard(channel)
