"""The control process's side of its fetch workers: starts them, hands requests out, starts another when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cache.daemon import wire
from cache.errors import CacheError, OriginUnavailable, from_wire

log = logging.getLogger("railhead.cache")

_PR_SET_PDEATHSIG = 1
RECV_BYTES = 64 * 1024

PING_EVERY_S = 5.0
PING_TIMEOUT_S = 30.0
"""A worker that writes to a busy disk may be away for seconds; half a minute is no longer work."""


@dataclass(frozen=True)
class Greeting:
    """The first request that a worker gets, the descriptors that it is about, and who answers what the worker asks back (its process id and
    its question)."""

    header: dict[str, Any]
    fds: tuple[int, ...]
    answer: Callable[[int, dict[str, Any]], Awaitable[dict[str, Any]]]


class WorkerProcess:
    """One worker. `request` may be called concurrently from the event loop."""

    def __init__(self, greeting: Greeting | None = None) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self.process = start_worker(theirs, pass_fds=greeting.fds if greeting is not None else ())
        self._sock = ours
        self._answer = greeting.answer if greeting is not None else None
        self._answering: set[asyncio.Task[None]] = set()
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[wire.Frame]] = {}
        self._send_lock = asyncio.Lock()
        self.reader = asyncio.create_task(self._read())
        if greeting is not None:
            # The first frame that it gets, so nothing is asked of it before it knows.
            ours.sendall(wire.encode({**greeting.header, "id": 0}))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def request(self, header: dict[str, Any]) -> wire.Frame:
        """The worker's answer. Raises the CacheError that it reports; OriginUnavailable (retryable) when it dies."""
        loop = asyncio.get_running_loop()
        self._next_id += 1
        request_id = self._next_id
        future: asyncio.Future[wire.Frame] = loop.create_future()
        self._waiting[request_id] = future
        try:
            async with self._send_lock:
                try:
                    await loop.sock_sendall(self._sock, wire.encode({**header, "id": request_id}))
                except OSError as error:
                    raise OriginUnavailable(f"fetch worker {self.process.pid} is gone: {error}") from error
            frame = await future
        finally:
            self._waiting.pop(request_id, None)
        if "error" in frame.header:
            raise from_wire(frame.header["error"])
        return frame

    async def _read(self) -> None:
        decoder = wire.Decoder()
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._sock, RECV_BYTES):
                for frame in decoder.feed(data):
                    if "ask" in frame.header:
                        task = asyncio.create_task(self._answer_worker(frame.header))
                        self._answering.add(task)
                        task.add_done_callback(self._answering.discard)
                        continue
                    future = self._waiting.get(frame.header.get("id", -1))
                    if future is not None and not future.done():
                        future.set_result(frame)
        except OSError:
            pass
        except wire.ProtocolError as error:
            log.error("fetch worker %d sent what is no frame: %s", self.process.pid, error)
            self.process.kill()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    OriginUnavailable(f"fetch worker {self.process.pid} died while it worked on this request")
                )

    async def _answer_worker(self, header: dict[str, Any]) -> None:
        """A question of the worker to this process (what other nodes' daemons ask it)."""
        try:
            if self._answer is None:
                raise CacheError("nobody answers workers here")
            answer = await self._answer(self.process.pid, header)
        except CacheError as error:
            answer = {"error": error.to_wire()}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": CacheError(f"malformed: {error!r}").to_wire()}
        with contextlib.suppress(OSError):
            async with self._send_lock:
                message = wire.encode({**answer, "answer": header["ask"]})
                await asyncio.get_running_loop().sock_sendall(self._sock, message)

    def close(self) -> None:
        """The worker ends by itself when its socket closes; `kill` for the one that does not."""
        self.reader.cancel()
        for task in self._answering:
            task.cancel()
        self._sock.close()


class WorkerPool:
    """`size` workers; one that dies is replaced, and what it had in hand fails as retryable."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.greeting: Greeting | None = None
        """What each worker is told when it begins."""
        self.on_gone: Callable[[int], None] = lambda pid: None
        """Called with the process id of a worker that has ended."""
        self._workers: list[WorkerProcess] = []
        self._keepers: list[asyncio.Task[None]] = []
        self.num_restarts = 0

    def start(self) -> None:
        self._workers = [WorkerProcess(self.greeting) for _ in range(self._size)]
        self._keepers = [asyncio.create_task(self._keep(idx)) for idx in range(self._size)]

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def pick(self, avoid: WorkerProcess | None = None) -> WorkerProcess:
        """The living worker with least in hand; rather not `avoid`, where something has just failed."""
        return min(self._workers, key=lambda w: (w.reader.done(), w is avoid, w.num_waiting))

    async def request(self, header: dict[str, Any]) -> wire.Frame:
        """From the worker with least in hand. Raises CacheError."""
        return await self.pick().request(header)

    async def _keep(self, idx: int) -> None:
        while True:
            worker = self._workers[idx]
            watching = asyncio.create_task(_watch(worker))
            try:
                await asyncio.wait([worker.reader])
            finally:
                watching.cancel()
            code = await asyncio.to_thread(worker.process.wait)
            log.warning("fetch worker %d ended (%s); starting another", worker.process.pid, _describe_exit(code))
            worker.close()
            self.num_restarts += 1
            self.on_gone(worker.process.pid)
            await asyncio.sleep(0.1)
            self._workers[idx] = WorkerProcess(self.greeting)

    async def close(self, grace_s: float = 1.0) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in self._workers:
            worker.close()
        ended = [asyncio.create_task(asyncio.to_thread(worker.process.wait)) for worker in self._workers]
        if ended:
            await asyncio.wait(ended, timeout=grace_s)
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
        await asyncio.gather(*ended, return_exceptions=True)


async def _watch(worker: WorkerProcess) -> None:
    """Ends a worker that no longer answers (stopped, or stuck in the kernel): what it has in hand is tried elsewhere."""
    while True:
        await asyncio.sleep(PING_EVERY_S)
        try:
            # Not wait_for: until Python 3.12 it loses a cancellation that comes with the answer.
            async with asyncio.timeout(PING_TIMEOUT_S):
                await worker.request({"op": "ping"})
        except TimeoutError:
            log.error("fetch worker %d has not answered for %g s: ending it", worker.process.pid, PING_TIMEOUT_S)
            worker.process.kill()
            return
        except CacheError:
            return  # It died; its keeper notices.


def start_worker(
    sock: socket.socket, *, dies_with_parent: bool = True, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """A worker process that serves `sock` until the other end closes. `dies_with_parent`: also when the calling thread ends, however."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    # -P and a path of our own at the end: a `cache.py` in the trainer's working directory must not be taken for us.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = f"import sys; sys.path.append({root!r}); from cache.daemon.worker import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(sock.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=[sock.fileno(), *pass_fds],
        preexec_fn=die_with_parent if dies_with_parent else None,
    )


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
