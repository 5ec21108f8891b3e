"""The order of the nodes, so that neighbours in a ring are neighbours in the network.

Collectives pass data along a ring of nodes; an edge between two racks costs more than one within. Nodes that share a label
(NVLink domain, rack, switch) are placed side by side, level by level. With whole groups side by side every group of a level is
entered and left once, and no order can do better: a ring over k > 1 groups crosses between groups k times at least.
Within a group the given order stays, and a node that already had a rank keeps its place relative to the others, so the order
is stable over restarts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.fabric.facts import NodeFacts

RACK_LABELS = (
    "topology.kubernetes.io/region",
    "ray.io/availability-region",
    "topology.kubernetes.io/zone",
    "ray.io/availability-zone",
    "topology.k8s.aws/network-node-layer-1",
    "topology.k8s.aws/network-node-layer-2",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-block",
    "cloud.google.com/gce-topology-subblock",
    "cloud.google.com/gce-topology-host",
    "oci.oraclecloud.com/rdma.network_block_id",
    "oci.oraclecloud.com/rdma.local_block_id",
    "oci.oraclecloud.com/rdma.hpc_island_id",
    "backend.coreweave.cloud/superpod",
    "backend.coreweave.cloud/leafgroup",
    "ib.coreweave.cloud/superpod",
    "ib.coreweave.cloud/leafgroup",
    "topology.nebius.com/tier-2",
    "topology.nebius.com/tier-1",
    "topology.kubernetes.io/rack",
    "nvidia.com/gpu.clique",
    "ray.io/gpu-domain",
)
"""Labels that say where a node stands, widest group first. Labels that a node lacks count as a group of their own."""


@dataclass(frozen=True)
class NodeOrder:
    """Positions in the given sequence, in the order of node ranks, and the reason in a sentence."""

    positions: tuple[int, ...]
    reason: str


def place_of(facts: NodeFacts) -> tuple[str | None, ...]:
    """Where a node stands, widest group first: its topology labels, then its NVLink domain."""
    labels = facts.kubernetes.labels
    domain = next((gpu.cluster_uuid for gpu in facts.gpus if gpu.cluster_uuid is not None), None)
    clique = next((gpu.clique_id for gpu in facts.gpus if gpu.clique_id is not None), None)
    nvlink = None if domain is None else f"{domain}.{clique}"
    return (*(labels.get(name) for name in RACK_LABELS), nvlink)


def order_nodes(places: Sequence[Sequence[str | None]], *, previous: Mapping[int, int] | None = None) -> NodeOrder:
    """An order with the fewest edges between groups, at every level.

    `places`: for each node, its groups from the widest to the narrowest. `previous`: node → rank that it had; such nodes come
    in that order and before new ones wherever the groups allow it.
    """
    ranks = previous or {}
    positions = list(range(len(places)))
    depth = max((len(place) for place in places), default=0)

    def seniority(position: int) -> tuple[int, int, int]:
        return (0, ranks[position], position) if position in ranks else (1, 0, position)

    def arrange(members: list[int], level: int) -> list[int]:
        members = sorted(members, key=seniority)
        if level == depth or len(members) == 1:
            return members
        groups: dict[str | None, list[int]] = {}
        for position in members:
            place = places[position]
            groups.setdefault(place[level] if level < len(place) else None, []).append(position)
        # Groups come in the order of their most senior member, so an unchanged gang keeps its order.
        return [position for group in groups.values() for position in arrange(group, level + 1)]

    ordered = arrange(positions, 0)
    return NodeOrder(tuple(ordered), _reason(places, ordered, bool(ranks)))


def crossings(places: Sequence[Sequence[str | None]], positions: Sequence[int], level: int) -> int:
    """Edges of the ring over `positions` whose ends are in different groups at `level` (counting wider groups as well)."""
    if len(positions) < 2:
        return 0
    ring = [tuple(places[position][: level + 1]) for position in positions]
    return sum(one != other for one, other in zip(ring, ring[1:] + ring[:1], strict=True))


def _reason(places: Sequence[Sequence[str | None]], ordered: Sequence[int], had_ranks: bool) -> str:
    kept = "; nodes of the last attempt keep their order" if had_ranks else ""
    depth = min((len(place) for place in places), default=0)
    telling = [level for level in range(depth) if len({places[position][level] for position in ordered}) > 1]
    if not telling:
        return f"no label tells the nodes apart: the given order{kept}"
    level = telling[-1]
    before = crossings(places, sorted(ordered), level)
    after = crossings(places, ordered, level)
    groups = len({tuple(place[: level + 1]) for place in places})
    return f"{groups} groups by labels side by side: {after} of {len(ordered)} ring edges cross groups ({before} as given){kept}"


@dataclass(frozen=True)
class Packing:
    """What to give Ray as `topology_strategy`, with the reason; `label` None: no label helps, place by node alone."""

    label: str | None
    reason: str

    def strategy(self) -> dict[str, str] | None:
        """Ray's argument (Ray ≥ 2.60): every bundle on a node of its own, all within one group of the label."""
        if self.label is None:
            return None
        return {"ray.io/node-id": "STRICT_SPREAD", self.label: "STRICT_PACK"}


def packing(labels: Sequence[Mapping[str, str]], num_nodes: int) -> Packing:
    """The narrowest label one of whose groups holds the whole gang.

    `labels`: those of each node that has the resources; `num_nodes`: nodes of the gang. Ray packs by one label only and
    waits for ever if no group is large enough, so a label is named only if it can be met now.
    """
    for name in reversed(RACK_LABELS):
        sizes: dict[str, int] = {}
        for node in labels:
            if name in node:
                sizes[node[name]] = sizes.get(node[name], 0) + 1
        if not sizes or max(sizes.values()) < num_nodes:
            continue
        if len(sizes) == 1 and sum(sizes.values()) == len(labels):
            # All nodes are in the one group: the label restricts nothing.
            continue
        largest = max(sizes, key=lambda value: sizes[value])
        return Packing(name, f"{name}={largest} holds {sizes[largest]} nodes, the job needs {num_nodes}")
    return Packing(None, f"no label has a group of {num_nodes} nodes that is narrower than all {len(labels)}")
