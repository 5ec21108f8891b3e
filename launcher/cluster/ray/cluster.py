"""The Cluster port over Ray: one agent actor for each node of the gang, on one placement group."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from launcher import exclusion
from launcher.cluster.ports import EventSink, NodeHandle
from launcher.cluster.ray import survey, topology
from launcher.cluster.ray.acquire import SAY_AGAIN_S, Abandoned, Group, StartedAgent, start_agents, why_missing
from launcher.cluster.ray.cache_peers import CachePeers
from launcher.cluster.ray.head import HeadWatch, forget_ray
from launcher.cluster.ray.keeper import Keeper, Wanted
from launcher.cluster.ray.lease import Terms
from launcher.cluster.ray.leaving import Leaving
from launcher.cluster.ray.lifelines import Lifelines
from launcher.cluster.ray.parcel import Packer
from launcher.cluster.ray.remote_node import RemoteNode
from launcher.cluster.ray.waiter import Waiter
from launcher.errors import RequestRefused
from launcher.exclusion_file import NOWHERE, ExclusionFile
from launcher.gang.events import (
    Event,
    ModulesLearnt,
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodesReady,
    Notice,
    Output,
    PlacementRefused,
    PlacementWaiting,
)
from launcher.gang.offers import GPU
from launcher.gang.placement import default_gpus_per_proc, resolve_procs_per_node
from launcher.gang.world import NodeInfo
from launcher.spec import JobSpec

if TYPE_CHECKING:
    from launcher.cluster.ray.probes import RayPeer

CLOSE_S = 4.0
"""Agents drain their cache daemon in 2 s; what is not closed by then is killed."""
QUIET_S = 1.0
"""A wait for a replacement that is shorter than this is not worth a line."""


class RayCluster:
    """Nodes of the Ray cluster that this process is a driver of."""

    def __init__(self, address: str, spec: JobSpec, exclusions: ExclusionFile | None = None) -> None:
        """exclusions: nodes that are remembered as bad. None: no such memory."""
        self.description = f"Ray cluster at {address}"
        self._exclusions = exclusions or ExclusionFile(NOWHERE)
        self._terms = Terms(spec.heartbeat_timeout_s)
        self._head = HeadWatch(address)
        self._lifelines = Lifelines()
        self._events, self._outputs = Waiter("events"), Waiter("outputs")
        self._packer = Packer()
        self._imports: tuple[str, ...] = ()
        """Modules that ranks have imported, once a node has told."""
        self._cache_peers = CachePeers(self._share_cache)
        self._keeper: Keeper | None = None
        self._changed = threading.Condition()
        self._is_asked = True
        self._leaving = Leaving()
        self._num_taken = 0
        self._gone: dict[str, RemoteNode] = {}
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
        self._terms = Terms(spec.heartbeat_timeout_s)
        self._head.start(sink)

    def acquire(self, keep: tuple[str, ...]) -> None:
        self._acquiring = threading.Thread(target=self._acquire, args=(keep,), name="acquire", daemon=True)
        self._acquiring.start()

    def node(self, node_id: str) -> NodeHandle:
        with self._changed:
            return self._nodes.get(node_id) or self._gone[node_id]

    def let_go(self, node_id: str) -> None:
        with self._changed:
            node = self._nodes.get(node_id)
        if node is not None:
            self._let_go(node)
            self._lost(node_id)

    def open_peers(self, nodes: Sequence[NodeInfo]) -> list[RayPeer]:
        """Who measures from each of these nodes (launcher.fabric)."""
        from launcher.cluster.ray.probes import open_peers

        return open_peers([(node.node_id.partition("#")[0], node.hostname, node.addr) for node in nodes])

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._head.close()
        if self._keeper is not None:
            self._keeper.close(CLOSE_S)
        nodes = self._held()
        closing = [ref for node in nodes if not node.is_over and (ref := node.ask_to_close()) is not None]
        if closing:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        self._lifelines.close()
        self._events.close()
        self._outputs.close()
        if self._head.is_lost:
            forget_ray()
            return
        for node in nodes:
            node.kill()
        if self._acquiring is not None:
            self._acquiring.join(CLOSE_S)
        if self._group is not None:
            self._group.remove()
        with contextlib.suppress(Exception):
            ray.shutdown()

    # --- getting nodes ----------------------------------------------------------------------------------------------------------------

    def _acquire(self, keep: tuple[str, ...]) -> None:
        assert self._sink is not None, "acquire before open"
        try:
            for node in self._held():
                if node.node.node_id not in keep or node.is_over:
                    self._let_go(node)
            if self._group is None:
                self._first_time()
            else:
                self._wait_for_more()
            with self._changed:  # a node that joins now is either named here or tells of itself
                self._sink.put(NodesReady(self._ready()))
                self._is_asked = False
            if self._keeper is None:
                self._keeper = self._make_keeper()
                self._keeper.start()
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

    def _first_time(self) -> None:
        """All or none of the gang, by one placement group."""
        assert self._sink is not None
        left_out = self._left_out(say=True)
        deadline_s = time.monotonic() + self._spec.place_timeout_s
        group = Group(survey.gang_request(self._spec), self._sink, self._stop, deadline_s, left_out)
        self._group = group
        for agent in start_agents(group, group.create(), self._spec, self._stop):
            self._take(agent)

    def _wait_for_more(self) -> None:
        """The keeper brings them; here it is waited until there are enough, and said why. Raises RequestRefused at the deadline."""
        assert self._sink is not None
        deadline_s = time.monotonic() + self._spec.place_timeout_s
        said_s = 0.0
        with self._changed:
            self._is_asked = True
        if self._keeper is not None:
            self._keeper.look_now()
        while (num_missing := self._spec.min_nodes - len(self._ready())) > 0:
            now = time.monotonic()
            if now >= deadline_s:
                reason = self._why_missing(num_missing)
                raise RequestRefused(
                    f"nodes were lost and not replaced in {self._spec.place_timeout_s:g} s: {reason}",
                    advice="--place-timeout SECONDS waits longer, --spare-nodes holds some ready, --nnodes MIN:MAX goes on with fewer",
                )
            if now - said_s > SAY_AGAIN_S and now > deadline_s - self._spec.place_timeout_s + QUIET_S:
                said_s = now
                self._sink.put(PlacementWaiting(self._why_missing(num_missing), deadline_s - now))
            with self._changed:
                if not self._stop.is_set() and len(self._ready()) < self._spec.min_nodes:
                    self._changed.wait(min(QUIET_S, deadline_s - now))
            if self._stop.is_set():
                raise Abandoned

    def _why_missing(self, num_missing: int) -> str:
        left_out = {*self._left_out(), *self._ids_held()}
        return why_missing(survey.gang_request(self._spec), num_missing, left_out)

    def _make_keeper(self) -> Keeper:
        assert self._sink is not None
        assert self._group is not None
        sink = self._sink
        return Keeper(
            self._spec,
            self._group,
            self._wanted,
            self._joined,
            self._draining,
            self._left_out,
            lambda text: sink.put(Notice(text)),
        )

    def _wanted(self) -> Wanted:
        num_held = sum(node.node.node_id not in self._leaving for node in self._held() if not node.is_over)
        num_wanted = self._spec.max_nodes + self._spec.spare_nodes
        return Wanted(num_wanted - num_held, frozenset(self._ids_held()))

    def _joined(self, agent: StartedAgent) -> None:
        assert self._sink is not None
        info = self._take(agent)
        with self._changed:
            self._changed.notify_all()
            if not self._is_asked:  # else NodesReady names it
                self._sink.put(NodeJoined(info))

    def _draining(self, ray_id: str, deadline_wall_s: float | None) -> None:
        assert self._sink is not None
        for node in self._held():
            node_id = node.node.node_id
            if ray_id_of(node_id) == ray_id and not node.is_over and self._leaving.tell(node_id):
                left_s = None if deadline_wall_s is None else max(0.0, deadline_wall_s - time.time())
                self._sink.put(NodeDraining(node_id, "Ray drains it", left_s, time.time()))
                self._leaving.announced(node_id)

    def _left_out(self, say: bool = False) -> set[str]:
        """Ray's ids of the nodes on which no agent is started, because the user or the memory of bad nodes says so."""
        assert self._sink is not None
        offers = survey.offers()
        hosts = {offer.node_id: offer.host for offer in offers}
        named = [host for host in self._spec.exclude if host != "none"]
        chosen = exclusion.Exclusion({})
        if "none" not in self._spec.exclude:
            history = self._exclusions.history()
            chosen = exclusion.excluded(history, list(hosts.values()), needed=self._spec.min_nodes, now=time.time())
        if say and chosen.hosts:
            self._sink.put(Notice(exclusion.describe(chosen.hosts.items(), self._exclusions.path)))
        if say and chosen.remark:
            self._sink.put(Notice(chosen.remark))
        return {node_id for node_id, host in hosts.items() if host in named or host in chosen.hosts}

    # --- held nodes -------------------------------------------------------------------------------------------------------------------

    def _take(self, agent: StartedAgent) -> NodeInfo:
        """The agent begins; from now on it is one of ours."""
        assert self._sink is not None
        node = agent.node
        self._num_taken += 1
        # The number, because a node that is lost and comes back is another one to the gang.
        bare = NodeInfo(f"{node.node_id}#{self._num_taken}", node.hostname, node.addr, self._spec.nproc_per_node)
        info = topology.with_label(bare, topology.labels(), node.node_id, agent.hello.nvlink_domain)
        key = self._cache_peers.key_for(self._spec)
        port = agent.actor.begin.remote(info, self._spec, self._run_dir, agent.hello.cwd, key)
        tap = _Tap(self._sink, self._lost, self._leaving, self._left, self._cache_peers, self._learnt)
        remote = RemoteNode(info, agent.actor, tap, self._terms, self._events, self._outputs, self._packer)
        with self._changed:
            self._nodes[info.node_id] = remote
        remote.start()
        if self._imports:
            remote.share_imports(self._imports)
        self._events.when(port, lambda answer: self._connect(remote, answer))
        return info

    def _connect(self, remote: RemoteNode, port: Future[int]) -> None:
        if port.exception() is None and port.result():  # else the next poll will say what is wrong
            self._lifelines.connect(remote.node.node_id, remote.node.addr, port.result(), remote.process_ended)

    def _lost(self, node_id: str) -> None:
        self._lifelines.forget(node_id)
        if self._keeper is not None:
            self._keeper.leave_alone(ray_id_of(node_id))
            self._keeper.look_now()
        with self._changed:
            self._changed.notify_all()

    def _left(self, node_id: str) -> None:
        """Nothing of ours runs any more on a node that was told to leave."""
        with self._changed:
            node = self._nodes.get(node_id)
        if node is not None:
            self._let_go(node)

    def _learnt(self, event: ModulesLearnt) -> None:
        """Nodes without ranks of their own (spares) have it from those that have."""
        if not self._imports:
            self._imports = event.names
            for node in self._held():
                if node.node.node_id != event.node_id:
                    node.share_imports(event.names)

    def _share_cache(self, addresses: tuple[str, ...]) -> None:
        for node in self._held():
            node.share_cache(addresses)

    def _held(self) -> list[RemoteNode]:
        with self._changed:
            return list(self._nodes.values())

    def _ids_held(self) -> set[str]:
        return {ray_id_of(node.node.node_id) for node in self._held() if not node.is_over}

    def _ready(self) -> tuple[NodeInfo, ...]:
        """Held nodes on which an attempt may run, in the order of the gang."""
        infos = [node.node for node in self._held() if not node.is_over and node.node.node_id not in self._leaving]
        by_name = sorted(infos, key=lambda info: survey.order_of_nodes(_as_cluster_node(info)))
        return topology.in_order(by_name)

    def _let_go(self, node: RemoteNode) -> None:
        with self._changed:
            self._nodes.pop(node.node.node_id, None)
            self._gone[node.node.node_id] = node
        self._lifelines.forget(node.node.node_id)
        self._cache_peers.gone(node.node.node_id)
        node.kill()

    def _give_back(self) -> None:
        for node in self._held():
            self._let_go(node)
        if self._group is not None:
            self._group.remove()
            self._group = None


