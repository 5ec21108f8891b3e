"""Ranges over HTTP/1.1 on blocking sockets, into the caller's buffer: the hot path of fetching, called from threads.

Why not the client library (docs/decisions/0055): it hands over whole bodies, so four MiB of memory per request, no way to see a body stop
in its middle, none to go on where it was cut, and no headers of a refusal. This reader knows one request, GET of a range of a pinned
version, and one good answer, 206 with its length. Whatever else comes is an error of ours (`failures`), or NotPlain where the library may
know better (redirects, credentials, chunked answers): the caller asks it then.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cache.errors import OriginError, OriginUnavailable
from cache.origin import failures
from cache.origin.failures import Failure

MAX_HEAD_BYTES = 64 * 1024
HEAD_BUFFER_BYTES = 16 * 1024
MAX_ERROR_BODY_BYTES = 8 * 1024
CONNECT_TIMEOUT_S = 5.0
IDLE_S = 15.0
"""S3 closes connections that are idle for 20 s or more; a request sent into a closing one is lost."""

MAX_IDLE = 128


class NotPlain(Exception):
    """The answer is not one that this reader understands; the store's own client may."""


@dataclass(frozen=True)
class PlainTarget:
    """Where a GET goes: everything about a url that a request needs. `target`: path and query as sent."""

    host: str
    port: int
    is_tls: bool
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    context: ssl.SSLContext | None = field(default=None, compare=False, hash=False)
    """How TLS is done; None: as for any web server."""

    @property
    def address(self) -> tuple[str, int, bool]:
        return self.host, self.port, self.is_tls

    @classmethod
    def of(cls, url: str) -> PlainTarget:
        """Raises NotPlain for what is no http(s) url."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or goes_through_proxy(url):
            raise NotPlain(url)
        is_tls = parts.scheme == "https"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(c <= " " for c in target):
            raise NotPlain(url)
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, target)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def goes_through_proxy(url: str) -> bool:
    """The environment names a proxy for it (HTTPS_PROXY, NO_PROXY): the store's client handles that."""
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


@dataclass(frozen=True)
class Head:
    status: int
    headers: Mapping[str, str]
    silence_s: float = 0.0
    """The longest time without a byte before it, interim answers (1xx) counted as such."""

    @property
    def length(self) -> int | None:
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    @property
    def keeps_alive(self) -> bool:
        return "close" not in self.headers.get("connection", "").lower()


def parse_head(raw: bytes) -> Head:
    """Status and headers (names in lower case). Raises NotPlain on what is no HTTP/1.1 answer."""
    lines = raw.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not (parts[1].isdigit() and len(parts[1]) == 3):
        raise NotPlain(f"not an HTTP answer: {lines[0][:80]!r}")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return Head(int(parts[1]), headers)


def request_bytes(target: PlainTarget, etag: str, start: int, end: int) -> bytes:
    """GET of the bytes [start, end) of one version."""
    lines = [f"GET {target.target} HTTP/1.1", f"Host: {target.host_header}", f"Range: bytes={start}-{end - 1}"]
    if not etag.startswith("W/"):
        lines.append(f"If-Match: {etag}")
    lines += ["User-Agent: railhead", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in target.headers]
    if any("\r" in line or "\n" in line for line in lines):
        raise NotPlain("a line break in a header")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def check_partial(url: str, etag: str, start: int, end: int, head: Head) -> None:
    """The answer is the range that was asked for, of the version that was pinned. Raises OriginError or NotPlain."""
    if head.status != 206 or head.length != end - start:
        content_range = head.headers.get("content-range", "")
        _, _, size = content_range.rpartition("/")
        if head.status == 206 and size.isdigit() and end > int(size):
            raise failures.beyond_end(url, start, end, int(size))
        raise NotPlain(f"status {head.status}, length {head.length}")
    found = head.headers.get("etag")
    if found is None or not head.headers.get("content-range", "").startswith(f"bytes {start}-{end - 1}/"):
        raise NotPlain("no etag, or another range")
    if found != etag:
        raise failures.changed(url, etag, found)


def refusal(url: str, head: Head, body: bytes, now_s: float) -> OriginError | NotPlain:
    """What an answer other than 206 means. NotPlain where the store's client may know better."""
    if head.status < 400 or head.status in (400, 401, 403, 405, 407):
        return NotPlain(f"status {head.status}")
    text = body.decode("utf-8", "replace")
    code = text.partition("<Code>")[2].partition("</Code>")[0][:64]
    said = text.partition("<Message>")[2].partition("</Message>")[0][:200]
    detail = " ".join(filter(None, [str(head.status), code, said]))
    sent_s = retry_after_s(head.headers.get("date", ""), 0.0)  # By its clock and not ours, which may have been stepped.
    after_s = retry_after_s(head.headers.get("retry-after", ""), sent_s if sent_s else now_s)
    return failures.error_of(Failure("GET", url, detail, head.status, code, after_s))


