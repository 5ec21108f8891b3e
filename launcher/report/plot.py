"""Small plots as inline SVG: no script, no font, nothing fetched. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.report.words import about

WIDTH, LEFT, RIGHT = 960, 64, 16
_MIN_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0
_TIME_STEPS_S = (
    *(1.0, 2.0, 5.0, 10.0, 15.0, 30.0, _MIN_S, 2 * _MIN_S, 5 * _MIN_S, 10 * _MIN_S, 15 * _MIN_S, 30 * _MIN_S),
    *(_HOUR_S, 2 * _HOUR_S, 3 * _HOUR_S, 6 * _HOUR_S, 12 * _HOUR_S, _DAY_S),
)
_MAX_POINTS = 2000
"""A plot has a thousand columns; a month's journal has more points."""


@dataclass(frozen=True)
class Band:
    """A stretch of the time axis in a colour class, with words that show when it is pointed at."""

    begin_s: float
    end_s: float
    kind: str
    words: str


Line = Sequence[tuple[float, float]]


def timeline(bands: Sequence[Band], marks: Sequence[tuple[float, str]], end_s: float) -> str:
    """One row of coloured stretches; `marks` are moments (failures)."""
    parts = []
    for band in bands:
        x, right = _x(band.begin_s, end_s), _x(band.end_s, end_s)
        parts.append(
            f'<rect class="k-{band.kind}" x="{x:.1f}" y="4" width="{max(0.5, right - x):.1f}" height="32">{_title(band.words)}</rect>'
        )
    for at_s, words in marks:
        x = _x(at_s, end_s)
        parts.append(f'<path class="mark" d="M{x:.1f} 40 l-5 9 h10 z">{_title(words)}</path>')
    return _svg(72, [*parts, *_time_axis(end_s, 52)], "Where the time went")


def lines(series: Sequence[Line], end_s: float, label: str, *, is_share: bool = False) -> str:
    """Lines over time, one for each attempt, from 0 up; empty where there is nothing to draw."""
    thinned = [_thin(line) for line in series if len(line) > 1]
    if not thinned:
        return ""
    top = 1.0 if is_share else _nice_above(max(y for line in thinned for _, y in line))
    height, base = 180, 150
    parts = []
    for idx in range(5):
        y = base - (base - 10) * idx / 4
        value = top * idx / 4
        words = f"{value:.0%}".replace("%", " %") if is_share else f"{value:,.10g}"
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    for line in thinned:
        path = " ".join(f"{_x(x, end_s):.1f},{base - (base - 10) * min(y, top) / top:.1f}" for x, y in line)
        parts.append(f'<polyline class="line" points="{path}"/>')
    return _svg(height, [*parts, *_time_axis(end_s, base)], label)


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def _time_axis(end_s: float, y: float) -> list[str]:
    step_s = next((each for each in _TIME_STEPS_S if each >= end_s / 8), _nice_above(end_s / 8 / _DAY_S) * _DAY_S)
    ticks = [idx * step_s for idx in range(int(end_s / step_s) + 1)] if end_s > 0 else [0.0]
    parts = [f'<line class="axis" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>']
    for tick in ticks:
        x = _x(tick, end_s)
        parts.append(f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{about(tick) if tick else "0"}</text>')
    return parts


def _x(at_s: float, end_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (min(max(at_s / end_s, 0.0), 1.0) if end_s > 0 else 0.0)


def _title(words: str) -> str:
    return f"<title>{html.escape(words)}</title>"


def _thin(line: Line) -> Line:
    every = math.ceil(len(line) / _MAX_POINTS)
    return [*line[::every], line[-1]] if every > 1 else line


def _nice_above(value: float) -> float:
    """The next of 1, 2, 5 × a power of ten.

    >>> _nice_above(0.0), _nice_above(3.2), _nice_above(72)
    (1.0, 5.0, 100.0)
    """
    if not value > 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= value), 10.0 * power)
