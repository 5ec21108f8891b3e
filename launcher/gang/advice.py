"""Why a gang does not fit, and what would: the nearest node and what it lacks, and one change that the nodes would hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.gang.offers import (
    CPU,
    GPU,
    UNITS_PER_ONE,
    GangRequest,
    NodeOffer,
    View,
    count_holding,
    format_amount,
    holds,
    plural,
    units,
)


@dataclass(frozen=True, slots=True)
class Change:
    """Flags that would make the request fit, as a person would type them."""

    request: GangRequest
    flags: str

    def __str__(self) -> str:
        return f"`{self.flags}`"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The resource of which the nearest node has too little. `resource` is "nodes" where there are too few of them at all."""

    resource: str
    asked: float
    total: float
    free: float
    host: str
    """The nearest node: the one that lacks the fewest resources, and the least of them. Empty if there is no node."""


def find_shortfall(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Shortfall:
    """What the nearest node that does not hold the bundle lacks; "nodes" if every node holds it and there are too few."""
    bundle = request.bundle
    lacking = [node for node in nodes if not holds(bundle, view.of(node))]
    if not lacking:
        return Shortfall("nodes", request.min_nodes, len(nodes), count_holding(bundle, nodes, View.FREE), "")
    nearest = min(lacking, key=lambda node: (*distance(bundle, view.of(node)), node.host, node.node_id))
    have = view.of(nearest)
    resource = max(bundle, key=lambda name: (_lack_ratio(bundle[name], have.get(name, 0)), name))
    return Shortfall(
        resource, bundle[resource], nearest.total.get(resource, 0), nearest.free.get(resource, 0), nearest.host
    )


def distance(bundle: Mapping[str, float], amounts: Mapping[str, float]) -> tuple[int, float]:
    """How far a node is from holding the bundle: resources it lacks, and the sum of the lacking fractions.

    >>> distance({"CPU": 4, "GPU": 2}, {"CPU": 8, "GPU": 1})
    (1, 0.5)
    """
    ratios = [_lack_ratio(asked, amounts.get(name, 0)) for name, asked in bundle.items()]
    return sum(ratio > 0 for ratio in ratios), sum(ratios)


def _lack_ratio(asked: float, have: float) -> float:
    return max(0, units(asked) - units(have)) / units(asked)


# What would fit: one changed flag, else nodes and ranks together, else one resource less.


def find_change(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Change | None:
    """The change that keeps the most ranks: of one flag the largest value that fits, else fewer nodes with fewer ranks on each.

    Only where no number of ranks fits anywhere is it proposed to do without a resource.
    """
    single = [_fewer_cpus(request, nodes, view), _fewer_ranks(request, nodes, view), _fewer_nodes(request, nodes, view)]
    found = [change for change in single if change is not None]
    if found:
        return max(found, key=lambda change: change.request.min_nodes * change.request.procs_per_node)
    change = _fewer_nodes_fewer_ranks(request, nodes, view)
    if change is None and view is View.TOTAL:  # what others hold now is no reason to do without
        change = _without_a_resource(request, nodes)
    return change


def fits(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> bool:
    """True if enough nodes hold the request's bundle."""
    return count_holding(request.bundle, nodes, view) >= request.min_nodes


def ranks_held(request: GangRequest, amounts: Mapping[str, float]) -> int:
    """How many of the request's ranks per node a node with these amounts holds: 0 to `procs_per_node`."""
    if not holds(request.per_node, amounts):
        return 0
    most = request.procs_per_node
    for name, each in request.per_proc.items():
        if units(each) > 0:
            left = units(amounts.get(name, 0)) - units(request.per_node.get(name, 0))
            most = min(most, left // units(each))
    return max(0, most)


def _falling_ranks(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> list[int]:
    """Of each node, the ranks that it holds; the most first. So entry n - 1 is what n nodes can each hold."""
    return sorted((ranks_held(request, view.of(node)) for node in nodes), reverse=True)


def _fewer_cpus(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Change | None:
    """Fewer CPUs per rank, whole and at least one: CPUs are a word given to the scheduler, so giving up some costs least."""
    asked = request.per_proc.get(CPU, 0)
    without = replace(request, per_proc={**request.per_proc, CPU: 0.0}).bundle
    spare = sorted(
        (
            units(view.of(node).get(CPU, 0)) - units(request.per_node.get(CPU, 0))
            for node in nodes
            if holds(without, view.of(node))
        ),
        reverse=True,
    )
    if len(spare) < request.min_nodes:
        return None
    amount = spare[request.min_nodes - 1] // (UNITS_PER_ONE * request.procs_per_node)
    if not 1 <= amount < asked:
        return None
    return Change(replace(request, per_proc={**request.per_proc, CPU: float(amount)}), f"--cpus-per-proc {amount}")


def _fewer_ranks(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Change | None:
    held = _falling_ranks(request, nodes, view)
    num_procs = held[request.min_nodes - 1] if len(held) >= request.min_nodes else 0
    if not 1 <= num_procs < request.procs_per_node:
        return None
    return Change(replace(request, procs_per_node=num_procs), f"--nproc-per-node {num_procs}")


def _fewer_nodes(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Change | None:
    num_holding = count_holding(request.bundle, nodes, view)
    if not 1 <= num_holding < request.min_nodes:
        return None
    return Change(replace(request, min_nodes=num_holding, max_nodes=num_holding), f"--nnodes {num_holding}")


def _fewer_nodes_fewer_ranks(request: GangRequest, nodes: Sequence[NodeOffer], view: View) -> Change | None:
    held = _falling_ranks(request, nodes, view)[: request.min_nodes]
    if not held or held[0] == 0:
        return None
    num_nodes = max(range(1, len(held) + 1), key=lambda count: count * held[count - 1])
    num_procs = held[num_nodes - 1]
    changed = replace(request, min_nodes=num_nodes, max_nodes=num_nodes, procs_per_node=num_procs)
    return Change(changed, f"--nnodes {num_nodes} --nproc-per-node {num_procs}")


def _without_a_resource(request: GangRequest, nodes: Sequence[NodeOffer]) -> Change | None:
    for name in request.bundle:
        changed = replace(
            request,
            per_proc={other: amount for other, amount in request.per_proc.items() if other != name},
            per_node={other: amount for other, amount in request.per_node.items() if other != name},
        )
        if fits(changed, nodes, View.TOTAL):
            flag = {CPU: "--cpus-per-proc 0", GPU: "--gpus-per-proc 0"}.get(name, f"--resources {name}=0")
            return Change(changed, flag)
    return None


def describe_shortfall(shortfall: Shortfall) -> str:
    """`the nearest node gpu-3 lacks GPU (asked 8, total 4, free 2)`."""
    if shortfall.resource == "nodes":
        there = f"{format_amount(shortfall.total)} node{plural(shortfall.total)}"
        return f"the cluster has {there}, {format_amount(shortfall.asked)} are asked"
    name, total = shortfall.resource, format_amount(shortfall.total)
    amounts = f"asked {format_amount(shortfall.asked)}, total {total}, free {format_amount(shortfall.free)}"
    return f"the nearest node {shortfall.host} lacks {name} ({amounts})"
