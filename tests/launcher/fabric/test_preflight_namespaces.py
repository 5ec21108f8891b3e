"""The preflight over real sockets between network namespaces, with links that are slow, narrow, filtered or cut."""

from __future__ import annotations

import pytest

from benchmarks.namespaces import Network, closing, network, why_not
from launcher.fabric import conduct as conducting
from launcher.fabric.conduct import Wishes, conduct
from launcher.fabric.findings import Severity
from launcher.fabric.verdict import Report

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    # One worker: two gangs measured at once on two cores would take each other's time.
    pytest.mark.xdist_group("namespaces"),
]

RATE_MBIT = 200


def examine(nodes: Network) -> Report:
    with nodes.peers() as peers:
        return conduct(peers, [f"host{node}" for node in range(nodes.num_nodes)])


def test_healthy_nodes_raise_no_finding() -> None:
    """A check that accuses healthy nodes would be switched off."""
    with network(8, RATE_MBIT) as nodes:
        report = examine(nodes)
    assert report.findings == ()
    assert report.slow_nodes == ()
    assert len({(item.source, item.target) for item in report.transfers}) == 8 * 7


def test_the_node_with_a_half_rate_link_is_named() -> None:
    """A port that trained down to half its lanes slows every collective of the gang, and nothing else shows it."""
    with network(5, RATE_MBIT) as nodes:
        nodes.limit(3, RATE_MBIT // 2)
        report = examine(nodes)
    assert report.slow_nodes == (3,)
    assert [(finding.id, finding.nodes) for finding in report.findings] == [("node-slow", ("host3",))]


def test_a_path_that_drops_full_size_packets_is_named() -> None:
    """The classic: the start works, small messages work, the first large collective hangs."""
    with network(4, RATE_MBIT) as nodes:
        nodes.at_switch("ip", "link", "set", "p2", "mtu", "1200")
        report = examine(nodes)
    (finding,) = report.findings
    assert (finding.id, finding.nodes, finding.severity) == ("mtu-path", ("host2",), Severity.ERROR)
    assert "1472 bytes" in finding.evidence


def test_a_cut_link_is_a_finding_about_one_node() -> None:
    with network(4, RATE_MBIT) as nodes, nodes.peers() as peers:
        nodes.at_switch("ip", "link", "set", "p1", "down")
        report = conduct(peers, ["a", "b", "c", "d"])
    unreachable = [finding for finding in report.findings if finding.nodes == ("b",)]
    assert [finding.id for finding in unreachable] == ["unreachable"]
    assert set(report.unreachable) == {(1, 0), (1, 2), (1, 3), (0, 1), (2, 1), (3, 1)}


def test_a_firewall_that_drops_connections_one_way_is_found() -> None:
    """The rendezvous goes out and works; NCCL then connects inwards, and hangs. Established connections pass here."""
    with network(3, RATE_MBIT) as nodes:
        nodes.drop_new_connections_to(0)
        report = examine(nodes)
    assert set(report.unreachable) == {(1, 0), (2, 0)}
    assert [(finding.id, finding.nodes) for finding in report.findings] == [("unreachable", ("host0",))]
    assert "packets are dropped" in report.findings[0].evidence


def test_a_node_on_the_wrong_interface_is_unreachable() -> None:
    """Its address exists and answers locally; only the others can tell that it is not on their network."""
    with network(3, RATE_MBIT) as nodes:
        nodes.at_node(2, "ip", "link", "add", "mgmt0", "type", "bridge")
        nodes.at_node(2, "ip", "addr", "add", "172.31.9.9/24", "dev", "mgmt0")
        nodes.at_node(2, "ip", "link", "set", "mgmt0", "up")
        with (
            closing(nodes.peer(0)) as first,
            closing(nodes.peer(1)) as second,
            closing(nodes.peer(2, "172.31.9.9")) as wrong,
        ):
            report = conduct([first, second, wrong], ["a", "b", "c"])
    about_wrong = [finding for finding in report.findings if finding.nodes == ("c",)]
    assert [finding.id for finding in about_wrong] == ["unreachable"]
    assert "172.31.9.9" in about_wrong[0].evidence


def test_collectives_take_the_interface_that_was_decided_and_a_node_where_it_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo takes the address of the host's name by default, which in a namespace is not even there. One value for unequal hosts: all
    connections work, so only the collective shows it."""
    monkeypatch.setattr(conducting, "GLOO_TIMEOUT_S", 5.0)
    with network(3, RATE_MBIT) as nodes, nodes.peers() as peers:
        environments = [{"GLOO_SOCKET_IFNAME": name} for name in ("eth0", "eth0", "mgmt0")]
        report = conduct(peers, ["a", "b", "c"], Wishes(reduce=True, environments=environments))
    (finding,) = report.findings
    assert (finding.id, finding.nodes) == ("collective-failed", ("c",))
    assert "mgmt0" in finding.evidence
    assert report.backend == "gloo"
    assert (0, 1) in [item.group for item in report.reduces if item.is_ok]
