"""How a rank's process is made. One class for each way; a fork server will be the second.

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

from launcher.gang.world import Member
from launcher.node.guarded import GuardedProcess
from launcher.spec import Program, ProgramKind

_RUNNER = str(Path(__file__).with_name("runner.py"))
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

    def write_environment(self, account: Mapping[str, object]) -> None:
        """`environment.json`: what was set and why. Best effort."""
        with contextlib.suppress(OSError), open(os.path.join(self.directory, "environment.json"), "w") as file:
            json.dump(account, file, indent=1)


class FreshInterpreter:
    """Executes the program in a new process (`--start-method spawn`)."""

    def __init__(self, program: Program, cwd: str) -> None:
        self._program = program
        self._cwd = cwd

    def start(
        self, member: Member, env: Mapping[str, str], files: RankFiles, bind: Mapping[str, object] | None = None
    ) -> GuardedProcess:
        """Raises OSError. `bind`: see GuardedProcess. A log that cannot be opened (full disk) is /dev/null: the rank runs, only its words
        are lost."""
        stdout_fd = _open_log(files.stdout_log)
        stderr_fd = _open_log(files.stderr_log)
        try:
            return GuardedProcess(self.argv(member, files), env, self._cwd, stdout_fd, stderr_fd, bind=bind)
        finally:
            os.close(stdout_fd)
            os.close(stderr_fd)

    def argv(self, member: Member, files: RankFiles) -> list[str]:
        """Python programs run under the runner, unbuffered as under torchrun; anything else as it is."""
        args = [arg.replace("${local_rank}", str(member.local_rank)) for arg in self._program.args]
        if self._program.kind is ProgramKind.EXECUTABLE:
            return [self._program.target, *args]
        python = self._program.python or sys.executable
        # The runner is named by its path: `-m launcher.node.runner` would put our package where the user may have a `launcher` of his own.
        observer = ["--observer", str(_OBSERVER), os.path.abspath(files.directory)] if _OBSERVER.exists() else []
        return [python, "-u", _RUNNER, *observer, self._program.kind.value, self._program.target, *args]


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
