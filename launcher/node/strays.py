"""Descendants that fall to this process when a guardian is killed: who they are, and ending them.

The agent's process is a subreaper, so what a dead guardian's process leaves behind becomes its child. Children that we did not start and
that were not there when the first agent began are strays. (Several agents may share one process; the books are per process.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from launcher.node.guardian import (
    JANITOR_GRACE_S,
    PR_SET_CHILD_SUBREAPER,
    PROCESS_NAME,
    descendants_of,
    is_janitor,
    parents,
    prctl,
    remove_shared_memory,
)

_lock = threading.Lock()
_ours: set[int] = set()
_adopting = False
_began_s = time.time()
_first_seen: dict[int, float] = {}
"""When each stray was found: those that remove shared memory get a moment to do so."""


def adopt() -> None:
    """From now on orphans below us become our children. Idempotent. Raises OSError."""
    global _adopting
    with _lock:
        if not _adopting:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            _ours.update(_children())
            _adopting = True


def is_ours(pid: int) -> None:
    """A child that we have started."""
    with _lock:
        _ours.add(pid)


def is_no_longer_ours(pid: int) -> None:
    """We have collected it; the number may come again."""
    with _lock:
        _ours.discard(pid)


def kill() -> bool:
    """Kills every stray with all its descendants and collects the dead. True when none was found: call it until then."""
    with _lock:
        found = [pid for pid in _children() if pid not in _ours and not _is_guardian(pid)]
        now = time.monotonic()
        for pid in found:
            spares = now < _first_seen.setdefault(pid, now) + JANITOR_GRACE_S
            for victim in (pid, *descendants_of(pid)):
                if spares and is_janitor(victim):
                    continue
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(victim, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    _first_seen.pop(pid, None)
                    remove_shared_memory({pid}, _began_s)
        return not found


def _children() -> list[int]:
    me = os.getpid()
    return [pid for pid, parent in parents().items() if parent == me]


def _is_guardian(pid: int) -> bool:
    """The fork server's guardians fall to us a moment before they tell their numbers; and a guardian without an agent ends by itself."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().strip() == PROCESS_NAME
    return False
