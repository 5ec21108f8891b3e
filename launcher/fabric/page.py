"""The doctor's page: facts, distances, decisions and findings as text for a person, or as JSON for a program.

Pure: from an Examination to a string. Nodes that look alike are shown once, under all their names, so that a page about
sixty-four equal nodes stays readable.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.fabric.binding import cpu_list
from launcher.fabric.decision import Decision
from launcher.fabric.facts import Hca, HcaPort, NodeFacts
from launcher.fabric.findings import Finding, Severity, worst
from launcher.fabric.order import NodeOrder
from launcher.fabric.rules import NodeEnvironment
from launcher.fabric.topology import Distance, closest_hcas, gpu_hca, numa_of_gpu

WIDTH = 118

GIB = 1 << 30


@dataclass(frozen=True)
class Examination:
    """All that a page shows."""

    nodes: tuple[NodeFacts, ...]
    environments: tuple[NodeEnvironment, ...]
    order: NodeOrder
    findings: tuple[Finding, ...]
    remark: str = ""
    """One sentence on what was looked at and how."""


def text_page(examination: Examination) -> str:
    """The whole page."""
    lines = [_headline(examination), *([examination.remark] if examination.remark else []), ""]
    lines += ["NODES", *_indent(_nodes(examination)), ""]
    for names, block in _alike((facts.hostname, _devices(facts, env)) for facts, env in _pairs(examination)):
        if block:
            lines += [f"GPUS AND NICS of {names}", *_indent(block), ""]
    for names, block in _alike((facts.hostname, _environment(env)) for facts, env in _pairs(examination)):
        lines += [f"ENVIRONMENT of the ranks on {names}", *_indent(block), ""]
    lines += ["FINDINGS", *_indent(finding_lines(examination.findings))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Each finding in four parts: what, seen, means, do."""
    if not findings:
        return ["none"]
    lines: list[str] = []
    for finding in findings:
        where = f"  on {_some(finding.nodes)}" if finding.nodes else ""
        lines.append(f"{finding.severity.name:<8} {finding.id}{where}")
        for label, text in (("seen", finding.evidence), ("means", finding.meaning), ("do", finding.cure)):
            lines += _wrapped(text, f"         {label:<6} ", " " * 16)
    return lines


def explain_page(examination: Examination, variable: str) -> str:
    """Why a variable is what it is, on each node; a sentence if no rule knows it."""
    blocks = []
    for facts, env in _pairs(examination):
        decision = env.decision(variable)
        if decision is not None:
            blocks.append((facts.hostname, _decision(decision)))
    if not blocks:
        return (
            f"{variable}: no rule says anything about it on these nodes; it is neither set nor changed. "
            "If you set it, it is passed on as it is.\n"
        )
    lines: list[str] = []
    for names, block in _alike(blocks):
        lines += [f"on {names}:", *_indent(block)]
    return "\n".join(lines) + "\n"


def as_json(examination: Examination) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "format": "railhead-doctor",
        "version": 1,
        "worst": worst(examination.findings).name,
        "order": {
            "hosts": [examination.nodes[position].hostname for position in examination.order.positions],
            "reason": examination.order.reason,
        },
        "nodes": [_node_json(facts, env) for facts, env in _pairs(examination)],
        "findings": [
            {
                "id": finding.id,
                "severity": finding.severity.name,
                "nodes": list(finding.nodes),
                "evidence": finding.evidence,
                "meaning": finding.meaning,
                "cure": finding.cure,
            }
            for finding in examination.findings
        ],
    }


def _node_json(facts: NodeFacts, env: NodeEnvironment) -> dict[str, Any]:
    matrix = gpu_hca(facts)
    return {
        "hostname": facts.hostname,
        "node_ip": facts.node_ip,
        "transport": env.hcas.transport,
        "hcas": list(env.hcas.hcas),
        "excluded_hcas": dict(env.hcas.excluded),
        "provider": env.provider.id if env.provider else None,
        "closest_hcas": {str(gpu): list(names) for gpu, names in closest_hcas(facts, env.hcas.hcas).items()},
        "affinity": {
            f"GPU{gpu.index}": {hca.name: str(cell) for hca, cell in zip(facts.hcas, row, strict=True)}
            for gpu, row in zip(facts.gpus, matrix, strict=True)
        },
        "environment": {
            decision.variable: {
                "value": decision.value,
                "user_value": decision.user_value,
                "effective": decision.effective,
                "reason": decision.reason,
                "source": decision.source,
            }
            for decision in env.decisions
        },
        "bindings": [
            {
                "local_rank": binding.local_rank,
                "gpu": binding.gpu_index,
                "cpus": None if binding.cpus is None else cpu_list(binding.cpus),
                "memory_node": binding.memory_node,
                "reason": binding.reason,
            }
            for binding in env.bindings
        ],
    }


