"""The worker's side of lending: other nodes' daemons ask for blocks, and get them from the extent files, by sendfile.

A small HTTP/1.1 server of two requests, in threads that wait on sockets: `GET /v1/hello` (who are you?) and
`GET /v1/blocks/ID/FIRST-END`. What is asked for is a content id and blocks, never a path. Every request carries a MAC (peerauth.py); where
the blocks lie, and whether they are here or must be fetched first, the control process says. While it works on that, `102 Processing` goes
out, so that whoever waits can tell a busy node from a frozen one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from cache.blocks import BLOCK_BYTES, ObjectId, num_blocks, run_span
from cache.daemon.peerauth import Ask, check_authorization, proof
from cache.errors import CacheError
from cache.origin.plain_http import NotPlain
from cache.store.format import LABEL_BYTES, decode_entry
from cache.store.holding import mark_held

log = logging.getLogger("railhead.cache.peers")

MAX_REQUEST_BYTES = 16 * 1024
IDLE_S = 30.0
SEND_TIMEOUT_S = 20.0
ALIVE_EVERY_S = 0.25
MAX_CONNECTIONS = 256
MAX_WAIT_S = 60.0

_TARGET = re.compile(r"/v1/blocks/([0-9a-f]{32})/(\d{1,9})-(\d{1,9})")

AskControl = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


class Refusal(Exception):
    """An answer that is an error: status and reason, no detail for strangers."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Request:
    ask: Ask
    object_id: ObjectId | None
    nonce: str
    expires_s: float


def parse_request(raw: bytes, key: bytes, node_id: str, now_s: float) -> Request:
    """A request for this node, believed. Raises Refusal. Pure."""
    try:
        lines = raw.decode("latin-1").split("\r\n")
        method, target, version = lines[0].split(" ")
        headers = dict(_header(line) for line in lines[1:] if line)
    except ValueError:
        raise Refusal(400, "not an HTTP request") from None
    if method != "GET" or not version.startswith("HTTP/1."):
        raise Refusal(405, "only GET")
    match = _TARGET.fullmatch(target)
    if target != "/v1/hello" and match is None:
        raise Refusal(404, "no such thing")
    # Who asks a node for the first time does not know its name yet.
    audience = node_id if match is not None else ""
    ask = Ask(audience, match[1], int(match[2]), int(match[3])) if match is not None else Ask("", "", 0, 0)
    sound = check_authorization(key, ask, headers.get("authorization", ""), now_s)
    if isinstance(sound, str):
        raise Refusal(401, sound)
    object_id = _object_of(headers, ask) if match is not None else None
    return Request(ask, object_id, *sound)


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon:
        raise ValueError(line)
    return name.strip().lower(), value.strip()


def _object_of(headers: dict[str, str], ask: Ask) -> ObjectId:
    """The object that a content id stands for: it is their hash, so nothing else can be slipped in."""
    size = headers.get("x-railhead-size", "")
    if not (size.isascii() and size.isdigit() and len(size) <= 15):
        raise Refusal(400, "no size")
    object_id = ObjectId(
        unquote(headers.get("x-railhead-url", "")), unquote(headers.get("x-railhead-etag", "")), int(size)
    )
    if object_id.content_id != ask.content_id or not 0 <= ask.first < ask.end <= num_blocks(object_id.size_bytes):
        raise Refusal(400, "another object than was signed, or blocks that it does not have")
    return object_id


