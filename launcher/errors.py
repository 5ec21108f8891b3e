"""What can go wrong in the launcher. The type says whose fault it is; `exit_code` is what the command then ends with.

LauncherError
├── SpecError             the person who asked: a bad option, a missing script, a number that makes no sense
├── RequestRefused        the person who asked, or the platform's size: the cluster can never (or not in time) meet the request
├── ClusterUnavailable    platform: no cluster answers at the address, wrong version or token
├── JobFailed             whoever it says: a job that was run from Python did not end with 0; `result` has the facts
├── NodeError             platform: a node could not do what it was told (start a process, open a port, make a directory)
└── InvalidTransition     ours: the gang's state machine was asked for a move that its table does not have

Every one survives pickling: agents on other machines raise them too.
"""

from __future__ import annotations

from typing import Any, ClassVar

# The exit codes of the command. A job that fails by a rank ends with that rank's own code (128 + number for a signal), so these
# are only unambiguous together with the last lines on the terminal and `journal.jsonl`. They follow sysexits.h where it has a word.
EXIT_OK = 0
EXIT_USAGE = 2
"""A bad option or script: nothing was started (argparse's own code)."""
EXIT_REFUSED = 69
"""EX_UNAVAILABLE: the request cannot be met, or there is no cluster at the address: nothing was started."""
EXIT_INTERNAL = 70
"""EX_SOFTWARE: a fault in the launcher itself. All ranks were stopped."""
EXIT_NODE_LOST = 75
"""EX_TEMPFAIL: a node was lost, or a process of ours on it, and no restart was left. Trying again may work."""
EXIT_CRASH_LOOP = 78
"""EX_CONFIG: so many attempts in a row failed without progress that the next would as well. Trying again does not help."""
EXIT_RESUMABLE = 79
"""The job was told to stop and every rank has saved its state (`launcher.preemption`); such a rank ends with it, too. Run it again."""
EXIT_HUNG = 80
"""The job did not get on and would not have by itself, and no restart was left or wanted (`--on-hang`). (sysexits.h ends at 78.)"""
EXIT_SIGNAL_BASE = 128
"""128 + signal number: 130 after SIGINT, 143 after SIGTERM to the launcher; also for a rank that died by a signal."""


class LauncherError(Exception):
    """Base of all. `message` says what happened with the values; `advice` what to do next (may be empty)."""

    exit_code: ClassVar[int] = EXIT_INTERNAL

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message}\n  {self.advice}" if self.advice else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.advice)


class SpecError(LauncherError):
    exit_code = EXIT_USAGE


class RequestRefused(LauncherError):
    exit_code = EXIT_REFUSED


class ClusterUnavailable(LauncherError):
    exit_code = EXIT_REFUSED


class NodeError(LauncherError):
    exit_code = EXIT_NODE_LOST


class InvalidTransition(LauncherError):
    exit_code = EXIT_INTERNAL


class JobFailed(LauncherError):
    """`result` is a `launcher.JobResult`."""

    def __init__(self, message: str, *, advice: str = "", result: Any = None) -> None:
        super().__init__(message, advice=advice)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_failed, (self.message, self.advice, self.result)


def _rebuild(cls: type[LauncherError], message: str, advice: str) -> LauncherError:
    return cls(message, advice=advice)


def _rebuild_failed(message: str, advice: str, result: Any) -> JobFailed:
    return JobFailed(message, advice=advice, result=result)
