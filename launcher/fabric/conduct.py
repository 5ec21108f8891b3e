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


@dataclass(frozen=True)
class Report:
    """What a preflight saw and concluded."""

    findings: tuple[Finding, ...]
    slow_nodes: tuple[int, ...]
    """Positions of nodes that were slow twice: candidates for being left out."""
    unreachable: tuple[tuple[int, int], ...]
    transfers: tuple[preflight.Transfer, ...]


def conduct(peers: Sequence[Peer], hosts: Sequence[str], *, transfer_s: float = TRANSFER_S) -> Report:
    """Measures every node of the gang against the others. Blocks for some seconds; nothing is left running."""
    with ThreadPoolExecutor(max_workers=max(1, len(peers)), thread_name_prefix="preflight") as pool:
        return _conduct(peers, hosts, transfer_s, pool)


def _conduct(peers: Sequence[Peer], hosts: Sequence[str], transfer_s: float, pool: ThreadPoolExecutor) -> Report:
    endpoints = _all(pool, [peer.endpoint for peer in peers])
    others = [[target for target in range(len(peers)) if target != source] for source in range(len(peers))]

    def targets(source: int) -> list[Endpoint]:
        return [endpoints[target] for target in others[source]]

    connections = _all(pool, [_connect(peer, targets(source)) for source, peer in enumerate(peers)])
    reaches = [
        preflight.Reach(source, target, outcome.is_ok, outcome.problem, outcome.clock_offset_s)
        for source, outcomes in enumerate(connections)
        for target, outcome in zip(others[source], outcomes, strict=True)
    ]
    lost = {(item.source, item.target) for item in reaches if not item.is_ok}
    reached = [[target for target in others[source] if (source, target) not in lost] for source in range(len(peers))]
    answers = _all(
        pool,
        [_datagrams(peers[source], [endpoints[target] for target in reached[source]]) for source in range(len(peers))],
    )
    datagrams = [
        preflight.Datagrams(source, target, outcome.size, outcome.is_small_ok, outcome.is_large_ok)
        for source, outcomes in enumerate(answers)
        for target, outcome in zip(reached[source], outcomes, strict=True)
    ]
    mtu = preflight.datagram_findings(datagrams, hosts)
    # Large transfers hang where full-size packets are dropped; the reason is known already.
    dead = lost | {(item.source, item.target) for item in datagrams if item.is_small_ok and not item.is_large_ok}
    transfers = _measure(peers, endpoints, preflight.schedule(len(peers)), dead, transfer_s, pool)
    first = preflight.suspects(transfers)
    again: list[preflight.Transfer] = []
    if first:
        # Longer: what one stumble of TCP did in the first round weighs less.
        rounds = preflight.retests(first, transfers)
        again = _measure(peers, endpoints, rounds, dead, RETEST_FACTOR * transfer_s, pool)
    slow = preflight.confirmed(first, transfers, again)
    addresses = [endpoint.address for endpoint in endpoints]
    found = [*preflight.reach_findings(reaches, hosts, addresses), *mtu, *preflight.slow_findings(slow, hosts)]
    found += preflight.broken_findings(preflight.schedule(len(peers)), dead, transfers, hosts)
    return Report(tuple(found), tuple(sorted(slow.nodes)), tuple(sorted(lost)), (*transfers, *again))


def _measure(
    peers: Sequence[Peer],
    endpoints: Sequence[Endpoint],
    rounds: Sequence[Sequence[tuple[int, int]]],
    dead: set[tuple[int, int]],
    transfer_s: float,
    pool: ThreadPoolExecutor,
) -> list[preflight.Transfer]:
    """Each round one way, then the other; pairs of one round at the same time, because they share no node."""
    found: list[preflight.Transfer] = []
    for pairs in rounds:
        for ways in (pairs, [(target, source) for source, target in pairs]):
            ways = [way for way in ways if way not in dead]
            rates = _all(pool, [_transfer(peers[source], endpoints[target], transfer_s) for source, target in ways])
            found += [
                # 0 is a transfer that broke: it says nothing about speed.
                preflight.Transfer(source, target, rate)
                for (source, target), rate in zip(ways, rates, strict=True)
                if rate > 0
            ]
    return found


def _connect(peer: Peer, targets: list[Endpoint]) -> Callable[[], list[Connection]]:
    return lambda: peer.connect(targets, TIMEOUT_S)


def _datagrams(peer: Peer, targets: list[Endpoint]) -> Callable[[], list[DatagramOutcome]]:
    return lambda: peer.datagrams(targets, DATAGRAM_S)


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

    def _ask(self, call: str, targets: Sequence[Endpoint], **arguments: float) -> Any:
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
