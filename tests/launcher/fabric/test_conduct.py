"""The preflight as a whole, over peers in memory: who is named, by what, and that one that dies costs nobody else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.preflight_model import NoisyReduces
from launcher.fabric import compute_check
from launcher.fabric.collective import Rank, gpu_seconds
from launcher.fabric.compute_check import Unit
from launcher.fabric.conduct import Wishes, conduct
from launcher.fabric.reduce_check import Outcome, failed_findings
from launcher.fabric.verdict import Report, judge, page, summary
from tests.fakes.peers import MATMUL_S, FakePeer, gang

HOSTS = ["a", "b", "c", "d", "e", "f"]
ALL = Wishes(compute=True, names=True, reduce=True)


def measured(*faults: Callable[[list[FakePeer]], None], wishes: Wishes = ALL, count: int = 6) -> Report:
    peers = gang(count)
    for fault in faults:
        fault(peers)
    return conduct(peers, HOSTS[:count], wishes)


def found(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.id, finding.nodes) for finding in report.findings]


def test_a_healthy_gang_is_measured_in_every_way_and_nobody_is_named() -> None:
    report = measured()
    assert report.findings == ()
    assert report.backend == "gloo"
    assert len({(item.source, item.target) for item in report.transfers}) == 6 * 5
    # Two partners for each node, then all together.
    assert [len(item.group) for item in report.reduces] == [2] * 6 + [6]
    assert set(report.seconds["matmul"]) == {Unit(node) for node in range(6)}
    assert "7 all-reduces over gloo; the largest over 6 nodes (6 ranks)" in summary(report)


def test_a_node_that_is_slow_in_collectives_alone_is_named() -> None:
    """Its plain TCP is as fast as others': with RDMA, only a collective shows the card that trained down."""

    def slow(peers: list[FakePeer]) -> None:
        peers[3].reduce_s *= 3

    report = measured(slow)
    assert found(report) == [("node-slow", ("d",))]
    assert "all-reduce over gloo" in report.findings[0].evidence
    assert report.slow_nodes == (3,)


def test_a_node_that_is_slow_in_both_is_named_once() -> None:
    def slow(peers: list[FakePeer]) -> None:
        peers[3].rate /= 2
        peers[3].reduce_s *= 3

    assert found(measured(slow)) == [("node-slow", ("d",))]


def test_slow_arithmetic_is_looked_at_twice() -> None:
    def slow(peers: list[FakePeer]) -> None:
        peers[1].cpu_s *= 2

    report = measured(slow)
    assert found(report) == [("node-slow", ("b",))]
    assert "measured again" in report.findings[0].evidence


def test_one_disturbed_look_at_a_processor_accuses_nobody() -> None:
    before = {"matmul": {Unit(node): MATMUL_S * (2 if node == 1 else 1) for node in range(6)}}
    first = compute_check.slow(before)
    assert list(first) == [("matmul", Unit(1))]
    assert compute_check.confirmed(first, before, {"matmul": {Unit(1): MATMUL_S}}) == {}


def test_one_throttled_gpu_among_many_is_named_with_its_number() -> None:
    """It holds up seven others on its node and all of the gang; its node's median would hide it."""

    def gpus(peers: list[FakePeer]) -> None:
        for peer in peers:
            peer.gpus_s = (0.003,) * 8
        peers[2].gpus_s = (*(0.003,) * 5, 0.006, *(0.003,) * 2)

    report = measured(gpus)
    assert report.backend == "nccl"
    assert found(report) == [("node-slow", ("c",))]
    assert "GPU 5" in report.findings[0].evidence
    assert "nvidia-smi -i 5" in report.findings[0].cure
    assert {item.num_ranks for item in report.reduces} == {16, 48}


def test_a_gang_with_one_node_without_gpus_reduces_over_gloo() -> None:
    def gpus(peers: list[FakePeer]) -> None:
        for peer in peers[1:]:
            peer.gpus_s = (0.003, 0.003)

    assert measured(gpus).backend == "gloo"


TCP = "host1:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0"
RDMA = "host1:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA"


def test_what_nccl_says_that_carried_it_is_held_against_what_the_node_has() -> None:
    """A fall-back to TCP is silent; NCCL's own line is the only proof."""

    def gpus(peers: list[FakePeer]) -> None:
        for peer in peers:
            peer.gpus_s = (0.003,)
            peer.log = (RDMA,)
        peers[4].log = (TCP,)

    wishes = Wishes(reduce=True, transports=["infiniband"] * 6)
    assert found(measured(gpus, wishes=wishes)) == [("tcp-fallback", ("e",))]
    assert found(measured(gpus, wishes=Wishes(reduce=True, transports=["socket"] * 6))) == []


@pytest.mark.parametrize(
    "step", ["endpoint", "connect", "datagrams", "transfer", "ready", "store", "reduce", "compute", "lookup"]
)
def test_a_peer_that_dies_is_named_and_the_others_are_measured(step: str) -> None:
    def dying(peers: list[FakePeer]) -> None:
        peers[1].dies_at = step

    report = measured(dying)
    assert ("probe-lost", ("b",)) in found(report)
    assert {node for _, nodes in found(report) for node in nodes} == {"b"}
    meaning = judge(report, HOSTS)
    assert (set(meaning.broken), meaning.slow, meaning.hopeless) == ({1}, {}, "")
    assert list(report.lost) == [1]
    assert page(report, HOSTS, [])


