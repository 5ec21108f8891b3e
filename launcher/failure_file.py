"""`failure.json` in the run directory: what is said of failures on the terminal, for programs. There is none while nothing has failed.

Written whole each time, under another name first, so that a reader never sees half of it. The schema is in docs/launcher.md; tests hold
it to that page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from launcher.gang.causes import Kind, cause, kind, why_collateral
from launcher.gang.events import Failure, RankExited, RankHung
from launcher.gang.policy import exit_code_of, happened_at_s
from launcher.gang.world import World
from launcher.messages import hostname

VERSION = 1
"""Raised when a reader of the old version would misread it; new fields do not raise it."""
NAME = "failure.json"
_MAX_OTHERS = 64
_MAX_ATTEMPTS = 100
"""The last ones; journal.jsonl has all."""


class FailureFile:
    """What has failed in this run so far. on_trouble is called once, with a sentence, when it cannot be written."""

    def __init__(self, run_dir: str, on_trouble: Callable[[str], None]) -> None:
        self._path = os.path.join(run_dir, NAME)
        self._run_dir = run_dir
        self._on_trouble = on_trouble
        self._attempts: list[dict[str, Any]] = []

    def told(self, attempt: int, root: Failure, consequence: str, world: World | None) -> None:
        """An attempt has failed; `root` is the cause as far as is known."""
        self._attempts.append(
            {
                "attempt": attempt,
                "root": describe(root, world),
                "others": [],
                "num_others": 0,
                "consequence": consequence,
            }
        )
        del self._attempts[:-_MAX_ATTEMPTS]
        self._write(None, None)

    def concluded(self, attempt: int, root: Failure, others: Sequence[Failure], world: World | None) -> None:
        """Everything of the attempt has stopped."""
        for known in self._attempts:
            if known["attempt"] == attempt:
                known["root"] = describe(root, world)
                in_order = sorted(others, key=happened_at_s)
                known["others"] = [describe(other, world, root) for other in in_order[:_MAX_OTHERS]]
                known["num_others"] = len(others)
        self._write(None, None)

    def ended(self, exit_code: int, reason: str) -> None:
        """The job is over."""
        if self._attempts or exit_code:
            self._write(exit_code, reason)

    def _write(self, exit_code: int | None, reason: str | None) -> None:
        data = {
            "version": VERSION,
            "run_dir": os.path.abspath(self._run_dir),
            "exit_code": exit_code,
            "reason": reason,
            "attempts": self._attempts,
        }
        try:
            with open(f"{self._path}.tmp", "w") as file:
                json.dump(data, file, indent=1)
                file.write("\n")
            os.replace(f"{self._path}.tmp", self._path)
        except OSError as error:
            on_trouble, self._on_trouble = self._on_trouble, lambda text: None
            on_trouble(f"{self._path} cannot be written ({error.strerror}); the job goes on without it")


def describe(failure: Failure, world: World | None, root: Failure | None = None) -> dict[str, Any]:
    """One failure. root: what it followed, if it is not the root itself."""
    why = why_collateral(failure, root) if root is not None else ""
    found: dict[str, Any] = {
        "kind": (Kind.STOPPED if why.startswith(Kind.STOPPED.value) else kind(failure)).value,
        "node": failure.node_id,
        "host": hostname(failure.node_id, world),
        "cause": cause(failure),
        "exit_code": exit_code_of(failure),
        "at_s": happened_at_s(failure) if happened_at_s(failure) < float("inf") else None,
    }
    if root is not None:
        found["why"] = why
    if isinstance(failure, RankHung):
        found["rank"] = failure.rank
    if isinstance(failure, RankExited):
        exception = failure.exception
        found |= {
            "rank": failure.rank,
            "local_rank": failure.local_rank,
            "pid": failure.pid,
            "signal": failure.status.signum,
            "exception": exception and {"type": exception.type_name, "message": exception.message},
            "details": exception.traceback if exception else failure.last_lines,
            "stdout_log": failure.stdout_log,
            "stderr_log": failure.stderr_log,
            "steps": failure.steps,
        }
    return found
