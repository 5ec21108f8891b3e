"""The gang's progress as one value, from what is seen of its ranks. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.gang.observations import RankSample


@dataclass(frozen=True)
class GangProgress:
    """How far an attempt is. Journalled at a low rate; what people see is made of it."""

    attempt: int
    num_ranks: int
    num_alive: int
    steps: int | None = None
    """Optimizer steps that every rank that has any has made. None: unknown."""
    waited_s: float = 0.0
    """Time that a rank waited for data so far, on average."""
    samples: int | None = None
    """Samples of all ranks so far."""
    total_steps: int | None = None
    done_steps: int = 0
    """As the script has said (`expect_steps`)."""
    stragglers: tuple[int, ...] = ()
    hung: tuple[int, ...] = ()
    """Ranks that are named as holding up the job."""
    is_paused: bool = False
    step_s: float | None = None
    """How long the last step took, on the rank in the middle."""
    step_age_s: float | None = None
    """Since a step ended on any rank."""


def tally(
    attempt: int,
    num_ranks: int,
    samples: Sequence[RankSample],
    stragglers: Sequence[int] = (),
    hung: Sequence[int] = (),
) -> GangProgress:
    """
    >>> seen = tally(0, 2, [RankSample(0, 9.0, steps=5, samples=40, step_s=0.2), RankSample(1, 9.0, steps=4, samples=32, step_s=0.4)])
    >>> seen.steps, seen.samples, round(seen.step_s, 3), seen.num_alive, seen.total_steps
    (4, 72, 0.3, 2, None)
    """
    stepping = [sample for sample in samples if sample.steps is not None]
    counted = [sample.samples for sample in stepping if sample.samples is not None]
    durations = [sample.step_s for sample in stepping if sample.step_s is not None]
    return GangProgress(
        attempt,
        num_ranks,
        len(samples),
        min((sample.steps or 0 for sample in stepping), default=None),
        statistics.fmean(sample.waited_s for sample in samples) if samples else 0.0,
        sum(counted) if counted else None,
        max((sample.total_steps or 0 for sample in samples), default=0) or None,
        max((sample.done_steps for sample in samples), default=0),
        tuple(sorted(stragglers)),
        tuple(sorted(hung)),
        any(sample.paused_s is not None for sample in samples),
        statistics.median(durations) if durations else None,
        min((sample.step_age_s for sample in stepping if sample.step_age_s is not None), default=None),
    )
