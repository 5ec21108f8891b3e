"""Who makes the others wait, step by step, without ever stopping: a hot GPU, a slow disk, a noisy neighbour. Pure.

In a synchronous job all steps take the same time, for everybody waits. What differs is the time of a rank's own: between the end of a
step and the next call of backward nobody waits for anybody. A rank whose own time is well above the others', for minutes, is named. (On
a GPU that time is that of the host: a straggling kernel is not seen here.)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.gang.observations import RankSample

WINDOW_S = 30.0
NUM_WINDOWS = 4
"""In a row: two minutes."""
_MIN_STEPS = 10
_FACTOR = 1.5
_MIN_SHARE = 0.1
"""Of a step. Less costs less than it takes to read about it."""


@dataclass(frozen=True)
class Straggling:
    """This rank takes `own_s` of its own in each step of `step_s`, the others `others_s` in the middle."""

    rank: int
    own_s: float
    others_s: float
    step_s: float
    is_data: bool
    """Most of the difference is time that it waits for its data loader."""
    has_ended: bool = False
    """It straggles no more."""


@dataclass(frozen=True)
class _Mark:
    steps: int
    own_s: float
    waited_s: float


class Stragglers:
    """One attempt."""

    def __init__(self) -> None:
        self._last: dict[int, RankSample] = {}
        self._marks: dict[int, _Mark] = {}
        self._window_began_s: float | None = None
        self._num_slow: dict[int, int] = {}
        self.named: dict[int, Straggling] = {}

    def see(self, samples: Sequence[RankSample], now: float) -> None:
        for sample in samples:
            if sample.steps:
                self._last[sample.rank] = sample
        if self._window_began_s is None and self._last:
            self._window_began_s = now

    def judge(self, now: float) -> Sequence[Straggling]:
        """At the end of each window: who has straggled for long, and who no longer does."""
        if self._window_began_s is None or now - self._window_began_s < WINDOW_S:
            return ()
        seconds, self._window_began_s = now - self._window_began_s, now
        marks = {rank: _Mark(sample.steps or 0, sample.own_s, sample.waited_s) for rank, sample in self._last.items()}
        before, self._marks = self._marks, marks
        gone_by = {
            rank: _Mark(mark.steps - old.steps, mark.own_s - old.own_s, mark.waited_s - old.waited_s)
            for rank, mark in marks.items()
            if (old := before.get(rank)) is not None
        }
        if len(gone_by) < 2 or any(mark.steps < _MIN_STEPS for mark in gone_by.values()):
            self._num_slow.clear()
            return ()
        return self._compare(gone_by, seconds)

    def _compare(self, gone_by: dict[int, _Mark], seconds: float) -> Sequence[Straggling]:
        own_s = {rank: mark.own_s / mark.steps for rank, mark in gone_by.items()}
        wait_s = {rank: mark.waited_s / mark.steps for rank, mark in gone_by.items()}
        step_s = seconds / statistics.median(mark.steps for mark in gone_by.values())
        found = []
        ordered = sorted(own_s.values())
        for rank, own in own_s.items():
            others_s = _median_without(ordered, own)
            is_slow = own > _FACTOR * others_s and own - others_s > _MIN_SHARE * step_s
            self._num_slow[rank] = self._num_slow.get(rank, 0) + 1 if is_slow else 0
            if self._num_slow[rank] >= NUM_WINDOWS and rank not in self.named:
                others_wait_s = _median_without(sorted(wait_s.values()), wait_s[rank])
                is_data = wait_s[rank] - others_wait_s > 0.5 * (own - others_s)
                self.named[rank] = Straggling(rank, own, others_s, step_s, is_data)
                found.append(self.named[rank])
            elif not is_slow and rank in self.named:
                del self.named[rank]
                found.append(Straggling(rank, own, others_s, step_s, False, has_ended=True))
        return found


def _median_without(ordered: Sequence[float], value: float) -> float:
    rest = list(ordered)
    rest.remove(value)
    return statistics.median(rest)
