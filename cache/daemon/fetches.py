"""The worker's part of fetching: runs of blocks from an origin (or a peer) into extent files, each read in a thread of its own.

Decides nothing: when a run is late and gets a second reader, and whether to try again, the control process says. Where the plain way is
not understood (plain_http.NotPlain), the store's own client reads the run whole.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cache.daemon.blockfetch import BlockFetch, read_run
from cache.daemon.borrowing import answer_check, as_peer_error, peer_target
from cache.daemon.peerauth import Ask
from cache.daemon.starvation import Starvation
from cache.errors import CacheError, CapacityError, CorruptBlock, DiskError, OriginUnavailable
from cache.origin.plain_http import Connections, Head, NotPlain, PlainTarget
from cache.origin.registry import origin_for
from cache.store.files import disk_error, label_of
from cache.store.holding import mark_held

MAX_READERS = 512
"""Threads, made when needed: each waits on one connection, with a buffer of 256 KiB."""

MAX_WHOLE = 4
"""Bodies that the store's client may hold in memory at once (4 MiB each), where the plain way cannot be gone."""

STALL_S = 15.0


@dataclass
class _Running:
    run: BlockFetch
    request: dict[str, Any]
    target: PlainTarget
    check: Callable[[Head], None] | None
    result: asyncio.Future[float]
    num_readers: int = 0
    errors: list[BaseException] = field(default_factory=list)


@dataclass(frozen=True)
class Peering:
    key: bytes
    client_tls: ssl.SSLContext | None