class _Tap:
    """The sink, and the cluster's own interest in what comes of a node."""

    def __init__(
        self,
        sink: EventSink,
        on_lost: Callable[[str], None],
        leaving: Leaving,
        on_left: Callable[[str], None],
        cache_peers: CachePeers,
        on_modules: Callable[[ModulesLearnt], None],
    ) -> None:
        self._sink = sink
        self._on_modules = on_modules
        self._cache_peers = cache_peers
        self._on_lost, self._on_left = on_lost, on_left
        self._leaving = leaving

    def put(self, event: Event) -> None:
        if isinstance(event, NodeDraining) and not self._leaving.tell(event.node_id):
            return
        if isinstance(event, ModulesLearnt):
            self._on_modules(event)
            return
        self._cache_peers.heard(event)
        self._sink.put(event)
        if isinstance(event, NodeDraining):
            self._leaving.announced(event.node_id)
        if isinstance(event, NodeLost):
            self._on_lost(event.node_id)
        self._heard(event)

    def put_log(self, output: Output) -> None:
        self._sink.put_log(output)
        self._heard(output)

    def _heard(self, what: Event | Output) -> None:
        left = self._leaving.heard(what)
        if left is not None:
            self._on_left(left)


def ray_id_of(node_id: str) -> str:
    """
    >>> ray_id_of("3fe#2")
    '3fe'
    """
    return node_id.partition("#")[0]


def _as_cluster_node(info: NodeInfo) -> survey.ClusterNode:
    return survey.ClusterNode(info.node_id, info.hostname, info.addr)
