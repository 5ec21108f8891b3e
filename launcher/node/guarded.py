"""A process with a guardian, as the agent sees it: start, watch, stop. The other end of `guardian.py`'s wire."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.gang.events import ExitStatus
from launcher.node import strays

_GUARDIAN = str(Path(__file__).with_name("guardian.py"))


@dataclass(frozen=True)
class Started:
    pid: int


@dataclass(frozen=True)
class StartFailed:
    """The program could not be executed: a shell would say 126 or 127."""

    reason: str
    errno: int


@dataclass(frozen=True)
class Exited:
    """The process ended; some of its descendants may be alive for a moment."""

    status: ExitStatus
    at_s: float


@dataclass(frozen=True)
class Gone:
    """Nothing of it is alive. Always the last report."""

    guardian_died: bool = False
    """True: the guardian was killed, so the kernel killed the process, and its descendants have fallen to us (`strays`)."""


Report = Started | StartFailed | Exited | Gone


class GuardedProcess:
    """One process and its guardian. Not thread-safe: the agent's loop owns it.

    Output goes to the two descriptors, which the caller keeps and closes; standard input is inherited. `cwd` may be relative to ours.
    `bind` is `{"cpus": […], "memory_node": n or None}`, see `guardian.bind`. Raises OSError when not even the guardian can be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        stdout_fd: int,
        stderr_fd: int,
        keep_fds: Sequence[int] = (),
        bind: Mapping[str, object] | None = None,
    ) -> None:
        self.pid = 0
        self.status: ExitStatus | None = None
        self.is_gone = False
        self._received = b""
        ours, theirs = socket.socketpair()
        self.socket = ours
        passed = {theirs.fileno(), stdout_fd, stderr_fd, *keep_fds}
        try:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", _GUARDIAN, str(theirs.fileno()), str(os.getpid())],
                pass_fds=tuple(passed),
                start_new_session=True,
                env={},
                cwd="/",
                restore_signals=False,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        strays.is_ours(self._guardian.pid)
        job = {
            "argv": list(argv),
            "env": dict(env),
            "cwd": os.path.abspath(cwd),
            "stdout_fd": stdout_fd,
            "stderr_fd": stderr_fd,
            "keep_fds": list(keep_fds),
            "bind": bind,
        }
        # Blocking, but the guardian reads all of it before it does anything else.
        self._send(job)
        ours.setblocking(False)

    @property
    def guardian_pid(self) -> int:
        return self._guardian.pid

    def stop(self, grace_s: float, signum: int = signal.SIGTERM) -> None:
        """`signum` to the process, after `grace_s` SIGKILL to all that is left; grace 0 kills at once. May be repeated to hurry."""
        if not self.is_gone:
            self._send({"stop": grace_s, "signum": signum})

    def read(self) -> list[Report]:
        """What the guardian has reported since the last call; to be called when `socket` is readable."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        reports = [self._understand(json.loads(line)) for line in lines]
        if not data and not self.is_gone:
            reports.extend(self._guardian_died())
        return reports

    def close(self) -> None:
        """Gives back the socket and collects the guardian; before Gone, that kills all that it guards."""
        self.socket.close()
        self._guardian.wait()
        strays.is_no_longer_ours(self._guardian.pid)

    def _understand(self, message: dict[str, object]) -> Report:
        match message["event"]:
            case "started":
                self.pid = int(str(message["pid"]))
                return Started(self.pid)
            case "failed":
                return StartFailed(str(message["error"]), int(str(message["errno"])))
            case "exited":
                code = os.waitstatus_to_exitcode(int(str(message["status"])))
                self.status = ExitStatus(code=code) if code >= 0 else ExitStatus(signum=-code)
                return Exited(self.status, float(str(message["at_s"])))
            case _:
                self.is_gone = True
                return Gone()

    def _guardian_died(self) -> list[Report]:
        self.is_gone = True
        reports: list[Report] = []
        if self.status is None:
            self.status = ExitStatus(signum=int(signal.SIGKILL))
            reports.append(Exited(self.status, time.time()))
        return [*reports, Gone(guardian_died=True)]

    def _send(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # a dead guardian is reported by `read`
            self.socket.setblocking(True)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            self.socket.setblocking(False)