def test_a_node_that_nobody_reaches_is_broken_and_not_measured_further() -> None:
    def deaf(peers: list[FakePeer]) -> None:
        peers[0].is_deaf = True

    report = measured(deaf)
    assert ("unreachable", ("a",)) in found(report)
    assert set(judge(report, HOSTS).broken) == {0}


def test_who_cannot_reduce_is_named_and_not_who_waited_for_it() -> None:
    def broken(peers: list[FakePeer]) -> None:
        peers[5].reduce_problem = "RuntimeError: no such interface"

    report = measured(broken)
    assert found(report) == [("collective-failed", ("f",))]
    assert "no such interface" in report.findings[0].evidence
    assert any(item.is_ok and len(item.group) == 5 for item in report.reduces), "the others reduce without it"


def test_a_pair_that_cannot_reduce_is_a_path_and_costs_no_node() -> None:
    pair = Outcome((0, 1), problems={0: "timed out", 1: "timed out"})
    fine = [Outcome((0, 2), 0.1, 1000, 2), Outcome((1, 3), 0.1, 1000, 2)]
    (finding,) = failed_findings([pair, *fine], HOSTS, "gloo")
    assert finding.nodes == ("a", "b")
    report = Report((finding,), (), (), ())
    assert judge(report, HOSTS).hopeless == finding.evidence


def test_alone_there_is_nothing_between_nodes() -> None:
    report = measured(count=1)
    assert (report.findings, report.transfers) == ((), ())
    assert [item.group for item in report.reduces] == [(0,)]


def test_the_environment_of_the_ranks_is_that_of_the_collectives() -> None:
    """Else another interface would be proven than the one that training takes."""
    peers = gang(2)
    conduct(peers, ["a", "b"], Wishes(reduce=True, environments=[{"GLOO_SOCKET_IFNAME": "eth0"}, {"X": "1"}]))
    assert [dict(peer.env) for peer in peers] == [{"GLOO_SOCKET_IFNAME": "eth0"}, {"X": "1"}]


def test_two_rounds_of_pairs_find_one_throttled_node_and_accuse_nobody_over_200_seeds() -> None:
    """The promise, for the collectives: at least 99 % found, no healthy node accused, in gangs of 4 to 33 nodes."""
    num_found = 0
    for seed in range(200):
        num_nodes = random.Random(seed).randint(4, 33)
        speeds = [3e9] * num_nodes
        slow = seed % num_nodes
        speeds[slow] *= random.Random(seed + 1).uniform(0.1, 0.6)
        verdict = NoisyReduces(speeds, seed).verdict()
        assert set(verdict.nodes) <= {slow}, f"seed {seed}"
        num_found += slow in verdict.nodes
    assert num_found >= 198


def test_two_rounds_of_pairs_accuse_nobody_of_a_healthy_gang_over_200_seeds() -> None:
    for seed in range(200):
        verdict = NoisyReduces([3e9] * random.Random(seed).randint(2, 33), seed).verdict()
        assert not verdict.nodes, f"seed {seed}"


class FakeTorch:
    """What the GPU measurements ask of torch; `calls` in order. (No GPU has run them.)"""

    bfloat16, uint8 = "bfloat16", "uint8"

    def __init__(self, num_gpus: int = 1) -> None:
        self.calls: list[str] = []
        self.cuda = self
        self.num_gpus = num_gpus

    def is_available(self) -> bool:
        return self.num_gpus > 0

    def device_count(self) -> int:
        return self.num_gpus

    def is_nccl_available(self) -> bool:
        return True

    def synchronize(self, where: str | None = None) -> None:
        self.calls.append("synchronize")

    def ones(self, shape: object, **options: Any) -> FakeTorch:
        self.calls.append(f"ones {options['device']}")
        return self

    def empty_like(self, other: object) -> FakeTorch:
        return self

    def copy_(self, other: object) -> None:
        self.calls.append("copy")

    def __matmul__(self, other: object) -> None:
        self.calls.append("matmul")


def test_gpu_work_is_timed_between_synchronisations_after_a_first_that_does_not_count() -> None:
    """GPU calls return before the work is done: an unsynchronised clock would measure the launch."""
    torch = FakeTorch()
    seconds = gpu_seconds(torch, 3)
    assert set(seconds) == {"matmul", "copy"}
    assert torch.calls[:2] == ["ones cuda:3", "ones cuda:3"]
    work = torch.calls[2:]
    assert work[0] == "matmul"
    assert work[1:16] == ["synchronize", "matmul", "synchronize"] * 5


def test_nccl_is_taken_where_there_are_gpus() -> None:
    assert Rank(FakeTorch(2), FakeTorch()).backend == "nccl"
    assert Rank(FakeTorch(0), FakeTorch()).backend == "gloo"


def test_what_fails_in_a_worker_is_a_sentence() -> None:
    class Broken(FakeTorch):
        def TCPStore(self, *_: object, **__: object) -> None:  # noqa: N802 (torch's own name)
            raise RuntimeError("Connection timed out\nwith a traceback of C++")

    rank = Rank(FakeTorch(0), Broken())
    assert rank.answer({"do": "store", "host": "x"}) == {
        "problem": "RuntimeError: Connection timed out",
        "is_late": True,
    }
    assert "unknown" in rank.answer({"do": "nonsense"})["problem"]
