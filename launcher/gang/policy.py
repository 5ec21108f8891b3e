"""What a failure leads to: which one was first, whether the gang starts again, how soon, and with which exit code it ends."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import EXIT_NODE_LOST, EXIT_SIGNAL_BASE
from launcher.gang.events import Failure, RankExited
from launcher.spec import RestartBudget

_QUICK_S = 30.0
"""An attempt that lived shorter than this may fail again at once, so the next but one waits."""
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0
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


def root_cause(failures: Sequence[Failure], num_before_stop: int = 1) -> Failure:
    """The earliest failure. The first `num_before_stop` were known before we stopped the gang; of the later ones, those that died by a
    signal that we send are our own doing, whatever their clocks say."""
    candidates = [
        failure
        for idx, failure in enumerate(failures)
        if idx < num_before_stop or not (isinstance(failure, RankExited) and failure.status.signum in _OUR_SIGNALS)
    ]
    return min(candidates, key=happened_at_s)


def exit_code_of(failure: Failure) -> int:
    """The rank's own code, 128 + n for a signal; EXIT_NODE_LOST for what was not a rank's doing."""
    return failure.status.exit_code if isinstance(failure, RankExited) else EXIT_NODE_LOST


def after_failure(
    budget: RestartBudget, num_restarts: int, num_quick: int, root: Failure, interrupted_by: int | None
) -> Decision:
    """num_restarts: spent so far. num_quick: attempts in a row, this one included, that lived less than `is_quick` allows."""
    if interrupted_by is not None:
        return GiveUp(exit_code_of(root), f"no restart: {signal.Signals(interrupted_by).name} was sent to the launcher")
    if budget.max_restarts == 0:
        return GiveUp(exit_code_of(root), "no restart: --max-restarts is 0")
    if num_restarts >= budget.max_restarts:
        return GiveUp(exit_code_of(root), f"no restart left: --max-restarts {budget.max_restarts} are spent")
    delay_s = 0.0 if num_quick < 2 else min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** (num_quick - 2))
    wait = f" in {delay_s:g} s, because the last {num_quick} attempts failed early" if delay_s else ""
    return Restart(delay_s, f"restart {num_restarts + 1} of {budget.max_restarts}{wait}")


def is_quick(lived_s: float) -> bool:
    return lived_s < _QUICK_S


def after_interrupt(signum: int) -> GiveUp:
    return GiveUp(EXIT_SIGNAL_BASE + signum, f"stopped by {signal.Signals(signum).name}")