def _headline(examination: Examination) -> str:
    num_gpus = sum(len(facts.gpus) for facts in examination.nodes)
    transports = sorted({env.hcas.transport for env in examination.environments})
    counts: dict[Severity, int] = {}
    for finding in examination.findings:
        counts[finding.severity] = counts.get(finding.severity, 0) + 1
    verdict = ", ".join(
        f"{counts[severity]} {severity.name.lower()}{'s' if counts[severity] > 1 and severity else ''}"
        for severity in sorted(counts, reverse=True)
    )
    network = " and ".join({"socket": "TCP sockets"}.get(name, name) for name in transports)
    return (
        f"{_count(len(examination.nodes), 'node')}, {_count(num_gpus, 'GPU')}, between nodes: {network}. "
        f"Findings: {verdict or 'none'}."
    )


def _nodes(examination: Examination) -> list[str]:
    lines = []
    for position in examination.order.positions:
        facts, env = examination.nodes[position], examination.environments[position]
        gpus = _counted(gpu.name or "GPU" for gpu in facts.gpus) or "no GPU"
        cpus = f"{facts.cpus.num_cpus} CPUs" if facts.cpus.num_cpus else "CPUs unknown"
        memory = f", {facts.memory.total_bytes / GIB:.0f} GiB" if facts.memory.total_bytes else ""
        parts = [gpus, f"{cpus}{memory}"]
        if facts.hcas:
            parts.append(_count(len(facts.hcas), "RDMA device"))
        if env.interface.name:
            address = env.interface.address or facts.node_ip
            parts.append(f"{env.interface.name}{f' {address}' if address else ''}")
        if env.provider:
            parts.append(env.provider.title)
        lines += _wrapped("; ".join(parts), f"{facts.hostname}: ", "    ")
        software = facts.software
        known = [
            f"{label} {value}"
            for label, value in (
                ("kernel", software.kernel),
                ("driver", software.driver),
                ("CUDA", software.cuda),
                ("NCCL", software.nccl),
                ("torch", software.torch),
                ("Python", software.python),
            )
            if value is not None
        ]
        if known:
            lines += _wrapped(", ".join(known), "    ", "    ")
    if len(examination.nodes) > 1:
        lines += _wrapped(examination.order.reason, "node ranks in this order: ", "    ")
    return lines


def _devices(facts: NodeFacts, env: NodeEnvironment) -> list[str]:
    if not facts.gpus and not facts.hcas:
        return []
    lines: list[str] = []
    nearest = closest_hcas(facts, env.hcas.hcas)
    if facts.gpus:
        rows = [["GPU", "PCI", "memory node", "NVLinks up", "nearest usable HCAs"]]
        for gpu in facts.gpus:
            node = numa_of_gpu(facts, gpu.index)
            links = "?" if gpu.num_nvlinks is None else f"{gpu.num_nvlinks_active} of {gpu.num_nvlinks}"
            near = ", ".join(nearest[gpu.index]) or "none known"
            rows.append([str(gpu.index), gpu.pci or "?", _unknown(node), links, near])
        lines += [*_table(rows), ""]
    if facts.hcas:
        rows = [["HCA", "port", "state", "Gb/s", "link layer", "netdev", "used"]]
        rows += [_port_row(hca, port, env) for hca in facts.hcas for port in hca.ports]
        lines += [*_table(rows), ""]
    if facts.gpus and facts.hcas:
        matrix = gpu_hca(facts)
        lines += _split_table(_matrix_rows(facts, matrix))
        if any(cell.is_bound for row in matrix for cell in row):
            lines.append("(with ?: at most this far; the PCI tree is not known)")
        lines.append("")
    return lines[:-1] if lines and not lines[-1] else lines


def _matrix_rows(facts: NodeFacts, matrix: tuple[tuple[Distance, ...], ...]) -> list[list[str]]:
    """The affinity matrix; neighbouring HCAs that are equally far from every GPU share a column ("mlx5_0 +1")."""
    columns = [tuple(str(row[idx]) for row in matrix) for idx in range(len(facts.hcas))]
    groups: list[tuple[str, int, tuple[str, ...]]] = []
    for hca, column in zip(facts.hcas, columns, strict=True):
        if groups and groups[-1][2] == column:
            name, more, _ = groups[-1]
            groups[-1] = (name, more + 1, column)
        else:
            groups.append((hca.name, 0, column))
    rows = [["", *(f"{name} +{more}" if more else name for name, more, _ in groups)]]
    for position, gpu in enumerate(facts.gpus):
        rows.append([f"GPU{gpu.index}", *(column[position] for _, _, column in groups)])
    return rows


