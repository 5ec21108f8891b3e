"""What a Ray cluster has and what of it is free: Ray's tables in the words of `gang.offers`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray._private import state as ray_state

from launcher.gang.offers import CPU, GPU, GangRequest, NodeGroup, NodeOffer
from launcher.spec import JobSpec

# Resources that Ray makes up itself and that say nothing to people.
_INTERNAL = re.compile(r"node:|object_store_memory$|\w+_group_(\d+_)?[0-9a-f]{32,}$")


@dataclass(frozen=True)
class ClusterNode:
    """A live node of the cluster."""

    node_id: str
    hostname: str
    addr: str


def live_nodes() -> dict[str, ClusterNode]:
    """Nodes that live, by id; those that are being drained too, for what runs there runs on for now."""
    return {
        node["NodeID"]: ClusterNode(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    }


def offers(left_out: Collection[str] = ()) -> tuple[NodeOffer, ...]:
    """What each live node has and has free, without those whose ids are `left_out` and those that are told to leave."""
    leaving = draining()
    free = ray_state.available_resources_per_node()
    return tuple(
        NodeOffer(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"] or node["NodeManagerAddress"],
            total=_told(node["Resources"]),
            free=_told(free.get(node["NodeID"], {})),
            group=node.get("Labels", {}).get("ray.io/node-group", ""),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and node["NodeID"] not in left_out
    )


def draining() -> dict[str, float | None]:
    """Nodes that were told to leave, and when they are gone (wall clock; None: nobody says)."""
    told: Mapping[str, int] = ray_state.state.get_draining_nodes()
    return {node_id: deadline_ms / 1000 if deadline_ms else None for node_id, deadline_ms in told.items()}


def _told(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if not _INTERNAL.match(name)}


def groups() -> tuple[NodeGroup, ...]:
    """What an autoscaler says it may add; empty without one."""
    config = ray_state.state.get_cluster_config()
    if config is None:
        return ()
    return tuple(
        NodeGroup(group.name, dict(group.resources), group.max_count if group.max_count >= 0 else None)
        for group in config.node_group_configs
    )


def may_join() -> bool:
    """Whether nodes may still come that no autoscaler speaks of: KubeRay starts a job once the head is ready, and worker pods join as
    they get their image. It marks the head's environment."""
    return os.environ.get("RAY_USAGE_STATS_KUBERAY_IN_USE") == "1"


def gang_request(spec: JobSpec) -> GangRequest:
    """The job's request in the cluster's terms. One CPU for each rank if nothing was said."""
    cpus, gpus = spec.resources.cpus_per_proc, spec.resources.gpus_per_proc
    return GangRequest(
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        procs_per_node=spec.nproc_per_node,
        per_proc={CPU: 1.0 if cpus is None else cpus, GPU: gpus or 0.0},
        per_node=dict(spec.resources.per_node),
    )


def order_of_nodes(node: ClusterNode) -> tuple[list[tuple[int, str]], str, str]:
    """Sort key: by name as people count (node-2 before node-10), so that rank 0 is where it was yesterday."""
    parts = re.split(r"(\d+)", node.hostname)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], node.addr, node.node_id
