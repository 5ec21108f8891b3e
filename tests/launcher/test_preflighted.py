"""`--preflight` around a cluster: who is measured, who is left out, what is told and remembered, and that it costs no job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster.preflighted import Preflighted, decide
from launcher.exclusion import Cause
from launcher.exclusion_file import ExclusionFile
from launcher.fabric.codec import to_json
from launcher.fabric.facts import NodeFacts
from launcher.fabric.verdict import Verdict as Meaning
from launcher.gang.events import FabricFound, FabricSurveyed, NodesReady, Notice, PlacementRefused
from launcher.gang.world import NodeInfo
from launcher.spec import JobSpec, Program, ProgramKind
from tests.contracts.cluster_contract import Recorder
from tests.fakes.cluster import FakeCluster
from tests.fakes.peers import FakePeer, gang
from tests.launcher.launched import launch

NAMES = [f"n{idx}" for idx in range(8)]


class Measured(FakeCluster):
    """A cluster in memory that can be measured; `fault` changes the peers of a round before they are asked."""

    def __init__(self, num_nodes: int, *, brings_more: bool = False) -> None:
        super().__init__(num_nodes)
        self.fault: Callable[[list[FakePeer], Sequence[NodeInfo]], None] = lambda peers, nodes: None
        self.rounds: list[list[FakePeer]] = []
        self.error: Exception | None = None
        self._brings_more = brings_more

    def acquire(self, keep: tuple[str, ...]) -> None:
        if keep and not self._brings_more:
            self._num_nodes = len(keep)
        super().acquire(keep)

    def put(self, event: object) -> None:
        if isinstance(event, NodesReady):
            for node in event.nodes:
                super().put(FabricSurveyed(node.node_id, to_json(NodeFacts(node.hostname, node_ip=node.addr))))
        super().put(event)

    def open_peers(self, nodes: Sequence[NodeInfo]) -> list[FakePeer]:
        if self.error is not None:
            raise self.error
        peers = gang(len(nodes))
        self.fault(peers, nodes)
        self.rounds.append(peers)
        return peers


class Trial:
    def __init__(self, directory: Path, cluster: Measured, min_nodes: int, max_nodes: int) -> None:
        self.sink = Recorder()
        self.memory = ExclusionFile(str(directory / "excluded.json"), clock=lambda: 1000.0)
        self.inner = cluster
        self.cluster = Preflighted(cluster, self.memory, clock=lambda: 1000.0)
        self.run_dir = directory / "run"
        spec = JobSpec(Program(ProgramKind.SCRIPT, "wait"), min_nodes, max_nodes)
        self.cluster.open(spec, str(self.run_dir), self.sink)

    def hosts(self, count: int = 1) -> list[str]:
        self.cluster.acquire(())
        return [node.hostname for node in self.sink.wait_for(NodesReady, count)[count - 1].nodes]

    def told(self) -> str:
        return " | ".join(event.text for event in self.sink.of(Notice))


def slow(host: str) -> Callable[[list[FakePeer], Sequence[NodeInfo]], None]:
    def fault(peers: list[FakePeer], nodes: Sequence[NodeInfo]) -> None:
        for peer, node in zip(peers, nodes, strict=True):
            if node.hostname == host:
                peer.rate /= 2

    return fault


def test_a_healthy_gang_is_measured_handed_over_and_not_measured_again(tmp_path: Path) -> None:
    """A restart after a failed rank is a matter of a second; it must not wait for a preflight of nodes that were sound."""
    trial = Trial(tmp_path, Measured(4), 4, 4)
    hosts = trial.hosts()
    assert len(hosts) == 4
    assert not trial.sink.of(FabricFound)
    assert "4 nodes are measured" in trial.told()
    assert "Gb/s" in (trial.run_dir / "fabric" / "preflight.txt").read_text()
    trial.cluster.acquire(tuple(trial.inner.nodes))
    trial.sink.wait_for(NodesReady, 2)
    assert len(trial.inner.rounds) == 1
    assert all(peer.is_closed for peer in trial.inner.rounds[0])
    assert trial.memory.history() == ()


def test_a_slow_node_is_left_out_told_and_remembered_where_the_job_can_do_without(tmp_path: Path) -> None:
    cluster = Measured(5)
    cluster.fault = slow("host-node2")
    trial = Trial(tmp_path, cluster, 4, 5)
    hosts = trial.hosts()
    assert hosts == ["host-node0", "host-node1", "host-node3", "host-node4"]
    (found,) = trial.sink.of(FabricFound)
    assert (found.id, found.hosts) == ("node-slow", ("host-node2",))
    assert "left out after the preflight: host-node2 (" in trial.told()
    (verdict,) = trial.memory.history()
    assert (verdict.host, verdict.cause) == ("host-node2", Cause.SLOW)
    assert "measured again" in verdict.reason


def test_a_slow_node_that_the_job_needs_stays_and_that_is_said(tmp_path: Path) -> None:
    cluster = Measured(5)
    cluster.fault = slow("host-node2")
    trial = Trial(tmp_path, cluster, 5, 5)
    assert len(trial.hosts()) == 5
    assert "the job needs 5 of 5 nodes" in trial.told()
    assert [verdict.host for verdict in trial.memory.history()] == ["host-node2"], "the next job may do without"


def test_what_the_cluster_brings_instead_is_measured_too(tmp_path: Path) -> None:
    """The substitute may be worse. And it ends: a cluster that brings one bad node after the other is used as it is."""
    cluster = Measured(5, brings_more=True)
    cluster.fault = lambda peers, nodes: setattr(peers[-1], "rate", 1e9)
    trial = Trial(tmp_path, cluster, 4, 5)
    assert len(trial.hosts()) == 5
    assert [len(peers) for peers in cluster.rounds] == [5, 5, 5]


def test_with_a_broken_node_the_job_is_refused_if_it_needs_it(tmp_path: Path) -> None:
    """A collective with it would hang, half an hour later and without a word."""
    cluster = Measured(4)
    cluster.fault = lambda peers, nodes: setattr(peers[1], "is_deaf", True)
    trial = Trial(tmp_path, cluster, 4, 4)
    trial.cluster.acquire(())
    refused = trial.sink.wait_for(PlacementRefused)[0]
    assert "host-node1" in refused.reason
    assert "no other node can connect" in refused.reason
    assert "--preflight" in refused.advice


def test_a_broken_node_is_left_out_where_others_suffice(tmp_path: Path) -> None:
    cluster = Measured(4)
    cluster.fault = lambda peers, nodes: setattr(peers[1], "is_deaf", True)
    trial = Trial(tmp_path, cluster, 3, 4)
    assert trial.hosts() == ["host-node0", "host-node2", "host-node3"]
    (verdict,) = trial.memory.history()
    assert (verdict.host, verdict.cause) == ("host-node1", Cause.LOST)


def test_a_preflight_that_breaks_costs_nothing_but_its_result(tmp_path: Path) -> None:
    cluster = Measured(3)
    cluster.error = OSError("no more processes")
    trial = Trial(tmp_path, cluster, 3, 3)
    assert len(trial.hosts()) == 3
    assert "broke off (OSError: no more processes); the job goes on" in trial.told()


def test_a_job_that_is_stopped_does_not_wait_for_the_end_of_the_preflight(tmp_path: Path) -> None:
    cluster = Measured(3)
    is_measuring, may_go_on = threading.Event(), threading.Event()

    class Stuck(FakePeer):
        def transfer(self, target: object, seconds: float) -> float:
            is_measuring.set()
            assert may_go_on.wait(60)
            raise ConnectionError("killed")

        def kill(self) -> None:
            may_go_on.set()

    def stuck(peers: list[FakePeer], nodes: Sequence[NodeInfo]) -> None:
        peers[:] = [Stuck(position) for position in range(3)]
        for peer in peers:
            peer.friends = peers

    cluster.fault = stuck
    trial = Trial(tmp_path, cluster, 3, 3)
    trial.cluster.acquire(())
    assert is_measuring.wait(60)
    trial.cluster.close()
    assert cluster.is_closed
    assert not trial.sink.of(NodesReady)
    assert all(peer.is_closed for peer in cluster.rounds[0])


@pytest.mark.parametrize(
    ("meaning", "needed", "left_out", "refuses", "remarks"),
    [
        (Meaning({}, {}, ""), 8, set(), False, False),
        (Meaning({3: "slow"}, {}, ""), 7, {3}, False, False),
        (Meaning({3: "slow"}, {}, ""), 8, set(), False, True),
        (Meaning({1: "slow", 2: "slow", 3: "slow"}, {}, ""), 1, set(), False, True),
        (Meaning({}, {1: "deaf", 2: "deaf", 3: "deaf"}, ""), 5, {1, 2, 3}, False, False),
        (Meaning({3: "slow"}, {1: "deaf"}, ""), 7, {1}, False, True),
        (Meaning({}, {1: "deaf"}, ""), 8, set(), True, False),
        (Meaning({3: "slow"}, {}, "a cannot reach b"), 1, set(), True, False),
    ],
)
def test_the_policy(meaning: Meaning, needed: int, left_out: set[int], refuses: bool, remarks: bool) -> None:
    """Slow nodes go where others suffice and they are few (many share a cause); broken ones always go, or the job does."""
    decision = decide(meaning, NAMES, needed, 1000.0)
    assert (set(decision.left_out), bool(decision.refusal), bool(decision.remark)) == (left_out, refuses, remarks)


@pytest.mark.e2e
def test_a_job_on_this_machine_begins_after_its_preflight(tmp_path: Path) -> None:
    """Real processes: connections and gloo on this machine's loopback, then the ranks. Nothing of it is left."""
    with launch(tmp_path, "print('trained')", "--preflight", "--nproc-per-node=1") as launched:
        code, out, err = launched.finish()
        assert (code, out) == (0, "[rank0] trained\n"), err
        assert "launcher: preflight: 1 node is measured\n" in err
        assert "1 all-reduce over gloo" in err
        assert "fabric: " not in err
        assert (launched.run_dir / "fabric" / "preflight.txt").exists()
    assert not [process for process in launched.seen if process.is_alive()]


def test_the_surveys_decide_over_which_interface_is_reduced(tmp_path: Path) -> None:
    cluster = Measured(2)
    trial = Trial(tmp_path, cluster, 2, 2)

    def survey(node_id: str, addr: str) -> None:
        from launcher.fabric.facts import Netdev

        netdev = Netdev("ens7", "up", addresses=(f"{addr}/24",))
        facts = replace(NodeFacts(node_id, node_ip=addr), netdevs=(netdev,))
        trial.cluster.put(FabricSurveyed(node_id, to_json(facts), (("NCCL_DEBUG", "WARN"),)))

    cluster.put = lambda event: FakeCluster.put(cluster, event)  # type: ignore[method-assign]
    survey("node0", "10.0.0.1")
    survey("node1", "10.0.0.2")
    trial.hosts()
    assert [peer.env["GLOO_SOCKET_IFNAME"] for peer in cluster.rounds[0]] == ["ens7", "ens7"]
    assert cluster.rounds[0][0].env["NCCL_DEBUG"] == "WARN"
