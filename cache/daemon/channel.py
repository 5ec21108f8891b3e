"""A blocking connection to a daemon or a worker: one request at a time, answers with their descriptors. One thread at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from cache.daemon import wire
from cache.errors import DaemonUnavailable, from_wire

RECV_BYTES = 1024 * 1024
MAX_FDS = 16


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = wire.Decoder()
        self._next_id = 0

    @classmethod
    def connect(cls, path: str, *, timeout_s: float = 5.0) -> Channel:
        """Raises DaemonUnavailable when nobody answers at this socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise DaemonUnavailable(f"no cache daemon answers at {path}: {error.strerror or error}") from error
        return cls(sock)

    def request(
        self,
        header: dict[str, Any],
        body: bytes = b"",
        *,
        timeout_s: float,
        is_working: Callable[[], bool] | None = None,
    ) -> tuple[wire.Frame, list[int]]:
        """The answer and the descriptors that came with it (the caller owns them). Raises the CacheError of the other side, or
        DaemonUnavailable when the connection broke or nothing came for `timeout_s`; the channel is of no more use then.
        `is_working`: asked after each `timeout_s`; while it says yes we go on waiting."""
        self._next_id += 1
        self.tell({**header, "id": self._next_id}, body)
        fds: list[int] = []
        try:
            self._sock.settimeout(timeout_s)
            frames: list[wire.Frame] = []
            while not frames:
                try:
                    data, received, _, _ = socket.recv_fds(self._sock, RECV_BYTES, MAX_FDS)
                except TimeoutError:
                    if is_working is not None and is_working():
                        continue
                    raise
                fds += received
                if not data:
                    raise DaemonUnavailable("the cache daemon closed the connection")
                frames = self._decoder.feed(data)
        except (OSError, wire.ProtocolError) as error:
            close_all(fds)
            raise DaemonUnavailable(f"the connection to the cache daemon broke: {error}") from error
        except DaemonUnavailable:
            close_all(fds)
            raise
        frame = frames[0]
        if "error" in frame.header:
            close_all(fds)
            raise from_wire(frame.header["error"])
        return frame, fds

    def tell(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Sends without waiting for an answer. Raises DaemonUnavailable."""
        try:
            self._sock.settimeout(30.0)
            self._sock.sendall(wire.encode(header, body))
        except OSError as error:
            raise DaemonUnavailable(f"the connection to the cache daemon broke: {error}") from error

    def close(self) -> None:
        self._sock.close()


def close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
