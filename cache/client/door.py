"""A process's association with its node's daemon: finds it, loses it, finds it again; and reads the origin meanwhile.

One door per socket and process, shared by every Cache, object and stream; a fork gives the child a door of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from multiprocessing import util as mp_util
from typing import Protocol

from cache.client.direct import DirectReader
from cache.client.link import Link
from cache.client.mapping import Mapping
from cache.client.stats import ReaderStats
from cache.errors import CacheError, CapacityError, DaemonUnavailable

log = logging.getLogger("railhead.cache.client")

FIRST_CONNECT_WAIT_S = 3.0
"""A socket that is named but does not answer yet may belong to a daemon that starts beside us: it gets this long, once."""

RECONNECT_S = 1.0
"""While the daemon is away, how often to look whether it is back."""


class ForkAware(Protocol):
    def after_fork(self) -> None: ...


class Door:
    """Any thread may call. `socket`: the daemon's Unix socket, empty for none. `members`: what must be told of a fork."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.members: weakref.WeakSet[ForkAware] = weakref.WeakSet()
        self._was_tried = False
        self._reset()

    def _reset(self) -> None:
        self.stats = ReaderStats()
        self.direct = DirectReader()
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._former: weakref.WeakSet[Link] = weakref.WeakSet()
        """Links to daemons that are gone, whose files we may hold and read until there is another."""
        self._next_connect_s = 0.0
        self._reported_s = 0.0
        _close_at_exit(self)
        mp_util.register_after_fork(self, _close_at_exit)

    def link(self) -> Link | None:
        """The link to a living daemon, None while there is none. Connects, at most once a second."""
        link = self._link
        if link is not None and link.is_alive:
            return link
        if not self.socket or time.monotonic() < self._next_connect_s:
            return None
        with self._lock:
            if self._link is not None and self._link.is_alive:
                return self._link
            if self._link is not None:
                self._former.add(self._link)
            self._link = self._connect()
            if self._link is not None:
                while self._former:
                    self._former.pop().let_go()
            return self._link

    def _connect(self) -> Link | None:
        deadline_s = time.monotonic() + (0.0 if self._was_tried else FIRST_CONNECT_WAIT_S)
        was_away = self._next_connect_s > 0
        self._was_tried = True
        while True:
            try:
                link = Link(self.socket)
            except DaemonUnavailable as error:
                if time.monotonic() < deadline_s:
                    time.sleep(0.05)
                    continue
                if not was_away:
                    log.warning("%s; reading the origin directly until one does", error.message)
                self._next_connect_s = time.monotonic() + RECONNECT_S
                return None
            if was_away:
                log.warning("the cache daemon at %s answers again", self.socket)
            self._next_connect_s = 0.0
            return link

    def lost(self, error: DaemonUnavailable) -> None:
        """A request found the daemon gone: said once, and tried again in a while."""
        with self._lock:
            if self._next_connect_s == 0.0:
                log.warning("%s; reading the origin directly until it is back", error.message)
            self._next_connect_s = time.monotonic() + RECONNECT_S

    def map(self, url: str, etag: str | None) -> Mapping | None:
        """The object's place at the daemon; None when there is no daemon or it has no room. Raises OriginError."""
        link = self.link()
        if link is None:
            return None
        try:
            frame, _ = link.request({"op": "open", "url": url, "etag": etag})
        except DaemonUnavailable as error:
            self.lost(error)
            return None
        except CapacityError as error:
            log.warning("%s", error)
            return None
        return Mapping(link, frame.header)

    def report(self, link: Link) -> None:
        """Tells the daemon this process's account. Raises DaemonUnavailable."""
        self._reported_s = time.monotonic()
        link.tell({"op": "report", "stats": self.stats.flat()})

    def maybe_report(self) -> None:
        """At most once a second. Who finds everything in files that he holds learns here that their daemon has gone, and goes to the one
        that has taken its place: that one knows of neither his reads nor his files."""
        link = self._link
        if link is None or not link.is_alive:
            self.link()
        elif time.monotonic() - self._reported_s > 1.0:
            with contextlib.suppress(DaemonUnavailable):
                self.report(link)

    def close(self) -> None:
        """The last account to the daemon, and every connection closed. The next use connects again."""
        with self._lock:
            link, self._link = self._link, None
            if link is not None:
                self._former.add(link)
        if link is not None:
            with contextlib.suppress(DaemonUnavailable):
                self.report(link)
            link.close()
        self.direct.close()

    def after_fork(self) -> None:
        """In the child: nothing of the parent's connections is used; its accounts begin at zero."""
        link, direct, members = self._link, self.direct, list(self.members)
        self._reset()
        if link is not None:
            link.abandon()
        direct.forget()
        for member in members:
            member.after_fork()


_doors: dict[str, Door] = {}
_doors_lock = threading.Lock()


def door_at(socket: str) -> Door:
    """This process's door to the daemon at `socket`."""
    with _doors_lock:
        if socket not in _doors:
            _doors[socket] = Door(socket)
        return _doors[socket]


def _close_at_exit(door: Door) -> None:
    """At the end of this process, a multiprocessing child included (there atexit is not run, and finalizers are reset at its start)."""
    mp_util.Finalize(door, _close, args=(weakref.ref(door),), exitpriority=10)


def _close(reference: weakref.ref[Door]) -> None:
    door = reference()
    if door is not None:
        with contextlib.suppress(CacheError):
            door.close()


def _after_fork_in_child() -> None:
    global _doors_lock
    _doors_lock = threading.Lock()
    for door in list(_doors.values()):
        door.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
