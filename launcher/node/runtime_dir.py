"""Short-lived things of a node that have a place in the file system: Unix sockets, and the temporary directories of its ranks' children.

One directory for each user (`$XDG_RUNTIME_DIR/railhead-UID` or `/tmp/railhead-UID`), in it one for each agent, named after its process so
that whoever comes next can tell whether it is still there. A killed agent removes nothing: the next one does (`sweep`).

Why ranks get a directory here: Python's multiprocessing makes `/tmp/pymp-…` for its sockets (each data loader's worker that hands over
tensors has one) and removes it when the interpreter ends, which a killed one never does; the names do not say whose they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile

_OF_AN_AGENT = re.compile(r"agent-([0-9a-f]+)-(\d+)-(\d+)-\w+$")
"""Namespace, process and its start, and chance, as one process may have several agents."""
_SOCKET_OF_A_PROCESS = re.compile(r"[0-9a-f]{16}-(\d+)\.sock$")
_MAX_PATH = 80
"""Socket paths end at 107 bytes, and multiprocessing appends `/listener-xxxxxxxx`."""
LINK = "tmp"
"""In the directory of a rank's records: leads to its temporary directory."""


def private_directory() -> str:
    """A short path that only this user can enter; in a shared /tmp somebody else may have made the usual one before us. Raises OSError."""
    usual = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), f"railhead-{os.getuid()}")
    with contextlib.suppress(OSError):
        os.mkdir(usual, 0o700)
    with contextlib.suppress(OSError):
        status = os.lstat(usual)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return usual
    return tempfile.mkdtemp(prefix="railhead-")


class RuntimeDir:
    """What one agent has there. Best effort throughout: without it, ranks use the usual places."""

    def __init__(self) -> None:
        """Removes what dead agents of this user have left behind."""
        self._path = ""
        self._num_made = 0
        with contextlib.suppress(OSError):
            base = private_directory()
            sweep(base)
            pid = os.getpid()
            name = f"agent-{_namespace()}-{pid}-{_start_ticks(pid)}-{secrets.token_hex(2)}"
            self._path = os.path.join(base, name)

    def make_for_rank(self, records: str) -> str:
        """A fresh directory for one rank, with a link to it in the directory of its records; empty if there is none."""
        self._num_made += 1
        path = os.path.join(self._path, str(self._num_made))
        if not self._path or len(path) > _MAX_PATH:
            return ""
        try:
            os.makedirs(path, 0o700)
            os.symlink(path, os.path.join(records, LINK))
        except OSError:
            return ""
        return path

    def close(self) -> None:
        if self._path:
            shutil.rmtree(self._path, ignore_errors=True)
            base = os.path.dirname(self._path)
            if not base.endswith(f"railhead-{os.getuid()}"):
                with contextlib.suppress(OSError):
                    os.rmdir(base)


def remove(path: str) -> None:
    """A directory that `make_for_rank` has made; nobody uses it any more."""
    if path:
        shutil.rmtree(path, ignore_errors=True)


def sweep(base: str) -> None:
    """Removes directories of agents and sockets of daemons whose processes are gone. Nothing else is touched, nor what containers that
    share the directory have there: their processes are not ours to see."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(base):
            agent = _OF_AN_AGENT.match(entry.name)
            if agent and entry.is_dir(follow_symlinks=False):
                if agent[1] == _namespace() and _start_ticks(int(agent[2])) != int(agent[3]):
                    shutil.rmtree(entry.path, ignore_errors=True)
                continue
            daemon = _SOCKET_OF_A_PROCESS.match(entry.name)
            if daemon and not os.path.exists(f"/proc/{daemon[1]}") and not _answers(entry.path):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _namespace() -> str:
    """Numbers of processes mean something within it only."""
    return f"{os.stat('/proc/self/ns/pid').st_ino:x}"


def _answers(path: str) -> bool:
    """Somebody listens there, or it cannot be said."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def _start_ticks(pid: int) -> int:
    """When the process began, in the kernel's count; 0 if there is none. With the number it names a process for good."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
