"""A job as numbers for Prometheus: which there are, and their values now. Pure; `exporter` serves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.report.goodput import Goodput
from launcher.report.pace import Pace, pace_of
from launcher.report.record import Point, RunRecord
from launcher.report.state import Stands, State

PREFIX = "railhead_job_"
GAUGES: Mapping[str, str] = {
    "state": "1 for what the job does now",
    "began_timestamp_seconds": "When the job began, seconds since 1970",
    "attempt": "Number of the attempt that runs, from 0",
    "nodes": "Nodes of the attempt",
    "ranks": "Ranks of the attempt",
    "ranks_alive": "Ranks that were alive when they were looked at last",
    "step": "Optimizer steps of the job so far, those before this attempt included if the script says them",
    "expected_steps": "Steps to the end of the job, if the script says so",
    "steps_per_second": "Steps per second over the last minute",
    "samples_per_second": "Samples per second of all ranks over the last minute",
    "step_seconds": "How long the last step took",
    "step_age_seconds": "Since a step ended on any rank",
    "data_wait_ratio": "Share of the last minute in which ranks waited for data",
    "remaining_seconds": "Time to the last expected step, at this pace",
    "straggling_ranks": "Ranks that are slower than the others for long",
    "hung_ranks": "Ranks that are named as holding up the job",
    "time_seconds": "The job's time so far by kind; the kinds add up to all of it",
    "goodput_ratio": "Share of the job's time in which it trained",
}
COUNTERS: Mapping[str, str] = {
    "restarts": "Attempts after the first",
    "failures": "Attempts that failed, by what failed",
    "node_events": "Nodes that were lost, joined, or were told to leave",
    "steps": "Optimizer steps of all attempts, those that were made twice included",
}
LABELS: Mapping[str, str] = {"state": "state", "time_seconds": "kind", "failures": "kind", "node_events": "event"}
"""Metrics with one label more than `run`."""
FAILURE_KINDS = ("rank", "node", "hang")


@dataclass(frozen=True)
class Value:
    """One sample."""

    name: str
    value: float
    label: str = ""


def values(run: RunRecord, state: State, good: Goodput, latest: Point | None) -> Iterator[Value]:
    """All that is known; what is not known is left out. `latest` is newer than what the journal has."""
    for stands in Stands:
        yield Value("state", float(stands is state.stands), stands.value)
    yield Value("began_timestamp_seconds", run.began_wall_s)
    yield Value("restarts", run.num_restarts)
    failures = [attempt.failure.kind for attempt in run.attempts if attempt.failure is not None]
    for kind in FAILURE_KINDS:
        yield Value("failures", failures.count(kind), kind)
    for event, number in run.num_node_events.items():
        yield Value("node_events", number, event)
    for kind, seconds in good.seconds.items():
        yield Value("time_seconds", seconds, kind)
    attempt = run.attempt
    newest = latest.steps if latest is not None and latest.steps else 0
    ended = sum(each.steps or 0 for each in run.attempts[:-1])
    made = ended + max(newest, (attempt.steps or 0) if attempt is not None else 0)
    yield Value("steps", made)
    if made:
        yield Value("goodput_ratio", good.shares["steps"])
    if attempt is None:
        return
    yield Value("attempt", attempt.number)
    yield Value("nodes", len(set(attempt.hosts)))
    yield Value("ranks", attempt.num_ranks)
    points = [*attempt.points, *([latest] if latest is not None else [])]
    if points:
        yield from _of_point(points[-1])
    speed = pace_of(points[-200:], 60.0)
    if speed is not None:
        yield from _of_pace(speed)


def _of_point(point: Point) -> Iterator[Value]:
    yield Value("ranks_alive", point.num_alive)
    yield Value("straggling_ranks", len(point.stragglers))
    yield Value("hung_ranks", len(point.hung))
    for name, value in (("step_seconds", point.step_s), ("step_age_seconds", point.step_age_s)):
        if value is not None:
            yield Value(name, value)


def _of_pace(speed: Pace) -> Iterator[Value]:
    known = {
        "step": speed.step,
        "expected_steps": speed.total_steps,
        "steps_per_second": speed.steps_per_s,
        "samples_per_second": speed.samples_per_s,
        "data_wait_ratio": speed.wait_share,
        "remaining_seconds": speed.left_s,
    }
    for name, value in known.items():
        if value is not None:
            yield Value(name, value)
