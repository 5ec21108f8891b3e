"""Which fork server ranks are forked from now. The agent's loop owns all of it.

The first server imports torch, if the program's source wants it, while the gang is being placed. As soon as a rank has told what else it
has imported, a second one is forked from the first and imports all of that; when it is warm it takes the first one's place, so that a
restart finds everything in memory. A restart that comes sooner waits for it: the rest of one import is less than all of it in each rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence

from launcher.gang import rank_env
from launcher.node.forking import ForkServer
from launcher.node.imports import Outlook, find_module, read_program
from launcher.spec import JobSpec, Program, ProgramKind, StartMethod

_MAX_TRIES = 5
"""How often a server is made again without the module that made the last one unfit."""


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
        self._retiring: list[ForkServer] = []
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

    def for_ranks(self) -> ForkServer | None:
        """The one that ranks shall be forked from: the better one if it is on its way and nothing was wrong with it so far."""
        if self._next is None or self._leave_out:
            return self._current
        self._next.is_waited_for()
        return self._next

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
        for server in (self._current, self._next, *self._retiring):
            if server is not None:
                self._end(server)
        self._current = self._next = None
        self._retiring = []

    def _first_modules(self) -> list[str]:
        return ["torch"] if self._outlook.wants_torch and not self._outlook.early_setting else []

    def _make(self, first: Sequence[str], modules_file: str, parent: ForkServer | None = None) -> ForkServer | None:
        log_path = os.path.join(self._run_dir, "fork_server.log")
        try:
            server = ForkServer(self._spec.cwd, self._env, first, modules_file, self._leave_out, log_path, parent)
        except OSError:
            return self._make(first, modules_file) if parent is not None else None
        self._on_socket(server.socket, lambda: self._read(server))
        return server

    def _try_next(self, with_torch: bool) -> None:
        self._num_tries += 1
        if self._num_tries <= _MAX_TRIES:
            self._next = self._make(["torch"] if with_torch else [], self._modules_file, self._current)

    def _read(self, server: ForkServer) -> None:
        server.read()
        if server.is_dead:
            self._died(server)
        elif server.is_warm and server is self._next:
            if self._current is not None:
                self._current.retire()
                self._retiring.append(self._current)
            self._current, self._next = server, None

    def _died(self, server: ForkServer) -> None:
        self._end(server)
        if server in self._retiring:
            self._retiring.remove(server)
        elif server is self._next:
            self._next = None
            if server.unfit is not None:
                top = server.unfit[0].partition(".")[0]
                self._leave_out += [name for name in _names(self._modules_file) if name.partition(".")[0] == top]
                self._try_next("torch" in _names(self._modules_file))
            elif not server.pid:  # the one that it was to be forked from has died
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
