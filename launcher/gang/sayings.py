"""What the machine says, and how it names an event in its story."""

from __future__ import annotations

import signal

from launcher.gang.events import Fact, NodeDraining


def describe(event: Fact) -> str:
    """One short line for the story."""
    names = ("attempt", "node_id", "rank", "status", "signum", "reason")
    details = [f"{name}={getattr(event, name)}" for name in names if hasattr(event, name)]
    return f"{type(event).__name__}({', '.join(details)})"


def how_stopped(signum: int, grace_s: float) -> str:
    """
    >>> how_stopped(15, 30.0), how_stopped(15, 0.0)
    ('SIGTERM, SIGKILL after 30 s', 'SIGKILL')
    """
    return f"{signal.Signals(signum).name}, SIGKILL after {grace_s:g} s" if grace_s else "SIGKILL"


def in_time(event: NodeDraining) -> str:
    """
    >>> in_time(NodeDraining("n", "spot", 119.6, 0.0)), in_time(NodeDraining("n", "spot", None, 0.0))
    (', in 120 s', '')
    """
    return "" if event.deadline_in_s is None else f", in {event.deadline_in_s:.0f} s"
