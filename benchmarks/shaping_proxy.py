"""A proxy that makes a local S3 or HTTP server behave like a distant, crowded or broken one, and counts what leaves it.

    python -m benchmarks.shaping_proxy --upstream 127.0.0.1:8333 --port 9000 --first-byte-s 0.03 --rate-per-connection 60e6

Point AWS_ENDPOINT_URL at it. Signed requests pass, as the Host header and all else stay as they came. At run time, on the control port:

    GET /behaviour, PATCH /behaviour {"cut_share": 0.1}, PUT /behaviour {…} (the rest back to defaults), GET /counters, DELETE /counters

benchmarks/shaping.py says what each setting does. In tests use `ProxyProcess` (benchmarks/proxy_process.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine

from aiohttp import web

from benchmarks.http1 import Head, ProtocolError, SocketReader, request_of
from benchmarks.object_memory import StoredObject, may_be_kept
from benchmarks.shaping import Answer, Behaviour, Counters, Request, TokenBucket, fault_of

# Unshaped, a big buffer saves system calls. Shaped, a piece is some milliseconds of the rate: 1 ms made as even a stream as 5 ms for
# every client tried, at three times the CPU (measured: 2.3 against 0.8 s/GB).
_BUFFER_BYTES = 512 * 1024
_SHAPED_PIECE_S = 0.005
_SHAPED_PIECE_BYTES = (4 * 1024, 256 * 1024)
# asyncio sleeps no finer than about a millisecond; smaller debts are carried on to the next piece.
_SHORTEST_SLEEP_S = 0.001
_GONE = (ConnectionError, ProtocolError, TimeoutError, BrokenPipeError)


class ShapingProxy:
    """The proxy, inside a running event loop. `behaviour` may be replaced at any time; it holds from the next request on."""

    def __init__(self, upstream: tuple[str, int], behaviour: Behaviour | None = None) -> None:
        self.upstream = upstream
        self.counters = Counters()
        self.port = 0
        self._seen: Counter[Request] = Counter()
        self._met: Counter[Request] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.total = TokenBucket(None)
        self.objects: dict[str, asyncio.Task[StoredObject | None]] = {}
        """By path, read or being read; None: what is no object."""
        self._behaviour = Behaviour()
        self.behaviour = behaviour or Behaviour()

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        if behaviour.rate_total != self._behaviour.rate_total:
            self.total = TokenBucket(behaviour.rate_total)
        self._behaviour = behaviour
        # A new behaviour meets requests as if they came for the first time, so that one scenario does not depend on the one before.
        self._seen.clear()
        self._met.clear()

    async def start(self, port: int = 0) -> None:
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._spawn(self._accept(listener))

    async def stop(self) -> None:
        tasks = [*self._tasks, *self.objects.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
                client.setblocking(False)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.counters.connections += 1
                self._spawn(_Connection(self, client).run())

    def meets(self, request: Request) -> tuple[str, float]:
        """The fault for this request, counted."""
        nth = self._seen[request]
        self._seen[request] += 1
        limit = self.behaviour.faults_per_range
        if limit is not None and self._met[request] >= limit:
            return "", 0.0
        fault, place = fault_of(self.behaviour, request, nth)
        if fault:
            self._met[request] += 1
            self.counters.faults[fault] += 1
        return fault, place


class _Connection:
    """One client connection, with an upstream connection of its own."""

    def __init__(self, proxy: ShapingProxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.reader = SocketReader(client)
        self.upstream: SocketReader | None = None
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.bucket = TokenBucket(None)
        self.answer = Answer(Request("", ""), 0)

    async def run(self) -> None:
        try:
            # A peer that goes away in the middle is daily business here: hedged and cancelled requests do it all the time.
            with contextlib.suppress(*_GONE, OSError):
                while (head := await self.reader.head()) is not None and await self._exchange(head):
                    pass
        finally:
            self.client.close()
            self._drop_upstream()

    async def _exchange(self, head: Head) -> bool:
        """One request and its answer; False when the connection ends with it."""
        request, behaviour = request_of(head), self.proxy.behaviour
        if self.bucket.rate != behaviour.rate_per_connection:
            self.bucket = TokenBucket(behaviour.rate_per_connection)
        if "100-continue" in head.headers.get("expect", "").lower():
            await self.loop.sock_sendall(self.client, b"HTTP/1.1 100 Continue\r\n\r\n")
        fault, place = self.proxy.meets(request)
        if fault in ("throttle", "html"):
            await self._relay_request_body(head, None)
            status, answer = _canned(fault, behaviour)
            await self.loop.sock_sendall(self.client, answer)
            self.proxy.counters.begin(request, status)
            return head.keeps_alive
        if fault == "reset":
            self.proxy.counters.begin(request, 0)
            _reset(self.client)
            return False
        asked_at = self.loop.time()
        kept = await self._kept(request, head) if behaviour.keeps_objects else None
        answer_head, body = kept if kept is not None else (await self._ask_upstream(head), None)
        self.answer = self.proxy.counters.begin(request, answer_head.status)
        await asyncio.sleep(max(0.0, asked_at + behaviour.first_byte_s - self.loop.time()))
        await self.loop.sock_sendall(self.client, answer_head.raw)
        if body is not None:
            complete = await self._relay_sized(len(body), _from_memory(body), behaviour, fault, place)
        else:
            complete = await self._relay_answer_body(request, answer_head, behaviour, fault, place)
        return complete and head.keeps_alive and answer_head.keeps_alive

    async def _kept(self, request: Request, head: Head) -> tuple[Head, memoryview] | None:
        """The answer from memory; None: the upstream is to be asked."""
        if not may_be_kept(request, head):
            return None
        reading = self.proxy.objects.get(request.path)
        if reading is None:
            reading = self.proxy.objects[request.path] = self.loop.create_task(_whole(self.proxy.upstream, head))
        try:
            stored = await reading
        except (*_GONE, OSError):
            self.proxy.objects.pop(request.path, None)
            raise
        return None if stored is None else stored.answer(request, head)

    async def _ask_upstream(self, head: Head) -> Head:
        """Sends the request on and returns the answer's head. A kept connection that upstream has closed meanwhile is replaced once."""
        raw = head.without("Expect")
        for is_fresh in (self.upstream is None, True):
            if self.upstream is None:
                self.upstream = SocketReader(await _connect(self.proxy.upstream))
            try:
                await self.loop.sock_sendall(self.upstream.sock, raw)
                await self._relay_request_body(head, self.upstream.sock)
                while (answer := await self.upstream.head()) is not None:
                    if answer.status >= 200:
                        return answer
            except _GONE:
                if is_fresh or head.length or head.is_chunked:
                    raise
            self._drop_upstream()
        raise ProtocolError("upstream closed without an answer")

    async def _relay_request_body(self, head: Head, to: socket.socket | None) -> None:
        if head.is_chunked:
            while True:
                chunk = await self.reader.chunk()
                if to is not None:
                    await self.loop.sock_sendall(to, chunk)
                if chunk.startswith(b"0"):
                    return
        left = head.length or 0
        while left:
            n = await self.reader.into(self.buffer[: min(left, len(self.buffer))])
            if n == 0:
                raise ProtocolError("closed in the middle of a request's body")
            left -= n
            if to is not None:
                await self.loop.sock_sendall(to, self.buffer[:n])

    async def _relay_answer_body(
        self, request: Request, head: Head, behaviour: Behaviour, fault: str, place: float
    ) -> bool:
        """The body, paced and spoilt as told; True when the connection can go on."""
        assert self.upstream is not None
        if request.method == "HEAD" or head.status in (204, 304):
            return True
        if head.is_chunked:
            while True:
                chunk = await self.upstream.chunk()
                await self._send(memoryview(chunk), behaviour, fault)
                if chunk.startswith(b"0"):
                    return True
        return await self._relay_sized(head.length, self._from_upstream, behaviour, fault, place)

    async def _from_upstream(self, room: int) -> memoryview:
        assert self.upstream is not None
        return self.buffer[: await self.upstream.into(self.buffer[:room])]

    async def _relay_sized(
        self,
        length: int | None,
        some: Callable[[int], Awaitable[memoryview]],
        behaviour: Behaviour,
        fault: str,
        place: float,
    ) -> bool:
        """A body in pieces as `some` gives them, of as many bytes as it is asked for or fewer; none is its end."""
        sent, spot = 0, int(place * length) if length else 0
        while length is None or sent < length:
            room = self._room(behaviour, fault)
            if length is not None:
                room = min(room, length - sent)
            if fault in ("cut", "stall") and sent < spot:
                room = min(room, spot - sent)
            piece = await some(room)
            if not piece:
                return False
            if fault == "flip" and sent <= spot < sent + len(piece):
                piece = memoryview(bytearray(piece))
                piece[spot - sent] ^= 1 << (spot % 8)
            if fault == "cut" and sent == spot:
                return False
            if fault == "stall" and sent == spot:
                await asyncio.sleep(behaviour.stall_s)
            await self._send(piece, behaviour, fault)
            sent += len(piece)
        return True

    def _room(self, behaviour: Behaviour, fault: str) -> int:
        if fault == "trickle":
            return max(1, int(behaviour.trickle_rate / 20))
        rates = [rate for rate in (behaviour.rate_per_connection, behaviour.rate_total) if rate is not None]
        if not rates:
            return _BUFFER_BYTES
        smallest, largest = _SHAPED_PIECE_BYTES
        return min(largest, max(smallest, int(min(rates) * _SHAPED_PIECE_S)))

    async def _send(self, piece: memoryview, behaviour: Behaviour, fault: str) -> None:
        now = self.loop.time()
        wait_s = max(self.bucket.reserve(len(piece), now), self.proxy.total.reserve(len(piece), now))
        if fault == "trickle":
            wait_s = max(wait_s, len(piece) / behaviour.trickle_rate)
        if wait_s >= _SHORTEST_SLEEP_S:
            await asyncio.sleep(wait_s)
        await self.loop.sock_sendall(self.client, piece)
        self.answer.body_bytes += len(piece)

    def _drop_upstream(self) -> None:
        if self.upstream is not None:
            self.upstream.sock.close()
            self.upstream = None