class PeerServer:
    """Serves on `listener`, which may be shared with other workers. `ask_control`: to be awaited on `loop`."""

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        node_id: str,
        tls: ssl.SSLContext | None,
        loop: asyncio.AbstractEventLoop,
        ask_control: AskControl,
    ) -> None:
        self._listener, self._key, self._node_id, self._tls = listener, key, node_id, tls
        self._loop, self._ask_control = loop, ask_control
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._control_answered_s = time.monotonic()
        threading.Thread(target=self._accept, daemon=True, name="peers").start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                time.sleep(0.1)  # Out of descriptors, or the listener is closed and the process about to end.
                continue
            if not self._slots.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="peer").start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(IDLE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            early = b""
            while True:
                raw, early = _read_request(sock, early)
                if not raw or not self._answer(sock, raw):
                    return
        except (OSError, Refusal):
            pass
        except Exception:
            log.exception("a peer's connection was closed")
        finally:
            sock.close()
            self._slots.release()

    def _answer(self, sock: socket.socket, raw: bytes) -> bool:
        """False: the connection is of no more use."""
        try:
            request = parse_request(raw, self._key, self._node_id, time.time())
            if request.object_id is None:
                about = self._wait(sock, {"op": "hello", **_nonce(request)})["about"]
                sign = proof(self._key, request.ask, request.nonce, about)
                _send(sock, 200, {"X-Railhead-Proof": sign}, about.encode())
                return True
            return self._lend(sock, request, request.object_id)
        except Refusal as refusal:
            if refusal.status == 401:
                log.warning("a request was refused: %s", refusal.reason)
            _send(sock, refusal.status, {"X-Railhead-Reason": refusal.reason.replace("\n", " ")[:200]}, b"")
            return refusal.status >= 404

    def _lend(self, sock: socket.socket, request: Request, object_id: ObjectId) -> bool:
        ask = request.ask
        told = {"op": "lend", "url": object_id.url, "etag": object_id.etag, "size_bytes": object_id.size_bytes}
        lent = self._wait(sock, {**told, "first": ask.first, "end": ask.end, **_nonce(request)})
        try:
            start, end = run_span(object_id.size_bytes, ask.first, ask.end)
            try:
                fd = os.open(lent["path"], os.O_RDONLY | os.O_CLOEXEC)
                mark_held(fd)
            except OSError as error:
                raise Refusal(503, "evicted a moment ago") from error
            try:
                slot = int(lent["slot"])
                checksums = _checksums(fd, object_id.content_id, int(lent["extent_idx"]), slot, end - start)
                headers = {
                    "ETag": object_id.etag,
                    "Content-Range": f"bytes {start}-{end - 1}/{object_id.size_bytes}",
                    "X-Railhead-Checksums": checksums,
                    "X-Railhead-Proof": proof(self._key, ask, request.nonce, checksums),
                }
                sock.settimeout(SEND_TIMEOUT_S)
                _send(sock, 206, headers, None, length=end - start)
                # Plain sockets: from the page cache to the network, without a look at the bytes.
                with os.fdopen(os.dup(fd), "rb") as file:
                    sent = sock.sendfile(file, slot * BLOCK_BYTES, end - start)
                sock.settimeout(IDLE_S)
                return sent == end - start
            finally:
                os.close(fd)
        finally:
            self._tell({"op": "lent", "hold": lent["hold"]})

    def _tell(self, frame: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._ask_control(frame), self._loop)

    def _wait(self, sock: socket.socket, frame: dict[str, Any]) -> dict[str, Any]:
        """The control process's answer. Meanwhile the other side hears that we live, as long as the control process does."""
        asked = asyncio.run_coroutine_threadsafe(self._ask_control(frame), self._loop)
        began_s, pinged = time.monotonic(), None
        try:
            while True:
                try:
                    return asked.result(timeout=ALIVE_EVERY_S)
                except TimeoutError:
                    if time.monotonic() - began_s > MAX_WAIT_S:
                        raise Refusal(503, "it took too long") from None
                # A worker goes on when the process that decides is frozen; to others that is a frozen node. One that is only slow to
                # answer (all processors are taken) is none, so the question stays open until it does.
                if pinged is not None and pinged.done():
                    sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
                if pinged is None or pinged.done():
                    pinged = asyncio.run_coroutine_threadsafe(self._ask_control({"op": "ping"}), self._loop)
        except CancelledError:
            raise Refusal(503, "this daemon is about to end") from None
        except CacheError as error:
            raise Refusal(421 if getattr(error, "reason", "") == "not-owner" else 409, error.message) from error
        finally:
            asked.cancel()
            if pinged is not None:
                pinged.cancel()


def _nonce(request: Request) -> dict[str, Any]:
    return {"nonce": request.nonce, "expires_s": request.expires_s}


def _read_request(sock: socket.socket, early: bytes) -> tuple[bytes, bytes]:
    """One request's head and what came after it; empty when the peer has closed. Raises Refusal."""
    while (at := early.find(b"\r\n\r\n")) < 0:
        if len(early) > MAX_REQUEST_BYTES:
            raise Refusal(431, "a head without end")
        more = sock.recv(4096)
        if not more:
            return b"", b""
        early += more
    return early[:at], early[at + 4 :]


_WORDS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
}


def _send(sock: socket.socket, status: int, headers: dict[str, str], body: bytes | None, *, length: int = 0) -> None:
    lines = [
        f"HTTP/1.1 {status} {_WORDS.get(status, 'Refused')}",
        f"Content-Length: {length if body is None else len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise NotPlain("a line break in a header")
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + (body or b""))


def _checksums(fd: int, content_id: str, extent_idx: int, slot: int, length: int) -> str:
    """Of each block, as they were computed when it came from the origin. Raises Refusal when the file says that it is not there."""
    page = os.pread(fd, LABEL_BYTES, max(0, os.fstat(fd).st_size - LABEL_BYTES))
    found = []
    for idx in range(-(-length // BLOCK_BYTES)):
        entry = decode_entry(page, content_id, extent_idx, slot + idx) if len(page) == LABEL_BYTES else None
        if entry is None or entry.length != min(BLOCK_BYTES, length - idx * BLOCK_BYTES):
            raise Refusal(503, "a block is not there any more")
        found.append(f"{entry.crc:08x}")
    return ",".join(found)
