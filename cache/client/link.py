"""The association of one process with one daemon: connections, the residency words, the extent files that it was given.

It outlives the daemon: words and open files stay right after the daemon died, only requests fail.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from cache.daemon import wire
from cache.daemon.channel import Channel, close_all
from cache.daemon.words import WordsView
from cache.errors import CacheError, DaemonUnavailable
from cache.residency.slots import HEARTBEAT_WORD

HELLO_TIMEOUT_S = 5.0

HEARTBEAT_WATCH_S = 5.0
"""A daemon whose heart (two beats a second) stands still for this long is taken for dead."""


class OpenExtent:
    """An extent file that the daemon handed over. Its descriptor closes when nobody refers to it any more, never before: a thread that
    is about to read cannot have it closed, and its number reused, under its hands."""

    __slots__ = ("__weakref__", "_link", "_map", "fd", "generation", "key")

    def __init__(self, link: Link, key: tuple[str, int], generation: int, fd: int) -> None:
        self.fd = fd
        self.generation = generation
        self.key = key
        self._link = link
        self._map: weakref.ref[_ExtentMap] | None = None

    def memory_map(self) -> mmap.mmap:
        """The whole file, read-only. The map keeps this extent alive, and with it the daemon's knowledge that its bytes are held."""
        existing = self._map() if self._map is not None else None
        if existing is None:
            existing = _ExtentMap(self.fd, 0, prot=mmap.PROT_READ)
            existing.extent = self
            self._map = weakref.ref(existing)
        return existing

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self._link.released.append((*self.key, self.generation))


class _ExtentMap(mmap.mmap):
    extent: OpenExtent


class Link:
    """Raises DaemonUnavailable when nobody answers. Any thread may call `request` and `tell`."""

    def __init__(self, socket_path: str) -> None:
        self.client_id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.is_alive = True
        self.released: deque[tuple[str, int, int]] = deque()
        self._socket_path = socket_path
        channel, fd, num_words = self._connect()
        self._words = WordsView(fd, num_words)
        self.words = self._words.view
        self._idle: deque[Channel] = deque([channel])

    def request(self, header: dict[str, Any], body: bytes = b"") -> tuple[wire.Frame, list[int]]:
        """Waits as long as the daemon works: how long a fetch may take is its decision. Raises CacheError of the daemon, or
        DaemonUnavailable when it went away or its heart stopped; the link is dead then."""
        channel = self._take()
        try:
            answer = channel.request(header, body, timeout_s=HEARTBEAT_WATCH_S, is_working=self._beats())
        except CacheError as error:
            if isinstance(error, DaemonUnavailable):
                self.is_alive = False
                channel.close()
            else:
                self._idle.append(channel)
            raise
        except BaseException:
            # An interrupt in mid-answer: what is left of the answer would be taken for the next one.
            self.is_alive = False
            channel.close()
            raise
        self._idle.append(channel)
        return answer

    def tell(self, header: dict[str, Any], body: bytes = b"") -> None:
        channel = self._take()
        try:
            channel.tell(header, body)
        except BaseException:
            channel.close()
            self.is_alive = False
            raise
        self._idle.append(channel)

    def flush_released(self) -> None:
        """Tells the daemon which evicted files this process no longer holds. Best effort: a daemon that is gone needs no telling."""
        with contextlib.suppress(IndexError, DaemonUnavailable):
            while self.is_alive:
                content_id, extent_idx, generation = self.released.popleft()
                self.tell(
                    {"op": "release", "content_id": content_id, "extent_idx": extent_idx, "generation": generation}
                )

    def close(self) -> None:
        """Closes the connections; words and files go with the last object that refers to them."""
        self.is_alive = False
        with contextlib.suppress(IndexError):
            while True:
                self._idle.popleft().close()

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
            channel, fd, _ = self._connect()
            os.close(fd)
            return channel

    def _connect(self) -> tuple[Channel, int, int]:
        """A channel that said hello, the descriptor of the words and how many there are."""
        channel = Channel.connect(self._socket_path)
        hello = {"op": "hello", "version": wire.PROTOCOL_VERSION, "client_id": self.client_id, "pid": os.getpid()}
        try:
            frame, fds = channel.request(hello, timeout_s=HELLO_TIMEOUT_S)
            if len(fds) != 1:
                close_all(fds)
                raise DaemonUnavailable(
                    f"what answers at {self._socket_path} is not a cache daemon: it passed no words"
                )
        except BaseException:
            channel.close()
            raise
        return channel, fds[0], int(frame.header["num_words"])
