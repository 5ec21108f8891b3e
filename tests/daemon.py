"""A real cache daemon for one test: started as users start it, in a directory of its own, ended by its process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from cache.client import Cache
from cache.daemon import probe

START_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 20.0


class CacheDaemon:
    """`with CacheDaemon(capacity="64MiB") as daemon:`. The directory survives `kill` and `start`; it goes with the end of the block.

    Unix socket paths are limited to 107 bytes, so it lies directly below the temporary directory and not in pytest's.
    """

    def __init__(
        self,
        *,
        capacity: str | int = "256MiB",
        options: tuple[str, ...] = (),
        dir: Path | None = None,
        environment: dict[str, str] | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "cache"),
    ) -> None:
        """`command`: what starts it, if not as usual (in a namespace, say)."""
        self._folder = tempfile.TemporaryDirectory(prefix="rh-")
        self.root = Path(self._folder.name)
        self.dir = dir or self.root / "cache"
        self.socket = str(self.root / "s")
        self.capacity, self.options, self.command = capacity, options, command
        self.environment = environment
        """Of the daemon; None: that of the tests."""
        self.process: subprocess.Popen[bytes] | None = None
        self.announced: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        path = self.root / "log"
        return path.read_text() if path.exists() else ""

    @property
    def extent_files(self) -> list[Path]:
        return sorted(path for path in self.dir.glob("extents/*/*") if path.suffix not in (".tmp", ".held"))

    @property
    def held_files(self) -> list[Path]:
        """Evicted, and set aside while somebody has them open."""
        return sorted(self.dir.glob("extents/*/*.held"))

    def start(self) -> CacheDaemon:
        """Starts it and waits until readers can connect."""
        command = [*self.command, "serve", "--dir", str(self.dir), "--capacity", str(self.capacity)]
        command += ["--socket", self.socket, "--announce", "--metadata-ttl", "0.2", *self.options]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=self.environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"the daemon did not start: exit code {code}\n{self.log}")
        self.announced = json.loads(line)
        return self

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=WAIT_TIMEOUT_S)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def status(self) -> dict[str, Any]:
        status = probe.status(self.socket)
        assert status is not None, f"the daemon does not answer\n{self.log}"
        return status

    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def disk_bytes(self, *, with_held: bool = True) -> int:
        """Bytes of all extent files on the disk, half-made ones included; and those that were evicted while somebody had them open."""
        total = 0
        for path in self.dir.glob("extents/*/*"):
            if path.suffix == ".held" and not with_held:
                continue
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    def __enter__(self) -> CacheDaemon:
        try:
            return self.start()
        except BaseException:
            self._folder.cleanup()
            raise

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        if kind is not None:
            print(f"--- the daemon's log ---\n{self.log}", file=sys.stderr)
        self._folder.cleanup()


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Fails when it has not become true after a long time; how long it took is nobody's business."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"it never came true that {what}"
        time.sleep(0.01)


@pytest.fixture
def cache_daemon() -> Iterator[CacheDaemon]:
    """A daemon with room for 256 MiB."""
    with CacheDaemon() as daemon:
        yield daemon


@pytest.fixture
def open_cache() -> Iterator[Callable[[str], Cache]]:
    """Opens a Cache at a socket; its connections are closed at the end."""
    opened: list[Cache] = []

    def at(socket: str) -> Cache:
        opened.append(Cache(socket))
        return opened[-1]

    yield at
    for cache in opened:
        cache.close()
