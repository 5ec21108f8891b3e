"""One process on each node of a Ray cluster that looks at it and measures from it: for `doctor --address` and for `--preflight`.

The actors ask Ray for nothing (no CPU, no GPU), so that they start on a full cluster too; which GPUs they may use is told to them. They die
with the driver, and with them what they started.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.cluster.ray.agent_actor import _initial_environment, user_environment
from launcher.cluster.ray.connection import connect_to_ray
from launcher.fabric.codec import from_json, to_json
from launcher.fabric.facts import FactsError, Kubernetes, NodeFacts
from launcher.fabric.findings import Finding, Severity
from launcher.fabric.probe import probe
from launcher.fabric.serve import JsonPeer, ProcessPeer, command_of

START_S = 60.0
"""A worker process of Ray starts within seconds; on a node that unpacks a large runtime_env first, within tens."""
MIN_PATIENCE_S = 10.0
"""Ray takes a dead node for alive for a while; nobody waits a minute for it when the others have long answered."""
MARGIN_S = 5.0
"""For the way to a node and back."""
CLOSE_S = 5.0


class NodeProbe:
    """Created by the launcher on one node. All methods are called by Ray."""

    def __init__(self) -> None:
        self._peer: ProcessPeer | None = None

    def facts(self, addr: str, labels: Mapping[str, str]) -> str:
        """What the node is, as JSON; the paths of installed packages are those of Ray's workers, as they are the ranks'."""
        return to_json(probe(node_ip=addr, kubernetes=Kubernetes(labels=dict(labels))))

    def open(self, addr: str) -> None:
        """Starts the process that measures. Raises ConnectionError when nothing can listen at the address."""
        self._peer = ProcessPeer(command_of(addr), user_environment(os.environ, _initial_environment()))

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        assert self._peer is not None, "asked before it was opened"
        return self._peer.ask(question, timeout_s)

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


@dataclass(frozen=True)
class Place:
    """A node of the cluster."""

    ray_id: str
    hostname: str
    addr: str
    labels: Mapping[str, str]


def places() -> list[Place]:
    """The live nodes, in the order in which Ray knows them."""
    return [
        Place(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"], dict(node.get("Labels") or {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


class RayPeer(JsonPeer):
    """A `conduct.Peer` on another node."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._actor = (
            ray.remote(NodeProbe)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.ray_id, soft=False),
            )
            .remote()
        )
        self._opening: Any = None

    def look(self) -> Any:
        """Asks for the facts; what `heard` takes."""
        return self._actor.facts.remote(self.place.addr, dict(self.place.labels))

    def open(self) -> None:
        """Lets the measuring process start; the first question waits for it."""
        self._opening = self._actor.open.remote(self.place.addr)

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        opening, self._opening = self._opening, None
        if opening is not None:
            heard(opening, START_S)
        return heard(self._actor.ask.remote(dict(question), timeout_s), timeout_s + MARGIN_S)

    def kill(self) -> None:
        """From any thread: whatever is asked now is lost."""
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            ray.get(self._actor.close.remote(), timeout=CLOSE_S)
        with contextlib.suppress(Exception):
            ray.kill(self._actor)


def left_s(num_asked: int, num_silent: int, elapsed_s: float, last_answer_s: float) -> float:
    """How much longer to wait for those that are silent: less once most have answered, and how long that took is known.

    >>> left_s(8, 5, 20.0, 15.0), left_s(8, 1, 4.0, 2.0), left_s(8, 1, 30.0, 15.0), left_s(8, 0, 4.0, 4.0)
    (40.0, 6.0, 15.0, 0.0)
    """
    if num_silent == 0:
        return 0.0
    patience_s = START_S if 2 * num_silent >= num_asked else max(MIN_PATIENCE_S, 3 * last_answer_s)
    return max(0.0, min(START_S, patience_s) - elapsed_s)


def _wait_for_most(refs: list[Any]) -> float:
    """Until all have answered, or the silent ones have had their time. Returns how long that took (s)."""
    began_s = time.monotonic()
    silent, last_answer_s = refs, 0.0
    while (rest_s := left_s(len(refs), len(silent), time.monotonic() - began_s, last_answer_s)) > 0.0:
        answered, silent = ray.wait(silent, timeout=min(rest_s, 1.0))
        if answered:
            last_answer_s = time.monotonic() - began_s
    return time.monotonic() - began_s


def heard(ref: Any, timeout_s: float, waited_s: float = 0.0) -> Any:
    """The answer. Raises ConnectionError, with Ray's many lines in one. waited_s: how long it has been waited for already."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise ConnectionError(f"no answer within {waited_s + timeout_s:.3g} s") from error
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise ConnectionError(lines[0] if lines else type(cause).__name__) from error


def open_peers(nodes: Sequence[tuple[str, str, str]]) -> list[RayPeer]:
    """A peer on each node, from (Ray's id, host name, address). Returns before they have started; none raises here."""
    peers = [RayPeer(Place(ray_id, hostname, addr, {})) for ray_id, hostname, addr in nodes]
    for peer in peers:
        peer.open()
    return peers


class ClusterDoctor:
    """The nodes of a Ray cluster for `launcher.fabric.doctor`. Raises ClusterUnavailable when there is no such cluster."""

    def __init__(self, address: str) -> None:
        connect_to_ray(address)
        self._peers = [RayPeer(place) for place in places()]
        self._seen: list[RayPeer] = []

    def look(self) -> tuple[list[NodeFacts], list[Finding]]:
        """The facts of all nodes, and a finding for each that gave none."""
        asked = [(peer, peer.look()) for peer in self._peers]
        waited_s = _wait_for_most([ref for _, ref in asked])
        nodes: list[NodeFacts] = []
        found: list[Finding] = []
        for peer, ref in asked:
            try:
                nodes.append(from_json(heard(ref, 0.0, waited_s), source=peer.place.hostname))
                self._seen.append(peer)
            except (ConnectionError, FactsError) as error:
                found.append(_silent(peer.place, str(error).partition("\n")[0]))
        return nodes, found

    def peers(self) -> list[RayPeer]:
        """Those that were seen, in that order, ready to measure."""
        for peer in self._seen:
            peer.open()
        return self._seen

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        with contextlib.suppress(Exception):
            ray.shutdown()


def _silent(place: Place, why: str) -> Finding:
    return Finding(
        "facts-unreadable",
        Severity.ERROR,
        (place.hostname or place.addr,),
        f"the node at {place.addr} says nothing of itself: {why}",
        "this node is not part of the picture; what is wrong on it stays unseen",
        "the same railhead must be installed in the environment in which Ray runs there; ray status shows whether the node lives",
    )