def _from_memory(body: memoryview) -> Callable[[int], Awaitable[memoryview]]:
    at = 0

    async def some(room: int) -> memoryview:
        nonlocal at
        piece = body[at : at + room]
        at += len(piece)
        return piece

    return some


async def _whole(upstream: tuple[str, int], head: Head) -> StoredObject | None:
    """The object that a request is about, whole. None: there is none, or its length is not known before."""
    reader = SocketReader(await _connect(upstream))
    try:
        asked = dataclasses.replace(head, raw=head.without("Range"))
        await asyncio.get_running_loop().sock_sendall(reader.sock, asked.without("If-Match"))
        answer = await reader.head()
        if answer is None or answer.status != 200 or answer.length is None:
            return None
        body = bytearray(answer.length)
        at = 0
        while at < len(body):
            count = await reader.into(memoryview(body)[at:])
            if count == 0:
                raise ProtocolError("upstream closed in the middle of an object")
            at += count
        return StoredObject.of(answer, bytes(body))
    finally:
        reader.sock.close()


async def _connect(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    """Makes the close that follows an RST instead of a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _canned(fault: str, behaviour: Behaviour) -> tuple[int, bytes]:
    if fault == "html":
        body = b"<html><body>Please log in to the network.</body></html>"
        return 200, b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    body = (
        b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    head = (
        f"HTTP/1.1 503 Slow Down\r\nRetry-After: {behaviour.retry_after_s:.0f}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return 503, head.encode() + body


def control_app(proxy: ShapingProxy) -> web.Application:
    """The control port: behaviour and counters as JSON."""

    async def get_behaviour(_: web.Request) -> web.Response:
        return web.json_response(dataclasses.asdict(proxy.behaviour))

    async def set_behaviour(request: web.Request) -> web.Response:
        base = proxy.behaviour if request.method == "PATCH" else Behaviour()
        try:
            proxy.behaviour = base.changed_by(await request.json())
        except (ValueError, TypeError) as e:
            return web.json_response({"error": str(e)}, status=400)
        return await get_behaviour(request)

    async def get_counters(_: web.Request) -> web.Response:
        return web.json_response(proxy.counters.as_dict())

    async def reset_counters(_: web.Request) -> web.Response:
        proxy.counters.reset()
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/behaviour", get_behaviour)
    app.router.add_patch("/behaviour", set_behaviour)
    app.router.add_put("/behaviour", set_behaviour)
    app.router.add_get("/counters", get_counters)
    app.router.add_delete("/counters", reset_counters)
    return app


async def serve(upstream: tuple[str, int], port: int, control_port: int, behaviour: Behaviour) -> None:
    """Runs until SIGTERM or SIGINT. Prints one line of JSON with the ports once it serves."""
    proxy = ShapingProxy(upstream, behaviour)
    await proxy.start(port)
    runner = web.AppRunner(control_app(proxy), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", control_port).start()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    ports = {"port": proxy.port, "control_port": runner.addresses[0][1], "pid": os.getpid()}
    print(json.dumps({"event": "serving", **ports}), flush=True)
    await over.wait()
    await runner.cleanup()
    await proxy.stop()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--port", type=int, default=0, help="0: any free one, printed")
    parser.add_argument("--control-port", type=int, default=0, help="0: any free one, printed")
    for field in dataclasses.fields(Behaviour):
        if field.name == "keeps_objects":
            parser.add_argument("--keeps-objects", action="store_true")
            continue
        kind = str if field.name == "match" else int if field.name in ("seed", "faults_per_range") else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    options = vars(parser.parse_args(argv))
    host, _, upstream_port = options.pop("upstream").removeprefix("http://").rstrip("/").rpartition(":")
    ports = options.pop("port"), options.pop("control_port")
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    asyncio.run(serve((host, int(upstream_port)), *ports, Behaviour(**options)))


if __name__ == "__main__":
    main(sys.argv[1:])
