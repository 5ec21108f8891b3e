"""Reading the origin without a daemon, from a process of its own.

The trainer's process may be forked at any moment (DataLoader), and no object-store client survives that: threads, sockets and event
loops do not come along, and a connection that two processes share mixes their answers. So the trainer never owns one. The worker is
the daemon's own (`cache.daemon.worker`); it starts at the first direct read, and after a fork each process starts its own.
"""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from typing import Any

from cache.daemon import wire
from cache.daemon.channel import Channel
from cache.daemon.pool import start_worker
from cache.errors import CacheError, DaemonUnavailable, OriginUnavailable
from cache.origin.ports import ObjectInfo
from cache.residency.retry import RetryPolicy

REQUEST_TIMEOUT_S = 120.0
"""The worker's own time-outs (connect, no bytes) are far shorter; this one only finds a worker that hangs."""


class DirectReader:
    """Any thread may call; requests take turns. Retries what can be retried, for about half a minute."""

    def __init__(self, retry: RetryPolicy | None = None) -> None:
        self._retry = retry or RetryPolicy()
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def head(self, url: str) -> ObjectInfo:
        return _info(self._request({"op": "head", "url": url}).header["info"])

    def list(self, url: str) -> list[ObjectInfo]:
        return [_info(item) for item in self._request({"op": "list", "url": url}).header["objects"]]

    def read(self, url: str, etag: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of the object at this etag. Raises OriginError."""
        return self._request({"op": "read", "url": url, "etag": etag, "start": start, "end": end}).body

    def close(self) -> None:
        """Ends the worker. The next request starts another."""
        with self._lock:
            self._drop()

    def forget(self) -> None:
        """After a fork, in the child: the worker is the parent's."""
        self._lock = threading.Lock()
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        if self._process is not None:
            self._process.returncode = 0  # not our child: nothing to wait for
        self._process = None

    def _request(self, header: dict[str, Any]) -> wire.Frame:
        attempts = 0
        while True:
            try:
                with self._lock:
                    return self._ask(header)
            except CacheError as error:
                attempts += 1
                asked_s = getattr(error, "retry_after_s", None)
                delay_s = self._retry.delay_s(attempts, asked_s, random.Random()) if error.is_retryable else None
                if delay_s is None:
                    raise
            time.sleep(delay_s)

    def _ask(self, header: dict[str, Any]) -> wire.Frame:
        channel = self._channel or self._start()
        try:
            frame, _ = channel.request(header, timeout_s=REQUEST_TIMEOUT_S)
        except DaemonUnavailable as error:
            self._drop()
            raise OriginUnavailable(
                f"the process that reads {header['url']} directly ended: {error}", url=header["url"]
            ) from error
        return frame

    def _start(self) -> Channel:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = start_worker(theirs, dies_with_parent=False)
        self._channel = Channel(ours)
        return self._channel

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _info(data: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(data["url"], data["size_bytes"], data["etag"])
