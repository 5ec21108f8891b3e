"""The agent's end of the fork server: one process (`ForkServer`), and which one is the right one now (`ForkServers`).

The first server imports torch, if the program's source wants it, while the gang is being placed. Once a rank has told what else it
has imported, a second one that imports all of that is made ready beside the first and takes its place; a restart then finds
everything in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.gang import rank_env
from launcher.node import strays
from launcher.node.guarded import GuardedProcess
from launcher.node.imports import Outlook, find_module, read_program
from launcher.spec import JobSpec, Program, ProgramKind, StartMethod

_PROGRAM = str(Path(__file__).with_name("forkserver.py"))
_WARM_UP_TIMEOUT_S = 60.0
"""An import that takes longer hangs (a dead network file system); ranks then start as fresh interpreters, where a stack can be shown."""
_MAX_JOB_BYTES = 100_000
"""A job is written into a socket before anybody reads it: it has to fit."""
_MAX_TRIES = 5
"""How often a server is made again without the module that made the last one unfit."""
_PADDING = "-" * 2048
"""Room in which a rank writes its own command line, for `ps`."""


class ForkServer:
    """One process. The agent's loop owns it and calls `read` when `socket` is readable.

    env: what all ranks have in common. first: modules that the program asks for by itself. modules_file: further ones, as a JSON list of
    names, without `leave_out`. Raises OSError.
    """

    def __init__(
        self,
        cwd: str,
        env: Mapping[str, str],
        first: Sequence[str],
        modules_file: str = "",
        leave_out: Sequence[str] = (),
        log_path: str = os.devnull,
    ) -> None:
        self.env = dict(env)
        self.is_warm = False
        self.is_dead = False
        self.unfit: tuple[str, str] | None = None
        """Module and reason: a server of no use."""
        self.warm_s = 0.0
        """How long its imports took."""
        self.num_modules = 0
        self._first = tuple(first)
        self._failed: dict[str, str] = {}
        self._began_s = time.monotonic()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log_fd = _open_log(log_path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", _PROGRAM, str(theirs.fileno()), str(os.getpid()), _PADDING],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd=cwd,
                env=self.env,
                stdout=log_fd,
                stderr=log_fd,
                restore_signals=False,
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
            os.close(log_fd)
        self.pid = self._process.pid
        strays.is_ours(self.pid)
        message = {
            "first": list(first),
            "modules_file": modules_file,
            "leave_out": list(leave_out),
            "private": list(rank_env.PER_RANK),
        }
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode())
        self.socket.setblocking(False)

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
            self.socket.setblocking(True)
            try:
                socket.send_fds(self.socket, [b"fork"], [control.fileno(), stdout_fd, stderr_fd, *keep_fds])
            finally:
                self.socket.setblocking(False)

        return GuardedProcess(whole, bear)

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
        if message["event"] == "warm":
            self.is_warm = True
            self.warm_s = time.monotonic() - self._began_s
            self._failed = message["failed"]
            self.num_modules = message["num_modules"]
        else:
            self.unfit = (message["module"], message["reason"])

    def check_deadline(self) -> None:
        if not self.is_warm and time.monotonic() > self._began_s + _WARM_UP_TIMEOUT_S:
            self._process.kill()

    def close(self) -> None:
        """Ends the server; what was forked from it lives on."""
        self._process.kill()
        self._process.wait()
        strays.is_no_longer_ours(self.pid)
        self.socket.close()


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


class ForkServers:
    """The server that ranks are forked from now, and the better one that is being made ready. The agent's loop owns it.

    on_socket(socket, handler): from now on the handler is called when the socket is readable; None: no more.
    """

    def __init__(
        self,
        spec: JobSpec,
        num_ranks: int,
        run_dir: str,
        base_env: Mapping[str, str],
        on_socket: Callable[[socket.socket, Callable[[], None] | None], None],
    ) -> None:
        self._spec = spec
        self._run_dir = run_dir
        self._on_socket = on_socket
        self._env = {
            **base_env,
            **{setting.name: setting.value for setting in rank_env.defaults(num_ranks, base_env)},
        }
        self._outlook = Outlook()
        self._current: ForkServer | None = None
        self._next: ForkServer | None = None
        self._leave_out: list[str] = []
        self._modules_file = ""
        self._num_tries = 0
        self.why_not = why_fresh(spec)
        """Why ranks are fresh interpreters; empty if they are not."""

    def start(self) -> None:
        """Makes the first server, unless ranks shall be fresh interpreters."""
        if self.why_not:
            return
        self._outlook = outlook_of(self._spec.program, self._spec.cwd)
        self._current = self._make(self._first_modules(), "")
        if self._current is None:
            self.why_not = "the fork server could not be started"

    @property
    def current(self) -> ForkServer | None:
        return self._current

    @property
    def wants_modules(self) -> bool:
        """A rank's list of modules would be of use, for the next attempt."""
        is_known = bool(self._modules_file) or self._outlook.any_setting
        return self._current is not None and self._spec.may_start_again and not is_known

    def learn(self, modules_file: str) -> tuple[str, ...]:
        """A rank has written down its modules: the next attempt shall find them in memory. Returns the names of those that it may."""
        names = installed_modules(modules_file)
        self.learn_names(names)
        return tuple(names)

    def learn_names(self, names: Sequence[str]) -> None:
        """The same, of modules that ranks have imported on this node or on another."""
        if not self.wants_modules:
            return
        path = os.path.join(self._run_dir, f"fork_modules_{os.getpid()}.json")
        self._modules_file = path
        if not names:
            return
        try:
            with open(path, "w") as file:
                json.dump(list(names), file)
        except OSError:
            return
        self._try_next("torch" in names)

    def check_deadlines(self) -> None:
        for server in (self._current, self._next):
            if server is not None:
                server.check_deadline()

    @property
    def is_warming(self) -> bool:
        """Some server still imports: `check_deadlines` every few seconds."""
        return any(server is not None and not server.is_warm for server in (self._current, self._next))

    def close(self) -> None:
        for server in (self._current, self._next):
            if server is not None:
                self._end(server)
        self._current = self._next = None

    def _first_modules(self) -> list[str]:
        return ["torch"] if self._outlook.wants_torch and not self._outlook.early_setting else []

    def _make(self, first: Sequence[str], modules_file: str) -> ForkServer | None:
        log_path = os.path.join(self._run_dir, "fork_server.log")
        try:
            server = ForkServer(self._spec.cwd, self._env, first, modules_file, self._leave_out, log_path)
        except OSError:
            return None
        self._on_socket(server.socket, lambda: self._read(server))
        return server

    def _try_next(self, with_torch: bool) -> None:
        self._num_tries += 1
        if self._num_tries <= _MAX_TRIES:
            self._next = self._make(["torch"] if with_torch else [], self._modules_file)

    def _read(self, server: ForkServer) -> None:
        server.read()
        if server.is_dead:
            self._died(server)
        elif server.is_warm and server is self._next:
            if self._current is not None:
                self._end(self._current)
            self._current, self._next = server, None

    def _died(self, server: ForkServer) -> None:
        self._end(server)
        if server is self._next:
            self._next = None
            if server.unfit is not None:
                top = server.unfit[0].partition(".")[0]
                self._leave_out += [name for name in _names(self._modules_file) if name.partition(".")[0] == top]
                self._try_next("torch" in _names(self._modules_file))
        elif server is self._current:
            self._current = None
            if server.unfit is not None:
                self.why_not = f"{server.unfit[0]} cannot be imported in advance: {server.unfit[1]}"
            elif self._num_tries < _MAX_TRIES:  # killed by someone: the next attempt shall find one
                self._num_tries += 1
                self._current = self._make(self._first_modules(), "")

    def _end(self, server: ForkServer) -> None:
        self._on_socket(server.socket, None)
        server.close()


