"""Conducts a preflight over the peers of a gang and returns what was found. A thin shell around preflight.py's judgement.

The order: everyone connects to everyone (both directions are connections of their own), full-size datagrams, then transfers in
rounds of disjoint pairs, then a second look at whoever seemed slow. What cannot be reached is not measured further.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from launcher.fabric import preflight
from launcher.fabric.findings import Finding
from launcher.fabric.peer import TIMEOUT_S, Connection, DatagramOutcome, Endpoint

T = TypeVar("T")

RETEST_FACTOR = 2

DATAGRAM_S = 0.5
"""For the answers to three tries; a round trip within a data centre takes a thousandth of it."""

TRANSFER_S = 0.2
"""Per measurement: enough for TCP to reach its rate on a data-centre path."""


class Peer(Protocol):
    """One node, wherever it is: a LocalPeer, a process, a Ray actor behind the same methods."""

    def endpoint(self) -> Endpoint: ...
    def connect(self, targets: Sequence[Endpoint], timeout_s: float = ...) -> list[Connection]: ...
    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = ...) -> list[DatagramOutcome]: ...
    def transfer(self, target: Endpoint, seconds: float) -> float: ...
    def compute(self) -> dict[str, float]: ...
    def lookup(self, names: Sequence[tuple[str, str]]) -> list[str]: ...


@dataclass(frozen=True)
class Report:
    """What a preflight saw and concluded."""

    findings: tuple[Finding, ...]
    slow_nodes: tuple[int, ...]
    """Positions of nodes that were slow twice: candidates for being left out."""
    unreachable: tuple[tuple[int, int], ...]
    transfers: tuple[preflight.Transfer, ...]


def conduct(
    peers: Sequence[Peer],
    hosts: Sequence[str],
    *,
    transfer_s: float = TRANSFER_S,
    with_compute: bool = False,
    with_names: bool = False,
) -> Report:
    """Measures every node of the gang against the others. Blocks for some seconds; nothing is left running.

    `with_compute` also compares how fast the nodes' processors are; leave it out where nodes share a machine.
    `with_names` also looks the nodes' names up from everywhere; leave it out where `hosts` are no names in DNS.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(peers)), thread_name_prefix="preflight") as pool:
        gang = _Gang(peers, _all(pool, [peer.endpoint for peer in peers]), pool)
        reaches = gang.reach()
        lost = {(item.source, item.target) for item in reaches if not item.is_ok}
        datagrams = gang.datagrams(lost)
        # Large transfers hang where full-size packets are dropped; the reason is known already.
        dead = lost | {(item.source, item.target) for item in datagrams if item.is_small_ok and not item.is_large_ok}
        rounds = preflight.schedule(len(peers))
        transfers = gang.measure(rounds, dead, transfer_s)
        first = preflight.suspects(transfers)
        # Longer: what one stumble of TCP did in the first round weighs less.
        again = gang.measure(preflight.retests(first, transfers), dead, RETEST_FACTOR * transfer_s) if first else []
        slow = preflight.confirmed(first, transfers, again)
        found = [
            *preflight.reach_findings(reaches, hosts, [endpoint.address for endpoint in gang.endpoints]),
            *preflight.datagram_findings(datagrams, hosts),
            *preflight.slow_findings(slow, hosts),
            *preflight.broken_findings(rounds, dead, transfers, hosts),
            *(gang.lookup_findings(hosts) if with_names else ()),
            *(gang.compute_findings(hosts) if with_compute else ()),
        ]
    return Report(tuple(found), tuple(sorted(slow.nodes)), tuple(sorted(lost)), (*transfers, *again))


