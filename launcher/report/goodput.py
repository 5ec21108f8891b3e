"""Where the time of a run went. Pure.

The run is cut into pieces that follow each other without a gap, each of one kind, so that the kinds always add up to the whole:

- *start*: until the first optimizer step of the first attempt (nodes, imports, compilation, the first batch).
- *steps*: training. *data wait*: the part of it in which ranks waited for their data loaders (on average).
- *hang*: from the last step until the job was found to hang and stopped, or went on.
- *restart*: from an attempt's end to the first step of the next, and the steps that were made a second time, where the script says where it
  resumed (`expect_steps`).
- *other*: no step for much longer than usual (evaluation, checkpoints, `pause_watch`), what comes after the last step, and all of a job
  whose steps cannot be seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.report.record import Attempt, Point, RunRecord

START, STEPS, DATA_WAIT, HANG, RESTART, OTHER = KINDS = ("start", "steps", "data_wait", "hang", "restart", "other")
_LONG_STEP_S = 10.0
_LONG_STEP_FACTOR = 5.0
"""Without a step for longer than both, something else was done than a step."""


@dataclass(frozen=True)
class Piece:
    """A stretch of time of one kind (with `waited_s` of it waiting for data); for the timeline."""

    kind: str
    begin_s: float
    end_s: float
    attempt: int | None = None
    waited_s: float = 0.0


@dataclass(frozen=True)
class Goodput:
    """Seconds of each kind; they add up to `total_s`."""

    total_s: float
    seconds: dict[str, float]
    redone_s: float = 0.0
    """Of restart: steps that were made a second time."""
    redone_steps: int = 0
    pieces: tuple[Piece, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """Of 1; all 0 for a run of no length."""
        return {kind: seconds / self.total_s if self.total_s else 0.0 for kind, seconds in self.seconds.items()}


def goodput(run: RunRecord, until_s: float | None = None) -> Goodput:
    """`until_s`: now, for a run in progress (since its beginning); None: until the last that is known of it."""
    end_s = max(run.last_s, until_s or 0.0)
    if run.ending is not None:
        end_s = run.ending.at_s
    pieces = tuple(piece for piece in _pieces(run, end_s) if piece.end_s > piece.begin_s)
    seconds = dict.fromkeys(KINDS, 0.0)
    for piece in pieces:
        seconds[piece.kind] += piece.end_s - piece.begin_s - piece.waited_s
        seconds[DATA_WAIT] += piece.waited_s
    redone_s, redone_steps = 0.0, 0
    for attempt, lost in _redone(run.attempts):
        own = [piece for piece in pieces if piece.attempt == attempt.number and piece.kind == STEPS]
        share = min(1.0, lost / (attempt.steps or lost))
        wait_s = share * sum(piece.waited_s for piece in own)
        step_s = share * sum(piece.end_s - piece.begin_s - piece.waited_s for piece in own)
        seconds[STEPS] -= step_s
        seconds[DATA_WAIT] -= wait_s
        seconds[RESTART] += step_s + wait_s
        redone_s += step_s + wait_s
        redone_steps += lost
    return Goodput(end_s, {kind: max(0.0, each) for kind, each in seconds.items()}, redone_s, redone_steps, pieces)


def _redone(attempts: Sequence[Attempt]) -> Iterator[tuple[Attempt, int]]:
    """Attempts whose last steps were made again by a later one, and how many."""
    for idx, attempt in enumerate(attempts):
        resumed_at = next((later.done_steps for later in attempts[idx + 1 :] if later.done_steps is not None), None)
        if resumed_at is None or attempt.done_steps is None or not attempt.steps:
            continue
        lost = min(attempt.steps, attempt.done_steps + attempt.steps - resumed_at)
        if lost > 0:
            yield attempt, lost


def _pieces(run: RunRecord, end_s: float) -> Iterator[Piece]:
    """From 0 to `end_s` without a gap."""
    at_s, lead = 0.0, START
    for idx, attempt in enumerate(run.attempts):
        is_last = idx + 1 == len(run.attempts)
        next_s = end_s if is_last else min(end_s, run.attempts[idx + 1].began_s)
        for piece in _pieces_of(attempt, run.has_steps, lead, at_s, next_s, is_last):
            at_s = piece.end_s
            yield piece
        lead = RESTART
    yield Piece(lead if not run.attempts else OTHER, at_s, end_s)


def _pieces_of(
    attempt: Attempt, has_steps: bool, lead: str, begin_s: float, next_s: float, is_last: bool
) -> Iterator[Piece]:
    """One attempt, from the end of what was before it to the beginning of the next. Ascending, each begins where the last ended."""
    number = attempt.number
    stopped_s = _within(begin_s, attempt.stopped_s, next_s, next_s)
    stepped = [point for point in attempt.points if point.steps]
    tail = HANG if attempt.failure is not None and attempt.failure.kind == "hang" else OTHER
    if not stepped:
        # Steps that only the ranks' ends tell of are known in number, not in time.
        is_unseen = not has_steps or attempt.steps
        led_s = _within(begin_s, attempt.started_s, stopped_s, stopped_s) if is_unseen else stopped_s
        yield Piece(lead, begin_s, led_s, number)
        yield Piece(tail if tail == HANG else STEPS if attempt.steps else OTHER, led_s, stopped_s, number)
    else:
        at_s = _within(begin_s, _first_step_s(stepped[0]), stopped_s, stopped_s)
        yield Piece(lead, begin_s, at_s, number)
        for piece in _training(attempt, stepped, at_s, stopped_s):
            at_s = piece.end_s
            yield piece
        rest_s = stopped_s - at_s
        is_stopped = attempt.stopped_s is not None
        if not is_stopped and not stepped[-1].is_paused and rest_s <= _long_s(stepped):
            tail = STEPS  # it runs, and the next step is not late
        elif tail == OTHER and attempt.failure is not None:
            tail = STEPS if rest_s <= _long_s(stepped) else OTHER  # it fell in mid-step
        elif attempt.failure is None and _has_named(attempt, at_s, stopped_s) and not is_stopped:
            tail = HANG
        yield Piece(tail, at_s, stopped_s, number)
    yield Piece(OTHER if is_last else RESTART, stopped_s, next_s, number)


def _training(attempt: Attempt, points: Sequence[Point], begin_s: float, end_s: float) -> Iterator[Piece]:
    """From the end of the first step to the end of the last one that was seen."""
    usual_s, long_s = _usual_s(points), _long_s(points)
    at_s, before = begin_s, points[0]
    still: list[Point] = []
    for point in points[1:]:
        num_steps = (point.steps or 0) - (before.steps or 0)
        if num_steps <= 0:
            still.append(point)
            continue
        until_s = _within(at_s, point.step_at_s, end_s, end_s)
        waited_s = min(until_s - at_s, max(0.0, point.waited_s - before.waited_s))
        # Between the two, one step may have been long: no step ended while it was looked at, and the others took as long as the last.
        others_s = (num_steps - 1) * (point.step_s or usual_s)
        seen_s = max((each.at_s for each in still), default=at_s)
        gap_s = max(0.0, seen_s - at_s, until_s - at_s - others_s) if still else 0.0
        excess_s = 0.0
        if gap_s > long_s or any(each.is_paused for each in still):
            excess_s = max(0.0, min(gap_s - usual_s, until_s - at_s - waited_s))
        kind = HANG if _has_named(attempt, at_s, until_s) else OTHER
        yield Piece(kind, at_s, at_s + excess_s, attempt.number)
        yield Piece(STEPS, at_s + excess_s, until_s, attempt.number, min(waited_s, until_s - at_s - excess_s))
        at_s, before, still = until_s, point, []


def _has_named(attempt: Attempt, begin_s: float, end_s: float) -> bool:
    return any(begin_s <= named_s <= end_s for named_s in attempt.named_hangs)


def _first_step_s(point: Point) -> float:
    """When the first step ended, seen from the first time that any were seen."""
    return point.step_at_s - ((point.steps or 1) - 1) * (point.step_s or 0.0)


def _usual_s(points: Sequence[Point]) -> float:
    """How long a step takes."""
    return statistics.median([point.step_s for point in points if point.step_s is not None] or [0.0])


def _long_s(points: Sequence[Point]) -> float:
    return max(_LONG_STEP_S, _LONG_STEP_FACTOR * _usual_s(points))


def _within(low_s: float, value_s: float | None, high_s: float, default_s: float) -> float:
    return min(max(low_s, default_s if value_s is None else value_s), max(low_s, high_s))
