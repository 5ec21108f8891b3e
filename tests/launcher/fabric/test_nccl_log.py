"""NCCL's log lines read as proof of the transport. The lines are as published in issues and guides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.fabric.findings import Severity
from launcher.fabric.nccl_log import read_log, transport_findings

RDMA = """\
hostA:1:257 [0] NCCL INFO NCCL version 2.27.5+cuda12.9
hostA:1:257 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.7<0>
hostA:1:257 [0] NCCL INFO Using network IB
hostA:1:257 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/IB/0/GDRDMA
hostA:1:257 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA
hostA:1:257 [0] NCCL INFO Channel 01/0 : 0[4b000] -> 7[cf000] via P2P/IPC/read
""".splitlines()

TCP = """\
hostA:7:19 [0] NCCL INFO NET/IB : No device found.
hostA:7:19 [0] NCCL INFO NET/Socket : Using [0]eth0:10.140.0.7<0>
hostA:7:19 [0] NCCL INFO Using network Socket
hostA:7:19 [0] NCCL INFO Channel 00/0 : 9[51000] -> 0[4b000] [receive] via NET/Socket/0
hostA:7:19 [0] NCCL INFO Channel 01/1 : 0[0] -> 1[1] [send] via NET/Socket/0/Shared
""".splitlines()

STAGED = """\
hostA:7:19 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE ; OOB nmn0:10.252.1.67<0>
hostA:7:19 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'
hostA:7:19 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [receive] via NET/IB/0
""".splitlines()

EFA = """\
hostA:7:19 [0] NCCL INFO Using network AWS Libfabric
hostA:7:19 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/AWS Libfabric/0/GDRDMA
hostA:7:19 [0] NCCL INFO Channel 02/0 : 0[0] -> 1[6] via SHM/direct/direct
""".splitlines()


def test_rdma_with_gpudirect_is_proven() -> None:
    evidence = read_log(RDMA)
    assert evidence.version == "2.27.5"
    assert evidence.network == "IB"
    assert evidence.devices == ("mlx5_0", "mlx5_1")
    assert evidence.channels == {"NET/IB/GDRDMA": 2, "P2P": 1}
    assert transport_findings(evidence, "infiniband", "hostA") == []


def test_a_silent_fall_back_to_tcp_is_an_error() -> None:
    """The complaint: nobody can tell whether RDMA is really used."""
    (finding,) = transport_findings(read_log(TCP), "roce", "hostA")
    assert (finding.id, finding.severity, finding.nodes) == ("tcp-fallback", Severity.ERROR, ("hostA",))
    assert "2 channels via NET/Socket" in finding.evidence


def test_tcp_on_a_node_without_rdma_is_no_fall_back() -> None:
    assert transport_findings(read_log(TCP), "socket", "hostA") == []


def test_traffic_through_host_memory_is_a_warning() -> None:
    (finding,) = transport_findings(read_log(STAGED), "roce", "hostA")
    assert (finding.id, finding.severity) == ("gpudirect-unused", Severity.WARNING)
    assert "off for mlx5_0" in finding.evidence
    assert transport_findings(read_log(STAGED), "roce", "hostA", has_gpus=False) == []


def test_plugins_have_names_with_spaces() -> None:
    evidence = read_log(EFA)
    assert evidence.channels == {"NET/AWS Libfabric/GDRDMA": 1, "SHM": 1}
    assert transport_findings(evidence, "efa", "hostA") == []


def test_a_log_without_channels_between_nodes_proves_nothing() -> None:
    assert transport_findings(read_log(["NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM"]), "roce", "a") == []


@given(st.lists(st.text(max_size=80) | st.text(max_size=20).map(lambda t: f"NCCL INFO Channel 00/0 : a -> b via {t}")))
def test_any_log_can_be_read(lines: list[str]) -> None:
    evidence = read_log(lines)
    transport_findings(evidence, "infiniband", "a")
    assert all(count > 0 for count in evidence.channels.values())