@dataclass(frozen=True)
class _Gang:
    """The peers with their endpoints, and the threads that talk to them all at once."""

    peers: Sequence[Peer]
    endpoints: Sequence[Endpoint]
    pool: ThreadPoolExecutor

    def others(self, source: int) -> list[int]:
        return [target for target in range(len(self.peers)) if target != source]

    def reach(self) -> list[preflight.Reach]:
        """Everyone connects to everyone."""
        answers = _all(
            self.pool,
            [
                _connect(peer, [self.endpoints[target] for target in self.others(source)])
                for source, peer in enumerate(self.peers)
            ],
        )
        return [
            preflight.Reach(source, target, outcome.is_ok, outcome.problem, outcome.clock_offset_s)
            for source, outcomes in enumerate(answers)
            for target, outcome in zip(self.others(source), outcomes, strict=True)
        ]

    def datagrams(self, lost: set[tuple[int, int]]) -> list[preflight.Datagrams]:
        """Full-size datagrams along every path that connects."""
        reached = [
            [target for target in self.others(source) if (source, target) not in lost]
            for source in range(len(self.peers))
        ]
        answers = _all(
            self.pool,
            [
                _datagrams(peer, [self.endpoints[target] for target in reached[source]])
                for source, peer in enumerate(self.peers)
            ],
        )
        return [
            preflight.Datagrams(source, target, outcome.size, outcome.is_small_ok, outcome.is_large_ok)
            for source, outcomes in enumerate(answers)
            for target, outcome in zip(reached[source], outcomes, strict=True)
        ]

    def measure(
        self, rounds: Sequence[Sequence[tuple[int, int]]], dead: set[tuple[int, int]], seconds: float
    ) -> list[preflight.Transfer]:
        """Each round one way, then the other; pairs of one round at the same time, because they share no node."""
        found: list[preflight.Transfer] = []
        for pairs in rounds:
            for direction in (pairs, [(target, source) for source, target in pairs]):
                ways = [way for way in direction if way not in dead]
                rates = _all(
                    self.pool,
                    [_transfer(self.peers[source], self.endpoints[target], seconds) for source, target in ways],
                )
                found += [
                    # 0 is a transfer that broke: it says nothing about speed.
                    preflight.Transfer(source, target, rate)
                    for (source, target), rate in zip(ways, rates, strict=True)
                    if rate > 0
                ]
        return found

    def lookup_findings(self, hosts: Sequence[str]) -> list[Finding]:
        """Everyone looks everyone else up."""
        names = [(host, endpoint.address) for host, endpoint in zip(hosts, self.endpoints, strict=True)]
        answers = _all(
            self.pool,
            [
                _lookup(peer, [names[target] for target in self.others(source)])
                for source, peer in enumerate(self.peers)
            ],
        )
        problems = {
            (source, target): problem
            for source, answer in enumerate(answers)
            for target, problem in zip(self.others(source), answer, strict=True)
        }
        return preflight.lookup_findings(problems, hosts)

    def compute_findings(self, hosts: Sequence[str]) -> list[Finding]:
        answers = _all(self.pool, [peer.compute for peer in self.peers])
        kinds = dict.fromkeys(kind for answer in answers for kind in answer)
        return [
            finding
            for kind in kinds
            for finding in preflight.compute_findings(
                {node: answer[kind] for node, answer in enumerate(answers) if kind in answer}, hosts, kind
            )
        ]


def _connect(peer: Peer, targets: list[Endpoint]) -> Callable[[], list[Connection]]:
    return lambda: peer.connect(targets, TIMEOUT_S)


def _datagrams(peer: Peer, targets: list[Endpoint]) -> Callable[[], list[DatagramOutcome]]:
    return lambda: peer.datagrams(targets, DATAGRAM_S)


def _lookup(peer: Peer, names: list[tuple[str, str]]) -> Callable[[], list[str]]:
    return lambda: peer.lookup(names)


def _transfer(peer: Peer, target: Endpoint, seconds: float) -> Callable[[], float]:
    return lambda: peer.transfer(target, seconds)


def _all(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> list[T]:
    return [future.result() for future in [pool.submit(call) for call in calls]]


class ProcessPeer:
    """A peer in a process of its own (`python -m launcher.fabric.peer ADDRESS`), reached by its standard input and output.

    `command` starts it: through `ip netns exec`, ssh, or directly. One call at a time.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._endpoint = Endpoint(**self._read())

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def connect(self, targets: Sequence[Endpoint], timeout_s: float = TIMEOUT_S) -> list[Connection]:
        return [Connection(**item) for item in self._ask("connect", targets, timeout_s=timeout_s)]

    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = TIMEOUT_S) -> list[DatagramOutcome]:
        return [DatagramOutcome(**item) for item in self._ask("datagrams", targets, timeout_s=timeout_s)]

    def transfer(self, target: Endpoint, seconds: float) -> float:
        return float(self._ask("transfer", [target], seconds=seconds))

    def lookup(self, names: Sequence[tuple[str, str]]) -> list[str]:
        return [str(problem) for problem in self._ask("lookup", [], names=[list(pair) for pair in names])]

    def compute(self) -> dict[str, float]:
        return {str(kind): float(seconds) for kind, seconds in self._ask("compute", []).items()}

    def close(self) -> int:
        """Closes its input, which ends it; its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        return code

    def _ask(self, call: str, targets: Sequence[Endpoint], **arguments: Any) -> Any:
        assert self._process.stdin is not None
        request = {"call": call, "targets": [asdict(target) for target in targets], **arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError(f"the preflight process {self._process.pid} ended (exit code {self._process.poll()})")
        return json.loads(line)
