"""Conducts a preflight over the peers of a gang and returns what was found. A thin shell around the judgement of others.

The order: everyone connects to everyone (both directions are connections of their own), full-size datagrams, transfers in rounds of
disjoint pairs, a second look at whoever seemed slow, all-reduces of pairs in two rounds and of the whole gang, processors and GPUs. What
cannot be reached is not measured further. A peer that dies is a finding, and the others are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from launcher.fabric import compute_check, preflight, reduce_check
from launcher.fabric.findings import Finding, Severity
from launcher.fabric.hcas import Transport
from launcher.fabric.nccl_log import read_log, transport_findings
from launcher.fabric.peer import TIMEOUT_S, Connection, DatagramOutcome, Endpoint
from launcher.fabric.reduce_check import Outcome
from launcher.fabric.verdict import Report
from launcher.fabric.workers import Ready, Reduced, Seat

T = TypeVar("T")

RETEST_FACTOR = 2

DATAGRAM_S = 0.5
"""For the answers to three tries; a round trip within a data centre takes a thousandth of it."""

TRANSFER_S = 0.15
"""Per measurement: enough for TCP to reach its rate on a data-centre path."""

READY_S = 60.0
"""For importing torch from a cold disk."""

GLOO_TIMEOUT_S = 10.0
NCCL_TIMEOUT_S = 60.0
"""NCCL's first communicator on a large node takes several seconds."""


class Peer(Protocol):
    """One node, wherever it is: a LocalPeer, a process, a Ray actor behind the same methods. Any may raise when the node is gone."""

    def endpoint(self) -> Endpoint: ...
    def connect(self, targets: Sequence[Endpoint], timeout_s: float = ...) -> list[Connection]: ...
    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = ...) -> list[DatagramOutcome]: ...
    def transfer(self, target: Endpoint, seconds: float) -> float: ...
    def compute(self) -> dict[str, float]: ...
    def lookup(self, names: Sequence[tuple[str, str]]) -> list[str]: ...
    def prepare(self, env: Mapping[str, str]) -> None: ...
    def ready(self, timeout_s: float) -> Ready: ...
    def store(self) -> int: ...
    def reduce(self, seat: Seat) -> Reduced: ...
    def gpu_compute(self) -> list[dict[str, float]]: ...
    def nccl_log(self) -> list[str]: ...


@dataclass(frozen=True)
class Wishes:
    """What is measured beside the network itself."""

    compute: bool = False
    """How fast the nodes' processors are; leave it out where nodes share a machine."""
    names: bool = False
    """Look the nodes' names up from everywhere; leave it out where `hosts` are no names in DNS."""
    reduce: bool = False
    """All-reduces, and GPUs where there are any: imports torch on each node."""
    transfer_s: float = TRANSFER_S
    environments: Sequence[Mapping[str, str]] = ()
    """What the ranks of each node will find in their environment (interfaces, devices); empty: what is there."""
    transports: Sequence[Transport] = ()
    """The network that each node's facts promise; what NCCL's log shows is held against it."""


def conduct(peers: Sequence[Peer], hosts: Sequence[str], wishes: Wishes | None = None) -> Report:
    """Measures every node of the gang against the others. Blocks for some seconds; `close` of the peers ends all that this starts."""
    wishes = wishes or Wishes()
    with ThreadPoolExecutor(max_workers=max(1, len(peers)), thread_name_prefix="preflight") as pool:
        gang = _Gang(peers, pool)
        if wishes.reduce:
            gang.prepare(wishes.environments)
        gang.look_around()
        reaches = gang.reach()
        dead = {(item.source, item.target) for item in reaches if not item.is_ok}
        datagrams = gang.datagrams(dead)
        ready = gang.ready() if wishes.reduce else []
        # Large transfers hang where full-size packets are dropped; the reason is known already.
        mute = dead | {(item.source, item.target) for item in datagrams if item.is_small_ok and not item.is_large_ok}
        rounds = preflight.schedule(len(peers))
        network = gang.network(rounds, mute, wishes.transfer_s)
        found = [
            *preflight.reach_findings(reaches, hosts, [endpoint.address for endpoint in gang.endpoints]),
            *preflight.datagram_findings(datagrams, hosts),
            *preflight.slow_findings(network.slow, hosts),
            *preflight.broken_findings(rounds, mute, network.transfers, hosts),
            *(gang.lookup_findings(hosts) if wishes.names else ()),
        ]
        reduces = gang.reduces(ready, mute) if wishes.reduce else _Reduces()
        found += reduces.findings(hosts, already=network.slow.nodes.keys())
        if reduces.backend == "nccl":
            found += gang.transport_findings(hosts, wishes.transports)
        compute = gang.compute(wishes.compute, ready)
        found += compute_check.compute_findings(compute.slow, hosts)
        found += [*_not_ready(ready, hosts), *_lost(gang.lost, hosts)]
    slow = {*network.slow.nodes, *reduces.slow.nodes, *(unit.node for _, unit in compute.slow)}
    return Report(
        tuple(found),
        tuple(sorted(slow)),
        tuple(sorted(dead)),
        network.transfers,
        tuple(reduces.outcomes),
        reduces.backend,
        compute.seconds,
        dict(gang.lost),
    )


