"""The memory of bad nodes on disk, shared by all jobs of this user: read whole, changed under a lock, replaced in one step.

A memory that cannot be read is empty, one that cannot be written costs the memory and never the job: `remember` says what was wrong.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.exclusion import Verdict, from_json, remember, to_json

NOWHERE = "none"
"""As a path: remember nothing, leave nobody out."""


def default_path(environ: Mapping[str, str]) -> str:
    """Below the user's state directory (XDG).

    >>> default_path({"HOME": "/home/me"})
    '/home/me/.local/state/railhead/excluded-nodes.json'
    """
    state = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/tmp", ".local", "state")
    return os.path.join(state, "railhead", "excluded-nodes.json")


class ExclusionFile:
    """path: the file; `none` for no memory. `clock`: seconds since 1970. Any thread may call any method; none raises."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    @property
    def is_kept(self) -> bool:
        return self.path != NOWHERE

    def history(self) -> tuple[Verdict, ...]:
        """What is remembered now."""
        if not self.is_kept:
            return ()
        try:
            return remember(from_json(Path(self.path).read_text(errors="replace")), (), now=self._clock())
        except OSError:
            return ()

    def remember(self, new: Sequence[Verdict]) -> str:
        """Adds verdicts; returns what was wrong, in a sentence, or nothing."""
        if not self.is_kept or not new:
            return ""
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # The lock is a file of its own: the memory itself is replaced, and a lock would go with the old one.
                fcntl.flock(lock_fd, fcntl.LOCK_EX)
                self._replace(remember(self.history(), new, now=self._clock()))
            finally:
                os.close(lock_fd)
        except OSError as error:
            return f"{self.path} cannot be written ({error.strerror}): these nodes are not remembered for later jobs"
        return ""

    def _replace(self, history: Sequence[Verdict]) -> None:
        part = f"{self.path}.{os.getpid()}.part"
        with open(part, "w") as file:
            file.write(to_json(history))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
