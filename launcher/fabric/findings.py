"""What is wrong, or will be: a list of findings over the facts of all nodes of a gang.

Each check looks for one failure mode and is silent on what it cannot know. A finding says what was seen (evidence), what it
means for the job, and what to do. The checks are in checks_*.py, one function each; `checks()` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from launcher.fabric.decision import UserEnv, of_each_node
from launcher.fabric.facts import NodeFacts
from launcher.fabric.rules import GangRequest, NodeEnvironment, environment


class Severity(IntEnum):
    """How bad; the doctor's exit code is the worst one's."""

    INFO = 0
    """Worth knowing; nothing to do."""
    WARNING = 1
    """The job runs, but slower or less safely than it could."""
    ERROR = 2
    """The job will hang, fail, or run over a far slower network than it should."""


@dataclass(frozen=True)
class Finding:
    id: str
    severity: Severity
    nodes: tuple[str, ...]
    """Host names concerned."""
    evidence: str
    meaning: str
    cure: str


@dataclass(frozen=True)
class View:
    """What a check of one node sees."""

    facts: NodeFacts
    env: NodeEnvironment
    user_env: Mapping[str, str]
    is_multi_node: bool
    is_one_machine: bool = False
    """All nodes of the gang are one machine, on which somebody tries things out."""

    def finding(self, id: str, severity: Severity, evidence: str, meaning: str, cure: str) -> Finding:
        return Finding(id, severity, (self.facts.hostname,), evidence, meaning, cure)


NodeCheck = Callable[[View], list[Finding]]
GangCheck = Callable[[Sequence[View]], list[Finding]]


def findings(
    nodes: Sequence[NodeFacts], *, request: GangRequest | None = None, user_env: UserEnv | None = None
) -> list[Finding]:
    """All findings, worst first; the same finding with the same evidence on several nodes is one finding.

    `request.num_nodes` may ask for the view of a larger gang than there are facts (the doctor on one machine).
    """
    envs = of_each_node(user_env or {}, len(nodes))
    wanted = request or GangRequest()
    is_one_machine = share_a_machine(nodes)
    views = [
        View(facts, node_env, env, (wanted.num_nodes or len(nodes)) > 1, is_one_machine)
        for facts, node_env, env in zip(nodes, environment(nodes, wanted, envs), envs, strict=True)
    ]
    node_checks, gang_checks = checks()
    found = [finding for view in views for check in node_checks for finding in check(view)]
    if len(views) > 1:
        found += [finding for check in gang_checks for finding in check(views)]
    return sorted(merged(found), key=lambda finding: (-finding.severity, finding.id))


def share_a_machine(nodes: Sequence[NodeFacts]) -> bool:
    """Whether all these nodes are one machine: several raylets on a laptop, or pods of one host."""
    boots = {facts.platform.boot_id for facts in nodes}
    return len(nodes) > 1 and len(boots) == 1 and None not in boots


def merged(found: Sequence[Finding]) -> list[Finding]:
    """Findings that differ in the node only, joined."""
    together: dict[tuple[str, Severity, str, str, str], list[str]] = {}
    for finding in found:
        key = (finding.id, finding.severity, finding.evidence, finding.meaning, finding.cure)
        hosts = together.setdefault(key, [])
        hosts.extend(node for node in finding.nodes if node not in hosts)
    return [
        Finding(id_, severity, tuple(hosts), evidence, meaning, cure)
        for (id_, severity, evidence, meaning, cure), hosts in together.items()
    ]


def worst(found: Sequence[Finding]) -> Severity:
    return max((finding.severity for finding in found), default=Severity.INFO)


def checks() -> tuple[tuple[NodeCheck, ...], tuple[GangCheck, ...]]:
    """Every check: those of one node, and those that compare nodes."""
    # Imported here because the checks need the types above.
    from launcher.fabric import (
        checks_gang,
        checks_gpu,
        checks_gpu_path,
        checks_interface,
        checks_limits,
        checks_provider,
        checks_rdma,
    )

    of_node = (checks_interface, checks_rdma, checks_provider, checks_gpu, checks_gpu_path, checks_limits)
    return tuple(check for module in of_node for check in module.CHECKS), checks_gang.CHECKS
