"""The known order of one reader, told to the daemon."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from cache.client.door import Door
from cache.client.link import Link
from cache.daemon import wire
from cache.errors import DaemonUnavailable
from cache.origin.urls import canonical_url


class Stream:
    """The known order of one reader. `announce` what will be read, `advance` as it is read; the daemon fetches and evicts by it.

    It belongs to the process that made it: in a forked child every call does nothing. One thread at a time.
    """

    def __init__(self, door: Door, name: str) -> None:
        self._door = door
        self._name = name
        self._link: Link | None = None
        self._is_mine = True
        self._etags: Mapping[str, str] = {}
        self._ahead: deque[tuple[str, int, int]] = deque()
        self._num_behind = 0
        self._link_offset = 0
        self._outline: tuple[dict[str, Any], bytes] | None = None
        self._bytes_behind = 0
        self._read_before = self._bytes_read()
        door.members.add(self)

    def announce(self, visits: Sequence[tuple[str, int, int]], etags: Mapping[str, str] | None = None) -> None:
        """Appends visits (url, offset, length), in the order in which they will be read. `etags`: url → the etag at which it will be
        read; what is not in it is fetched ahead at the etag that it has when this is told, which the daemon has to ask the origin for."""
        if not self._is_mine:
            return
        if etags is not None and etags is not self._etags:
            self._etags = {**self._etags, **etags} if self._etags else etags
        link = self._linked()
        self._ahead.extend(visits)
        if link is not None:
            self._tell_visits(link, visits)

    def outline(self, order: Mapping[str, Any], objects: bytes) -> None:
        """What will be read beyond the announced visits, as a function: see `wire.pack_outline`. Told again to a new daemon."""
        if not self._is_mine:
            return
        self._outline = (dict(order), objects)
        link = self._linked()
        if link is not None:
            self._tell_outline(link)

    def _tell_outline(self, link: Link) -> None:
        if self._outline is not None:
            order, objects = self._outline
            header = {"op": "outline", "stream": self._name, **order, "first_visit": -self._link_offset}
            self._tell(link, header, objects)

    def advance(self, num_visits: int, waited_s: float | None = None) -> None:
        """The first `num_visits` announced visits, counted from the stream's beginning, are behind the reader. `waited_s`: for how long it
        has waited for data in all, where others read for it; what this process reads itself is known."""
        if not self._is_mine:
            return
        while self._ahead and self._num_behind < num_visits:
            self._bytes_behind += self._ahead.popleft()[2]
            self._num_behind += 1
        link = self._linked()
        if link is not None:
            header = {"op": "advance", "stream": self._name, "num_visits": self._num_behind - self._link_offset}
            header["num_bytes"] = self._bytes_behind
            if waited_s is None and 2 * (self._bytes_read() - self._read_before) >= self._bytes_behind:
                waited_s = self._door.stats.wait_s
            self._tell(link, header if waited_s is None else {**header, "waited_s": waited_s})
            self._door.maybe_report()

    def _bytes_read(self) -> int:
        """By this process. Who has hardly read what is behind it has others read for it, and does not know how long they wait."""
        stats = self._door.stats
        return stats.hit_bytes + stats.miss_bytes + stats.direct_bytes

    def close(self) -> None:
        """Nothing more will be read in this order."""
        link = self._link
        if self._is_mine and link is not None and link.is_alive:
            self._tell(link, {"op": "close_stream", "stream": self._name})
        self._link = None
        self._ahead.clear()

    def _linked(self) -> Link | None:
        """The daemon that follows us. One that is new (the old one died) is told what lies ahead; its count begins there."""
        link = self._door.link()
        if link is not None and link is not self._link:
            self._link = link
            self._link_offset = self._num_behind
            if self._ahead:
                self._tell_visits(link, list(self._ahead))
            self._tell_outline(link)
        return link

    def _tell_visits(self, link: Link, visits: Sequence[tuple[str, int, int]]) -> None:
        urls: dict[str, int] = {}
        packed = [(urls.setdefault(url, len(urls)), offset, length) for url, offset, length in visits]
        fields, body = wire.pack_visits([canonical_url(url) for url in urls], packed)
        fields["etags"] = [self._etags.get(url) for url in urls]
        self._tell(link, {"op": "announce", "stream": self._name, **fields}, body)

    def _tell(self, link: Link, header: dict[str, Any], body: bytes = b"") -> None:
        try:
            link.tell(header, body)
        except DaemonUnavailable as error:
            self._door.lost(error)

    def after_fork(self) -> None:
        """In the child: the order is the parent's to tell."""
        self._is_mine = False
