"""Judging all-reduces between pairs of nodes and of the whole gang. Pure.

The pairs are judged like transfers (preflight.py): in two rounds of pairs every node has two partners, so that a node is suspected only
if it was slow with both; then it is measured again with those that were healthy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.fabric.findings import Finding, Severity
from launcher.fabric.preflight import Transfer

ROUNDS = 2

Group = tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """One all-reduce of one group of nodes."""

    group: Group
    seconds: float = 0.0
    bytes: int = 0
    num_ranks: int = 0
    problems: Mapping[int, str] = field(default_factory=dict)
    """By node: why it has no result."""
    culprits: frozenset[int] = frozenset()
    """Nodes that failed by themselves; the others waited for them in vain."""

    @property
    def is_ok(self) -> bool:
        return not self.problems and self.seconds > 0

    @property
    def rate_bytes_per_s(self) -> float:
        """What a ring moves over each link: 2 (n - 1) / n of the bytes.

        >>> Outcome((0, 1), 0.5, 1000, 2).rate_bytes_per_s
        2000.0
        """
        if not self.is_ok or self.num_ranks < 2:
            return 0.0
        return 2 * (self.num_ranks - 1) / self.num_ranks * self.bytes / self.seconds


def transfers(outcomes: Sequence[Outcome]) -> list[Transfer]:
    """Pairs as transfers, the same both ways: an all-reduce goes both ways at once."""
    return [
        Transfer(source, target, outcome.rate_bytes_per_s)
        for outcome in outcomes
        if outcome.is_ok and len(outcome.group) == 2
        for source, target in (outcome.group, outcome.group[::-1])
    ]


def to_blame(outcomes: Sequence[Outcome]) -> frozenset[int]:
    """Nodes that failed by themselves."""
    return frozenset(node for outcome in outcomes for node in outcome.culprits)


def unfit(outcomes: Sequence[Outcome]) -> frozenset[int]:
    """Nodes that had no result with anybody."""
    tried = {node for outcome in outcomes for node in outcome.group}
    return frozenset(tried - {node for outcome in outcomes if outcome.is_ok for node in outcome.group})


def failed_findings(outcomes: Sequence[Outcome], hosts: Sequence[str], backend: str) -> list[Finding]:
    """All-reduces that had no result: one finding for each node that failed by itself, or in all that it took part in; else the pairs."""
    failed = [outcome for outcome in outcomes if not outcome.is_ok]
    counts = Counter(node for outcome in failed for node in outcome.group)
    alone = to_blame(failed) or {node for node in unfit(outcomes) if counts[node] == max(counts.values()) > 1}
    found = []
    for node in sorted(alone):
        first = next(outcome for outcome in failed if node in outcome.group)
        found.append(_failed((node,), first, hosts, backend))
    rest = [outcome for outcome in failed if not alone & set(outcome.group)]
    pairs = [outcome for outcome in rest if len(outcome.group) == 2]
    return found + [_failed(item.group, item, hosts, backend) for item in pairs or rest[:1]]


def _failed(concerned: Group, outcome: Outcome, hosts: Sequence[str], backend: str) -> Finding:
    node = next((node for node in concerned if node in outcome.problems), concerned[0])
    why = outcome.problems.get(node, "no result")
    of = f"of {', '.join(hosts[node] for node in outcome.group[:4])}" + (" …" if len(outcome.group) > 4 else "")
    return Finding(
        "collective-failed",
        Severity.ERROR,
        tuple(hosts[node] for node in concerned),
        f"an all-reduce over {backend} {of} had no result: {why} (on {hosts[node]})",
        "connections work and collectives do not: training would hang or fail at the first one",
        "look at the interface and the devices that the page of the run directory names, and at NCCL_DEBUG=INFO of one rank",
    )