NOTHING = preflight.Suspects({}, {})


@dataclass(frozen=True)
class _Network:
    transfers: tuple[preflight.Transfer, ...]
    slow: preflight.Suspects


@dataclass(frozen=True)
class _Compute:
    seconds: compute_check.Seconds
    slow: Mapping[tuple[str, compute_check.Unit], str]


@dataclass(frozen=True)
class _Reduces:
    outcomes: Sequence[Outcome] = ()
    slow: preflight.Suspects = NOTHING
    backend: str = ""

    def findings(self, hosts: Sequence[str], already: Collection[int]) -> list[Finding]:
        known = set(already)
        fresh = preflight.Suspects(
            {node: why for node, why in self.slow.nodes.items() if node not in known},
            {link: why for link, why in self.slow.links.items() if not known & set(link)},
        )
        return [
            *reduce_check.failed_findings(self.outcomes, hosts, self.backend),
            *preflight.slow_findings(fresh, hosts, f"in an all-reduce over {self.backend} it "),
        ]


class _Gang:
    """The peers with their endpoints, and the threads that talk to them all at once. A peer that raises is lost from then on."""

    def __init__(self, peers: Sequence[Peer], pool: ThreadPoolExecutor) -> None:
        self.peers = peers
        self.pool = pool
        self.endpoints: list[Endpoint] = [Endpoint("", 0, 0, "")] * len(peers)
        self.lost: dict[int, str] = {}

    def others(self, source: int) -> list[int]:
        return [target for target in range(len(self.peers)) if target != source]

    def look_around(self) -> None:
        self.endpoints = self._each(lambda peer, node: peer.endpoint(), self.endpoints)

    def prepare(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._each(
            lambda peer, node: peer.prepare(environments[node] if environments else {}), [None] * len(self.peers)
        )

    def ready(self) -> list[Ready]:
        return self._each(lambda peer, node: peer.ready(READY_S), [Ready(problem="it is gone")] * len(self.peers))

    def reach(self) -> list[preflight.Reach]:
        """Everyone connects to everyone."""
        gone = [[Connection(False, "its probe is gone")] * (len(self.peers) - 1)] * len(self.peers)
        answers = self._each(
            lambda peer, node: peer.connect([self.endpoints[target] for target in self.others(node)], TIMEOUT_S), gone
        )
        return [
            preflight.Reach(source, target, outcome.is_ok, outcome.problem, outcome.clock_offset_s)
            for source, outcomes in enumerate(answers)
            for target, outcome in zip(self.others(source), outcomes, strict=True)
            if source not in self.lost
        ]

    def datagrams(self, dead: set[tuple[int, int]]) -> list[preflight.Datagrams]:
        """Full-size datagrams along every path that connects."""
        reached = [
            [target for target in self.others(source) if (source, target) not in dead]
            for source in range(len(self.peers))
        ]
        gone = [[DatagramOutcome(0, False, False)] * len(targets) for targets in reached]
        answers = self._each(
            lambda peer, node: peer.datagrams([self.endpoints[target] for target in reached[node]], DATAGRAM_S), gone
        )
        return [
            preflight.Datagrams(source, target, outcome.size, outcome.is_small_ok, outcome.is_large_ok)
            for source, outcomes in enumerate(answers)
            for target, outcome in zip(reached[source], outcomes, strict=True)
        ]

    def network(self, rounds: Sequence[Sequence[tuple[int, int]]], dead: set[tuple[int, int]], s: float) -> _Network:
        """Transfers, and a second look where something seemed slow."""
        transfers = self._measure(rounds, dead, s)
        first = preflight.suspects(transfers)
        # Longer: what one stumble of TCP did in the first round weighs less.
        again = self._measure(preflight.retests(first, transfers), dead, RETEST_FACTOR * s) if first else []
        return _Network((*transfers, *again), preflight.confirmed(first, transfers, again))

    def _measure(
        self, rounds: Sequence[Sequence[tuple[int, int]]], dead: set[tuple[int, int]], seconds: float
    ) -> list[preflight.Transfer]:
        """Each round one way, then the other; pairs of one round at the same time, because they share no node."""
        found: list[preflight.Transfer] = []
        for pairs in rounds:
            for direction in (pairs, [(target, source) for source, target in pairs]):
                targets = dict(way for way in direction if way not in dead)
                rates = self._each(
                    lambda peer, node, to=targets: peer.transfer(self.endpoints[to[node]], seconds),  # type: ignore[misc]
                    [0.0] * len(self.peers),
                    only=targets,
                )
                found += [
                    # 0 is a transfer that broke: it says nothing about speed.
                    preflight.Transfer(source, target, rates[source])
                    for source, target in targets.items()
                    if rates[source] > 0
                ]
        return found

    def reduces(self, ready: Sequence[Ready], dead: set[tuple[int, int]]) -> _Reduces:
        """Pairs in two rounds, whoever seemed slow again, then all together."""
        able = [node for node, one in enumerate(ready) if not one.problem and node not in self.lost]
        able = [node for node in able if not any(node in pair and set(pair) <= set(able) for pair in dead)]
        if not able:
            return _Reduces()
        is_gpu = all(ready[node].backend == "nccl" for node in able)
        backend = "nccl" if is_gpu else "gloo"
        ranks = min(ready[node].gpus for node in able) if is_gpu else 1
        pairs: list[Outcome] = []
        for places in preflight.schedule(len(able), max_rounds=reduce_check.ROUNDS):
            unable = reduce_check.to_blame(pairs)
            groups = [(able[one], able[other]) for one, other in places]
            # Whoever waits for a node that cannot waits for the whole time-out.
            pairs += self._reduce([group for group in groups if not unable & set(group)], backend, ranks)
        transfers = reduce_check.transfers(pairs)
        first = preflight.suspects(transfers)
        again = [
            item
            for groups in (preflight.retests(first, transfers) if first else ())
            for item in self._reduce(groups, backend, ranks)
        ]
        slow = preflight.confirmed(first, transfers, reduce_check.transfers(again))
        fit = tuple(node for node in able if node not in reduce_check.unfit(pairs))
        whole = self._reduce([fit], backend, ranks) if len(fit) > 2 or len(able) == 1 else []
        return _Reduces([*pairs, *again, *whole], slow, backend)

    def _reduce(self, groups: Sequence[reduce_check.Group], backend: str, ranks: int) -> list[Outcome]:
        """Disjoint groups at the same time. The first node of each hosts its store."""
        timeout_s = NCCL_TIMEOUT_S if backend == "nccl" else GLOO_TIMEOUT_S
        leaders = [group[0] for group in groups]
        ports = self._each(lambda peer, node: peer.store(), [0] * len(self.peers), only=leaders)
        seats = {
            node: Seat(
                self.endpoints[group[0]].address, ports[group[0]], position, len(group), ranks, backend, timeout_s
            )
            for group in groups
            if ports[group[0]]
            for position, node in enumerate(group)
        }
        gone = [
            Reduced(problem="it could host no store") if node in leaders else Reduced(problem="no store", is_late=True)
            for node in range(len(self.peers))
        ]
        answers = self._each(lambda peer, node: peer.reduce(seats[node]), gone, only=seats)
        return [
            Outcome(
                group,
                max(answers[node].seconds for node in group),
                max(answers[node].bytes for node in group),
                len(group) * ranks,
                {node: answers[node].problem for node in group if answers[node].problem},
                frozenset(node for node in group if answers[node].problem and not answers[node].is_late),
            )
            for group in groups
        ]

    def compute(self, is_wished: bool, ready: Sequence[Ready]) -> _Compute:
        """Processors if that is wished, GPUs where there are any; again for whoever seemed slow."""
        gpus = [node for node, one in enumerate(ready) if one.gpus]
        if not is_wished and not gpus:
            return _Compute({}, {})
        nodes = list(range(len(self.peers))) if is_wished else []
        seconds = self._compute(nodes, gpus)
        first = compute_check.slow(seconds)
        if not first:
            return _Compute(seconds, {})
        processors = sorted({unit.node for _, unit in first if unit.gpu is None})
        again = self._compute(processors, sorted({unit.node for _, unit in first if unit.gpu is not None}))
        return _Compute(seconds, compute_check.confirmed(first, seconds, again))

    def _compute(self, nodes: Sequence[int], gpus: Sequence[int]) -> compute_check.Seconds:
        processors: list[dict[str, float]] = [{} for _ in self.peers]
        cards: list[list[dict[str, float]]] = [[] for _ in self.peers]
        return compute_check.gather(
            self._each(lambda peer, node: peer.compute(), processors, only=nodes),
            self._each(lambda peer, node: peer.gpu_compute(), cards, only=gpus),
        )

    def transport_findings(self, hosts: Sequence[str], transports: Sequence[Transport]) -> list[Finding]:
        """What NCCL says that carried it, against what the nodes have."""
        logs = self._each(lambda peer, node: peer.nccl_log(), [list[str]() for _ in self.peers])
        return [
            finding
            for node, lines in enumerate(logs)
            if node < len(transports)
            for finding in transport_findings(read_log(lines), transports[node], hosts[node])
        ]

    def lookup_findings(self, hosts: Sequence[str]) -> list[Finding]:
        """Everyone looks everyone else up."""
        names = [(host, endpoint.address) for host, endpoint in zip(hosts, self.endpoints, strict=True)]
        gone = [[""] * (len(self.peers) - 1)] * len(self.peers)
        answers = self._each(lambda peer, node: peer.lookup([names[target] for target in self.others(node)]), gone)
        problems = {
            (source, target): problem
            for source, answer in enumerate(answers)
            for target, problem in zip(self.others(source), answer, strict=True)
        }
        return preflight.lookup_findings(problems, hosts)

    def _each(self, call: Callable[[Peer, int], T], gone: Sequence[T], only: Iterable[int] | None = None) -> list[T]:
        """The answers of all peers (or of `only` these) at once, `gone[node]` for those that are lost or not asked."""
        asked = [node for node in (range(len(self.peers)) if only is None else only) if node not in self.lost]
        futures = {node: self.pool.submit(call, self.peers[node], node) for node in asked}
        answers = list(gone)
        for node, future in futures.items():
            try:
                answers[node] = future.result()
            except Exception as error:  # a dead process, a dead actor, an answer that is none: each loses one node
                self.lost[node] = f"{type(error).__name__}: {error}".partition("\n")[0]
        return answers


def _not_ready(ready: Sequence[Ready], hosts: Sequence[str]) -> list[Finding]:
    return [
        Finding(
            "collective-failed",
            Severity.ERROR,
            (hosts[node],),
            f"no all-reduce could be tried: {one.problem}",
            "training imports the same torch and will fail as well",
            "run `python -c 'import torch'` in the environment of this node",
        )
        for node, one in enumerate(ready)
        if one.problem
    ]


def _lost(lost: Mapping[int, str], hosts: Sequence[str]) -> list[Finding]:
    return [
        Finding(
            "probe-lost",
            Severity.ERROR,
            (hosts[node],),
            f"its probe broke off: {why}",
            "the node was not measured to the end; what ends a probe may end a rank",
            "look at the node's memory and its kernel log (dmesg)",
        )
        for node, why in sorted(lost.items())
    ]
