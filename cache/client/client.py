"""Reading objects through the node's cache daemon; past it when it is away.

    cache = Cache()
    with cache.open("s3://bucket/train/0.tar") as f:
        header = f.read(0, 512)

A hit is a look at a word in shared memory and a read of a local file: no request, no lock. Everything here may be called from any
thread, pickled, and forked at any moment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from cache.blocks import ObjectId
from cache.client.door import Door, door_at
from cache.client.object import CachedObject
from cache.client.stats import ReaderStats
from cache.client.stream import Stream
from cache.daemon import wire
from cache.errors import CapacityError, DaemonUnavailable, ObjectChanged
from cache.origin.ports import ObjectInfo
from cache.origin.urls import canonical_url

log = logging.getLogger("railhead.cache.client")

SOCKET_VARIABLE = "RAILHEAD_CACHE_SOCKET"


class Cache:
    """A process's door to the cache.

    `socket`: the daemon's Unix socket; by default what RAILHEAD_CACHE_SOCKET says. Without either, or while the daemon is away, objects
    are read from the origin directly: slower, never wrong.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None) -> None:
        self.socket = os.fspath(socket) if socket is not None else os.environ.get(SOCKET_VARIABLE, "")

    @property
    def _door(self) -> Door:
        return door_at(self.socket)

    def open(self, url: str, etag: str | None = None) -> CachedObject:
        """The object as it is now, or at `etag`. What is read from it later is of this generation or an error.

        Raises ObjectNotFound, AccessDenied, OriginMisconfigured, OriginUnavailable; ObjectChanged when it is no longer at `etag`.
        """
        url, door = canonical_url(url), self._door
        started = time.monotonic()
        try:
            mapping = door.map(url, etag)
            if mapping is not None:
                return CachedObject(door, mapping.url, mapping.etag, mapping.size, mapping)
            info = door.direct.head(url)
        finally:
            door.stats.waited(time.monotonic() - started, "open")
        if etag is not None and info.etag != etag:
            message = f"{url} was {etag} when it was opened and is {info.etag} now"
            raise ObjectChanged(message, advice="open it again to read the new generation", url=url)
        return CachedObject(door, info.url, info.etag, info.size_bytes, None)

    def list(self, url: str) -> list[ObjectInfo]:
        """All objects below a prefix, sorted by url; the object itself if the url names one. Raises ObjectNotFound when there is none."""
        url, door = canonical_url(url), self._door
        link = door.link()
        if link is not None:
            try:
                frame, _ = link.request({"op": "list", "url": url})
                return [ObjectInfo(o["url"], o["size_bytes"], o["etag"]) for o in frame.header["objects"]]
            except DaemonUnavailable as error:
                door.lost(error)
        return door.direct.list(url)

    def stream(self, name: str) -> Stream:
        """A reader's known order (one per sampler). Without a daemon it does nothing."""
        return Stream(self._door, name)

    def stats(self) -> ReaderStats:
        """This process's account of everything read through this socket; the live object, so copy it before comparing."""
        return self._door.stats

    def daemon_status(self) -> dict[str, Any] | None:
        """The daemon's account, None without a daemon."""
        link = self._door.link()
        if link is None:
            return None
        try:
            self._door.report(link)
            frame, _ = link.request({"op": "status"})
        except DaemonUnavailable as error:
            self._door.lost(error)
            return None
        return dict(frame.header["status"])

    def ask_daemon(self, header: dict[str, Any]) -> dict[str, Any]:
        """A request of the command line's. Raises DaemonUnavailable without a daemon, and the error that it answers with."""
        link = self._door.link()
        if link is None:
            raise DaemonUnavailable(f"no cache daemon answers at {self.socket or '(no socket given)'}")
        return link.request(header)[0].header

    def resident_bytes(self, objects: Sequence[ObjectInfo]) -> tuple[int, ...] | None:
        """Of each object, how much is on this node's disk; None without a daemon. One request, and no object is opened."""
        ids = [ObjectId(info.url, info.etag, info.size_bytes).content_id for info in objects]
        answer = self._ask_if_there({"op": "resident", "content_ids": ids})
        return None if answer is None else tuple(answer[0].header["bytes"])

    def kept_index(self, key: str) -> bytes | None:
        """What `keep_index` was given for this key on this node, by any process; None when it is not here. Whoever reads it verifies it."""
        answer = self._ask_if_there({"op": "index", "key": key})
        if answer is None or not answer[1]:
            return None
        with open(answer[1][0], "rb") as file:
            data: bytes = file.read()
        return data

    def keep_index(self, key: str, data: bytes) -> bool:
        """Keeps an index on this node, within the cache's capacity; False when there is no daemon or no room."""
        try:
            return self._ask_if_there({"op": "keep", "key": key}, data) is not None
        except CapacityError as error:
            log.info("an index is not kept: %s", error.message)
            return False

    def _ask_if_there(self, header: dict[str, Any], body: bytes = b"") -> tuple[wire.Frame, Sequence[int]] | None:
        link = self._door.link()
        if link is None:
            return None
        try:
            return link.request(header, body)
        except DaemonUnavailable as error:
            self._door.lost(error)
            return None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the last account to the daemon and closes connections. Objects stay readable: they connect again."""
        self._door.close()
