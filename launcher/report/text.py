"""`status` and `report` as text. Pure."""

from __future__ import annotations

from launcher.messages import duration
from launcher.report.goodput import KINDS, RESTART, Goodput
from launcher.report.pace import pace, whole_pace
from launcher.report.record import Attempt, RunRecord
from launcher.report.state import State
from launcher.report.words import clock, counted, pace_words, percent

NAMES = {kind: kind.replace("_", " ") for kind in KINDS}
MEANINGS = {
    "start": "until the first step",
    "steps": "training",
    "data_wait": "ranks waited for their data loaders",
    "hang": "no step, until it was found and ended",
    "restart": "from an attempt's end to the next one's first step",
    "other": "evaluation, checkpoints, what comes after the last step",
}
_BAR = 30
_MAX_ATTEMPTS = 20


def status_text(run: RunRecord, state: State, total_s: float, silent_s: float) -> str:
    """A few lines: where it stands, how fast, what has happened."""
    lines = [f"{run.run_dir}: {state.words}"]
    lines.append(
        f"  began {clock(run.began_wall_s)}, {duration(total_s)} {'in all' if state.is_over else 'ago'}; {run.cluster}"
    )
    attempt = run.attempt
    speed = (whole_pace if state.is_over else pace)(attempt) if attempt is not None else None
    if speed is not None:
        ago = f" (as of {duration(silent_s)} ago)" if not state.is_over else ""
        lines.append(f"  {pace_words(speed)}{ago}")
    if attempt is not None and attempt.last is not None:
        known = attempt.stragglers
        lines += [f"  slow: {known.get(rank, f'rank {rank}')}" for rank in attempt.last.stragglers[:_MAX_ATTEMPTS]]
    if run.num_restarts:
        lines.append(f"  {counted(run.num_restarts, 'restart')}")
        failed = [each for each in run.attempts if each.failure is not None]
        lines += [f"  attempt {each.number}: {each.failure}" for each in failed[-3:]]
    elif attempt is not None and attempt.failure is not None:
        lines.append(f"  {attempt.failure}")
    if attempt is not None and attempt.failure is not None and attempt.failure.log:
        lines.append(f"  log {attempt.failure.log}")
    return "\n".join(lines)


def report_text(run: RunRecord, state: State, good: Goodput) -> str:
    """The whole account."""
    hosts = sorted({host for attempt in run.attempts for host in attempt.hosts})
    ranks = run.attempts[-1].num_ranks if run.attempts else 0
    where = f"{counted(ranks, 'rank')} on {counted(len(hosts), 'node')}" if hosts else run.cluster
    lines = [
        f"{run.run_dir}: {state.words}",
        f"  began {clock(run.began_wall_s)}; {duration(good.total_s)}; {where}; {counted(len(run.attempts), 'attempt')}",
        "",
        goodput_words(run, good),
    ]
    for kind, share in good.shares.items():
        bar = "█" * round(share * _BAR)
        lines.append(
            f"  {NAMES[kind]:<10}{percent(share):>7} {duration(good.seconds[kind]):>13}  {bar:<{_BAR}}  {MEANINGS[kind]}"
        )
        if kind == RESTART and good.redone_s:
            redone = f"{counted(good.redone_steps, 'step')} made a second time, {duration(good.redone_s)}"
            lines.append(f"  {'':<10}{'':>7} {'':>13}  {'':<{_BAR}}  (of it {redone})")
    lines += ["", *_attempt_lines(run)]
    if run.node_events:
        lines += ["", "nodes"]
        lines += [
            f"  {clock(run.began_wall_s + event.at_s)}  {event.text}" for event in run.node_events[-_MAX_ATTEMPTS:]
        ]
    return "\n".join(lines).rstrip()


def _attempt_lines(run: RunRecord) -> list[str]:
    lines = ["attempts"] if run.attempts else ["no attempt has begun"]
    hidden = len(run.attempts) - _MAX_ATTEMPTS
    if hidden > 0:
        lines.append(f"  … the first {hidden} are left out here (--json has them all)")
    for attempt in run.attempts[-_MAX_ATTEMPTS:]:
        speed = whole_pace(attempt)
        told = pace_words(speed) if speed else f"{attempt.steps} steps" if attempt.steps else "no step seen"
        lines.append(
            f"  {attempt.number:>3}  {clock(run.began_wall_s + attempt.began_s)}  {counted(attempt.num_ranks, 'rank')}; {told}"
        )
        end = how_ended(attempt)
        if end:
            lines.append(f"       {end}")
        if attempt.failure is not None and attempt.failure.log:
            lines.append(f"       log {attempt.failure.log}")
        lines += [f"       slow: {straggler}" for straggler in attempt.stragglers.values()][:_MAX_ATTEMPTS]
    return lines


def goodput_words(run: RunRecord, good: Goodput) -> str:
    """The headline. A program whose steps cannot be seen may have trained all the time: then it is not 0."""
    if run.has_steps:
        return f"goodput {percent(good.shares['steps'])}"
    return "goodput unknown: no optimizer step was seen, so the running time is other"


def how_ended(attempt: Attempt) -> str:
    """Why it ended; empty for one that goes on, or that simply is done."""
    if attempt.failure is not None:
        return f"{attempt.failure}"
    return f"ended: {attempt.why_stopped}" if attempt.why_stopped else ""
