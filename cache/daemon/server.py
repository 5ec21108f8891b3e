"""The daemon's outside: its Unix socket, its HTTP page, its signals; from start to drained."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.daemon import probe
from cache.daemon.clients import Clients
from cache.daemon.config import DaemonConfig, format_bytes
from cache.daemon.control import Control
from cache.daemon.sessions import Session
from cache.errors import CacheConfigError
from cache.store.directory import CacheDirectory, ServingDaemon

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("railhead.cache")

_PR_SET_PDEATHSIG = 1
LOCK_WAIT_S = 5.0
"""How long a new daemon waits for one that holds the directory but does not answer (it is starting, or draining)."""


class Daemon:
    """One serving daemon. `run` returns when it was told to stop and everything has ended."""

    def __init__(self, config: DaemonConfig, directory: CacheDirectory) -> None:
        self.config = config
        self.control = Control(config, directory)
        self.clients = Clients(self.control)
        self._directory = directory
        self._sessions: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self, on_serving: Any = None) -> None:
        """Serves until `stop`. `on_serving()` is called once readers can connect. Raises CacheConfigError."""
        listener = _listen(self.config)
        runner: web.AppRunner | None = None
        try:
            await self.control.start()
            if self.config.metrics is not None:
                from cache.daemon.metrics import start_http

                runner = await start_http(self.config.metrics, self)
            accepting = asyncio.create_task(self._accept(listener))
            self._directory.serve_at(str(self.config.socket))
            if on_serving is not None:
                on_serving()
            await self._stop.wait()
            log.info("draining")
            accepting.cancel()
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                self.config.socket.unlink()
            if runner is not None:
                await runner.cleanup()
            for session in self._sessions:
                session.cancel()
            await asyncio.gather(*self._sessions, return_exceptions=True)
            await self.control.close()
            self._directory.close()

    def status(self) -> dict[str, Any]:
        return {**self.control.status(), **self.clients.account()}

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors: what is connected goes on, and the next one may find room.
                log.warning("cannot accept a reader: %s", error)
                await asyncio.sleep(0.1)
                continue
            sock.setblocking(False)
            task = asyncio.create_task(Session(sock, self.control, self.clients).serve())
            self._sessions.add(task)
            task.add_done_callback(self._sessions.discard)


def _listen(config: DaemonConfig) -> socket.socket:
    """The listening socket, mode 0600 from its first moment. A socket that a dead daemon left is replaced; a living one is respected."""
    path = config.socket
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise CacheConfigError(f"{path} exists and is not a socket", advice="choose another path with --socket")
        if probe.is_listening(str(path)):
            who = "a cache daemon for another directory" if probe.answers(str(path)) else "another program"
            raise CacheConfigError(
                f"{who} listens at {path}", advice="choose another --socket, or stop what listens there"
            )
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise CacheConfigError(
            f"cannot listen at {path}: {error.strerror}", advice="choose another path with --socket"
        ) from error
    finally:
        os.umask(old_mask)
    listener.listen(512)
    listener.setblocking(False)
    return listener


def serve(config: DaemonConfig, *, announce: bool) -> int:
    """Runs a daemon until SIGTERM or SIGINT; the exit code. With `announce`: one JSON line on standard output once it serves.

    When another daemon serves the directory already, says so and returns 0. Raises CacheConfigError.
    """
    if config.exit_with_parent:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 0
    directory = asyncio.run(_open_directory(config))
    if isinstance(directory, ServingDaemon):
        status = probe.status(directory.socket) if directory.socket else None
        if status is None:
            raise CacheConfigError(
                f"{config.dir} is locked by process {directory.pid or '(unknown)'}, "
                f"which does not answer at {directory.socket or 'any socket'}",
                advice="wait until it has ended, or end it",
            )
        log.info("%s is served already by process %d at %s", config.dir, directory.pid, directory.socket)
        if status["capacity_bytes"] != config.capacity_bytes:
            have, asked = format_bytes(status["capacity_bytes"]), format_bytes(config.capacity_bytes)
            log.warning("its capacity is %s, and stays so; %s was asked for: stop it first", have, asked)
        if not announce and Path(directory.socket) != config.socket:
            log.warning("--socket %s is not served", config.socket)
        if announce:
            sizes = int(status["used_bytes"]), int(status["capacity_bytes"])
            _announce(directory.socket, directory.pid, True, *sizes, None)
        return 0
    asyncio.run(_serve(config, directory, announce))
    return 0


async def _open_directory(config: DaemonConfig) -> CacheDirectory | ServingDaemon:
    """Waits a little for a holder of the lock that does not answer: it is starting, or on its way out."""
    deadline = asyncio.get_running_loop().time() + LOCK_WAIT_S
    while True:
        found = CacheDirectory.open(config.dir)
        if isinstance(found, CacheDirectory) or (found.socket and probe.answers(found.socket)):
            return found
        if asyncio.get_running_loop().time() > deadline:
            return found
        await asyncio.sleep(0.05)


async def _serve(config: DaemonConfig, directory: CacheDirectory, announce: bool) -> None:
    daemon = Daemon(config, directory)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)

    def on_serving() -> None:
        used = daemon.control.resident_bytes_at_start
        log.info(
            "serving %s at %s: %s of %s used",
            config.dir,
            config.socket,
            format_bytes(used),
            format_bytes(config.capacity_bytes),
        )
        if announce:
            address = daemon.control.peer_address
            _announce(str(config.socket), os.getpid(), False, used, config.capacity_bytes, address)

    await daemon.run(on_serving)


def _announce(
    path: str, pid: int, already_running: bool, resident_bytes: int, capacity_bytes: int, peer_address: str | None
) -> None:
    line = {
        "event": "serving",
        "socket": path,
        "pid": pid,
        "already_running": already_running,
        "resident_bytes": resident_bytes,
        "capacity_bytes": capacity_bytes,
        "peer_address": peer_address,
    }
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
