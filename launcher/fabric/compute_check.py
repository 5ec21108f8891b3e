"""Judging how fast the nodes compute: processors, and GPUs where there are any. Pure.

Everyone does the same short piece of work. Who is far below the median does it again, and is named only if it is slow again: what else
ran for a moment on a node does not make it a slow node.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.fabric.findings import Finding, Severity
from launcher.fabric.preflight import SLOW, outliers


@dataclass(frozen=True)
class Unit:
    """What did the work: a node's processor (`gpu` None), or one of its GPUs."""

    node: int
    gpu: int | None = None

    def __str__(self) -> str:
        return "its processor" if self.gpu is None else f"GPU {self.gpu}"


Seconds = Mapping[str, Mapping[Unit, float]]
"""Kind of work → who → how long it took."""


def gather(processors: Sequence[Mapping[str, float]], gpus: Sequence[Sequence[Mapping[str, float]]]) -> Seconds:
    """The nodes' answers, in the order of the nodes, by kind of work. A GPU's kinds are told apart from a processor's."""
    found: dict[str, dict[Unit, float]] = {}
    for node, answer in enumerate(processors):
        for kind, seconds in answer.items():
            found.setdefault(kind, {})[Unit(node)] = seconds
    for node, answers in enumerate(gpus):
        for gpu, answer in enumerate(answers):
            for kind, seconds in answer.items():
                found.setdefault(f"GPU {kind}", {})[Unit(node, gpu)] = seconds
    return found


def slow(seconds: Seconds) -> dict[tuple[str, Unit], str]:
    """Who took much longer than the median for a kind of work, with the evidence; needs three at least."""
    found = {}
    for kind, by_unit in seconds.items():
        units = [unit for unit, value in by_unit.items() if value > 0]
        speeds = {idx: 1.0 / by_unit[unit] for idx, unit in enumerate(units)}
        middle = statistics.median(by_unit[unit] for unit in units) if units else 0.0
        for idx in outliers(speeds, beyond_scatter=True):
            unit = units[idx]
            found[(kind, unit)] = (
                f"{kind} on {unit} took {by_unit[unit] * 1000:.1f} ms, {middle * 1000:.1f} ms on the median"
            )
    return found


def confirmed(first: Mapping[tuple[str, Unit], str], before: Seconds, again: Seconds) -> dict[tuple[str, Unit], str]:
    """Of those that were slow, who was slow in the second look as well, by the median of the first."""
    found = {}
    for (kind, unit), why in first.items():
        value = again.get(kind, {}).get(unit, 0.0)
        middle = statistics.median(before[kind].values())
        if value > 0 and middle < SLOW * value:
            found[(kind, unit)] = f"{why}; measured again: {value * 1000:.1f} ms"
    return found


def compute_findings(slow_units: Mapping[tuple[str, Unit], str], hosts: Sequence[str]) -> list[Finding]:
    return [
        Finding(
            "node-slow",
            Severity.WARNING,
            (hosts[unit.node],),
            why,
            "every step of the gang waits for this node",
            "look at what else runs on the node, at its clock speeds, its power limit and its cooling"
            + ("" if unit.gpu is None else f"; nvidia-smi -i {unit.gpu} -q -d PERFORMANCE,CLOCK,POWER"),
        )
        for (_, unit), why in slow_units.items()
    ]
