"""Judging measurements between nodes: who cannot be reached, which node or link is slow, and how sure that is.

Pure: the schedule of measurements goes out, measurements come in, findings come out. Who measures is in peer.py and
conduct.py. The judgement is by medians, because a single disturbed measurement must not accuse anyone, and in two rounds:
whoever looks slow in the first is measured again with healthy partners, and is named only if it is slow again.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.fabric.findings import Finding, Severity

SLOW = 0.75
"""A node is slow below this share of the median. Half-rate links give 0.5; ordinary noise stays above 0.85."""

SLOW_LINK = 0.6
"""One link between two healthy nodes is judged by a single measurement, so it must fall further."""

MAX_ROUNDS = 9
"""Partners per node in the first round: enough for a median; with more nodes a full tournament would only take longer."""

RETEST_PARTNERS = 3

CLOCK_SKEW_S = 5.0
"""Clocks further apart than this confuse time-outs and logs."""


@dataclass(frozen=True)
class Reach:
    """One attempt to connect from one node to another, on the very address and an ephemeral port."""

    source: int
    target: int
    is_ok: bool
    problem: str = ""
    clock_offset_s: float | None = None
    """The target's clock minus the source's."""


@dataclass(frozen=True)
class Datagrams:
    """Whether datagrams that must not be fragmented arrived, small and as large as the interface allows."""

    source: int
    target: int
    size: int
    is_small_ok: bool
    is_large_ok: bool


@dataclass(frozen=True)
class Transfer:
    """Bytes per second from one node to another."""

    source: int
    target: int
    rate_bytes_per_s: float


@dataclass(frozen=True)
class Suspects:
    """What looks slow after a round: nodes (with what they were measured at), then links between other nodes."""

    nodes: Mapping[int, str]
    links: Mapping[tuple[int, int], str]

    def __bool__(self) -> bool:
        return bool(self.nodes or self.links)


def schedule(num_nodes: int, *, max_rounds: int = MAX_ROUNDS) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs: in each round every node is busy with one partner at most, over all rounds with another each.

    The circle method of round-robin tournaments; with more nodes than `max_rounds` the rounds are spread evenly.

    >>> schedule(4)
    [[(0, 3), (1, 2)], [(2, 3), (0, 1)], [(1, 3), (0, 2)]]
    """
    if num_nodes < 2:
        return []
    players: list[int | None] = [*range(num_nodes)]
    if num_nodes % 2:
        players.append(None)
    count = len(players)
    rounds = []
    for turn in range(count - 1):
        ring = players[:-1]
        ring = ring[-turn:] + ring[:-turn] if turn else ring
        full = [*ring, players[-1]]
        pairs = [(full[idx], full[count - 1 - idx]) for idx in range(count // 2)]
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
    if len(rounds) <= max_rounds:
        return rounds
    return [rounds[position * len(rounds) // max_rounds] for position in range(max_rounds)]


def suspects(transfers: Sequence[Transfer]) -> Suspects:
    """What looks slow in one round of measurements."""
    sent, received = _by_node(transfers)
    nodes: dict[int, str] = {}
    for rates_of, verb in ((sent, "sends"), (received, "receives")):
        typical = {node: _typical(rates) for node, rates in rates_of.items()}
        for node, why in outliers(typical).items():
            nodes.setdefault(node, f"{verb} at {why}")
    if len(sent.keys() | received.keys()) < 3:
        # With two nodes nobody can say whose fault a slow link is.
        nodes = {}
    return Suspects(nodes, _slow_links(transfers, nodes))


def _by_node(transfers: Sequence[Transfer]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    sent: dict[int, list[float]] = {}
    received: dict[int, list[float]] = {}
    for transfer in transfers:
        sent.setdefault(transfer.source, []).append(transfer.rate_bytes_per_s)
        received.setdefault(transfer.target, []).append(transfer.rate_bytes_per_s)
    return sent, received


def _typical(rates: Sequence[float]) -> float:
    """What a node manages with most partners; with few partners the best, so that one slow partner does not pull it down."""
    return statistics.median(rates) if len(rates) >= 4 else max(rates)


def outliers(typical: Mapping[int, float], *, beyond_scatter: bool = False) -> dict[int, str]:
    """Those whose value is below SLOW of the median (higher is better).

    `beyond_scatter` asks for more where there is no second look: further from the median than three times the others scatter.
    As a rule for suspicion that would let a half-rate node of a small, noisy gang pass.
    """
    if len(typical) < 3:
        return {}
    middle = statistics.median(typical.values())
    if middle <= 0:
        return {}
    limit = SLOW * middle
    if beyond_scatter:
        scatter = statistics.median(abs(value - middle) for value in typical.values())
        # 1.4826 makes the median deviation comparable to a standard deviation.
        limit = min(limit, middle - 3 * 1.4826 * scatter)
    return {
        node: f"{_rate(value)}, the median node at {_rate(middle)} ({value / middle:.0%})"
        for node, value in typical.items()
        if value < limit
    }


def _slow_links(transfers: Sequence[Transfer], nodes: Mapping[int, str]) -> dict[tuple[int, int], str]:
    good = [item for item in transfers if item.source not in nodes and item.target not in nodes]
    if len(good) < 3:
        return {}
    middle = statistics.median(item.rate_bytes_per_s for item in good)
    found: dict[tuple[int, int], str] = {}
    for item in good:
        if item.rate_bytes_per_s < SLOW_LINK * middle:
            share = item.rate_bytes_per_s / middle
            found[(item.source, item.target)] = (
                f"{_rate(item.rate_bytes_per_s)}, the median link at {_rate(middle)} ({share:.0%})"
            )
    return found


def retests(first: Suspects, transfers: Sequence[Transfer]) -> list[list[tuple[int, int]]]:
    """Pairs to measure again, in rounds of disjoint pairs: each suspect node with its healthiest partners, each link again."""
    sent, _ = _by_node(transfers)
    healthy = sorted((node for node in sent if node not in first.nodes), key=lambda node: (-_typical(sent[node]), node))
    pairs = {(min(pair), max(pair)) for pair in first.links}
    for position, node in enumerate(sorted(first.nodes)):
        partners = healthy[position % len(healthy) :] + healthy[: position % len(healthy)] if healthy else []
        pairs |= {(min(node, other), max(node, other)) for other in partners[:RETEST_PARTNERS]}
    # A link is judged by itself alone, so it gets two more chances; a node has several partners anyway.
    links = sorted({(min(pair), max(pair)) for pair in first.links})
    return [*_disjoint(sorted(pairs)), *_disjoint(links)]


def _disjoint(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The pairs in rounds in which no node is busy twice."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in pairs:
        for existing in rounds:
            if not any(set(pair) & set(other) for other in existing):
                existing.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds


def confirmed(first: Suspects, transfers: Sequence[Transfer], again: Sequence[Transfer]) -> Suspects:
    """Of the suspects, those that were slow in the second round as well, judged by what the healthy do."""
    healthy = [
        item.rate_bytes_per_s
        for item in transfers
        if item.source not in first.nodes
        and item.target not in first.nodes
        and (item.source, item.target) not in first.links
    ]
    if not healthy:
        return Suspects({}, {})
    middle = statistics.median(healthy)
    nodes = {}
    for node, why in first.nodes.items():
        sends = [item.rate_bytes_per_s for item in again if item.source == node]
        receives = [item.rate_bytes_per_s for item in again if item.target == node]
        # The best of the second look: a node that managed the full rate once is not a slow node.
        worst = min((max(rates) for rates in (sends, receives) if rates), default=None)
        if worst is not None and worst < SLOW * middle:
            nodes[node] = f"{why}; measured again with other partners: {_rate(worst)} at best"
    links = {}
    for (source, target), why in first.links.items():
        rates = [item.rate_bytes_per_s for item in again if (item.source, item.target) == (source, target)]
        if rates and max(rates) < SLOW_LINK * middle and source not in nodes and target not in nodes:
            links[(source, target)] = f"{why}; measured again: {_rate(max(rates))}"
    return Suspects(nodes, links)


def reach_findings(reaches: Sequence[Reach], hosts: Sequence[str], addresses: Sequence[str]) -> list[Finding]:
    """Who cannot be connected to: a node from everywhere, a pair one way, or a single pair."""
    failed = {(item.source, item.target): item.problem for item in reaches if not item.is_ok}
    found: list[Finding] = []
    blamed: set[tuple[int, int]] = set()
    for target in range(len(hosts)):
        tried = [item for item in reaches if item.target == target]
        lost = [item for item in tried if not item.is_ok]
        if len(tried) >= 2 and len(lost) == len(tried):
            blamed |= {(item.source, item.target) for item in lost}
            found.append(
                Finding(
                    "unreachable",
                    Severity.ERROR,
                    (hosts[target],),
                    f"no other node can connect to {addresses[target]} ({lost[0].problem})",
                    "the rendezvous may still work, but the first collective hangs: every rank is connected to on such a port",
                    "let the firewall pass the ports of net.ipv4.ip_local_port_range between the nodes; "
                    "check that the address is on the network the nodes share",
                )
            )
    for (source, target), problem in sorted(failed.items()):
        if (source, target) in blamed:
            continue
        is_one_way = (target, source) not in failed
        found.append(
            Finding(
                "unreachable",
                Severity.ERROR,
                (hosts[source], hosts[target]),
                f"{hosts[source]} cannot connect to {addresses[target]} of {hosts[target]} ({problem})"
                + ("; the other way works" if is_one_way else ""),
                "collectives between these nodes hang",
                "a firewall or route between these two nodes; let the ports of net.ipv4.ip_local_port_range pass both ways",
            )
        )
    return found + _clock_findings(reaches, hosts)


def _clock_findings(reaches: Sequence[Reach], hosts: Sequence[str]) -> list[Finding]:
    against: dict[int, list[float]] = {}
    for item in reaches:
        if item.clock_offset_s is not None:
            against.setdefault(item.target, []).append(item.clock_offset_s)
    return [
        Finding(
            "clock-skew",
            Severity.WARNING,
            (hosts[target],),
            f"its clock is {statistics.median(offsets):+.1f} s off those of the others",
            "time-outs and the order of log lines are misleading; certificates may be refused",
            "run chrony or ntpd on the node",
        )
        for target, offsets in sorted(against.items())
        if len(offsets) >= 2 and abs(statistics.median(offsets)) > CLOCK_SKEW_S
    ]


def datagram_findings(results: Sequence[Datagrams], hosts: Sequence[str]) -> list[Finding]:
    """Paths where small datagrams pass and full-size ones do not."""
    broken = [item for item in results if item.is_small_ok and not item.is_large_ok]
    if not broken:
        return []
    counts: dict[int, int] = {}
    for item in broken:
        for node in (item.source, item.target):
            counts[node] = counts.get(node, 0) + 1
    most = max(counts.values())
    # The node that all broken paths have in common, if there is one.
    common = [node for node, count in counts.items() if count == most and most == len(broken) and len(broken) > 2]
    concerned = tuple(hosts[node] for node in (common[:1] or sorted(counts)))
    first = broken[0]
    return [
        Finding(
            "mtu-path",
            Severity.ERROR,
            concerned,
            f"{len(broken)} paths drop datagrams of {first.size} bytes and pass small ones "
            f"(first: {hosts[first.source]} to {hosts[first.target]})",
            "small messages work and large ones hang: the start succeeds, the first large collective does not",
            "set one MTU on all hosts and switches of this network, or lower it on the hosts to what the path carries",
        )
    ]


def slow_findings(found: Suspects, hosts: Sequence[str], how: str = "") -> list[Finding]:
    """Findings for the nodes and links that were slow twice; `how` they were measured stands before the evidence."""
    nodes = [
        Finding(
            "node-slow",
            Severity.ERROR,
            (hosts[node],),
            f"{how}{why}",
            "every collective of the gang runs at the speed of this node",
            "leave the node out; check its cable, its port and what else runs on it",
        )
        for node, why in sorted(found.nodes.items())
    ]
    links = [
        Finding(
            "link-slow",
            Severity.WARNING,
            (hosts[source], hosts[target]),
            f"{how}from {hosts[source]} to {hosts[target]}: {why}",
            "rings that use this link are slowed",
            "look at the path between the two (switch uplink, routing)",
        )
        for (source, target), why in sorted(found.links.items())
    ]
    return nodes + links


def broken_findings(
    rounds: Sequence[Sequence[tuple[int, int]]],
    dead: set[tuple[int, int]],
    transfers: Sequence[Transfer],
    hosts: Sequence[str],
) -> list[Finding]:
    """Pairs that connect, but over which no transfer ended: neither way, so that one stumble is not a finding."""
    done = {(min(item.source, item.target), max(item.source, item.target)) for item in transfers}
    lost = [pair for pairs in rounds for pair in pairs if pair not in done and not dead & {pair, (pair[1], pair[0])}]
    return [
        Finding(
            "transfer-failed",
            Severity.ERROR,
            (hosts[one], hosts[other]),
            "connections are accepted, but no transfer ended, in either direction",
            "collectives between these nodes hang or fail",
            "look for a firewall or proxy that cuts long connections, and for packet loss on the path",
        )
        for one, other in lost
    ]


def lookup_findings(problems: Mapping[tuple[int, int], str], hosts: Sequence[str]) -> list[Finding]:
    """Names that cannot be looked up as they should, from (asking node, node asked for) → problem; one for each problem."""
    askers: dict[str, list[int]] = {}
    for (source, _), problem in sorted(problems.items()):
        if problem:
            askers.setdefault(problem, []).append(source)
    return [
        Finding(
            "name-lookup",
            Severity.WARNING,
            tuple(hosts[source] for source in sources),
            problem,
            "rendezvous and logs that use names are slow, or go to another address than the one that works",
            "correct DNS or /etc/hosts, or use addresses (a headless service, on Kubernetes)",
        )
        for problem, sources in askers.items()
    ]


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2f} Gb/s"
