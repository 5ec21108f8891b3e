"""What a failure leads to: which one was first, whether the gang starts again, how soon, and with which exit code it ends."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import (
    EXIT_CRASH_LOOP,
    EXIT_HUNG,
    EXIT_NODE_LOST,
    EXIT_REFUSED,
    EXIT_RESUMABLE,
    EXIT_SIGNAL_BASE,
)
from launcher.gang.causes import died_of_us, is_secondhand
from launcher.gang.events import Failure, NodeLost, RankExited, RankHung
from launcher.spec import RestartBudget

_QUICK_S = 30.0
"""An attempt that lived shorter than this, and of whose steps nothing is known, may fail again at once, so the next but one waits."""
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0
_HUNG_GRACE_S = 5.0
"""A gang that stands still cannot save anything together: waiting longer helps nobody."""
_OUR_SIGNALS = (signal.SIGTERM, signal.SIGKILL)


@dataclass(frozen=True)
class Restart:
    """Start again after `delay_s`."""

    delay_s: float
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """End the job with this code."""

    exit_code: int
    reason: str


Decision = Restart | GiveUp


def happened_at_s(failure: Failure) -> float:
    """When it went wrong. An exception is older than the exit that it leads to: clean-up takes time, and peers fail meanwhile."""
    if isinstance(failure, RankExited) and failure.exception is not None and failure.exception.at_s > 0:
        return min(failure.exception.at_s, failure.at_s)
    return failure.at_s


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is more than the loss of a peer. The first made us stop the gang; of the later ones, those that died by
    a signal that we send are our own doing, whatever their clocks say."""
    candidates = [failure for failure in failures if not died_of_us(failure, failures[0])]
    return min([failure for failure in candidates if not is_secondhand(failure)] or candidates, key=happened_at_s)


def exit_code_of(failure: Failure) -> int:
    """The rank's own code, 128 + n for a signal; EXIT_HUNG; EXIT_NODE_LOST for what was not a rank's doing. An exception ends a rank with
    1, also where our signal was quicker than its clean-up."""
    if isinstance(failure, RankHung):
        return EXIT_HUNG
    if not isinstance(failure, RankExited):
        return EXIT_NODE_LOST
    if failure.exception is not None and failure.status.signum in _OUR_SIGNALS:
        return 1
    return failure.status.exit_code


def grace_after(failure: Failure, grace_s: float) -> float:
    """How long the others have to end."""
    return min(grace_s, _HUNG_GRACE_S) if isinstance(failure, RankHung) else grace_s


def after_failure(
    budget: RestartBudget, num_restarts: int, num_stuck: int, root: Failure, interrupted_by: int | None, is_free: bool
) -> Decision:
    """num_restarts: spent so far. num_stuck: attempts in a row, this one included, that made no progress. is_free: a node
    was lost and a spare takes its place, which is what spares are for."""
    if interrupted_by is not None:
        return GiveUp(exit_code_of(root), f"no restart: {signal.Signals(interrupted_by).name} was sent to the launcher")
    if is_free:
        return Restart(0.0, "restart with a spare node, at no cost to --max-restarts")
    if isinstance(root, RankHung) and not root.may_restart:
        return GiveUp(EXIT_HUNG, "no restart: --on-hang stop")
    if budget.max_restarts == 0:
        return GiveUp(exit_code_of(root), "no restart: --max-restarts is 0")
    if num_restarts >= budget.max_restarts:
        return GiveUp(exit_code_of(root), f"no restart left: --max-restarts {budget.max_restarts} are spent")
    if budget.crash_loop and num_stuck >= budget.crash_loop:
        return GiveUp(
            EXIT_CRASH_LOOP,
            f"the last {num_stuck} attempts made no progress, so another would not either (--crash-loop {budget.crash_loop}; 0: go on)",
        )
    delay_s = 0.0 if num_stuck < 2 else min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(num_stuck - 2, 10))
    wait = f" in {delay_s:g} s, because the last {num_stuck} attempts made no progress" if delay_s else ""
    return Restart(delay_s, f"restart {num_restarts + 1} of {budget.max_restarts}{wait}")


def after_preemption(budget: RestartBudget, num_preemptions: int, is_saved: bool) -> Decision:
    """Nodes were told to leave, and nothing runs any more."""
    if num_preemptions >= budget.max_preemptions:
        code = EXIT_RESUMABLE if is_saved else EXIT_NODE_LOST
        return GiveUp(code, f"nodes were told to leave, and --max-preemptions {budget.max_preemptions} are spent")
    return Restart(0.0, f"preemption {num_preemptions + 1}, at no cost to --max-restarts")


def made_progress(
    lived_s: float, root: Failure, steps: int | None, steps_before: int | None, *, has_stepped: bool
) -> bool:
    """Whether a failed attempt got somewhere, so that the next may as well. `steps`: optimizer steps that it made (None: none were seen);
    `steps_before`: the attempt before. `has_stepped`: an attempt of this job was seen to make steps.

    Where steps are seen they decide. An attempt without any has got nowhere, however long it loaded; a short one that ended after as many
    steps as the one before has met the same obstacle. Else its lifetime decides. The loss of a node says nothing about that.

    >>> from launcher.gang.events import NodeFailed
    >>> gone = NodeFailed(0, "n", "", 0.0)
    >>> made_progress(5.0, gone, 100, None, has_stepped=True), made_progress(5.0, gone, 100, 100, has_stepped=True)
    (True, False)
    >>> made_progress(300.0, gone, None, None, has_stepped=True), made_progress(300.0, gone, None, None, has_stepped=False)
    (False, True)
    """
    if isinstance(root, NodeLost):
        return True
    if has_stepped:
        return bool(steps) and (lived_s >= _QUICK_S or steps != steps_before)
    return lived_s >= _QUICK_S


def after_refusal(last_root: Failure | None, is_saved: bool) -> int:
    """The exit code where no nodes were given: nothing was started, or nothing can go on."""
    if is_saved:
        return EXIT_RESUMABLE
    return exit_code_of(last_root) if last_root else EXIT_REFUSED


def is_worth_telling(failure: Failure) -> bool:
    """Whether what went wrong while ranks were stopped is more than our own signals' doing."""
    return not (isinstance(failure, RankExited) and failure.status.signum in _OUR_SIGNALS)


def after_interrupt(signum: int, is_saved: bool = False) -> GiveUp:
    name = signal.Signals(signum).name
    if is_saved:
        return GiveUp(EXIT_RESUMABLE, f"stopped by {name}, and every rank has saved its state: run it again to go on")
    return GiveUp(EXIT_SIGNAL_BASE + signum, f"stopped by {name}")
