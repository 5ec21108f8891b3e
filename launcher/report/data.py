"""A run as plain data, for `--json`. The schema has a version, and docs/launcher.md says what is in it. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.report.failures import FailureFacts
from launcher.report.goodput import Goodput
from launcher.report.pace import pace, whole_pace
from launcher.report.record import Attempt, RunRecord
from launcher.report.state import State

SCHEMA = "railhead.report/1"
"""The number is raised when a field changes its meaning or goes; new fields do not raise it."""


def report_data(run: RunRecord, state: State, good: Goodput) -> dict[str, Any]:
    """What `status --json` and `report --json` print: JSON has a value for all of it."""
    speed = (whole_pace if state.is_over else pace)(run.attempt) if run.attempt is not None else None
    return {
        "schema": SCHEMA,
        "run_dir": run.run_dir,
        "state": state.stands.value,
        "state_words": state.words,
        "is_over": state.is_over,
        "exit_code": run.ending.exit_code if run.ending else None,
        "reason": run.ending.reason if run.ending else None,
        "began_at_s": round(run.began_wall_s, 3),
        "written_at_s": round(run.last_wall_s, 3),
        "total_s": round(good.total_s, 3),
        "cluster": run.cluster,
        "launcher": {"pid": run.pid, "hostname": run.hostname, "argv": list(run.argv)},
        "num_restarts": run.num_restarts,
        "goodput": {
            "share": round(good.shares["steps"], 4) if run.has_steps else None,
            "seconds": {kind: round(seconds, 3) for kind, seconds in good.seconds.items()},
            "shares": {kind: round(share, 4) for kind, share in good.shares.items()},
            "redone_steps": good.redone_steps,
            "redone_s": round(good.redone_s, 3),
            "has_steps": run.has_steps,
        },
        "progress": None
        if speed is None
        else {
            "step": speed.step,
            "total_steps": speed.total_steps,
            "steps_per_s": _rounded(speed.steps_per_s),
            "samples_per_s": _rounded(speed.samples_per_s),
            "data_wait_share": _rounded(speed.wait_share),
            "left_s": _rounded(speed.left_s),
        },
        "attempts": [_attempt(attempt) for attempt in run.attempts],
        "node_events": [{"at_s": round(event.at_s, 3), "text": event.text} for event in run.node_events],
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    speed = whole_pace(attempt)
    return {
        "attempt": attempt.number,
        "began_s": round(attempt.began_s, 3),
        "started_s": _rounded(attempt.started_s),
        "stopped_s": _rounded(attempt.stopped_s),
        "ended_s": _rounded(attempt.ended_s),
        "num_ranks": attempt.num_ranks,
        "hosts": list(attempt.hosts),
        "steps": attempt.steps,
        "done_steps": attempt.done_steps,
        "steps_per_s": _rounded(speed.steps_per_s) if speed else None,
        "samples_per_s": _rounded(speed.samples_per_s) if speed else None,
        "failure": failure_data(attempt.failure) if attempt.failure else None,
        "why_stopped": attempt.why_stopped or None,
        "stragglers": [asdict(straggler) for straggler in attempt.stragglers.values()],
    }


def failure_data(failure: FailureFacts) -> dict[str, Any]:
    return {
        "kind": failure.kind,
        "what": failure.what or None,
        "rank": failure.rank,
        "host": failure.host,
        "cause": failure.cause,
        "exception": failure.exception or None,
        "exit_code": failure.exit_code,
        "signum": failure.signum,
        "log": failure.log or None,
        "traceback": failure.traceback or None,
        "at_s": round(failure.at_s, 3),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
