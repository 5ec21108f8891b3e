"""One reader's connections: requests in, answers and open files out. What the requests mean is the control's business.

Requests and their answers (each request with an `id` is answered exactly once, by `{"id": …, …}` or `{"id": …, "error": …}`):

    hello     {version, client_id, pid}                      → {version, num_words, capacity_bytes} + the words' descriptor
    open      {url, etag?}                                   → {content_id, url, etag, size_bytes, base, on_disk_bytes}
    want      {content_id, first, end, have}                 → {generation, cause, wait_s} + the file, unless `have` is its generation
    check     {content_id, extent_idx}                       → {cause}
    list      {url}                                          → {objects}
    status    {}                                             → the daemon's account
    evict     {url}                                          → {evicted_bytes, num_objects, num_pinned}
    ls        {url, after}                                   → {objects, after}: what is on the disk, and where to go on
    pin       {url, is_pinned}                               → {pins, num_objects, on_disk_bytes, …}
    resize    {capacity_bytes, max_files?}                   → {before_bytes, used_bytes, held_bytes}
    resident  {content_ids}                                  → {bytes}, of each object on this node's disk
    index     {key}                                          → {found} + the file, if it is here (see daemon/indexes.py)
    keep      {key} + index                                  → {}

Between answers a reader may be told {"evicted": true}: files that it holds were evicted and their space is needed.

and without an answer: hint {content_id, first, end}, release {content_id, extent_idx, generation}, announce {stream, urls, num_visits} +
visits, outline {stream, shuffle, seed, global_batch_size, drop_last, rank, world_size, first_step, first_visit, visits_per_step} + objects,
advance {stream, num_visits, num_bytes?, waited_s?} (what is behind the reader, how long it waited), close_stream {stream},
close {content_ids} (each as often as it was opened), report {stats}, suspect {content_id, extent_idx}.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cache.blocks import ExtentId, extent_of
from cache.daemon import wire
from cache.daemon.clients import Clients
from cache.daemon.control import Control
from cache.errors import CacheError, CapacityError
from cache.residency import messages as m
from cache.store.holding import mark_held

log = logging.getLogger("railhead.cache")

RECV_BYTES = 64 * 1024
MAX_REQUESTS_PER_CONNECTION = 256

Reply = tuple[dict[str, Any], list[int]]
"""Header fields, and descriptors to pass along."""


class Session:
    """One connection. `serve` returns when the reader has gone."""

    def __init__(self, sock: socket.socket, control: Control, clients: Clients) -> None:
        self._sock = sock
        self._control = control
        self._clients = clients
        self._client_id = ""
        self._send_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()
        self._num_announcing = 0

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = wire.Decoder()
        try:
            while data := await loop.sock_recv(self._sock, RECV_BYTES):
                for frame in decoder.feed(data):
                    await self._accept(frame)
        except (wire.ProtocolError, KeyError, TypeError, ValueError) as error:
            log.warning("a reader was disconnected: %s: %s", type(error).__name__, error)
        except OSError:
            pass
        except Exception:
            log.exception("a reader was disconnected")
        finally:
            self._sock.close()
            for task in list(self._tasks):
                task.cancel()
            if self._client_id:
                self._clients.went(self._client_id, self)

    async def _accept(self, frame: wire.Frame) -> None:
        """One frame: told at once, or answered by a task of its own so that a long wait does not hold up the next request."""
        request = frame.header
        op = str(request["op"])
        if not self._client_id and op != "hello":
            raise wire.ProtocolError(f"{op} before hello")
        if op in ("advance", "close_stream") and self._num_announcing:
            self._spawn(self._in_turn(op, request))
        elif op in _TOLD:
            _TOLD[op](self, request)
        elif op in ("announce", "outline"):
            self._num_announcing += 1
            self._spawn(self._announce(frame) if op == "announce" else self._outline(frame))
        elif len(self._tasks) >= MAX_REQUESTS_PER_CONNECTION:
            raise wire.ProtocolError(f"more than {MAX_REQUESTS_PER_CONNECTION} requests at once on one connection")
        elif op == "keep":
            self._spawn(self._answer(request, self._keep(frame)))
        elif op in _ANSWERED:
            self._spawn(self._answer(request, _ANSWERED[op](self, request)))
        else:
            raise wire.ProtocolError(f"unknown request {op!r}")

    def nudge(self) -> None:
        """Only where somebody reads: an answer is being waited for."""
        if self._tasks:
            self._spawn(self._send_nudge())

    async def _send_nudge(self) -> None:
        with contextlib.suppress(OSError):
            await self._send({"evicted": True}, [])

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: dict[str, Any], work: Awaitable[Reply]) -> None:
        fds: list[int] = []
        try:
            header, fds = await work
        except CacheError as error:
            header = {"error": error.to_wire()}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            header = {"error": CacheError(f"request {request.get('op')!r} is malformed: {error!r}").to_wire()}
        except Exception as error:  # a bug of ours must reach the reader as an error, not as silence
            log.exception("request %r failed", request.get("op"))
            header = {"error": CacheError(f"the cache daemon failed: {type(error).__name__}: {error}").to_wire()}
        try:
            await self._send({"id": request.get("id"), **header}, fds)
        except OSError:
            pass  # The reader has gone; `serve` notices.
        finally:
            for fd in fds:
                os.close(fd)

    async def _send(self, header: dict[str, Any], fds: list[int]) -> None:
        data = wire.encode({**header, "fds": len(fds)} if fds else header)
        loop = asyncio.get_running_loop()
        async with self._send_lock:
            if fds:
                while True:
                    try:
                        sent = socket.send_fds(self._sock, [data], fds)
                        break
                    except BlockingIOError:
                        await _writable(self._sock)
                data = data[sent:]
            if data:
                await loop.sock_sendall(self._sock, data)

    # -- answered --

    async def _hello(self, request: dict[str, Any]) -> Reply:
        if request["version"] != wire.PROTOCOL_VERSION:
            raise CacheError(
                f"the reader speaks version {request['version']} of the protocol, this daemon {wire.PROTOCOL_VERSION}",
                advice="run the same version of railhead on both sides",
            )
        if self._client_id:
            raise CacheError("hello came twice")
        if not (client_id := str(request["client_id"])):
            raise CacheError("a reader without a client_id")
        self._client_id = client_id
        self._clients.came(self._client_id, self, pid=int(request.get("pid", 0)))
        header = {
            "version": wire.PROTOCOL_VERSION,
            "daemon_id": self._control.daemon_id,
            "num_words": self._control.words.num_words,
            "capacity_bytes": self._control.residency.budget.capacity_bytes,
        }
        return header, [os.dup(self._control.words.fd)]

    async def _open(self, request: dict[str, Any]) -> Reply:
        object_id = await self._control.open_object(self._client_id, str(request["url"]), request.get("etag"))
        residency = self._control.residency
        header = {
            "content_id": object_id.content_id,
            "url": object_id.url,
            "etag": object_id.etag,
            "size_bytes": object_id.size_bytes,
            "base": residency.word_base(object_id.content_id),
            "on_disk_bytes": residency.on_disk_bytes(object_id.content_id),
        }
        return header, []

    async def _want(self, request: dict[str, Any]) -> Reply:
        content_id, first, end = str(request["content_id"]), int(request["first"]), int(request["end"])
        if not 0 <= first < end or extent_of(first) != extent_of(end - 1):
            raise ValueError(f"blocks [{first}, {end}) are not within one extent")
        started = time.monotonic()
        extent = ExtentId(content_id, extent_of(first))

        def hand_over(answer: m.Answer) -> Reply:
            header = {"generation": answer.generation, "cause": answer.cause, "wait_s": time.monotonic() - started}
            if answer.generation == request.get("have"):
                return header, []
            # From now on an eviction counts the file's bytes until this reader lets go.
            self._control.tell(m.ExtentHeld(self._client_id, extent, answer.generation))
            try:
                path = self._control.directory.extent_path(extent, answer.generation)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                mark_held(fd)
                return header, [fd]
            except OSError as error:
                self._control.tell(m.ExtentReleased(self._client_id, extent, answer.generation))
                self._control.tell(m.ExtentSuspected(extent))
                raise CapacityError(
                    f"the file of an extent of {content_id} cannot be opened: {error.strerror}"
                ) from error

        return await self._control.want(self._client_id, content_id, first, end, hand_over)

    async def _check(self, request: dict[str, Any]) -> Reply:
        extent = ExtentId(str(request["content_id"]), int(request["extent_idx"]))
        answer = await self._control.check(self._client_id, extent)
        return {"cause": answer.cause}, []

    async def _list(self, request: dict[str, Any]) -> Reply:
        return {"objects": await self._control.catalogue.list_objects(str(request["url"]))}, []

    async def _status(self, request: dict[str, Any]) -> Reply:
        return {"status": {**self._control.status(), **self._clients.account()}}, []

    async def _evict(self, request: dict[str, Any]) -> Reply:
        return await self._control.people.evict(str(request["url"]).rstrip("/")), []

    async def _ls(self, request: dict[str, Any]) -> Reply:
        return await self._control.people.list_here(str(request["url"]).rstrip("/"), str(request["after"])), []

    async def _pin(self, request: dict[str, Any]) -> Reply:
        url = str(request["url"]).rstrip("/")
        return await self._control.people.pin(url, is_pinned=bool(request["is_pinned"])), []

    async def _resize(self, request: dict[str, Any]) -> Reply:
        max_files = None if request.get("max_files") is None else int(request["max_files"])
        return self._control.people.resize(int(request["capacity_bytes"]), max_files), []

    async def _resident(self, request: dict[str, Any]) -> Reply:
        residency = self._control.residency
        await self._control.restoring.finished()
        return {"bytes": [residency.on_disk_bytes(str(content_id)) for content_id in request["content_ids"]]}, []

    async def _keep(self, frame: wire.Frame) -> Reply:
        await self._control.indexes.keep(str(frame.header["key"]), frame.body)
        return {}, []

    async def _index(self, request: dict[str, Any]) -> Reply:
        fd = self._control.indexes.open(str(request["key"]))
        return ({"found": False}, []) if fd is None else ({"found": True}, [fd])

    # -- told --

    async def _announce(self, frame: wire.Frame) -> None:
        """In the order of arrival: windows of one stream must not overtake each other while their objects are looked up."""
        async with self._in_order:
            try:
                urls, visits = wire.unpack_visits(frame)
                stream_id = self._clients.stream_id(self._client_id, str(frame.header["stream"]))
                etags = wire.unpack_etags(frame)
                await self._control.announce(self._client_id, stream_id, list(zip(urls, etags, strict=True)), visits)
            except (CacheError, wire.ProtocolError, KeyError) as error:
                log.warning("an announced order was ignored: %s", error)
            finally:
                self._num_announcing -= 1

    async def _outline(self, frame: wire.Frame) -> None:
        async with self._in_order:
            try:
                stream_id = self._clients.stream_id(self._client_id, str(frame.header["stream"]))
                await self._control.outlines.told(self._client_id, stream_id, frame)
            except (wire.ProtocolError, KeyError, TypeError, ValueError) as error:
                log.warning("an outlined order was ignored: %s: %s", type(error).__name__, error)
            finally:
                self._num_announcing -= 1

    async def _in_turn(self, op: str, request: dict[str, Any]) -> None:
        """What is said of a stream must not overtake the announcement before it, which may still be looking up its objects."""
        async with self._in_order:
            try:
                _TOLD[op](self, request)
            except (KeyError, TypeError, ValueError) as error:
                log.warning("%s was ignored: %s: %s", op, type(error).__name__, error)

    def _advance(self, request: dict[str, Any]) -> None:
        stream_id = self._clients.stream_id(self._client_id, str(request["stream"]))
        if "num_bytes" in request:
            self._control.foretelling.came(stream_id, request["num_bytes"], request.get("waited_s"), time.monotonic())
        self._control.tell(m.OrderAdvanced(stream_id, int(request["num_visits"])))

    def _close_stream(self, request: dict[str, Any]) -> None:
        self._control.tell(m.StreamClosed(self._clients.stream_id(self._client_id, str(request["stream"]))))

    def _hint(self, request: dict[str, Any]) -> None:
        first, end = int(request["first"]), int(request["end"])
        if not 0 <= first <= end:
            raise ValueError(f"a hint for the blocks [{first}, {end})")
        self._control.tell(m.BlocksHinted(str(request["content_id"]), first, end))

    def _release(self, request: dict[str, Any]) -> None:
        extent = ExtentId(str(request["content_id"]), int(request["extent_idx"]))
        self._control.tell(m.ExtentReleased(self._client_id, extent, int(request["generation"])))

    def _close(self, request: dict[str, Any]) -> None:
        for content_id in request["content_ids"]:
            self._control.tell(m.ObjectClosed(self._client_id, str(content_id)))

    def _suspect(self, request: dict[str, Any]) -> None:
        """A reader could not read a file that it was given, and has read the origin instead."""
        self._control.tell(m.ExtentSuspected(ExtentId(str(request["content_id"]), int(request["extent_idx"]))))

    def _report(self, request: dict[str, Any]) -> None:
        self._clients.report(self._client_id, dict(request["stats"]))


_ANSWERED: dict[str, Callable[[Session, dict[str, Any]], Awaitable[Reply]]] = {
    "hello": Session._hello,
    "open": Session._open,
    "want": Session._want,
    "check": Session._check,
    "list": Session._list,
    "status": Session._status,
    "evict": Session._evict,
    "ls": Session._ls,
    "pin": Session._pin,
    "resize": Session._resize,
    "resident": Session._resident,
    "index": Session._index,
}

_TOLD: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "advance": Session._advance,
    "close": Session._close,
    "close_stream": Session._close_stream,
    "hint": Session._hint,
    "release": Session._release,
    "report": Session._report,
    "suspect": Session._suspect,
}


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), future.set_result, None)
    try:
        await future
    finally:
        loop.remove_writer(sock.fileno())
