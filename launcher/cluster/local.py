"""This machine as a cluster: the agent runs in the launcher's own process, so nothing is started but the ranks."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.cluster.ports import EventSink, NodeHandle
from launcher.errors import RequestRefused
from launcher.gang.events import NodesReady
from launcher.gang.world import NodeInfo
from launcher.node.agent import NodeAgent
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.fabric.serve import ProcessPeer

_LOOPBACK = "127.0.0.1"


class LocalCluster:
    """num_nodes: how many nodes this machine plays. More than one is for trying out multi-node behaviour without a cluster.

    base_env: the environment that ranks start from; None: this process's.
    """

    def __init__(self, num_nodes: int = 1, base_env: Mapping[str, str] | None = None) -> None:
        self.description = "this machine" if num_nodes == 1 else f"this machine as {num_nodes} nodes"
        self._num_nodes = num_nodes
        self._base_env = dict(os.environ if base_env is None else base_env)
        self._agents: dict[str, NodeAgent] = {}

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        if spec.min_nodes > self._num_nodes:
            raise RequestRefused(
                f"--nnodes {spec.min_nodes} asks for {spec.min_nodes} nodes, but without a Ray cluster there is only this machine",
                advice="give the cluster with --address, or leave --nnodes out: "
                f"--nproc-per-node {spec.nproc_per_node * spec.min_nodes} would start as many ranks here",
            )
        self._spec, self._run_dir, self._sink = spec, run_dir, sink

    def acquire(self, keep: tuple[str, ...]) -> None:
        hostname = socket.gethostname()
        addr = self._spec.local_addr or _LOOPBACK
        nodes = tuple(
            NodeInfo(
                f"{hostname}-{idx}" if self._num_nodes > 1 else hostname, hostname, addr, self._spec.nproc_per_node
            )
            for idx in range(min(self._num_nodes, self._spec.max_nodes))
        )
        for node_id in set(self._agents) - set(keep):
            self._agents.pop(
                node_id
            ).close()  # it was lost by a fault of its own; the machine is still here, so a new one takes over
        for node in nodes:
            if node.node_id not in self._agents:
                self._agents[node.node_id] = NodeAgent(
                    node, self._spec, self._run_dir, self._base_env, self._sink.put, self._sink.put_log
                )
        self._sink.put(NodesReady(nodes))

    def node(self, node_id: str) -> NodeHandle:
        return self._agents[node_id]

    def let_go(self, node_id: str) -> None:
        # `acquire` makes the machine another agent; it closes this one first, if it has come so far.
        agent = self._agents[node_id]
        threading.Thread(target=agent.close, name="let-go", daemon=True).start()

    def open_peers(self, nodes: Sequence[NodeInfo]) -> list[ProcessPeer]:
        """Who measures from each of these nodes (launcher.fabric)."""
        from launcher.fabric.serve import ProcessPeer, command_of

        env = {**self._base_env, **self._spec.env}
        return [ProcessPeer(command_of(node.addr), env) for node in nodes]

    def close(self) -> None:
        for agent in self._agents.values():
            agent.close()
