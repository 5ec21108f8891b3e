"""What is said of a job while it runs: the parts of one line for a terminal, and now and then a sentence where there is none. Pure.

Fed with the journal's entries as they are written, and with the gang's progress, which comes more often than the journal gets it.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from launcher.gang.tally import GangProgress
from launcher.journal import Entry
from launcher.messages import duration
from launcher.report.pace import WINDOW_S, Pace, pace_of
from launcher.report.record import Point, RunRecord
from launcher.report.words import about, counted, pace_parts, pace_words

SAY_EVERY_S = 300.0
_FIRST_SAYING_S = 10.0
"""After the first step: by then the pace is known."""
_SHOWN_RANKS = 4


class LiveView:
    """One job. Times are the journal's (monotonic)."""

    def __init__(self) -> None:
        self._run = RunRecord()
        self._began_s: float | None = None
        self._latest: GangProgress | None = None
        self._points: collections.deque[Point] = collections.deque()
        self._stopped_s: float | None = None
        self._stepping_since_s: float | None = None
        self._next_saying_s = float("inf")
        self._stage: tuple[object, ...] = ()

    def see(self, entry: Entry) -> bool:
        """An entry of the journal; True if the line says something else from now on. Most do not: thousands of ranks end at once."""
        if self._began_s is None:
            self._began_s = entry.mono_s
        if entry.kind == "GangProgress":
            return False  # all of a month would be kept here; `look` has it anyhow
        before = self._run.attempt
        self._run.see(entry)
        attempt = self._run.attempt
        if attempt is not before:
            self._latest, self._stepping_since_s = None, None
            self._points.clear()
        if attempt is not None and attempt.stopped_s is not None and (attempt is not before or self._stopped_s is None):
            self._stopped_s = entry.mono_s
        stage = self._stage_now()
        has_changed, self._stage = stage != self._stage, stage
        return has_changed

    def _stage_now(self) -> tuple[object, ...]:
        run, attempt = self._run, self._run.attempt
        if attempt is None:
            return (bool(run.waiting_for), run.ending is not None)
        marks = (attempt.started_s, attempt.stopped_s, attempt.ended_s, run.ending)
        return (attempt.number, *(mark is not None for mark in marks))

    def look(self, progress: GangProgress, now: float) -> str | None:
        """The newest progress; a sentence, if it is time for one."""
        at_s = now - (self._began_s if self._began_s is not None else now)
        is_first = self._stepping_since_s is None and bool(progress.steps)
        self._latest = progress
        self._points.append(point_of(progress, at_s))
        while self._points and at_s - self._points[0].at_s > WINDOW_S:
            self._points.popleft()
        if is_first:
            self._stepping_since_s = now
            self._next_saying_s = now + _FIRST_SAYING_S
            if self._run.num_restarts and self._stopped_s is not None:
                took, self._stopped_s = duration(now - self._stopped_s), None
                step = progress.done_steps + (progress.steps or 0)
                return f"attempt {progress.attempt} trains again after {took}: step {step:,}"
        speed = self._pace()
        if now < self._next_saying_s or speed is None:
            return None
        self._next_saying_s = now + SAY_EVERY_S
        return pace_words(speed)

    def parts(self, now: float) -> Sequence[str]:
        """What the line says, the most important first; empty when the job is over."""
        run, attempt = self._run, self._run.attempt
        if run.ending is not None:
            return ()
        restarts = [counted(run.num_restarts, "restart")] if run.num_restarts else []
        if attempt is None:
            return ["waiting for nodes"] if run.waiting_for else ["starting"]
        if attempt.stopped_s is not None:
            doing = "restarting" if attempt.ended_s is not None else "stopping"
            return [doing, *restarts]
        speed = self._pace()
        if speed is None:
            age = about(now - (self._began_s or now))
            doing = "starting" if attempt.started_s is None else "no step yet"
            return [f"{doing} {counted(attempt.num_ranks, 'rank')}" if doing == "starting" else doing, age, *restarts]
        return [*self._trouble(), *pace_parts(speed), *restarts]

    def _trouble(self) -> list[str]:
        latest = self._latest
        if latest is None:
            return []
        if latest.hung:
            return [f"held up by {_ranks(latest.hung)}"]
        return [f"slow: {_ranks(latest.stragglers)}"] if latest.stragglers else []

    def _pace(self) -> Pace | None:
        return pace_of(self._points, WINDOW_S)


def _ranks(ranks: Sequence[int]) -> str:
    """
    >>> _ranks([3]), _ranks(range(6))
    ('rank 3', 'ranks 0, 1, 2, 3 and 2 more')
    """
    more = len(ranks) - _SHOWN_RANKS
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def point_of(progress: GangProgress, at_s: float) -> Point:
    """As the journal would give it back. at_s: since the job began."""
    return Point(
        at_s,
        progress.steps,
        progress.waited_s,
        progress.samples,
        progress.step_s,
        progress.step_age_s,
        progress.total_steps,
        progress.done_steps,
        progress.num_alive,
        progress.is_paused,
        progress.stragglers,
        progress.hung,
    )
