"""Where nodes stand, by Ray's labels: together if one rack or NVLink domain holds the gang, and side by side in the order of ranks.

What the labels mean is decided in launcher.fabric.order; here Ray's tables are read and its arguments made.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group

from launcher.cluster.ray import survey
from launcher.fabric.order import RACK_LABELS, Packing, order_nodes, packing
from launcher.gang.offers import View, holds
from launcher.gang.world import NodeInfo
from launcher.node.survey import has_gpus

CLIQUE = "nvidia.com/gpu.clique"
"""The narrowest label: nodes whose GPUs are on one NVLink fabric (NVIDIA's feature discovery sets it to CLUSTER.CLIQUE)."""
DRIVER_S = 5.0


def labels() -> dict[str, dict[str, str]]:
    """Of each live node, by Ray's id, the labels that say where it stands."""
    return {
        node["NodeID"]: {name: value for name, value in (node.get("Labels") or {}).items() if name in RACK_LABELS}
        for node in ray.nodes()
        if node["Alive"]
    }


def with_label(
    info: NodeInfo, found: Mapping[str, Mapping[str, str]], ray_id: str, nvlink: str | None = None
) -> NodeInfo:
    """The node with what its labels say, and its driver of its NVLink domain where no label does."""
    told = {**({} if nvlink is None else {CLIQUE: nvlink}), **found.get(ray_id, {})}
    return NodeInfo(info.node_id, info.hostname, info.addr, info.num_ranks, tuple(sorted(told.items())))


def nvlink_domain() -> str | None:
    """Of this node, from its driver; None without GPUs, and from a driver that is silent for DRIVER_S: it must not hold up the gang."""
    if not has_gpus():
        return None
    from launcher.fabric.probe_gpus import nvlink_domain as asked

    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(asked()), name="nvlink", daemon=True).start()
    try:
        return answer.get(timeout=DRIVER_S)
    except queue.Empty:
        return None


def in_order(nodes: Sequence[NodeInfo]) -> tuple[NodeInfo, ...]:
    """Nodes of one group of a label side by side, level by level; the given order within, and where no label tells them apart.

    Pure and stable: the same nodes come in the same order at each restart.
    """
    places = [tuple(dict(node.labels).get(name) for name in RACK_LABELS) for node in nodes]
    return tuple(nodes[position] for position in order_nodes(places).positions)


CAN_PACK = "topology_strategy" in inspect.signature(placement_group).parameters
"""Ray places by label since 2.60; before, the order of the ranks is all that labels can do."""


def choose_packing(bundle: Mapping[str, float], num_nodes: int, left_out: Collection[str] = ()) -> Packing:
    """The narrowest label one of whose groups can hold the gang on nodes that are free now."""
    if not CAN_PACK:
        return Packing(None, f"Ray {ray.__version__} does not place by label")
    where = labels()
    free = [
        where.get(offer.node_id, {})
        for offer in survey.offers()
        if offer.node_id not in left_out and holds(bundle, View.FREE.of(offer))
    ]
    return packing(free, num_nodes)


def arguments(chosen: Packing | None) -> dict[str, Any]:
    """What `placement_group` is told: each bundle on a node of its own, within one group of the label if there is one."""
    strategy = chosen.strategy() if chosen is not None else None
    return {"strategy": "STRICT_SPREAD"} if strategy is None else {"topology_strategy": strategy}
