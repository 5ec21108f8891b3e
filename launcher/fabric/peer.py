"""One node's part of the preflight: it listens where training will listen, and measures towards the other nodes.

A thin shell over sockets. `LocalPeer` does the work in this process; `serve.py` wraps one in a process that is driven by JSON lines. The
listener takes ephemeral ports on the node's own address, answers only who knows its token, and ends with the peer.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.fabric.compute import cpu_seconds
from launcher.fabric.workers import Ready, Reduced, Seat, Workers

TIMEOUT_S = 2.0
"""For a connection within a data centre, twenty times what a lost SYN costs on a healthy path."""

LOOKUP_S = 3.0
"""A name server that needs longer makes every start slow; gloo and the store look names up."""

SEND_BUFFER_BYTES = 1 << 20
"""Enough for 100 Gb/s over 80 µs, the round trip of a large fabric."""

MAX_TRANSFER_S = 10.0
SMALL_DATAGRAM = 64
MAX_DATAGRAM = 60_000
"""The loopback interface has an MTU that no datagram can fill."""

PMTUDISC_PROBE = 3
"""Forbid fragments and ignore what the kernel remembers of the path: linux/in.h, linux/in6.h."""


@dataclass(frozen=True)
class _MtuOptions:
    """Numbers of the socket options, which Python does not name, and the bytes of IP and UDP headers."""

    level: int
    mtu_discover: int
    mtu: int
    headers: int


_IPV4 = _MtuOptions(socket.IPPROTO_IP, 10, 14, 28)
_IPV6 = _MtuOptions(socket.IPPROTO_IPV6, 23, 24, 48)

# Offsets in struct tcp_info (linux/tcp.h), stable since Linux 4.9.
_BYTES_ACKED, _BUSY_TIME, _TCP_INFO_END = 120, 168, 184

_CHUNK = bytes(1 << 18)


@dataclass(frozen=True)
class Endpoint:
    """Where a peer listens."""

    address: str
    tcp_port: int
    udp_port: int
    token: str


@dataclass(frozen=True)
class Connection:
    """The outcome of connecting to one endpoint."""

    is_ok: bool
    problem: str = ""
    clock_offset_s: float | None = None


@dataclass(frozen=True)
class DatagramOutcome:
    size: int
    is_small_ok: bool
    is_large_ok: bool


class LocalPeer:
    """Listens on `address` and measures from it. Methods block and may be called from any thread; close() ends it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._token = secrets.token_hex(16)
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._tcp = socket.create_server((address, 0), family=self._family, backlog=256)
        self._udp = socket.socket(self._family, socket.SOCK_DGRAM)
        try:
            self._udp.bind((address, 0))
        except OSError:
            self._tcp.close()
            self._udp.close()
            raise
        self._udp.settimeout(0.2)
        self._tcp.settimeout(0.2)
        self._is_closing = threading.Event()
        self._workers: Workers | None = None
        self._threads = [
            threading.Thread(target=self._serve_tcp, name="preflight-tcp", daemon=True),
            threading.Thread(target=self._serve_udp, name="preflight-udp", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def endpoint(self) -> Endpoint:
        return Endpoint(self._address, self._tcp.getsockname()[1], self._udp.getsockname()[1], self._token)

    def connect(self, targets: Sequence[Endpoint], timeout_s: float = TIMEOUT_S) -> list[Connection]:
        """Tries all targets at once; one result each, in order."""
        return _at_once([(self._connect_one, (target, timeout_s)) for target in targets])

    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = 0.5) -> list[DatagramOutcome]:
        """Sends each target an unfragmentable datagram, small and of the interface's full size, until answered."""
        return _at_once([(self._datagrams_one, (target, timeout_s)) for target in targets])

    def transfer(self, target: Endpoint, seconds: float) -> float:
        """Bytes per second that reach the target in about `seconds`; 0.0 if the connection fails."""
        seconds = min(seconds, MAX_TRANSFER_S)
        try:
            with self._open(target, TIMEOUT_S) as connection:
                connection.settimeout(seconds + TIMEOUT_S + MAX_TRANSFER_S)
                # What waits in a large send buffer would have to drain through a slow link after the time is up.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                _send_line(connection, {"token": target.token, "do": "sink"})
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    connection.sendall(_CHUNK)
                connection.shutdown(socket.SHUT_WR)
                answer = _read_line(connection)
                return kernel_rate(connection) or float(answer["rate_bytes_per_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def compute(self) -> dict[str, float]:
        """Seconds for a matrix product and a memory copy on this node's processor."""
        return cpu_seconds()

    def prepare(self, env: Mapping[str, str]) -> None:
        """Starts the processes that take part in collectives, with `env` over this process's environment; does not wait for them."""
        if self._workers is None:
            self._workers = Workers(env)

    def ready(self, timeout_s: float) -> Ready:
        """Waits until they have loaded torch."""
        return self._workers.ready(timeout_s) if self._workers is not None else Ready(problem="nothing was prepared")

    def store(self) -> int:
        """Hosts the store of the next group at this node's address; its port, 0 if that failed."""
        return self._workers.store(self._address) if self._workers is not None else 0

    def reduce(self, seat: Seat) -> Reduced:
        """Takes part in an all-reduce."""
        return self._workers.reduce(seat) if self._workers is not None else Reduced(problem="nothing was prepared")

    def gpu_compute(self) -> list[dict[str, float]]:
        """For each GPU, seconds for a matrix product and a copy; without what failed."""
        return self._workers.gpu_compute() if self._workers is not None else []

    def nccl_log(self) -> list[str]:
        """What NCCL has logged of how it is connected."""
        return self._workers.nccl_log() if self._workers is not None else []

    def lookup(self, names: Sequence[tuple[str, str]], timeout_s: float = LOOKUP_S) -> list[str]:
        """For each (host name, address): what is wrong with looking it up from here, both ways; "" if nothing is."""
        return _at_once([(_lookup_one, (name, address, timeout_s)) for name, address in names])

    def close(self) -> None:
        """Ends the listener and what takes part in collectives; returns when all of it has ended."""
        if self._workers is not None:
            self._workers.close()
        self._is_closing.set()
        for thread in self._threads:
            thread.join()
        self._tcp.close()
        self._udp.close()

    def _open(self, target: Endpoint, timeout_s: float) -> socket.socket:
        # From the node's own address: another source could be another way through the network.
        return socket.create_connection((target.address, target.tcp_port), timeout_s, source_address=(self._address, 0))

    def _connect_one(self, target: Endpoint, timeout_s: float) -> Connection:
        started = time.time()
        try:
            with self._open(target, timeout_s) as connection:
                _send_line(connection, {"token": target.token, "do": "ping"})
                asked = time.time()
                answer = _read_line(connection)
                answered = time.time()
            return Connection(True, "", float(answer["unix_time"]) - (asked + answered) / 2)
        except TimeoutError:
            return Connection(False, f"no answer in {timeout_s:g} s: packets are dropped on the way")
        except ConnectionRefusedError:
            return Connection(False, "refused: a firewall rejects it, or another machine has this address")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Connection(False, f"{error or type(error).__name__} after {time.time() - started:.1f} s")

    def _datagrams_one(self, target: Endpoint, timeout_s: float) -> DatagramOutcome:
        options = _IPV6 if self._family == socket.AF_INET6 else _IPV4
        with socket.socket(self._family, socket.SOCK_DGRAM) as sender:
            size = 0
            try:
                sender.bind((self._address, 0))
                sender.connect((target.address, target.udp_port))
                sender.setsockopt(options.level, options.mtu_discover, PMTUDISC_PROBE)
                mtu = sender.getsockopt(options.level, options.mtu)
                size = min(max(mtu - options.headers, SMALL_DATAGRAM), MAX_DATAGRAM)
                return DatagramOutcome(
                    size,
                    self._is_answered(sender, target.token, SMALL_DATAGRAM, timeout_s),
                    self._is_answered(sender, target.token, size, timeout_s),
                )
            except OSError:
                return DatagramOutcome(size, False, False)

    @staticmethod
    def _is_answered(sender: socket.socket, token: str, size: int, timeout_s: float) -> bool:
        # Datagrams may be lost: three tries, one answer is proof.
        message = token.encode().ljust(size, b".")
        for _ in range(3):
            sender.settimeout(timeout_s / 3)
            try:
                sender.send(message)
                if sender.recv(64) == str(size).encode():
                    return True
            except OSError:
                continue
        return False

    def _serve_tcp(self) -> None:
        handlers: list[threading.Thread] = []
        while not self._is_closing.is_set():
            try:
                connection, _ = self._tcp.accept()
            except OSError:
                continue
            handler = threading.Thread(target=self._answer, args=(connection,), name="preflight-answer", daemon=True)
            handler.start()
            handlers = [thread for thread in handlers if thread.is_alive()] + [handler]
        for handler in handlers:
            handler.join(TIMEOUT_S)

    def _serve_udp(self) -> None:
        token = self._token.encode()
        while not self._is_closing.is_set():
            try:
                message, sender = self._udp.recvfrom(1 << 16)
                if message.startswith(token):
                    # The answer is small, so the way back does not depend on the MTU.
                    self._udp.sendto(str(len(message)).encode(), sender)
            except OSError:
                continue

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(TIMEOUT_S)
            try:
                request = _read_line(connection)
                if not secrets.compare_digest(str(request.get("token")), self._token):
                    return
                if request.get("do") == "ping":
                    _send_line(connection, {"unix_time": time.time()})
                elif request.get("do") == "sink":
                    _send_line(connection, {"rate_bytes_per_s": _swallow(connection)})
            except (OSError, ValueError, AttributeError):
                # Whoever broke off learns it on his own side.
                return


def _lookup_one(name: str, address: str, timeout_s: float) -> str:
    """The resolver cannot be interrupted, so a thread asks and is left behind when it takes too long."""
    answer: list[str] = []
    asking = threading.Thread(target=lambda: answer.append(_ask_resolver(name, address)), daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answer[0] if answer else f"the resolver gave no answer about {name} within {timeout_s:g} s"


def _ask_resolver(name: str, address: str) -> str:
    try:
        found = sorted({str(item[4][0]) for item in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return f"{name} does not resolve ({error})"
    if address not in found:
        return f"{name} resolves to {', '.join(found)}, the gang uses {address}"
    try:
        socket.gethostbyaddr(address)
    except OSError as error:
        return f"{address} has no name ({error})"
    return ""


def _swallow(connection: socket.socket) -> float:
    """Reads to the end; bytes per second between the first and the last arrival."""
    buffer = bytearray(1 << 18)
    started = ended = 0.0
    total = 0
    while received := connection.recv_into(buffer):
        ended = time.monotonic()
        if total:
            total += received
        else:
            # The first arrival starts the clock; its bytes came before.
            started, total = ended, 1
    return (total - 1) / (ended - started) if total and ended > started else 0.0


def kernel_rate(connection: socket.socket) -> float | None:
    """The rate at which the kernel moved this connection's bytes while it had any to move; None if it does not say.

    TCP_INFO counts the time in which data was waiting to be sent or acknowledged, and how much of that the receiver's full
    buffer took. A busy machine that stops the sending or the receiving program for a while does not change the quotient, a
    slow link does.
    """
    try:
        raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return None
    if len(raw) < _TCP_INFO_END:
        return None
    (acked,) = struct.unpack_from("=Q", raw, _BYTES_ACKED)
    busy_us, receiver_limited_us = struct.unpack_from("=QQ", raw, _BUSY_TIME)
    moving_us = busy_us - receiver_limited_us
    return acked / moving_us * 1e6 if acked and moving_us > 0 else None


def _send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line(connection: socket.socket) -> Any:
    line = bytearray()
    while not line.endswith(b"\n"):
        # Byte by byte: what follows the line is payload.
        part = connection.recv(1)
        if not part or len(line) > 4096:
            raise ValueError("the peer closed the connection")
        line += part
    return json.loads(line)


def _at_once(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> list[Any]:
    """Runs the calls in threads, so that the slowest decides how long it takes; results in order."""
    results: list[Any] = [None] * len(calls)

    def run(position: int) -> None:
        function, arguments = calls[position]
        results[position] = function(*arguments)

    threads = [threading.Thread(target=run, args=(position,)) for position in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
