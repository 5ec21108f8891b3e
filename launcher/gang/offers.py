"""What nodes offer and what a gang asks of them: the words in which placement is decided.

The gang is one equal bundle per node, each on a node of its own (STRICT_SPREAD), so a node either holds the bundle or does not, and
whether the gang fits is only a question of how many nodes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

CPU = "CPU"
GPU = "GPU"

# Ray counts resources in ten-thousandths; so do we, or 3 × 0.1 would not fit into 0.3.
UNITS_PER_ONE = 10_000


def units(amount: float) -> int:
    """The amount in the smallest unit that Ray knows.

    >>> units(0.1) * 3 == units(0.3)
    True
    """
    return round(amount * UNITS_PER_ONE)


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """What one live node has, and what of it nobody holds now."""

    node_id: str
    host: str
    """Name or address that a person recognises."""
    total: Mapping[str, float]
    free: Mapping[str, float]
    group: str = ""
    """The autoscaler's group that the node belongs to; empty for a node that was added by hand."""


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """A kind of node that an autoscaler may still add."""

    name: str
    resources: Mapping[str, float]
    max_nodes: int | None
    """Upper bound on the nodes of this group; None if there is none."""


@dataclass(frozen=True, slots=True)
class GangRequest:
    """One equal bundle on each of `min_nodes` to `max_nodes` nodes, all or nothing."""

    min_nodes: int
    max_nodes: int
    procs_per_node: int
    per_proc: Mapping[str, float] = field(default_factory=dict)
    """What each rank holds, by Ray's name of the resource."""
    per_node: Mapping[str, float] = field(default_factory=dict)
    """What each node must give once, whatever the number of ranks."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise ValueError(f"nodes {self.min_nodes}:{self.max_nodes}: needs 1 <= min <= max")
        if self.procs_per_node < 1:
            raise ValueError(f"procs_per_node {self.procs_per_node}: needs at least 1")

    @property
    def bundle(self) -> dict[str, float]:
        """What one node must give: resources with an amount above 0, by name."""
        names = sorted({*self.per_proc, *self.per_node})
        amounts = {
            name: units(self.per_proc.get(name, 0)) * self.procs_per_node + units(self.per_node.get(name, 0))
            for name in names
        }
        return {name: amount / UNITS_PER_ONE for name, amount in amounts.items() if amount > 0}


class View(Enum):
    """Which of a node's amounts a question is about."""

    TOTAL = "total"
    FREE = "free"

    def of(self, node: NodeOffer) -> Mapping[str, float]:
        return node.total if self is View.TOTAL else node.free


def count_holding(bundle: Mapping[str, float], nodes: Iterable[NodeOffer], view: View) -> int:
    """How many nodes hold the bundle."""
    return sum(holds(bundle, view.of(node)) for node in nodes)


def holds(bundle: Mapping[str, float], amounts: Mapping[str, float]) -> bool:
    """True if each amount of the bundle is there."""
    return all(units(amounts.get(name, 0)) >= units(asked) for name, asked in bundle.items())


def describe_request(request: GangRequest) -> str:
    """`4 nodes × 8 ranks ask for 8 GPU and 8 CPU on each node`."""
    span = (
        str(request.min_nodes)
        if request.min_nodes == request.max_nodes
        else f"{request.min_nodes} to {request.max_nodes}"
    )
    verb = "asks" if request.max_nodes == 1 and request.procs_per_node == 1 else "ask"
    ranks = f"{request.procs_per_node} rank{plural(request.procs_per_node)}"
    return f"{span} node{plural(request.max_nodes)} × {ranks} {verb} for {describe(request.bundle)} on each node"


def describe(bundle: Mapping[str, float]) -> str:
    """`8 GPU and 8 CPU`.

    >>> describe({"CPU": 8.0, "GPU": 8.0, "rdma/ib": 0.5})
    '8 GPU, 8 CPU and 0.5 rdma/ib'
    """
    order = {GPU: 0, CPU: 1}
    parts = [
        f"{format_amount(bundle[name])} {name}" for name in sorted(bundle, key=lambda name: (order.get(name, 2), name))
    ]
    if not parts:
        return "nothing"
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def format_amount(amount: float) -> str:
    """An amount without needless zeros.

    >>> format_amount(8.0), format_amount(0.25)
    ('8', '0.25')
    """
    return f"{amount:.4f}".rstrip("0").rstrip(".")


def plural(count: float) -> str:
    return "" if count == 1 else "s"
