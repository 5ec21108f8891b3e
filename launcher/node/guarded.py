"""A process with a guardian, as the agent sees it: start, watch, stop. The other end of `guardian.py`'s wire.

The guardian is either started here, to execute a program, or forked by the fork server, to fork one (`forking.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class NeverBorn:
    """The fork server died before it made the guardian: nothing was started, and something else has to start it. Always the last report."""


Report = Started | StartFailed | Exited | Gone | NeverBorn


class GuardedProcess:
    """One process and its guardian. Not thread-safe: the agent's loop owns it.

    job: what the guardian shall start. bear: makes the guardian, given its end of the wire, and returns it as a child of ours;
    None: it will become one and tell its number itself. Raises what `bear` raises.
    """

    def __init__(
        self, job: Mapping[str, object], bear: Callable[[socket.socket], subprocess.Popen[bytes] | None]
    ) -> None:
        self.pid = 0
        self.status: ExitStatus | None = None
        self.is_gone = False
        self._received = b""
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.guardian_pid = 0
        try:
            self._guardian = bear(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if self._guardian is not None:
            self._know_guardian(self._guardian.pid)
        # Blocking, but the guardian reads all of it before it does anything else.
        self._send(dict(job))
        ours.setblocking(False)

    def _know_guardian(self, pid: int) -> None:
        self.guardian_pid = pid
        strays.is_ours(pid)

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
        reports = [report for line in lines if (report := self._understand(json.loads(line))) is not None]
        if not data and not self.is_gone:
            reports.extend(self._guardian_died())
        return reports

    def close(self) -> None:
        """Gives back the socket and collects the guardian; before Gone, that kills all that it guards."""
        self.socket.close()
        if self._guardian is not None:
            self._guardian.wait()
        elif self.guardian_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.guardian_pid, 0)
        strays.is_no_longer_ours(self.guardian_pid)

    def _understand(self, message: dict[str, object]) -> Report | None:
        match message["event"]:
            case "born":
                self._know_guardian(int(str(message["pid"])))
                return None
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
        if not self.guardian_pid:
            return [NeverBorn()]
        reports: list[Report] = []
        if self.status is None:
            self.status = ExitStatus(signum=int(signal.SIGKILL))
            reports.append(Exited(self.status, time.time()))
        return [*reports, Gone(guardian_died=True)]

    @property
    def is_born(self) -> bool:
        """Its guardian lives, or has lived."""
        return self.guardian_pid != 0

    def _send(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # a dead guardian is reported by `read`
            self.socket.setblocking(True)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            self.socket.setblocking(False)


def execute(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdout_fd: int,
    stderr_fd: int,
    keep_fds: Sequence[int] = (),
    bind: Mapping[str, object] | None = None,
) -> GuardedProcess:
    """A process that executes a program.

    Output goes to the two descriptors, which the caller keeps and closes; standard input is inherited. `cwd` may be relative to ours.
    `bind` is `{"cpus": […], "memory_node": n or None}`, see `guardian.bind`. Raises OSError when not even the guardian can be started.
    """
    job = {
        "argv": list(argv),
        "env": dict(env),
        "cwd": os.path.abspath(cwd),
        "stdout_fd": stdout_fd,
        "stderr_fd": stderr_fd,
        "keep_fds": list(keep_fds),
        "bind": bind,
    }

    def bear(control: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARDIAN, str(control.fileno()), str(os.getpid())],
            pass_fds=tuple({control.fileno(), stdout_fd, stderr_fd, *keep_fds}),
            start_new_session=True,
            env={},
            cwd="/",
            restore_signals=False,
        )

    return GuardedProcess(job, bear)
