"""Numbers as people read them. Pure, and light: the live line is part of every start."""

from __future__ import annotations

import time

from launcher.report.pace import Pace


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
