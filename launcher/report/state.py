"""Where a run stands, in a word and a sentence. Pure: whether its launcher lives is an argument."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from launcher.report.record import RunRecord

_SILENT_S = 180.0
"""A launcher with running ranks writes once a minute at least."""


class Stands(enum.Enum):
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"
    """Its launcher is gone without a word; so are its ranks (they do not outlive it)."""


@dataclass(frozen=True)
class State:
    stands: Stands
    words: str

    @property
    def is_over(self) -> bool:
        return self.stands in (Stands.DONE, Stands.FAILED, Stands.LOST)


def state_of(run: RunRecord, is_alive: bool | None, silent_s: float = 0.0) -> State:
    """is_alive: whether its launcher's process is there; None: it cannot be seen from here. silent_s: since the last entry."""
    ending, attempt = run.ending, run.attempt
    if ending is not None:
        if ending.exit_code == 0:
            return State(Stands.DONE, "done")
        return State(Stands.FAILED, f"exit code {ending.exit_code}: {ending.reason.partition(chr(10))[0]}")
    if is_alive is False:
        return State(
            Stands.LOST,
            f"its launcher (process {run.pid} on {run.hostname}) is gone without a word, and its ranks with it",
        )
    where = f"seen last on {run.hostname}" if is_alive is None and run.hostname else ""
    doubt = (
        f" ({where}; silent for {silent_s:.0f} s)" if where and silent_s > _SILENT_S else f" ({where})" if where else ""
    )
    if attempt is None:
        why = f": {run.waiting_for}" if run.waiting_for else ""
        return State(Stands.WAITING, f"waiting for nodes{why}{doubt}")
    which = f"attempt {attempt.number}"
    if attempt.ended_s is not None:
        return State(Stands.RESTARTING, f"{which} has ended, the next has not begun{doubt}")
    if attempt.stopped_s is not None:
        return State(Stands.STOPPING, f"{which} is being stopped{doubt}")
    if attempt.started_s is None:
        return State(Stands.RESTARTING if run.num_restarts else Stands.STARTING, f"{which} is starting{doubt}")
    return State(Stands.RUNNING, f"{which} runs, {attempt.num_ranks} rank{'s' * (attempt.num_ranks != 1)}{doubt}")
