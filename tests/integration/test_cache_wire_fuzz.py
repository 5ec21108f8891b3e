"""10,000 random messages to a daemon's socket: none ends it, none makes it lie to a reader beside, none leaves something open."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.client import Cache
from cache.daemon import wire
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

NUM_MESSAGES = 10_000
PER_CONNECTION = 40
TIMEOUT_S = 60.0
DATA = random_bytes(700_000)
OPS = (
    *("hello", "open", "want", "check", "list", "status", "evict", "ls", "pin", "resize", "resident", "index", "keep"),
    *("hint", "release", "announce", "advance", "close", "close_stream", "report", "suspect", "nonsense"),
)
FIELDS = (
    *(
        "url",
        "etag",
        "content_id",
        "first",
        "end",
        "have",
        "extent_idx",
        "generation",
        "stream",
        "num_visits",
        "stats",
        "key",
    ),
    *(
        "urls",
        "etags",
        "client_id",
        "version",
        "pid",
        "after",
        "is_pinned",
        "capacity_bytes",
        "max_files",
        "content_ids",
        "fds",
    ),
)


class Fuzzer:
    """Messages from the nearly right to noise, the same ones for the same seed."""

    def __init__(self, seed: int, url: str, content_id: str) -> None:
        self.rng = random.Random(seed)
        self.right: dict[str, list[Any]] = {
            "url": [url, "", "s3://", "file:///etc/passwd", "ftp://x/y", "http://127.0.0.1:1/none"],
            "content_id": [content_id, "0" * 32, "../../etc", ""],
            "first": [0, 1, 2, 255, 256],
            "end": [0, 1, 3, 256, 257],
            "extent_idx": [0, 1, -1, 2**40],
            "capacity_bytes": [64 * 2**20, 2**40, 0, -1],
            "version": [wire.PROTOCOL_VERSION, 0],
            "urls": [[url], [], [url, 7], "x"],
            "content_ids": [[content_id], [], 5],
            "is_pinned": [True, False],
            "key": ["0" * 32, "../../x", ""],
        }

    def value(self, field: str, depth: int = 0) -> Any:
        if field in self.right and self.rng.random() < 0.6:
            return self.rng.choice(self.right[field])
        kinds: list[Callable[[], Any]] = [
            lambda: self.rng.choice([0, 1, -1, 2**31, 2**63, -(2**70), 1e308, float("nan"), True, None]),
            lambda: "".join(chr(self.rng.choice([0, 10, 65, 0x2603, 0x1F600])) for _ in range(self.rng.randrange(20))),
            lambda: [self.value(field, depth + 1) for _ in range(self.rng.randrange(4))] if depth < 3 else [],
            lambda: {self.rng.choice(FIELDS): self.value(field, depth + 1)} if depth < 3 else {},
        ]
        return self.rng.choice(kinds)()

    def message(self) -> bytes:
        how = self.rng.random()
        if how < 0.03:
            return self.rng.randbytes(self.rng.randrange(1, 300))
        if how < 0.05:
            return struct.pack(
                ">II", self.rng.choice([0, 2**31, 2**24 + 1]), self.rng.choice([0, 2**32 - 1, 2**28 + 1])
            )
        if how < 0.07:
            text = self.rng.choice([b"[]", b"7", b"nonsense", b"{", b"[" * 50_000, b'"\xff"'])
            return struct.pack(">II", len(text), 0) + text
        header = {field: self.value(field) for field in self.rng.sample(FIELDS, self.rng.randrange(8))}
        op = self.rng.choice(OPS)
        header |= {"op": op if self.rng.random() < 0.97 else self.value("op"), "id": self.value("id")}
        header |= {field: self.value(field) for field in _NEEDED.get(op, ()) if self.rng.random() < 0.9}
        body = self.rng.randbytes(self.rng.choice([0, 0, 0, 24, 48, 1000]))
        if op == "announce" and self.rng.random() < 0.5:
            fields, body = wire.pack_visits(self.right["urls"][0], [(0, self.rng.randrange(10**6), 100)])
            header |= fields
        message = bytearray(wire.encode(header, body))
        if self.rng.random() < 0.05:
            message[self.rng.randrange(len(message))] ^= 1 << self.rng.randrange(8)
        return bytes(message)


_NEEDED = {
    "open": ("url",),
    "want": ("content_id", "first", "end"),
    "check": ("content_id", "extent_idx"),
    "list": ("url",),
    "evict": ("url",),
    "ls": ("url", "after"),
    "pin": ("url", "is_pinned"),
    "resize": ("capacity_bytes",),
    "resident": ("content_ids",),
    "index": ("key",),
    "keep": ("key",),
    "hint": ("content_id", "first", "end"),
    "release": ("content_id", "extent_idx", "generation"),
    "advance": ("stream", "num_visits"),
    "close_stream": ("stream",),
    "report": ("stats",),
    "suspect": ("content_id", "extent_idx"),
}


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_ten_thousand_random_messages_end_nothing_and_leave_nothing(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: Callable[[str], Cache]
) -> None:
    """A client of another version, a port scanner, a bug: whoever may connect to the socket can hurt itself alone."""
    url = counting_origin.put("o", DATA)
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(url)
    assert obj.read(0, len(DATA)) == DATA
    content_id = cache.ask_daemon({"op": "open", "url": url, "etag": None})["content_id"]
    before = open_files(cache_daemon.pid)
    fuzzer, sent, reads = Fuzzer(3, url, content_id), 0, 0
    while sent < NUM_MESSAGES:
        sent += _one_connection(cache_daemon.socket, fuzzer, say_hello=fuzzer.rng.random() < 0.9)
        if sent // 1000 > reads:
            reads += 1
            with cache.open(url) as again:
                assert again.read(0, len(DATA)) == DATA, f"after {sent} messages"
    assert cache_daemon.process is not None and cache_daemon.process.poll() is None, cache_daemon.log
    assert obj.read(5, 1000) == DATA[5:1005]
    obj.close()
    status = cache_daemon.status()
    assert status["used_bytes"] <= max(status["capacity_bytes"], status["held_bytes"])
    log = cache_daemon.log
    assert "Traceback" not in log, log[max(0, log.find("Traceback") - 500) :][:3000]
    wait_until(lambda: open_files(cache_daemon.pid) <= before, "every connection and file of theirs is closed")
    wait_until(lambda: cache_daemon.status()["clients"] == 1, "they have all gone")
    assert cache_daemon.status()["waiting_requests"] == 0 and cache_daemon.stop() == 0
    assert not Path(cache_daemon.socket).exists()


def _one_connection(path: str, fuzzer: Fuzzer, *, say_hello: bool) -> int:
    """Some messages on one connection, until the daemon has enough of it; how many were sent. Answers are read and thrown away."""
    sent = 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if say_hello:
                client_id = f"fuzz-{fuzzer.rng.randrange(10**9)}"
                hello = {"op": "hello", "id": 0, "version": wire.PROTOCOL_VERSION, "client_id": client_id, "pid": 1}
                sock.sendall(wire.encode(hello))
            for _ in range(PER_CONNECTION):
                sent += 1
                sock.sendall(fuzzer.message())
                _drain(sock)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 20):
                pass
    return sent


def _drain(sock: socket.socket) -> None:
    """Else both sides could fill their buffers and wait for each other. (Descriptors that come along are closed by the kernel.)"""
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while sock.recv(1 << 20):
            pass
    sock.settimeout(TIMEOUT_S)
