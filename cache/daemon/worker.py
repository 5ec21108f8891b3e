"""A fetch worker: a process that owns connections to origins and carries payload, from the network into extent files.

`python -m cache.daemon.worker FD` serves frames on the inherited socket FD until it is closed. One request, one answer, in any order;
`id` ties them. It decides nothing: no retries, no choice of what to fetch. Fetching itself is fetches.py. Readers whose daemon is away
use one of these as well, to read the origin directly (client/direct.py).

    head   {url}                                            → {info}
    list   {url}                                            → {objects}
    read   {url, etag, start, end}                          → body
    fetch  {url, etag, start, end, path, slot, …}           → {seconds, first_byte_s, write_s}     the blocks are in their file
           {…, fetch_id, stall_s, done, crc}                → {failed, done, crc}         or not: how far it came, to go on from there
    cancel {fetch_id}                                       → {is_over}             a fetch is given up
    hedge  {fetch_id}                                       → {is_started}          a second reader for a fetch that is late
    check  {path, slot, length, from_device}                → {sound, read_s}       of each block
    peers  {key, node_id, listener, tls}                    → {}                    from now on serves other nodes' daemons, and asks them
    ping   {}                                               → {}
    table  {path}                                           → {present, content_id, extent_idx}
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.daemon import wire
from cache.daemon.fetches import Fetches, Peering
from cache.daemon.peerserver import PeerServer
from cache.daemon.peertls import client_context, server_context
from cache.errors import CacheError, CorruptBlock, DiskError, OriginUnavailable, from_wire
from cache.origin.registry import close_origins, origin_for
from cache.store.files import disk_error, label_of, read_label, sound_blocks
from cache.store.format import ExtentLabel
from cache.store.holding import mark_held

if TYPE_CHECKING:
    from cache.origin.ports import ObjectInfo

READ_BYTES = 256 * 1024


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, ExtentLabel]]:
    """An extent file, open for reading and writing, and its label. Raises DiskError, also for a file that no longer says whose it is.

    Opened for each fetch (some 50 µs against the milliseconds of 4 MiB) and never kept: a file that is open here after its eviction
    would take space that nobody expects; that of a worker that was killed counts until the kernel has closed it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        mark_held(fd)
        try:
            yield fd, label_of(fd)
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise DiskError(f"{path} was removed", kind="lost") from error
    except OSError as error:
        raise disk_error(error, f"cannot use {path}") from error
    except CorruptBlock as error:
        raise DiskError(f"{path} is damaged: {error}", kind="lost") from error


def _info_to_wire(info: ObjectInfo) -> dict[str, Any]:
    return {"url": info.url, "size_bytes": info.size_bytes, "etag": info.etag}


class Worker:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._tasks: set[asyncio.Task[None]] = set()
        self._send_lock = asyncio.Lock()
        self._fetches = Fetches()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_asked = 0

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = wire.Decoder()
        # A daemon that is killed with our answers unread resets the connection: the end, like any other.
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._sock, READ_BYTES):
                for frame in decoder.feed(data):
                    if "answer" in frame.header:
                        asked = self._asked.get(frame.header["answer"])
                        if asked is not None and not asked.done():
                            asked.set_result(frame.header)
                        continue
                    task = asyncio.create_task(self._answer(frame))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        for task in list(self._tasks):
            task.cancel()
        await self._fetches.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await close_origins()

    async def _answer(self, frame: wire.Frame) -> None:
        request = frame.header
        body: bytes | memoryview = b""
        try:
            header, body = await getattr(self, f"_op_{request['op']}")(request)
        except CacheError as error:
            header = {"error": error.to_wire()}
        except Exception as error:  # a bug or a library's surprise must reach the reader as an error, not as silence
            header = {"error": CacheError(f"{request.get('op')} failed: {type(error).__name__}: {error}").to_wire()}
        await self._send(wire.encode({"id": request.get("id"), **header}, body))

    async def _send(self, message: bytes) -> None:
        async with self._send_lock:
            with contextlib.suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(self._sock, message)

    async def _op_ping(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return {}, b""

    async def _op_head(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        info = await origin_for(request["url"]).head(request["url"])
        return {"info": _info_to_wire(info)}, b""

    async def _op_list(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return {"objects": [_info_to_wire(info) async for info in origin_for(request["url"]).list(request["url"])]}, b""

    async def _op_read(self, request: dict[str, Any]) -> tuple[dict[str, Any], memoryview]:
        return {}, await self._get(request)

    async def _op_fetch(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return await self._fetches.fetch(request), b""

    async def _op_cancel(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return {"is_over": self._fetches.cancel(int(request["fetch_id"]))}, b""

    async def _op_peers(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        key, tls = bytes.fromhex(request["key"]), request["tls"]
        self._fetches.peering = Peering(key, client_context(tls))
        listener = socket.socket(fileno=int(request["listener"]))
        PeerServer(
            listener, key, request["node_id"], server_context(tls), asyncio.get_running_loop(), self._ask_control
        )
        return {}, b""

    async def _ask_control(self, header: dict[str, Any]) -> dict[str, Any]:
        """A question of this worker to the control process; its answer. Raises CacheError."""
        self._num_asked += 1
        number = self._num_asked
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            await self._send(wire.encode({"ask": number, **header}))
            answer = await future
        finally:
            self._asked.pop(number, None)
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer

    async def _op_hedge(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return {"is_started": self._fetches.hedge(int(request["fetch_id"]))}, b""

    async def _op_check(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        started = time.monotonic()
        slot, length, from_device = request["slot"], request["length"], request["from_device"]
        with _opened(request["path"]) as (fd, label):
            sound = sound_blocks(fd, label, slot, length, from_device=from_device)
        return {"sound": sound, "read_s": time.monotonic() - started}, b""

    async def _op_table(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        label, present = read_label(Path(request["path"]))
        identity = {"content_id": label.object_id.content_id, "extent_idx": label.extent_idx}
        return {"present": sorted(present), **identity}, b""

    async def _get(self, request: dict[str, Any]) -> memoryview:
        url, start, end = request["url"], request["start"], request["end"]
        data = memoryview(await origin_for(url).get_range(url, request["etag"], start, end)).cast("B")
        if len(data) != end - start:
            raise OriginUnavailable(f"{url} gave {len(data)} bytes for the range [{start}, {end})", url=url)
        return data


def main() -> None:
    # Ctrl-C on a terminal reaches the whole process group; when to stop is the parent's decision, told by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)
    asyncio.run(_serve(sock))
    # Threads that still wait for a connection to stand are not waited for: nothing of theirs is needed any more.
    os._exit(0)


async def _serve(sock: socket.socket) -> None:
    await Worker(sock).serve()


if __name__ == "__main__":
    main()
