"""Nodes of a Ray cluster. Only this package imports ray, and only when an address is given.

`connection` (reach the cluster or say why not), `survey` (what the nodes have), `acquire` (placement group, one agent on each bundle),
`keeper` (nodes that are still lacking, nodes that are to leave), `agent_actor` (the node's side), `remote_node` (the driver's side of one
agent), `lease` (who may go on when they do not hear each other), `lifelines` (the death of an agent's process), `head` (that of the
cluster's head), `outbox` (what is told until it has arrived), `cluster` (the port).
"""

from __future__ import annotations

from launcher.cluster.ray.cluster import RayCluster
from launcher.cluster.ray.connection import connect_to_ray
from launcher.exclusion_file import ExclusionFile
from launcher.spec import JobSpec

__all__ = ["RayCluster", "connect"]


def connect(address: str, spec: JobSpec, exclusions: ExclusionFile | None = None) -> RayCluster:
    """A connection to the cluster at `address`; `exclusions`: nodes that are remembered as bad.

    Raises ClusterUnavailable, within seconds, with what is wrong."""
    resolved = connect_to_ray(address)
    return RayCluster(resolved, spec, exclusions)
