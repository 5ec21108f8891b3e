"""A blocking connection to a daemon or a worker: one request at a time, answers with their descriptors. One thread at a time."""

from __future__ import annotations

import array
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
        on_nudge: Callable[[], None] | None = None,
    ) -> tuple[wire.Frame, list[int]]:
        """The answer and the descriptors that came with it (the caller owns them). Raises the CacheError of the other side, or
        DaemonUnavailable when the connection broke or nothing came for `timeout_s`; the channel is of no more use then.
        `is_working`: asked after each `timeout_s`; while it says yes we go on waiting. `on_nudge`: called when the other side says that
        files which this process holds were evicted, and that somebody, perhaps this request, waits for their space."""
        self._next_id += 1
        self.tell({**header, "id": self._next_id}, body)
        fds: list[int] = []
        try:
            self._sock.settimeout(timeout_s)
            answer: wire.Frame | None = None
            while answer is None:
                try:
                    data, received = _recv_fds(self._sock)
                except TimeoutError:
                    if is_working is not None and is_working():
                        continue
                    raise
                fds += received
                if not data:
                    raise DaemonUnavailable("the cache daemon closed the connection")
                for frame in self._decoder.feed(data):
                    if frame.header.get("id") == self._next_id:
                        answer = frame
                    elif "evicted" in frame.header and on_nudge is not None:
                        on_nudge()
        except (OSError, wire.ProtocolError) as error:
            close_all(fds)
            raise DaemonUnavailable(f"the connection to the cache daemon broke: {error}") from error
        except DaemonUnavailable:
            close_all(fds)
            raise
        if "error" in answer.header:
            close_all(fds)
            raise from_wire(answer.header["error"])
        return answer, fds

    def tell(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Sends without waiting for an answer. Raises DaemonUnavailable."""
        try:
            self._sock.settimeout(30.0)
            self._sock.sendall(wire.encode(header, body))
        except OSError as error:
            raise DaemonUnavailable(f"the connection to the cache daemon broke: {error}") from error

    def shut(self) -> None:
        """Ends the connection, also for a thread that waits on it just now; it gets DaemonUnavailable."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def _recv_fds(sock: socket.socket) -> tuple[bytes, list[int]]:
    """socket.recv_fds, but with descriptors that a program which the trainer starts does not inherit: it would keep evicted files."""
    fds = array.array("i")
    space = socket.CMSG_LEN(MAX_FDS * fds.itemsize)
    data, ancillary, _, _ = sock.recvmsg(RECV_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