def retry_after_s(text: str, now_s: float) -> float | None:
    """Retry-After as seconds from now (RFC 9110, 10.2.3: a number or a date).

    >>> retry_after_s("3", 0.0), retry_after_s("soon", 0.0), retry_after_s("Thu, 01 Jan 1970 00:00:10 GMT", 4.0)
    (3.0, None, 6.0)
    """
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, TypeError):
        return None


class RangeConnection:
    """One connection. One thread at a time; `shut` may come from any."""

    def __init__(self, target: PlainTarget, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Raises OSError when no connection stands in time."""
        self.address = target.address
        self.idle_since_s = 0.0
        self._early = memoryview(b"")
        sock = _connect(target.host, target.port, timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_tls = target.is_tls
        if target.is_tls:
            try:
                sock = (target.context or _tls_context()).wrap_socket(sock, server_hostname=target.host)
            except BaseException:
                sock.close()
                raise
        self._sock = sock

    def ask(self, request: bytes, stall_s: float) -> Head:
        """Sends a request and reads the head of its answer. OSError (TimeoutError after `stall_s` of silence), NotPlain."""
        self._set_timeout(stall_s)
        self._sock.sendall(request)
        silence_s, heard_s = 0.0, time.monotonic()
        while True:
            head, now_s = self._head(), time.monotonic()
            silence_s, heard_s = max(silence_s, now_s - heard_s), now_s
            if head.status >= 200:
                return replace(head, silence_s=silence_s)

    def _head(self) -> Head:
        data = bytes(self._early)
        while (at := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise NotPlain("a head without end")
            more = self._recv(HEAD_BUFFER_BYTES)
            if not more:
                raise ConnectionResetError("the connection closed before the answer")
            data += more
        self._early = memoryview(data)[at + 4 :]
        return parse_head(data[:at])

    def _recv(self, size: int) -> bytes:
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            raise TimeoutError from None

    def read_into(self, view: memoryview) -> int:
        """Fills the view as far as the body comes before silence; 0: the other side has closed. TimeoutError when nothing came."""
        if self._early:
            count = min(len(self._early), len(view))
            view[:count] = self._early[:count]
            self._early = self._early[count:]
            return count
        if self._is_tls:
            return self._read_records(view)
        try:
            # One system call for the whole buffer; what has come before the timeout is returned.
            return self._sock.recv_into(view, len(view), socket.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError from None

    def _read_records(self, view: memoryview) -> int:
        got = 0
        while got < len(view):
            try:
                count = self._sock.recv_into(view[got:])
            except TimeoutError:
                if got:
                    break
                raise
            if count == 0:
                break
            got += count
        return got

    def drain(self, limit: int) -> bytes:
        """The beginning of a body, for its words."""
        body = bytes(self._early[:limit])
        with contextlib.suppress(OSError):
            while len(body) < limit and (more := self._recv(limit - len(body))):
                body += more
        return body

    def _set_timeout(self, stall_s: float) -> None:
        if self._is_tls:
            self._sock.settimeout(stall_s)
            return
        # A blocking socket with the kernel's own time-outs: MSG_WAITALL needs it.
        self._sock.settimeout(None)
        value = struct.pack("ll", int(stall_s), int(stall_s % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    @property
    def is_clean(self) -> bool:
        """Nothing of an earlier answer is left in it."""
        return not self._early

    def shut(self) -> None:
        """Ends whatever a thread waits for on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()


class Connections:
    """Idle connections by address. Any thread."""

    def __init__(self) -> None:
        self._idle: defaultdict[tuple[str, int, bool], list[RangeConnection]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, target: PlainTarget) -> RangeConnection | None:
        """One that is idle and young enough; None: make one."""
        with self._lock:
            idle = self._idle[target.address]
            while idle:
                connection = idle.pop()
                if time.monotonic() - connection.idle_since_s < IDLE_S:
                    return connection
                connection.close()
        return None

    def give_back(self, connection: RangeConnection) -> None:
        connection.idle_since_s = time.monotonic()
        with self._lock:
            idle = self._idle[connection.address]
            if len(idle) < MAX_IDLE and connection.is_clean:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            for idle in self._idle.values():
                for connection in idle:
                    connection.close()
            self._idle.clear()


def transport_error(url: str, error: OSError, stall_s: float) -> OriginError:
    """Below HTTP: no connection, silence, a reset."""
    if isinstance(error, TimeoutError):
        detail = f"no byte for {stall_s:.3g} s"
    elif isinstance(error, socket.gaierror):
        detail = f"the host's name cannot be resolved: {error.strerror}"
    else:
        detail = error.strerror or str(error)
    found = failures.error_of(Failure("GET", url, detail))
    assert isinstance(found, OriginUnavailable)
    return found


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """To any of the host's addresses, not always the first: a store has many, and one of them may be sick."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    random.shuffle(found)
    last: OSError = OSError("the host's name has no address")
    for family, kind, protocol, _, address in found[:4]:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise last


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()
