"""The recorded machines: what their owners published must come out of the probe, the topology and the rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.fabric.codec import from_json, to_json
from launcher.fabric.facts import NodeFacts
from launcher.fabric.findings import Severity, findings
from launcher.fabric.hcas import choose
from launcher.fabric.nccl import gid_index, parse_names, usable_ports
from launcher.fabric.rules import GangRequest, NodeEnvironment, environment
from launcher.fabric.topology import affinity, closest_hcas
from tests.launcher.fabric.machines import NAMES, NODE_IP, facts_of, give_address, lay_out, record

SEVERAL = GangRequest(num_nodes=2)


def _environment(facts: NodeFacts) -> NodeEnvironment:
    return environment([facts], SEVERAL, {})[0]


@pytest.mark.parametrize("name", NAMES)
def test_distances_agree_with_the_published_matrix(name: str, tmp_path: Path) -> None:
    """A wrong matrix would pair GPUs with the wrong NICs on every machine of this kind."""
    machine, facts = record(name), facts_of(name, tmp_path)
    found = affinity(facts)
    hca_at = {hca.name: idx for idx, hca in enumerate(facts.hcas)}
    published = machine["matrix"] or {}
    checked = 0
    for part, rows in (("gpu_hca", found.gpu_hca), ("hca_hca", found.hca_hca), ("gpu_gpu", found.gpu_gpu)):
        table = published.get(part) or {}
        for row, cells in table.get("rows", {}).items():
            for column, cell in zip(table["columns"], cells, strict=True):
                row_idx = _position(facts, row, hca_at)
                column_idx = _position(facts, column, hca_at)
                assert str(rows[row_idx][column_idx]) == cell, f"{row} to {column}"
                checked += 1
    assert checked or machine["matrix"] is None


def _position(facts: NodeFacts, name: str, hca_at: dict[str, int]) -> int:
    if not name.startswith("GPU"):
        return hca_at[name]
    # Bus order and nvidia-smi's numbers agree on all recorded machines.
    return int(name.removeprefix("GPU"))


@pytest.mark.parametrize("name", NAMES)
def test_hcas_are_those_of_the_training_network(name: str, tmp_path: Path) -> None:
    """Storage and management ports look like compute ports; only place and speed tell them apart."""
    expected, facts = record(name)["expected"], facts_of(name, tmp_path)
    choice = choose(facts)
    assert choice.transport == expected["transport"]
    if name == "epyc-4gpu-flat":
        # The record itself says that affinity cannot tell here; all active ports is acceptable, none is not.
        assert set(choice.hcas) >= set(expected["hcas"])
        return
    assert set(choice.hcas) == set(expected["hcas"])
    assert set(choice.excluded) == set(expected["excluded"])


@pytest.mark.parametrize("name", NAMES)
def test_nccl_ends_up_with_exactly_these_hcas(name: str, tmp_path: Path) -> None:
    """Whatever is set or left unset, NCCL's own reading of it must arrive at the choice."""
    facts = facts_of(name, tmp_path)
    node = _environment(facts)
    decision = node.decision("NCCL_IB_HCA")
    assert decision is not None
    if node.hcas.transport in ("efa", "socket"):
        assert decision.value is None
        return
    names = parse_names(decision.value or "")
    taken = {hca for hca, port in usable_ports(facts) if names.takes(hca, port.port)}
    assert taken == set(node.hcas.hcas)
    expected = record(name)["expected"]["nccl_ib_hca"]
    if name != "epyc-4gpu-flat":
        assert decision.value is not None
        assert decision.value[0] == "="
        assert set(decision.value[1:].split(",")) == set(expected[1:].split(","))


@pytest.mark.parametrize("name", NAMES)
def test_closest_hcas_are_as_published(name: str, tmp_path: Path) -> None:
    expected, facts = record(name)["expected"], facts_of(name, tmp_path)
    found = closest_hcas(facts, expected["hcas"])
    assert {str(gpu): set(names) for gpu, names in found.items()} == {
        gpu: set(names) for gpu, names in expected["closest_hcas"].items()
    }


