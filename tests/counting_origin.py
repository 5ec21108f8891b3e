"""An HTTP origin in a thread of the test's process that counts what is asked of it, and can be told to wait, to fail, or to go away."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

HOLD_TIMEOUT_S = 30.0


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True)
class Fault:
    """`refuse`: a status in place of the answer, with `headers`. Else after `after_bytes` of the body the connection closes, or is
    reset (`resets`), or (`stalls`) nothing more comes until `release`."""

    after_bytes: int = 0
    stalls: bool = False
    resets: bool = False
    refuse: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


class CountingOrigin:
    """`put` objects, then read `gets` (how often each range was fetched whole) and `heads`. Any thread may call."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.gets: Counter[tuple[str, int]] = Counter()
        """(path, first byte) → answers to GET that were sent whole."""
        self.heads: Counter[str] = Counter()
        self.bytes_sent = 0
        self.asked: list[tuple[str, int, int]] = []
        """(path, first byte, end) of every range that was asked for, in order."""
        self.fault: Callable[[str, int, int], Fault | None] = lambda path, start, end: None
        """What happens to a GET of a range."""
        self.query: dict[str, list[str]] = {}
        """Of the last request."""
        self.status: int | None = None
        """Every request is answered with this status, if it is not None."""
        self._held: dict[str, int] = {}
        self._changed = threading.Condition()
        self._server = self._listen(0)
        self.port = self._server.server_address[1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def put(self, path: str, data: bytes) -> str:
        self.objects[path], self.etags[path] = data, f'"{hashlib.md5(data).hexdigest()}"'
        return self.url(path)

    @property
    def num_gets(self) -> int:
        return sum(self.gets.values())

    def hold(self, path: str, from_byte: int = 0) -> None:
        """Ranges of this object that begin at `from_byte` or later are not answered until `release`."""
        with self._changed:
            self._held[path] = from_byte

    def release(self) -> None:
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Connections are refused, and those that stand are cut."""
        self.close()
        try:
            yield
        finally:
            self._server = self._listen(self.port)

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def _listen(self, port: int) -> _Server:
        server = _Server(("127.0.0.1", port), _Handler)
        server.origin = self
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def wait_for_release(self) -> None:
        with self._changed:
            self._changed.wait(HOLD_TIMEOUT_S)

    def wait_until_allowed(self, path: str, start: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: start < self._held.get(path, start + 1), HOLD_TIMEOUT_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128
    origin: CountingOrigin

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        self.to_reset: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        if request in self.to_reset:
            self.to_reset.discard(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close()  # Without the shutdown before it, which would be an end and not a reset.
            return
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._open):
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is nothing to print: readers are killed on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self.server.origin.heads[self.path.partition("?")[0].lstrip("/")] += 1
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        # Without the query: the signature of a cloud is there.
        origin, parts = self.server.origin, urlsplit(self.path)
        path, origin.query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        data = origin.objects.get(path)
        if origin.status is not None or data is None:
            self._send(origin.status or 404, {}, b"" if not with_body else b"no")
            return
        etag = origin.etags[path]
        if self.headers.get("If-Match", etag) != etag:
            self._send(412, {"ETag": etag}, b"")
            return
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Wed, 25 Nov 2026 12:00:00 GMT"}
        wanted = self.headers.get("Range")
        if not with_body:
            self._send(200, headers, b"", length=len(data))
        elif wanted is None:
            self._send(200, headers, data)
        else:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1) + 1, len(data))
            origin.asked.append((path, start, end))
            fault = origin.fault(path, start, end)
            if fault is not None and fault.refuse is not None:
                self._send(fault.refuse, dict(fault.headers), b"no")
                return
            origin.wait_until_allowed(path, start)
            body = data[start:end]
            if fault is not None:
                self._send_part(fault, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, body)
                return
            self._send(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, body)
            origin.gets[path, start] += 1
            origin.bytes_sent += len(body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _send_part(self, fault: Fault, headers: dict[str, str], body: bytes) -> None:
        self._send(206, headers, body[: fault.after_bytes], length=len(body))
        self.server.origin.bytes_sent += fault.after_bytes
        self.wfile.flush()
        if fault.stalls:
            self.server.origin.wait_for_release()
        if fault.resets:
            self.server.to_reset.add(self.connection)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def counting_origin() -> Iterator[CountingOrigin]:
    origin = CountingOrigin()
    yield origin
    origin.close()