class Fetches:
    """All runs under way in this worker. From its event loop only."""

    def __init__(self) -> None:
        self._connections = Connections()
        self._threads = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="reader")
        self._running: dict[int, _Running] = {}
        self.peering: Peering | None = None
        """How peers are spoken to; None: there are none."""
        self._starvation = Starvation()
        self._whole = asyncio.Semaphore(MAX_WHOLE)
        self._reading: set[asyncio.Future[float]] = set()

    async def fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer: {seconds, first_byte_s, write_s, silence_s}, or {failed, done, crc} with how far it came. Raises CapacityError."""
        with self._starvation.watch() as watch:
            answer = await self._fetch(request)
            if "write_s" in answer:
                answer["write_s"] = watch.without(answer["write_s"])
            return answer

    async def _fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        began_s = time.monotonic()
        run = _open_run(request)
        try:
            if "peer" in request:
                first_byte_s = await self._from_peer(run, request, request["peer"])
            else:
                first_byte_s = await self._from_origin(run, request)
        except CacheError as error:
            run.close()  # From here on nothing moves: what is said is what is there.
            return {"failed": error.to_wire(), "done": run.done, "crc": run.crc}
        finally:
            run.close()
        seconds = time.monotonic() - began_s
        return {"seconds": seconds, "first_byte_s": first_byte_s, "write_s": run.write_s, "silence_s": run.silence_s}

    def cancel(self, fetch_id: int) -> bool:
        """Gives up a run that is under way; its fetch fails."""
        running = self._running.get(fetch_id)
        if running is None or running.result.done():
            return False
        running.run.close()
        running.result.set_exception(OriginUnavailable("given up"))
        return True

    def hedge(self, fetch_id: int) -> bool:
        """A second reader for a run that is still under way."""
        running = self._running.get(fetch_id)
        if running is None or running.result.done():
            return False
        self._add_reader(running)
        return True

    async def close(self) -> None:
        """Ends what is under way. A thread that waits for a connection to stand is not waited for."""
        for running in self._running.values():
            running.run.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._reading:
            await asyncio.wait(self._reading, timeout=0.5)
        self._connections.close()

    async def _from_origin(self, run: BlockFetch, request: dict[str, Any]) -> float:
        url = request["url"]
        origin = origin_for(url)
        for is_second_try in (False, True):
            target = await origin.plain_target(url)
            if target is None:
                return await self._whole_from_origin(run, request)
            try:
                return await self._read(run, request, target)
            except NotPlain:
                origin.forget_signature(url)
                if is_second_try:
                    break
        first_byte_s = await self._whole_from_origin(run, request)
        origin.is_not_plain()
        return first_byte_s

    async def _from_peer(self, run: BlockFetch, request: dict[str, Any], peer: dict[str, Any]) -> float:
        assert self.peering is not None
        ask = Ask(peer["node"], peer["content_id"], peer["first"], peer["end"])
        about = {"url": request["url"], "etag": request["etag"], "size_bytes": peer["size_bytes"]}
        address, tls = (peer["host"], peer["port"]), self.peering.client_tls
        target, nonce = peer_target(self.peering.key, ask, address, about, time.time(), tls=tls)
        try:
            return await self._read(run, request, target, answer_check(self.peering.key, ask, nonce, run))
        except CapacityError:
            raise
        except (CacheError, NotPlain) as error:
            raise as_peer_error(ask.audience, error) from error

    async def _read(
        self,
        run: BlockFetch,
        request: dict[str, Any],
        target: PlainTarget,
        check: Callable[[Head], None] | None = None,
    ) -> float:
        running = _Running(run, request, target, check, asyncio.get_running_loop().create_future())
        fetch_id = int(request.get("fetch_id", 0))
        self._running[fetch_id] = running
        try:
            self._add_reader(running)
            return await running.result
        finally:
            self._running.pop(fetch_id, None)

    def _add_reader(self, running: _Running) -> None:
        running.num_readers += 1
        request = running.request
        reading = asyncio.get_running_loop().run_in_executor(
            self._threads,
            read_run,
            running.run,
            self._connections,
            running.target,
            request["url"],
            request["etag"],
            request["start"],
            float(request.get("stall_s", STALL_S)),
            running.check,
        )
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        reading.add_done_callback(lambda done: _reader_ended(running, done))

    async def _whole_from_origin(self, run: BlockFetch, request: dict[str, Any]) -> float:
        began_s = time.monotonic()
        async with self._whole:
            url, start, end = request["url"], request["start"] + run.done, request["end"]
            data = memoryview(await origin_for(url).get_range(url, request["etag"], start, end)).cast("B")
            if len(data) != end - start:
                raise OriginUnavailable(f"{url} gave {len(data)} bytes for the range [{start}, {end})", url=url)
            first_byte_s = time.monotonic() - began_s
            await asyncio.to_thread(run.put, run.done, data)
        return first_byte_s


def _reader_ended(running: _Running, reading: asyncio.Future[float]) -> None:
    running.num_readers -= 1
    if reading.cancelled():
        return
    error = reading.exception()
    if running.result.done():
        return
    if running.run.done == running.run.length:
        running.result.set_result(0.0 if error is not None else reading.result())
    elif running.num_readers == 0:
        running.result.set_exception(error or OriginUnavailable("a reader ended before its run was whole"))


def _open_run(request: dict[str, Any]) -> BlockFetch:
    """Opened for each run (some 50 µs against the milliseconds of 4 MiB) and never kept: a file that is open here after its eviction would
    take space that nobody expects; a killed worker's counts until the kernel has closed it. Raises DiskError, also for a file
    that no longer says whose it is."""
    path = request["path"]
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        mark_held(fd)
    except FileNotFoundError as error:
        raise DiskError(f"{path} was removed", kind="lost") from error
    except OSError as error:
        raise disk_error(error, f"cannot use {path}") from error
    try:
        label = label_of(fd)
    except CorruptBlock as error:
        os.close(fd)
        raise DiskError(f"{path} is damaged: {error}", kind="lost") from error
    except OSError as error:
        os.close(fd)
        raise disk_error(error, f"cannot use {path}") from error
    length = request["end"] - request["start"]
    return BlockFetch(fd, label, request["slot"], length, int(request.get("done", 0)), int(request.get("crc", 0)))