def test_gid_index_of_the_bonds_is_the_one_that_works(tmp_path: Path) -> None:
    """On this machine index 1 is RoCE v2 too, but link-local: published as timing out, while 3 works."""
    facts = facts_of("h20-roce-bond4", tmp_path)
    chosen = choose(facts).hcas
    assert {gid_index(hca.ports[0]) for hca in facts.hcas if hca.name in chosen} == {3}
    decision = _environment(facts).decision("NCCL_IB_GID_INDEX")
    assert decision is not None
    assert decision.value is None, "NCCL finds it itself; a fixed index breaks where hosts differ"
    assert "mlx5_bond_0: 3" in decision.reason


def test_old_nccl_is_given_the_index_it_cannot_find(tmp_path: Path) -> None:
    facts = facts_of("h20-roce-bond4", tmp_path)
    old = replace(facts, software=replace(facts.software, nccl="2.18.5"))
    decision = _environment(old).decision("NCCL_IB_GID_INDEX")
    assert decision is not None
    assert decision.value == "3"


@pytest.mark.parametrize(
    ("name", "netdev"), [("gpuless-microvm", "eth0"), ("oci-bm-gpu-h100-8", "eth0"), ("h20-roce-bond4", "eth0")]
)
def test_socket_interface_is_the_owner_of_the_node_address(name: str, netdev: str, tmp_path: Path) -> None:
    """Not the first up, not the fastest: on the Lenovo eth0 is a compute NIC, elsewhere it is the only way in."""
    layout = lay_out(name, tmp_path)
    give_address(layout, netdev)
    node = _environment(layout.probe(node_ip=NODE_IP))
    decision = node.decision("NCCL_SOCKET_IFNAME")
    assert decision is not None
    assert decision.value == f"={netdev}"


def test_the_only_real_interface_is_taken_when_no_address_is_known(tmp_path: Path) -> None:
    """The micro VM has six virtual interfaces up; one has a device behind it."""
    node = _environment(facts_of("gpuless-microvm", tmp_path))
    assert node.interface.name == record("gpuless-microvm")["expected"]["socket_ifname"]


@pytest.mark.parametrize("name", NAMES)
def test_healthy_machines_raise_no_alarm(name: str, tmp_path: Path) -> None:
    """A doctor that cries on healthy machines is not read on sick ones."""
    layout = lay_out(name, tmp_path)
    netdev = record(name)["expected"]["socket_ifname"] or "mgmt0"
    if netdev == "mgmt0":
        layout.write("sys/class/net/mgmt0/operstate", "up\n")
        layout.write("sys/class/net/mgmt0/mtu", "1500\n")
    give_address(layout, netdev)
    found = findings([layout.probe(node_ip=NODE_IP)], request=SEVERAL)
    assert [finding for finding in found if finding.severity > Severity.INFO] == []


@pytest.mark.parametrize("name", NAMES)
def test_facts_survive_json(name: str, tmp_path: Path) -> None:
    facts = facts_of(name, tmp_path)
    assert from_json(to_json(facts)) == facts


@pytest.mark.parametrize("name", ["dgx-a100", "lenovo-sr680a-v3-h200"])
def test_without_the_pci_tree_numa_still_keeps_far_ports_out(name: str, tmp_path: Path) -> None:
    """A flat copy of /sys has no tree. Ports on a memory node without a GPU must still not be taken, slow ones neither."""
    facts = lay_out(name, tmp_path, flat=True).probe()
    choice, expected = choose(facts), record(name)["expected"]
    assert set(choice.hcas) >= set(expected["hcas"])
    if name == "dgx-a100":
        assert set(choice.hcas) == set(expected["hcas"])
    else:
        assert {"rocep90s0f0", "rocep90s0f1", "rocep216s0f0"} <= set(choice.excluded)
