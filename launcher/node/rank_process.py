"""How a rank's process is made: forked from the fork server, or executed as a fresh interpreter.

A rank's standard streams are its own two files, opened here; whoever follows them reads the same files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.gang import rank_env
from launcher.gang.world import Member
from launcher.node.failure import Traces
from launcher.node.forking import ForkServer
from launcher.node.guarded import GuardedProcess, execute
from launcher.spec import Program, ProgramKind

RUNNER = str(Path(__file__).with_name("runner.py"))
_OBSERVER = Path(__file__).with_name("instrument.py")
"""What watches the rank from within, if it is there (see `runner.py`)."""


@dataclass(frozen=True)
class RankFiles:
    """Where one rank of one attempt leaves its traces on this node."""

    directory: str

    @property
    def stdout_log(self) -> str:
        return os.path.join(self.directory, "stdout.log")

    @property
    def stderr_log(self) -> str:
        return os.path.join(self.directory, "stderr.log")

    @property
    def error_file(self) -> str:
        """TORCHELASTIC_ERROR_FILE."""
        return os.path.join(self.directory, "error.json")

    @property
    def crash_file(self) -> str:
        """Where the interpreter writes its stacks when native code crashes."""
        return os.path.join(self.directory, "crash.log")

    @property
    def exit_file(self) -> str:
        """Where it called `sys.exit`."""
        return os.path.join(self.directory, "exit.json")

    @property
    def traceback_note(self) -> str:
        """Where in its standard error the traceback begins and ends that is the interpreter's last word."""
        return os.path.join(self.directory, "traceback.at")

    @property
    def traces(self) -> Traces:
        return Traces(self.error_file, self.exit_file, self.crash_file, self.stderr_log)

    @property
    def modules_file(self) -> str:
        """What the rank has imported, for the fork server."""
        return os.path.join(self.directory, "modules.json")

    def write_environment(self, account: Mapping[str, object]) -> None:
        """`environment.json`: what was set and why. Best effort."""
        with contextlib.suppress(OSError), open(os.path.join(self.directory, "environment.json"), "w") as file:
            json.dump(account, file, indent=1)


class RankStarter:
    """Starts ranks of one program: forked from `server` where that is there and does, else as fresh interpreters.

    server: its present one, or None. why_not: why there is none.
    """

    def __init__(self, program: Program, cwd: str, server: ForkServer | None, why_not: str) -> None:
        self._program = program
        self._cwd = cwd
        self._server = server
        self._why_not = why_not

    def start(
        self,
        member: Member,
        env: Mapping[str, str],
        files: RankFiles,
        bind: Mapping[str, object] | None = None,
        *,
        afresh: str = "",
        with_modules: bool = False,
    ) -> tuple[GuardedProcess, str]:
        """The process, and how it was made, for people. Raises OSError.

        bind: `{"cpus": […], "memory_node": n or None}`, see `guardian.bind`. afresh: why it must be a fresh interpreter.
        with_modules: it shall write down what it imports. A log that cannot be opened (full disk) is /dev/null: the rank runs, only
        its words are lost.
        """
        stdout_fd = _open_log(files.stdout_log)
        stderr_fd = _open_log(files.stderr_log)
        try:
            why_not = afresh or self._why_not_forked(env, is_bound=bool(bind))
            if not why_not and self._server is not None:
                job = {**self._job(member, files, with_modules), "bind": bind}
                try:
                    process = self._server.fork(job, env, self._cwd, stdout_fd, stderr_fd)
                    return process, "forked from the node's fork server, unless how_started.txt says otherwise"
                except OSError as error:
                    why_not = str(error)
            argv = self.argv(member, files)
            return execute(argv, env, self._cwd, stdout_fd, stderr_fd, bind=bind), f"executed: {why_not}"
        finally:
            os.close(stdout_fd)
            os.close(stderr_fd)

    def argv(self, member: Member, files: RankFiles) -> list[str]:
        """Python programs run under the runner, unbuffered as under torchrun; anything else as it is."""
        args = self._args(member)
        if self._program.kind is ProgramKind.EXECUTABLE:
            return [self._program.target, *args]
        python = self._program.python or sys.executable
        observer = _observer(files)
        # The runner is named by its path: `-m launcher.node.runner` would put our package where the user may have a `launcher` of his own.
        return [
            python,
            "-u",
            RUNNER,
            *(["--observer", *observer] if observer else []),
            self._program.kind.value,
            self._program.target,
            *args,
        ]

    def _args(self, member: Member) -> list[str]:
        return [arg.replace("${local_rank}", str(member.local_rank)) for arg in self._program.args]

    def _why_not_forked(self, env: Mapping[str, str], *, is_bound: bool) -> str:
        if self._server is None or self._server.is_dead:
            return self._why_not or "the fork server has died"
        if is_bound and self._server.has_torch and "OMP_NUM_THREADS" not in env:
            return "it is bound to CPUs, which torch counts when it is imported"
        names = rank_env.differing(env, self._server.env)
        return f"{', '.join(names)} differ from the fork server's environment" if names else ""

    def _job(self, member: Member, files: RankFiles, with_modules: bool) -> dict[str, object]:
        program, args = self._program, self._args(member)
        is_module = program.kind is ProgramKind.MODULE
        script = os.path.join(os.path.abspath(self._cwd), program.target)
        flags = ["-u", "-m"] if is_module else ["-u"]
        return {
            "kind": program.kind.value,
            "target": program.target,
            "args": args,
            "observer": _observer(files),
            "modules_file": os.path.abspath(files.modules_file) if with_modules else "",
            "own_modules": os.path.abspath(self._cwd) if is_module else os.path.dirname(os.path.realpath(script)),
            "title": " ".join([sys.executable, *flags, program.target, *args]),
            "argv_afresh": self.argv(member, files),
            "note_file": os.path.abspath(os.path.join(files.directory, "how_started.txt")),
        }


def _observer(files: RankFiles) -> list[str]:
    return [str(_OBSERVER), os.path.abspath(files.directory)] if _OBSERVER.exists() else []


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
