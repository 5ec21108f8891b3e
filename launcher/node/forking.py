"""The agent's end of one fork server (`forkserver.py` is the other). Which one is the right one now: `forkservers.py`."""

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
from pathlib import Path

from launcher.gang import rank_env
from launcher.node import strays
from launcher.node.guarded import GuardedProcess

_PROGRAM = str(Path(__file__).with_name("forkserver.py"))
_WARM_UP_TIMEOUT_S = 60.0
"""An import that takes longer hangs (a dead network file system); ranks then start as fresh interpreters, where a stack can be shown."""
_MAX_JOB_BYTES = 100_000
"""A job is written into a socket before anybody reads it: it has to fit."""
_WAITED_FOR_S = 10.0
"""The same while ranks wait for it: another can serve them."""
_BIRTH_S = 0.5
_PADDING = "-" * 2048
"""Room in which a rank writes its own command line, for `ps`."""


class ForkServer:
    """One process. The agent's loop owns it and calls `read` when `socket` is readable.

    env: what all ranks have in common. first: modules that the program asks for by itself. modules_file: further ones, as a JSON list of
    names, without `leave_out`. parent: it is forked from that server, as soon as that one is warm, and has in memory what that one has
    (whose `cwd`, `env` and log it shares). Raises OSError.
    """

    def __init__(
        self,
        cwd: str,
        env: Mapping[str, str],
        first: Sequence[str],
        modules_file: str = "",
        leave_out: Sequence[str] = (),
        log_path: str = os.devnull,
        parent: ForkServer | None = None,
    ) -> None:
        self.env = dict(env)
        self.is_warm = False
        self.is_dead = False
        self.unfit: tuple[str, str] | None = None
        """Module and reason: a server of no use."""
        self.warm_s = 0.0
        """How long its imports took."""
        self.num_modules = 0
        self.pid = 0
        """0: it is not born yet."""
        self._first = tuple(first)
        self._failed: dict[str, str] = {}
        self._began_s = time.monotonic()
        self._is_waited_for_since_s: float | None = None
        self._request = json.dumps(
            {
                "first": list(first),
                "modules_file": modules_file,
                "leave_out": list(leave_out),
                "private": list(rank_env.PER_RANK),
            }
        ).encode()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if parent is not None:
                parent.send(b"server", [theirs.fileno()])
            else:
                self._execute(theirs, cwd, log_path)
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self.socket.setblocking(False)

    def _execute(self, theirs: socket.socket, cwd: str, log_path: str) -> None:
        log_fd = _open_log(log_path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-u", _PROGRAM, str(theirs.fileno()), str(os.getpid()), _PADDING],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd=cwd,
                env=self.env,
                stdout=log_fd,
                stderr=log_fd,
                restore_signals=False,
            )
        finally:
            os.close(log_fd)
        process.returncode = 0  # collected by its number, like one that was forked
        self._is_born(process.pid)

    def _is_born(self, pid: int) -> None:
        """From here on it is in the books, and may begin."""
        self.pid = pid
        strays.is_ours(pid)
        with contextlib.suppress(OSError):
            self.socket.send(self._request)

    @property
    def has_torch(self) -> bool:
        """As far as is known: a process that is forked looks again."""
        return "torch" in self._first and "torch" not in self._failed and not self.is_dead

    def fork(
        self,
        job: Mapping[str, object],
        env: Mapping[str, str],
        cwd: str,
        stdout_fd: int,
        stderr_fd: int,
        keep_fds: Sequence[int] = (),
    ) -> GuardedProcess:
        """A process forked from this server, at once or when it is warm. If it dies before that, the process reports NeverBorn.

        job: what `forkserver.py` shall do there, with `argv_afresh`, the program that does the same. Raises OSError when the server
        is dead.
        """
        whole = {**job, "env": dict(env), "cwd": os.path.abspath(cwd)}
        if len(json.dumps(whole)) > _MAX_JOB_BYTES:
            raise OSError("the environment is too large for the fork server")

        def bear(control: socket.socket) -> None:
            self.send(b"fork", [control.fileno(), stdout_fd, stderr_fd, *keep_fds])

        return GuardedProcess(whole, bear)

    def send(self, word: bytes, fds: Sequence[int]) -> None:
        """A request, which is carried out when the server is warm. Raises OSError."""
        self.socket.setblocking(True)
        try:
            socket.send_fds(self.socket, [word], list(fds))
        finally:
            self.socket.setblocking(False)

    def read(self) -> None:
        """Takes in what the server has said."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_dead = True
            return
        message = json.loads(data)
        match message["event"]:
            case "born":
                self._is_born(message["pid"])
            case "warm":
                self.is_warm = True
                self.warm_s = time.monotonic() - self._began_s
                self._failed = message["failed"]
                self.num_modules = message["num_modules"]
            case _:
                self.unfit = (message["module"], message["reason"])

    def is_waited_for(self) -> None:
        """Ranks shall be forked from it although it is not warm yet."""
        if self._is_waited_for_since_s is None:
            self._is_waited_for_since_s = time.monotonic()

    def check_deadline(self) -> None:
        """Ends it if its imports take too long."""
        if self.is_warm or not self.pid:
            return
        deadline_s = self._began_s + _WARM_UP_TIMEOUT_S
        if self._is_waited_for_since_s is not None:
            deadline_s = min(deadline_s, self._is_waited_for_since_s + _WAITED_FOR_S)
        if time.monotonic() > deadline_s:
            self._kill()

    def retire(self) -> None:
        """It carries out what it has been asked for, and ends: `read` will say so."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the server; what was forked from it lives on."""
        if not self.pid:
            self._await_birth()
        if self.pid:
            self._kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            strays.is_no_longer_ours(self.pid)
        self.socket.close()

    def _await_birth(self) -> None:
        """A child of which we do not know the number could not be collected."""
        self.socket.settimeout(_BIRTH_S)
        with contextlib.suppress(OSError):
            data = self.socket.recv(1 << 20)
            if data:
                self._is_born(json.loads(data)["pid"])

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