def _port_row(hca: Hca, port: HcaPort, env: NodeEnvironment) -> list[str]:
    label = hca.name if len(hca.ports) <= 1 else f"{hca.name}:{port.port}"
    if any(chosen.hca == hca.name and chosen.port == port.port for chosen in env.hcas.ports):
        used = "yes"
    else:
        used = f"no: {env.hcas.excluded.get(label, env.hcas.excluded.get(hca.name, 'not chosen'))}"
    rate = "?" if port.rate_gbps is None else f"{port.rate_gbps:g}"
    return [
        hca.name,
        str(port.port),
        port.state or "?",
        rate,
        port.link_layer or "?",
        ",".join(hca.netdevs) or "-",
        used,
    ]


def _environment(env: NodeEnvironment) -> list[str]:
    lines: list[str] = []
    given = [decision for decision in env.decisions if decision.effective is not None]
    left = [decision for decision in env.decisions if decision.effective is None]
    for decision in given:
        lines += _decision(decision)
    if left:
        lines.append("left as they are:")
        for decision in left:
            lines += _wrapped(decision.reason, f"  {decision.variable}: ", "      ")
    reasons = list(dict.fromkeys(binding.reason for binding in env.bindings if binding.cpus is None))
    bound = [binding for binding in env.bindings if binding.cpus is not None]
    if bound:
        lines.append("binding:")
        for cpus, ranks in _by_cpus((binding.local_rank, binding.cpus, binding.memory_node) for binding in bound):
            lines.append(f"  local rank {ranks}: CPUs {cpus}")
    lines += [f"not bound to CPUs: {reason}" for reason in reasons]
    return lines


def _by_cpus(bound: Iterable[tuple[int, tuple[int, ...] | None, int | None]]) -> list[tuple[str, str]]:
    groups: dict[str, list[int]] = {}
    for rank, cpus, node in bound:
        groups.setdefault(f"{cpu_list(cpus or ())}, memory node {node}", []).append(rank)
    return [(cpus, cpu_list(tuple(ranks))) for cpus, ranks in groups.items()]


def _decision(decision: Decision) -> list[str]:
    effective = decision.effective
    head = f"{decision.variable} = {effective}" if effective is not None else f"{decision.variable} is left unset"
    lines = [head] if len(head) <= WIDTH - 4 else _wrapped(head, "", "    ")
    if decision.is_overruled:
        would = f"would be {decision.value}" if decision.value is not None else "would be left unset"
        lines += _wrapped(
            f"you set it; without your value it {would}: {decision.reason} [{decision.source}]", "    ", "    "
        )
    elif decision.user_value is not None:
        lines += _wrapped(
            f"you set it, and so would the launcher: {decision.reason} [{decision.source}]", "    ", "    "
        )
    else:
        lines += _wrapped(f"{decision.reason} [{decision.source}]", "    ", "    ")
    return lines


def _pairs(examination: Examination) -> list[tuple[NodeFacts, NodeEnvironment]]:
    return list(zip(examination.nodes, examination.environments, strict=True))


def _alike(blocks: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Blocks that are equal, under all their names."""
    groups: Mapping[tuple[str, ...], list[str]]
    groups = {}
    for name, block in blocks:
        groups.setdefault(tuple(block), []).append(name)
    return [(_some(names), list(block)) for block, names in groups.items()]


def _some(names: Sequence[str]) -> str:
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:5])} and {len(names) - 5} more"


def _counted(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return " + ".join(f"{count} × {name}" for name, count in counts.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _unknown(value: object) -> str:
    return "?" if value is None else str(value)


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _split_table(rows: list[list[str]]) -> list[str]:
    """A wide table in several pieces, each with the first column, none wider than the page."""
    lines: list[str] = []
    start = 1
    while start < len(rows[0]):
        end, width = start, max(len(row[0]) for row in rows)
        while end < len(rows[0]):
            width += 2 + max(len(row[end]) for row in rows)
            if width > WIDTH and end > start:
                break
            end += 1
        lines += _table([[row[0], *row[start:end]] for row in rows])
        start = end
    return lines
