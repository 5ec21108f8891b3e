"""Was every sample handed out exactly once in each epoch, through failures, resumes and resizing? Pure: records → a verdict.

A *stretch* is what one start of a job did from a place on, without a jump. A stretch that begins at a place makes void what earlier
stretches did from that place on: the model forgot it when it was loaded from the checkpoint. What is left is the history of the model;
it is compared, step by step and sample by sample, with the order, which is a function of what the records' heads say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from cache.order.batches import Cursor
from cache.order.mixing import Mixture
from cache.order.permutation import Indices
from cache.order.schedule import Schedule, parse_shuffle, shuffle_name

MAX_NAMED = 5
"""Of each kind of finding in an epoch, so many samples or steps are named; all are counted."""


def order_to_json(order: Schedule | Mixture) -> dict[str, Any]:
    """All that an order is made of, JSON-able; `order_from_json` is the inverse."""
    common = {"global_batch_size": order.global_batch_size, "seed": order.seed, "shuffle": shuffle_name(order.shuffle)}
    if isinstance(order, Mixture):
        weights = [str(share) for share in order.shares]
        parts = [_run_lengths(sizes) for sizes in order.part_sizes]
        return {**common, "mixture": parts, "weights": weights, "epoch_samples": order.plan.num_samples}
    return {**common, "shards": _run_lengths(order.shard_sizes), "drop_last": order.drop_last}


def order_from_json(data: dict[str, Any]) -> Schedule | Mixture:
    """ValueError or KeyError for what is no order."""
    shuffle = parse_shuffle(data["shuffle"])
    if "mixture" in data:
        sizes = tuple(_from_run_lengths(parts) for parts in data["mixture"])
        weights = tuple(Fraction(weight) for weight in data["weights"])
        return Mixture(sizes, weights, data["global_batch_size"], data["seed"], shuffle, data["epoch_samples"])
    shards = _from_run_lengths(data["shards"])
    return Schedule(shards, data["global_batch_size"], data["seed"], shuffle, data["drop_last"])


@dataclass
class Stretch:
    """What all ranks of one start recorded from one place on."""

    start: str
    """Names the start; later starts sort later."""
    number: int
    """Of the stretches of this start."""
    world_size: int
    begin: Cursor
    steps: dict[Cursor, dict[int, Indices]] = field(default_factory=dict)
    """Place → rank → the samples that it was handed."""

    def __str__(self) -> str:
        return f"start {self.start}" + (f", resumed {self.number} times" if self.number else "")


@dataclass(frozen=True)
class Epoch:
    """What is known of one epoch of the history."""

    epoch: int
    num_steps: int
    of_steps: int
    num_samples: int
    """Different ones."""
    world_sizes: tuple[int, ...]
    is_finished: bool


@dataclass(frozen=True)
class Verdict:
    findings: tuple[str, ...]
    """What is wrong, a sentence each; empty: every sample exactly once."""
    epochs: tuple[Epoch, ...]
    num_void: int
    """Steps that were done again after a resume."""
    notes: tuple[str, ...]
    """What is not wrong but should be known."""


def judge(order: Schedule | Mixture, stretches: Sequence[Stretch]) -> Verdict:
    """Compares what was handed out with the order. `stretches` in any order; at least one with a step."""
    history, num_void = _history(order, stretches)
    if not history:
        return Verdict(("no step was recorded",), (), num_void, ())
    first, last = min(history), max(history)
    findings: list[str] = []
    notes: list[str] = []
    if first != Cursor(0, 0):
        notes.append(
            f"the records begin at epoch {first.epoch}, step {first.step}: nothing is known of what was before"
        )
    is_torn = len(history[last].ranks) < history[last].stretch.world_size
    if is_torn:
        # A job that ended in mid-step, not one that went on without a rank's part.
        notes.append(
            f"epoch {last.epoch}, step {last.step}, the last one, was handed to {len(history[last].ranks)} of "
            f"{history[last].stretch.world_size} ranks: it is left out"
        )
        del history[last]
    epochs = []
    for epoch in range(first.epoch, last.epoch + 1):
        begin = first.step if epoch == first.epoch else 0
        end = order.plan.num_steps if epoch < last.epoch else last.step + (0 if is_torn else 1)
        if end > begin:
            epochs.append(_judge_epoch(order, history, epoch, range(begin, end), findings))
    return Verdict(tuple(findings), tuple(epochs), num_void, tuple(notes))


@dataclass(frozen=True)
class _Step:
    stretch: Stretch
    ranks: dict[int, Indices]


def _history(order: Schedule | Mixture, stretches: Sequence[Stretch]) -> tuple[dict[Cursor, _Step], int]:
    """The steps that made the model, and how many did not."""
    history: dict[Cursor, _Step] = {}
    num_void = 0
    for stretch in sorted(stretches, key=lambda stretch: (stretch.start, stretch.number)):
        begin = order.plan.normalised(stretch.begin)
        void = [place for place in history if place >= begin]
        num_void += len(void)
        for place in void:
            del history[place]
        history |= {place: _Step(stretch, ranks) for place, ranks in stretch.steps.items()}
    return history, num_void


def _judge_epoch(
    order: Schedule | Mixture, history: dict[Cursor, _Step], epoch: int, steps: range, findings: list[str]
) -> Epoch:
    found = {step: history[Cursor(epoch, step)] for step in steps if Cursor(epoch, step) in history}
    missing = [step for step in steps if step not in found]
    if missing:
        findings.append(f"epoch {epoch}: {_steps(missing)} never handed out{_gap(found, missing[0])}")
    torn = [step for step, record in found.items() if len(record.ranks) < record.stretch.world_size]
    if torn:
        record = found[torn[0]]
        absent = sorted(set(range(record.stretch.world_size)) - set(record.ranks))
        findings.append(
            f"epoch {epoch}: {_steps(torn)} without the records of some ranks; step {torn[0]} lacks {_few('rank', absent)} of "
            f"{record.stretch}"
        )
    seen = _samples(part for record in found.values() for part in record.ranks.values())
    expected_at = {step: order.global_batch(Cursor(epoch, step)) for step in steps}
    expected = _samples(expected_at.values())
    size = int(max(seen.max(initial=-1), expected.max(initial=-1))) + 1
    too_few = np.bincount(expected, minlength=size) - np.bincount(seen[seen >= 0], minlength=size)
    for sample in np.flatnonzero(too_few > 0)[:MAX_NAMED].tolist():
        should = next(step for step, batch in expected_at.items() if sample in batch)
        findings.append(f"epoch {epoch}: sample {sample} was lost; it belongs to step {should}{_who(found, should)}")
    findings.extend(
        f"epoch {epoch}: sample {sample} was {_doubled(found, expected, sample)}"
        for sample in np.flatnonzero(too_few < 0)[:MAX_NAMED].tolist()
    )
    lost, doubled = int(too_few[too_few > 0].sum()), int(-too_few[too_few < 0].sum())
    if lost > MAX_NAMED or doubled > MAX_NAMED:
        findings.append(f"epoch {epoch}: {lost} lost and {doubled} too many in all")
    if not lost and not doubled:
        moved = [
            step
            for step, record in found.items()
            if not np.array_equal(_whole(record), expected_at[step]) and step not in torn
        ]
        if moved:
            findings.append(
                f"epoch {epoch}: {_steps(moved)} with other samples than the order says, though each came once"
            )
    worlds = tuple(sorted({record.stretch.world_size for record in found.values()}))
    is_finished = len(found) == order.plan.num_steps and not torn
    return Epoch(epoch, len(found), order.plan.num_steps, len(np.unique(seen)), worlds, is_finished)


def _whole(record: _Step) -> Indices:
    """The global batch: the ranks' slices, in order."""
    return np.concatenate([record.ranks[rank] for rank in sorted(record.ranks)])


