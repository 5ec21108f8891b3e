"""`status` and `report` as text. Pure."""

from __future__ import annotations

import time

from launcher.messages import duration
from launcher.report.goodput import KINDS, RESTART, Goodput
from launcher.report.pace import Pace, pace, whole_pace
from launcher.report.record import Attempt, RunRecord
from launcher.report.state import State

NAMES = {kind: kind.replace("_", " ") for kind in KINDS}
MEANINGS = {
    "start": "until the first step",
    "steps": "training",
    "data_wait": "ranks waited for their data loaders",
    "hang": "no step, until it was found and ended",
    "restart": "from an attempt's end to the next one's first step",
    "other": "evaluation, checkpoints, what comes after the last step",
}
UNSEEN = "no optimizer step was seen in this run, so its running time is other"
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
        f"goodput {percent(good.shares['steps'])}",
    ]
    for kind, share in good.shares.items():
        bar = "█" * round(share * _BAR)
        lines.append(
            f"  {NAMES[kind]:<10}{percent(share):>7} {duration(good.seconds[kind]):>13}  {bar:<{_BAR}}  {MEANINGS[kind]}"
        )
        if kind == RESTART and good.redone_s:
            redone = f"{counted(good.redone_steps, 'step')} made a second time, {duration(good.redone_s)}"
            lines.append(f"  {'':<10}{'':>7} {'':>13}  {'':<{_BAR}}  (of it {redone})")
    if run.attempts and not run.has_steps:
        lines.append(f"  {UNSEEN}")
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


def how_ended(attempt: Attempt) -> str:
    """Why it ended; empty for one that goes on, or that simply is done."""
    if attempt.failure is not None:
        return f"{attempt.failure}"
    return f"ended: {attempt.why_stopped}" if attempt.why_stopped else ""


def pace_words(speed: Pace) -> str:
    """`step 1,234 of 10,000 · 3.2 steps/s · 205 samples/s · data wait 3 % · 46 min left`, of it what is known."""
    return " · ".join(pace_parts(speed))


def pace_parts(speed: Pace) -> list[str]:
    of = f" of {speed.total_steps:,}" if speed.total_steps is not None else ""
    parts = [f"step {speed.step:,}{of}"]
    if speed.samples_per_s is not None:
        parts.append(f"{figure(speed.samples_per_s)} samples/s")
    elif speed.steps_per_s is not None:
        parts.append(f"{figure(speed.steps_per_s)} steps/s")
    if speed.left_s is not None and speed.left_s > 0:
        parts.append(f"{about(speed.left_s)} left")
    if speed.wait_share is not None:
        parts.append(f"data wait {speed.wait_share:.0%}".replace("%", " %"))
    return parts


def about(seconds: float) -> str:
    """
    >>> about(42.3), about(754), about(200000), about(1e6)
    ('42 s', '13 min', '2 d 7 h', '11 d 13 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def figure(value: float) -> str:
    """
    >>> figure(0.1234), figure(3.456), figure(1234.5)
    ('0.12', '3.5', '1,234')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "rank"), counted(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def clock(wall_s: float) -> str:
    """Local time; the machine's zone is the reader's."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(max(wall_s, 0.0), 1e11)))
