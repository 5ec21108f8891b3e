"""Starting `python -m launcher` as a user would, and looking after every process that comes of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.journal import Entry, read_journal

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
"""How long a test waits for what must happen. The promises are shorter: a test on a crowded machine shows that, not how fast."""


@dataclass(frozen=True)
class Process:
    """A process that is not mistaken for a later one with its number."""

    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> Process:
        return Process(pid, _stat(pid)[1])

    def is_alive(self) -> bool:
        try:
            state, start_ticks = _stat(self.pid)
        except OSError:
            return False
        return start_ticks == self.start_ticks and state != "Z"


def _stat(pid: int) -> tuple[str, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def wait_until(claim: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Fails the test if the claim does not hold in time."""
    deadline = time.monotonic() + patience_s
    while not claim():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s for: {what}"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


class Launched:
    """A running launcher in a directory of its own. Use as a context: whatever is left of it at the end is killed, by pid."""

    def __init__(
        self,
        directory: Path,
        *args: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "launcher"),
    ) -> None:
        self.directory = directory
        environment = {**os.environ, **(env or {})}
        for name in [name for name in environment if name.startswith(("PET_", "RAY_ADDRESS", "RAILHEAD_"))]:
            del environment[name]
        environment.update(env or {})
        self.process = subprocess.Popen(
            [sys.executable, *program, *args],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.seen: set[Process] = set()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        for process in self.seen:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()

    def look(self) -> None:
        """Remembers all descendants."""
        todo = [self.process.pid]
        while todo:
            for pid in children_of(todo.pop()):
                with contextlib.suppress(OSError):
                    self.seen.add(Process.of(pid))
                    todo.append(pid)

    def wait_for_file(self, *names: str) -> None:
        for name in names:
            wait_until(
                lambda name=name: (self.directory / name).exists() or self.process.poll() is not None,  # type: ignore[misc]
                f"{name} to be written",
            )
            assert (self.directory / name).exists(), self.process.communicate()
        self.look()

    def finish(self, patience_s: float = PATIENCE_S * 2) -> tuple[int, str, str]:
        """Waits for the end: exit code, standard output, standard error. patience_s: more, for a job of several attempts."""
        out, err = self.process.communicate(timeout=patience_s)
        return self.process.returncode, out.decode("utf-8", "surrogateescape"), err.decode("utf-8", "surrogateescape")

    def read_available(self) -> bytes:
        """What it has printed so far on standard output, without waiting."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        return os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""

    @property
    def run_dir(self) -> Path:
        return self.directory / "railhead-runs" / "latest"

    def journal(self, *kinds: str) -> list[Entry]:
        return [
            entry for entry in read_journal(str(self.run_dir / "journal.jsonl")) if entry.kind in kinds or not kinds
        ]


def launch(directory: Path, script: str, *options: str, args: Sequence[str] = (), **more: Any) -> Launched:
    """Writes `script` to train.py there and launches it."""
    (directory / "train.py").write_text(script)
    return Launched(directory, *options, "train.py", *args, **more)
