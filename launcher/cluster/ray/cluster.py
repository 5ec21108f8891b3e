"""The Cluster port over Ray: one agent actor for each node of the gang, on one placement group."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from launcher.cluster.ports import EventSink, NodeHandle
from launcher.cluster.ray import survey, topology
from launcher.cluster.ray.acquire import Abandoned, Group, StartedAgent, start_agents
from launcher.cluster.ray.remote_node import RemoteNode
from launcher.errors import RequestRefused
from launcher.gang.events import NodesReady, PlacementRefused
from launcher.gang.offers import GPU
from launcher.gang.placement import default_gpus_per_proc, resolve_procs_per_node
from launcher.gang.world import NodeInfo
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.cluster.ray.probes import RayPeer

CLOSE_S = 4.0
"""Agents drain their cache daemon in 2 s; what is not closed by then is killed."""


class RayCluster:
    """Nodes of the Ray cluster that this process is a driver of."""

    def __init__(self, address: str, spec: JobSpec) -> None:
        self.description = f"Ray cluster at {address}"
        self._spec = spec
        self._run_dir = ""
        self._sink: EventSink | None = None
        self._group: Group | None = None
        self._nodes: dict[str, RemoteNode] = {}
        self._stop = threading.Event()
        self._acquiring: threading.Thread | None = None
        self._is_closed = False

    def fill_in(self, spec: JobSpec, procs_wish: str | None) -> JobSpec:
        """The job with what only the cluster knows: GPUs per rank, and ranks per node where they were wished by a word.

        Raises RequestRefused if no node can give what the word means.
        """
        offers, groups = survey.offers(), survey.groups()
        resources = spec.resources
        if resources.gpus_per_proc is None:
            gpus = 0.0 if procs_wish == "cpu" else default_gpus_per_proc(offers, groups)
            resources = replace(resources, gpus_per_proc=gpus)
        num_procs = spec.nproc_per_node
        if procs_wish is not None:
            num_procs = resolve_procs_per_node(procs_wish, offers, spec.min_nodes)
            if num_procs == 0:
                what = GPU if procs_wish == "gpu" else "GPU or CPU"
                raise RequestRefused(
                    f"--nproc-per-node {procs_wish}: of {len(offers)} nodes not {spec.min_nodes} have a {what}",
                    advice="write the number of ranks, or fewer --nnodes",
                )
        return replace(spec, nproc_per_node=num_procs, resources=resources)

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        # The actors have another working directory than we.
        self._spec, self._run_dir, self._sink = spec, os.path.abspath(run_dir), sink

    def acquire(self, keep: tuple[str, ...]) -> None:
        self._acquiring = threading.Thread(target=self._acquire, args=(keep,), name="acquire", daemon=True)
        self._acquiring.start()

    def node(self, node_id: str) -> NodeHandle:
        return self._nodes[node_id]

    def open_peers(self, nodes: Sequence[NodeInfo]) -> list[RayPeer]:
        """Who measures from each of these nodes (launcher.fabric)."""
        from launcher.cluster.ray.probes import open_peers

        return open_peers([(node.node_id.partition("#")[0], node.hostname, node.addr) for node in nodes])

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._stop.set()
        closing = [
            ref for node in self._nodes.values() if not node.is_over and (ref := node.ask_to_close()) is not None
        ]
        if closing:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for node in self._nodes.values():
            node.kill()
        if self._acquiring is not None:
            self._acquiring.join(CLOSE_S)
        if self._group is not None:
            self._group.remove()
        for node in self._nodes.values():
            node.join(1.0)
        with contextlib.suppress(Exception):
            ray.shutdown()

    def _acquire(self, keep: tuple[str, ...]) -> None:
        assert self._sink is not None, "acquire before open"
        try:
            self._acquire_all(keep)
            ready = sorted(self._live(), key=lambda item: survey.order_of_nodes(item[0]))
            self._sink.put(NodesReady(topology.in_order([info for _, info in ready])))
        except Abandoned:
            pass
        except RequestRefused as refused:
            self._give_back()
            self._sink.put(PlacementRefused(refused.message, refused.advice))
        except Exception as error:
            # A thread's exception would be nobody's: the job would wait for ever.
            if not self._stop.is_set():
                self._give_back()
                self._sink.put(PlacementRefused(f"{self.description} failed while nodes were asked for: {error!r}"))

    def _acquire_all(self, keep: tuple[str, ...]) -> None:
        assert self._sink is not None
        for node_id in [node_id for node_id, node in self._nodes.items() if node_id not in keep or node.is_over]:
            self._nodes.pop(node_id).kill()
        if self._group is None:
            deadline_s = time.monotonic() + self._spec.place_timeout_s
            self._group = Group(survey.gang_request(self._spec), self._sink, self._stop, deadline_s)
            bundles = self._group.create()
        else:
            self._group.renew(time.monotonic() + self._spec.place_timeout_s)
            bundles = self._group.complete()
        new = [bundle for bundle in bundles if bundle.node.node_id not in self._nodes]
        for agent in start_agents(self._group, new, self._spec, self._stop):
            self._take(agent)

    def _take(self, agent: StartedAgent) -> None:
        assert self._sink is not None
        info = topology.with_label(self._info(agent.node), topology.labels(), agent.node.node_id)
        # An error here is the actor's death, and the fetching thread will say so.
        agent.actor.begin.remote(info, self._spec, self._run_dir, agent.hello.cwd)
        remote = RemoteNode(info, agent.actor, self._sink)
        self._nodes[info.node_id] = remote
        remote.start()

    def _info(self, node: survey.ClusterNode) -> NodeInfo:
        return NodeInfo(node.node_id, node.hostname, node.addr, self._spec.nproc_per_node)

    def _live(self) -> list[tuple[survey.ClusterNode, NodeInfo]]:
        infos = [node.node for node in self._nodes.values()]
        return [(survey.ClusterNode(info.node_id, info.hostname, info.addr), info) for info in infos]

    def _give_back(self) -> None:
        for node in self._nodes.values():
            node.kill()
        if self._group is not None:
            self._group.remove()
            self._group = None
