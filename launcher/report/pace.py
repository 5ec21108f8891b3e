"""How fast an attempt goes and when the job will be done. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.report.record import Attempt, Point

WINDOW_S = 60.0


@dataclass(frozen=True)
class Pace:
    """Over the last minute of an attempt, or of what there is of it."""

    step: int | None
    """Of the job: steps before this attempt included, where the script says so."""
    total_steps: int | None
    steps_per_s: float | None
    samples_per_s: float | None
    wait_share: float | None
    """Of 1: time that ranks waited for data."""
    left_s: float | None
    """To the last step; None: unknown."""


def pace(attempt: Attempt) -> Pace | None:
    """None: nothing is known of its steps."""
    return pace_of(attempt.points, WINDOW_S)


def whole_pace(attempt: Attempt) -> Pace | None:
    """Over all of the attempt; what is left is another question."""
    found = pace_of(attempt.points, float("inf"))
    return None if found is None else replace(found, left_s=None)


def pace_of(seen: Iterable[Point], window_s: float) -> Pace | None:
    """Of one attempt's points, in order; None: no steps are known."""
    points = [point for point in seen if point.steps]
    if not points:
        return None
    last = points[-1]
    first = next(point for point in points if last.at_s - point.at_s <= window_s)
    if first is last and len(points) > 1:
        first = points[-2]  # a long job is noted once a minute
    num, took_s = (last.steps or 0) - (first.steps or 0), last.step_at_s - first.step_at_s
    steps_per_s = samples_per_s = share = left_s = None
    if num > 0 and took_s > 0:
        steps_per_s = num / took_s
        share = min(1.0, max(0.0, last.waited_s - first.waited_s) / took_s)
        if last.samples is not None and first.samples is not None:
            samples_per_s = max(0, last.samples - first.samples) / took_s
    elif last.step_s:
        steps_per_s = 1 / last.step_s
    step = last.done_steps + (last.steps or 0)
    if steps_per_s and last.total_steps is not None:
        left_s = max(0, last.total_steps - step) / steps_per_s
    return Pace(step, last.total_steps, steps_per_s, samples_per_s, share, left_s)
