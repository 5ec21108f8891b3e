"""What the machine says, and how it names an event in its story."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from launcher.errors import InvalidTransition
from launcher.gang.events import Fact, NodeDraining
from launcher.spec import SecondSignal


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


def stopping_others(num_others: int, signum: int, grace_s: float) -> str:
    """
    >>> stopping_others(0, 15, 30.0), stopping_others(1, 15, 0.0), stopping_others(7, 15, 30.0)
    ('', 'stopping the other rank (SIGKILL)', 'stopping the other 7 ranks (SIGTERM, SIGKILL after 30 s)')
    """
    if not num_others:
        return ""
    who = "rank" if num_others == 1 else f"{num_others} ranks"
    return f"stopping the other {who} ({how_stopped(signum, grace_s)})"


def some_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """
    >>> some_ranks([3]), some_ranks([0, 1, 2, 5]), some_ranks(range(0, 40, 2))
    ('rank 3', 'ranks 0-2, 5', 'ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more')
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most])
    rest = sum(len(run) for run in runs[most:])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f" and {rest} more" if rest else "")


def in_time(event: NodeDraining) -> str:
    """
    >>> in_time(NodeDraining("n", "spot", 119.6, 0.0)), in_time(NodeDraining("n", "spot", None, 0.0))
    (', in 120 s', '')
    """
    return "" if event.deadline_in_s is None else f", in {event.deadline_in_s:.0f} s"


def how_many_saved(num_saved: int, num_to_save: int) -> str:
    """
    >>> how_many_saved(4, 4), how_many_saved(1, 4), how_many_saved(0, 4)
    ('all 4 ranks have saved their state', '1 of 4 ranks have saved their state', '')
    """
    if not num_saved:
        return ""
    return f"{f'all {num_saved}' if num_saved == num_to_save else f'{num_saved} of {num_to_save}'} ranks have saved their state"


def illegal_move(state_name: str, event: Fact, whither: str, story: Sequence[str]) -> InvalidTransition:
    """What the machine raises when its table has no such move."""
    so_far = "\n  ".join(story) or "(nothing yet)"
    return InvalidTransition(
        f"{state_name} cannot take {describe(event)} {whither}".rstrip() + f"; the story so far:\n  {so_far}",
        advice="this is a fault in the launcher: please report it with the journal of the run",
    )


SECOND_SIGNAL = {
    SecondSignal.KILL: "a second signal kills at once",
    SecondSignal.FORWARD: "further signals are handed on to them",
    SecondSignal.IGNORE: "further signals are ignored",
}


def stopping_for_signal(signum: int, grace_s: float, rule: SecondSignal) -> str:
    """Of the first signal."""
    return f"{signal.Signals(signum).name}: stopping all ranks ({how_stopped(signum, grace_s)}; {SECOND_SIGNAL[rule]})"


def stopping_already(signum: int, rule: SecondSignal) -> str:
    """Of a signal that comes while ranks save for another reason."""
    return f"{signal.Signals(signum).name}: ranks are being stopped already; {SECOND_SIGNAL[rule]}"


def how_second_was_taken(signum: int, rule: SecondSignal, left_s: float) -> str:
    """
    >>> how_second_was_taken(10, SecondSignal.FORWARD, 21.4)
    'SIGUSR1: handed on to the ranks, which are killed in 21 s (--second-signal forward)'
    """
    how = "handed on to" if rule is SecondSignal.FORWARD else "ignored; it is not sent to"
    return f"{signal.Signals(signum).name}: {how} the ranks, which are killed in {left_s:.0f} s (--second-signal {rule.value})"
