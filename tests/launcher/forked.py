"""Running one program by way of a fork server, without an agent around it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.node import rank_process, strays
from launcher.node.forking import ForkServer
from launcher.node.guarded import Gone, GuardedProcess, NeverBorn, StartFailed

PATIENCE_S = 60.0


def wait_for_end(process: GuardedProcess) -> int | None:
    """The exit code as `subprocess` gives it; None if it was never born."""
    while True:
        assert select.select([process.socket], [], [], PATIENCE_S)[0], "waited for a forked process to end"
        for report in process.read():
            assert not isinstance(report, StartFailed), report
            if isinstance(report, Gone | NeverBorn):
                process.close()
                status = process.status
                return None if status is None else status.code if status.code is not None else -(status.signum or 0)


def wait_until_warm(server: ForkServer) -> None:
    while not (server.is_warm or server.is_dead):
        assert select.select([server.socket], [], [], PATIENCE_S)[0], "waited for the fork server"
        server.read()


def job_for(directory: Path, kind: str, target: str, *args: str, observer: Sequence[str] = ()) -> dict[str, object]:
    flags = ["-u", "-m"] if kind == "module" else ["-u"]
    return {
        "kind": kind,
        "target": target,
        "args": list(args),
        "observer": list(observer),
        "modules_file": "",
        "own_modules": "",
        "title": " ".join([sys.executable, *flags, target, *args]),
        "argv_afresh": [sys.executable, "-u", rank_process.RUNNER, kind, target, *args],
        "note_file": str(directory / "how_started.txt"),
    }


def fork_and_wait(
    directory: Path,
    env: Mapping[str, str],
    kind: str,
    target: str,
    *args: str,
    observer: Sequence[str] = (),
    server: ForkServer | None = None,
    **job: object,
) -> subprocess.CompletedProcess[str]:
    """`server` None: one of its own, with nothing imported."""
    strays.adopt()
    own = server or ForkServer(str(directory), env, [], log_path=str(directory / "server.log"))
    out, err = directory / "out.forked", directory / "err.forked"
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for path in (out, err)]
    try:
        whole = {**job_for(directory, kind, target, *args, observer=observer), **job}
        process = own.fork(whole, env, str(directory), *fds)
        code = wait_for_end(process)
        assert code is not None, (directory / "server.log").read_text()
        return subprocess.CompletedProcess([], code, out.read_text(), err.read_text())
    finally:
        for fd in fds:
            os.close(fd)
        if server is None:
            own.close()
