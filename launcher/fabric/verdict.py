"""What a preflight means for the job: who is left out, who must not be used at all, and what a person is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.fabric.compute_check import Seconds, Unit
from launcher.fabric.findings import Finding, Severity
from launcher.fabric.preflight import Transfer
from launcher.fabric.reduce_check import Outcome


@dataclass(frozen=True)
class Report:
    """What a preflight saw and concluded."""

    findings: tuple[Finding, ...]
    slow_nodes: tuple[int, ...]
    """Positions of nodes that were slow twice: candidates for being left out."""
    unreachable: tuple[tuple[int, int], ...]
    transfers: tuple[Transfer, ...]
    reduces: tuple[Outcome, ...] = ()
    backend: str = ""
    seconds: Seconds = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)
    """Nodes whose peer broke off, and why."""


BROKEN = ("unreachable", "collective-failed", "probe-lost", "mtu-path", "transfer-failed")
"""Findings with which a collective hangs or fails."""


@dataclass(frozen=True)
class Verdict:
    """By position in the gang."""

    slow: dict[int, str]
    """Nodes that would slow the whole gang, with the evidence."""
    broken: dict[int, str]
    """Nodes with which the gang would hang."""
    hopeless: str
    """What is broken and cannot be blamed on a node (a path between two); empty if nothing is."""


def judge(report: Report, hosts: Sequence[str]) -> Verdict:
    """What the findings mean for each node; one that is broken is not also slow."""
    broken: dict[int, str] = {}
    paths: list[Finding] = []
    for finding in report.findings:
        if finding.id in BROKEN and finding.severity >= Severity.ERROR:
            if len(finding.nodes) == 1:
                broken.setdefault(list(hosts).index(finding.nodes[0]), finding.evidence)
            else:
                paths.append(finding)
    names = {hosts[node] for node in broken}
    hopeless = next((finding.evidence for finding in paths if not names & set(finding.nodes)), "")
    slow = {node: _evidence(report, hosts[node]) for node in report.slow_nodes if node not in broken}
    return Verdict(slow, broken, hopeless)


def _evidence(report: Report, host: str) -> str:
    return next(
        finding.evidence for finding in report.findings if finding.id == "node-slow" and finding.nodes == (host,)
    )


def summary(report: Report) -> str:
    """One or two sentences on what was measured."""
    said = []
    if report.transfers:
        rates = sorted(item.rate_bytes_per_s for item in report.transfers)
        said.append(
            f"{len(rates)} transfers between nodes, {_gbps(rates[0])} to {_gbps(rates[-1])} Gb/s, median {_gbps(rates[len(rates) // 2])}."
        )
    done = [item for item in report.reduces if item.is_ok]
    if done:
        whole = max(done, key=lambda item: len(item.group))
        said.append(
            f"{_count(len(done), 'all-reduce')} over {report.backend}; the largest over {_count(len(whole.group), 'node')} "
            f"({_count(whole.num_ranks, 'rank')}) in {whole.seconds * 1000:.1f} ms."
        )
    for kind, by_unit in report.seconds.items():
        times = sorted(by_unit.values())
        if times:
            said.append(f"{kind}: {times[0] * 1000:.1f} to {times[-1] * 1000:.1f} ms.")
    return " ".join(said) or "Nothing was measured between nodes: there is one."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gbps(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2f}"


def page(report: Report, hosts: Sequence[str], finding_lines: Sequence[str]) -> str:
    """All that was measured, for the run directory."""
    lines = [
        summary(report),
        "",
        "FINDINGS",
        *(f"  {line}" for line in finding_lines),
        "",
        "TRANSFERS (Gb/s, from row to column)",
    ]
    width = max([len(host) for host in hosts] + [8])
    best: dict[tuple[int, int], float] = {}
    for item in report.transfers:
        best[(item.source, item.target)] = max(best.get((item.source, item.target), 0.0), item.rate_bytes_per_s)
    for source, target in sorted(best):
        lines.append(f"  {hosts[source]:<{width}} {hosts[target]:<{width}} {_gbps(best[(source, target)])}")
    lines += ["", f"ALL-REDUCES over {report.backend or 'nothing'}"]
    for outcome in report.reduces:
        names = ", ".join(hosts[node] for node in outcome.group)
        if outcome.is_ok:
            lines.append(f"  {outcome.seconds * 1000:9.2f} ms {_gbps(outcome.rate_bytes_per_s):>8} Gb/s  {names}")
        else:
            why = "; ".join(f"{hosts[node]}: {text}" for node, text in outcome.problems.items())
            lines.append(f"  failed: {names}: {why}")
    for kind, by_unit in report.seconds.items():
        lines += ["", f"{kind.upper()} (ms)"]
        lines += [f"  {hosts[unit.node]} {_unit(unit)}{seconds * 1000:.2f}" for unit, seconds in by_unit.items()]
    return "\n".join(lines) + "\n"


def _unit(unit: Unit) -> str:
    return "" if unit.gpu is None else f"GPU {unit.gpu} "