def _samples(parts: Iterable[Indices]) -> Indices:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _doubled(found: dict[int, _Step], expected: Indices, sample: int) -> str:
    places = [
        f"step {step}, rank {rank} ({record.stretch})"
        for step, record in found.items()
        for rank, samples in record.ranks.items()
        for _ in range(int((samples == sample).sum()))
    ]
    if sample not in expected:
        return f"handed out, and does not belong to these steps: {'; '.join(places[:3])}"
    return f"handed out {len(places)} times: {'; '.join(places[:3])}"


def _who(found: dict[int, _Step], step: int) -> str:
    return f", which {found[step].stretch} recorded without it" if step in found else ", which is missing"


def _gap(found: dict[int, _Step], first_missing: int) -> str:
    """Between whom the steps are missing."""
    before = max((step for step in found if step < first_missing), default=None)
    after = min((step for step in found if step > first_missing), default=None)
    text = "" if before is None else f" after step {before} of {found[before].stretch}"
    return text + ("" if after is None else f", before step {after} of {found[after].stretch}")


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]} was" if len(steps) == 1 else f"{len(steps)} steps, from {steps[0]} on, were"


def _few(noun: str, numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:MAX_NAMED]))
    return f"{noun}{'s' if len(numbers) > 1 else ''} {text}{', …' if len(numbers) > MAX_NAMED else ''}"


def _run_lengths(sizes: Sequence[int]) -> list[list[int]]:
    """
    >>> _run_lengths([5, 5, 3])
    [[5, 2], [3, 1]]
    """
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([int(size), 1])
    return runs


def _from_run_lengths(runs: list[list[int]]) -> tuple[int, ...]:
    return tuple(size for size, count in runs for _ in range(count))