def why_fresh(spec: JobSpec) -> str:
    """Why ranks of this job are not forked; empty if they are."""
    program = spec.program
    if spec.start_method is StartMethod.SPAWN:
        return "--start-method spawn"
    if program.kind is ProgramKind.EXECUTABLE:
        return "not a Python program"
    if program.python and os.path.realpath(program.python) != os.path.realpath(sys.executable):
        return f"another interpreter: {program.python}"
    return ""


def outlook_of(program: Program, cwd: str) -> Outlook:
    """What the program's source says of its imports."""
    if program.kind is ProgramKind.MODULE:
        path = find_module(program.target, [cwd, *sys.path])
    else:
        path = os.path.join(cwd, program.target)
        path = os.path.join(path, "__main__.py") if os.path.isdir(path) else path
    if path is None:
        return Outlook()
    return read_program(path, [cwd] if program.kind is ProgramKind.MODULE else [])


def installed_modules(modules_file: str) -> list[str]:
    """Names in a rank's list whose modules are installed ones: what lies elsewhere is the program's own, and may be changed before
    a restart."""
    places = [os.path.join(path, "") for name, path in sysconfig.get_paths().items() if name.endswith("lib")]
    try:
        with open(modules_file) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return []
    return [
        name
        for name, origin in found
        # launcher.preemption listens for signals when it is imported: that must happen in the rank
        if name.partition(".")[0] != "launcher"
        if origin in ("built-in", "frozen") or any(origin.startswith(place) for place in places)
    ]


def _names(modules_file: str) -> list[str]:
    with contextlib.suppress(OSError, ValueError), open(modules_file) as file:
        found: list[str] = json.load(file)
        return found
    return []
