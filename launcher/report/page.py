"""A run as one page that carries everything it needs: numbers, plots, attempts, failures with their tracebacks. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from launcher.messages import duration
from launcher.report.goodput import KINDS, Goodput, Piece
from launcher.report.pace import pace, whole_pace
from launcher.report.plot import Band, lines, timeline
from launcher.report.record import Attempt, RunRecord
from launcher.report.state import State
from launcher.report.text import MEANINGS, NAMES, goodput_words, how_ended
from launcher.report.words import clock, counted, pace_words, percent

_MAX_TRACEBACKS = 20
# Okabe and Ito's colours: apart for every kind of sight.
_COLOURS = {
    "start": "#56b4e9", "steps": "#009e73", "data_wait": "#e69f00", "hang": "#cc79a7", "restart": "#d55e00", "other": "#999999",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8888; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--ink); }
.grid, .axis { stroke: var(--faint); stroke-width: 1; } .line { fill: none; stroke: #0072b2; stroke-width: 1.6; } .mark { fill: #d00; }
pre { overflow-x: auto; background: #8881; padding: .8rem; } .bad { color: #c00; font-weight: 600; } .note { opacity: .75; }
"""  # noqa: E501


def page(run: RunRecord, state: State, good: Goodput) -> str:
    """The whole document."""
    colours = "".join(f".k-{kind} {{ fill: {colour}; background: {colour}; }}\n" for kind, colour in _COLOURS.items())
    body = "\n".join(
        (*_head(run, state, good), *_goodput(run, good), *_plots(run, good), *_attempts(run), *_nodes(run))
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(run.run_dir.rpartition("/")[2])}: {_e(state.words)}</title><style>{_STYLE}{colours}</style></head><body>
{body}
</body></html>
"""


def _head(run: RunRecord, state: State, good: Goodput) -> Iterator[str]:
    is_bad = state.is_over and state.stands.value != "done"
    yield f"<h1>{_e(run.run_dir)}</h1>"
    yield f'<p><span class="{"bad" if is_bad else ""}">{_e(state.words)}</span><br>'
    yield f"began {clock(run.began_wall_s)}, {duration(good.total_s)} {'in all' if state.is_over else 'so far'}; {_e(run.cluster)}; "
    yield f"{counted(len(run.attempts), 'attempt')}</p>"
    speed = (whole_pace if state.is_over else pace)(run.attempt) if run.attempt is not None else None
    if speed is not None:
        yield f"<p>{_e(pace_words(speed))}</p>"
    if run.argv:
        yield f"<p class=note><code>{_e(' '.join(run.argv[1:]))}</code></p>"


def _goodput(run: RunRecord, good: Goodput) -> Iterator[str]:
    yield f"<h2>{goodput_words(run, good).capitalize()}</h2>"
    bands = [Band(begin_s, end_s, kind, _words(kind, end_s - begin_s)) for begin_s, end_s, kind in _merged(good.pieces)]
    marks = [(attempt.failure.at_s, str(attempt.failure)) for attempt in run.attempts if attempt.failure]
    yield timeline(bands, marks, good.total_s)
    yield "<table>"
    for kind in KINDS:
        yield (
            f'<tr><td><span class="key k-{kind}"></span>{NAMES[kind]}</td><td class=n>{percent(good.shares[kind])}</td>'
            f"<td class=n>{duration(good.seconds[kind])}</td><td>{MEANINGS[kind]}</td></tr>"
        )
    yield "</table>"
    if good.redone_s:
        redone = f"{counted(good.redone_steps, 'step')} made a second time, {duration(good.redone_s)}"
        yield f"<p class=note>Of restart: {redone}. The timeline shows them where they were made first, as steps.</p>"


def _merged(pieces: Sequence[Piece]) -> list[tuple[float, float, str]]:
    """Neighbours of one kind as one: a month has tens of thousands."""
    found: list[tuple[float, float, str]] = []
    for piece in pieces:
        if found and found[-1][2] == piece.kind:
            found[-1] = (found[-1][0], piece.end_s, piece.kind)
        else:
            found.append((piece.begin_s, piece.end_s, piece.kind))
    return found


def _words(kind: str, seconds: float) -> str:
    return f"{NAMES[kind]}, {duration(seconds)}"


def _plots(run: RunRecord, good: Goodput) -> Iterator[str]:
    progress = [
        [(point.at_s, float(point.done_steps + point.steps)) for point in attempt.points if point.steps]
        for attempt in run.attempts
    ]
    rates = [list(_rates(attempt)) for attempt in run.attempts]
    has_samples = any(point.samples for attempt in run.attempts for point in attempt.points)
    unit = "samples/s" if has_samples else "steps/s"
    plots = (
        ("Steps", lines(progress, good.total_s, "Steps of the job over time")),
        (f"Speed ({unit})", lines([[(x, y) for x, y, _ in rate] for rate in rates], good.total_s, f"{unit} over time")),
        (
            "Data wait (share of the time)",
            lines([[(x, y) for x, _, y in rate] for rate in rates], good.total_s, "Data wait over time", is_share=True),
        ),
    )
    for title, plot in plots:
        if plot:
            yield f"<h2>{title}</h2>{plot}"


def _rates(attempt: Attempt) -> Iterator[tuple[float, float, float]]:
    """When, how fast, and which share of the time was waited for data, between two points that have steps between them."""
    stepped = [point for point in attempt.points if point.steps]
    has_samples = any(point.samples for point in stepped)
    before = stepped[0] if stepped else None
    for point in stepped[1:]:
        assert before is not None
        took_s, num_steps = point.step_at_s - before.step_at_s, (point.steps or 0) - (before.steps or 0)
        if took_s <= 0 or num_steps <= 0:
            continue
        amount = (point.samples or 0) - (before.samples or 0) if has_samples else num_steps
        wait = min(1.0, max(0.0, point.waited_s - before.waited_s) / took_s)
        yield point.at_s, max(0.0, amount / took_s), wait
        before = point


def _attempts(run: RunRecord) -> Iterator[str]:
    yield "<h2>Attempts</h2><table><tr><th>#</th><th>began</th><th>ranks</th><th>progress</th><th>end</th></tr>"
    for attempt in run.attempts:
        speed = whole_pace(attempt)
        told = pace_words(speed) if speed else f"{attempt.steps} steps" if attempt.steps else "no step seen"
        yield (
            f"<tr><td>{attempt.number}</td><td>{clock(run.began_wall_s + attempt.began_s)}</td><td>{attempt.num_ranks}</td>"
            f"<td>{_e(told)}</td><td>{_e(how_ended(attempt))}{_slow(attempt)}</td></tr>"
        )
    yield "</table>"
    failed = [attempt for attempt in run.attempts if attempt.failure is not None and attempt.failure.traceback]
    for attempt in failed[-_MAX_TRACEBACKS:]:
        assert attempt.failure is not None
        yield f"<h2>Attempt {attempt.number}: {_e(str(attempt.failure))}</h2>"
        yield f"<pre>{_e(attempt.failure.traceback)}</pre><p class=note>{_e(attempt.failure.log)}</p>"


def _slow(attempt: Attempt) -> str:
    return "".join(f"<br>slow: {_e(str(straggler))}" for straggler in attempt.stragglers.values())


def _nodes(run: RunRecord) -> Iterator[str]:
    if run.node_events:
        yield "<h2>Nodes</h2><table>"
        for event in run.node_events:
            yield f"<tr><td>{clock(run.began_wall_s + event.at_s)}</td><td>{_e(event.text)}</td></tr>"
        yield "</table>"


def _e(text: str) -> str:
    return html.escape(text)
