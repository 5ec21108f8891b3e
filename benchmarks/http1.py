"""As much of HTTP/1.1 as a proxy needs: heads, and where bodies end. Bytes in, values out, and a reader over a socket."""

from __future__ import annotations

import asyncio
import re
import socket
from dataclasses import dataclass

from benchmarks.shaping import Request

_MAX_HEAD_BYTES = 256 * 1024


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 as we understand it, or ended in the middle of a message."""


@dataclass(frozen=True)
class Head:
    """The head of a request or an answer, with the bytes as they came (signed headers must not be touched)."""

    raw: bytes
    first_line: str
    headers: dict[str, str]

    @property
    def length(self) -> int | None:
        return int(self.headers["content-length"]) if "content-length" in self.headers else None

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def keeps_alive(self) -> bool:
        return "close" not in self.headers.get("connection", "").lower() and "HTTP/1.0" not in self.first_line

    @property
    def status(self) -> int:
        return int(self.first_line.split(" ", 2)[1])

    def without(self, name: str) -> bytes:
        """The bytes of this head less one header."""
        return re.sub(rb"(?im)^" + name.encode() + rb":[^\r\n]*\r\n", b"", self.raw)


def parse_head(raw: bytes) -> Head:
    """A head up to and with its empty line. Raises ProtocolError."""
    lines = raw.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    if len(lines[0].split(" ")) < 2:
        raise ProtocolError(f"not an HTTP message: {lines[0][:80]!r}")
    return Head(raw, lines[0], headers)


def request_of(head: Head) -> Request:
    method, target = head.first_line.split(" ")[:2]
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", head.headers.get("range", ""))
    if match is None:
        return Request(method, target)
    return Request(method, target, (int(match.group(1)), int(match.group(2)) + 1 if match.group(2) else None))


class SocketReader:
    """Reads heads and bodies from a non-blocking socket; whatever came too early is kept for the next read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._early = bytearray()

    async def head(self) -> Head | None:
        """The next head, or None when the peer has closed before one began."""
        while (at := self._early.find(b"\r\n\r\n")) < 0:
            if len(self._early) > _MAX_HEAD_BYTES:
                raise ProtocolError("the head does not end")
            data = await self._loop.sock_recv(self.sock, 65536)
            if not data:
                if self._early:
                    raise ProtocolError("closed in the middle of a head")
                return None
            self._early += data
        raw = bytes(self._early[: at + 4])
        del self._early[: at + 4]
        return parse_head(raw)

    async def into(self, view: memoryview) -> int:
        """Some bytes into `view`; 0 when the peer has closed."""
        if self._early:
            n = min(len(self._early), len(view))
            view[:n] = self._early[:n]
            del self._early[:n]
            return n
        return await self._loop.sock_recv_into(self.sock, view)

    async def chunk(self) -> bytes:
        """One chunk of a chunked body with its framing, as it came; the last is the one of size 0 with its trailers."""
        line = await self._until(b"\r\n")
        size = int(line.split(b";")[0].strip(), 16)
        if size == 0:
            trailer = line
            while True:
                part = await self._until(b"\r\n")
                trailer += part
                if part == b"\r\n":
                    return trailer
        return line + await self._exactly(size + 2)

    async def _until(self, end: bytes) -> bytes:
        while (at := self._early.find(end)) < 0:
            await self._more()
        data = bytes(self._early[: at + len(end)])
        del self._early[: at + len(end)]
        return data

    async def _exactly(self, count: int) -> bytes:
        while len(self._early) < count:
            await self._more()
        data = bytes(self._early[:count])
        del self._early[:count]
        return data

    async def _more(self) -> None:
        data = await self._loop.sock_recv(self.sock, 65536)
        if not data:
            raise ProtocolError("closed in the middle of a body")
        self._early += data
