"""Runs one training program as a gang of ranks: on this machine, or on the nodes of a Ray cluster.

`python -m launcher train.py` is the door; docs/ARCHITECTURE.md draws the house. This package imports neither torch nor, without
an address, ray: the time from the command to the first rank is part of what it promises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.watching import count_step, expect_steps, pause_watch

if TYPE_CHECKING:
    from launcher.errors import JobFailed, LauncherError
    from launcher.job import Job, JobResult, JobStatus, run
    from launcher.spec import JobSpec, Program, ProgramKind

__all__ = [
    "Job",
    "JobFailed",
    "JobResult",
    "JobSpec",
    "JobStatus",
    "LauncherError",
    "Program",
    "ProgramKind",
    "count_step",
    "expect_steps",
    "pause_watch",
    "run",
]

# Imported when they are asked for: a training script that wants `pause_watch` pays for nothing else.
_HOMES = {
    "launcher.job": ("Job", "JobResult", "JobStatus", "run"),
    "launcher.errors": ("JobFailed", "LauncherError"),
    "launcher.spec": ("JobSpec", "Program", "ProgramKind"),
}


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'launcher' has no attribute {name!r}")
