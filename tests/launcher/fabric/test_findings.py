"""Each check is triggered by a fault seeded into a recorded machine; the healthy machines are silent.

The healthy side is in test_recorded_machines.py. The last test makes sure that no finding exists without its fault here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import launcher.fabric.findings
from launcher.fabric.checks_gang import counter_growth
from launcher.fabric.facts import Gid, Gpu, Hca, HcaPort, Kubernetes, NodeFacts, PciDevice, Xid
from launcher.fabric.findings import Finding, Severity, findings
from launcher.fabric.rules import GangRequest

Fault = Callable[[NodeFacts], NodeFacts]
Recorded = Callable[[str], NodeFacts]

DGX, OCI, AWS, LENOVO, BOND = (
    "dgx-a100",
    "oci-bm-gpu-h100-8",
    "aws-p5-48xlarge",
    "lenovo-sr680a-v3-h200",
    "h20-roce-bond4",
)


def _platform(**values: object) -> Fault:
    return lambda facts: replace(facts, platform=replace(facts.platform, **values))  # type: ignore[arg-type]


def _memory(**values: object) -> Fault:
    return lambda facts: replace(facts, memory=replace(facts.memory, **values))  # type: ignore[arg-type]


def _software(**values: object) -> Fault:
    return lambda facts: replace(facts, software=replace(facts.software, **values))  # type: ignore[arg-type]


def _cpus(**values: object) -> Fault:
    return lambda facts: replace(facts, cpus=replace(facts.cpus, **values))  # type: ignore[arg-type]


def _gpu(index: int, **values: object) -> Fault:
    def fault(facts: NodeFacts) -> NodeFacts:
        gpus = tuple(replace(gpu, **values) if gpu.index == index else gpu for gpu in facts.gpus)  # type: ignore[arg-type]
        return replace(facts, gpus=gpus)

    return fault


def _all_gpus(**values: object) -> Fault:
    return lambda facts: replace(facts, gpus=tuple(replace(gpu, **values) for gpu in facts.gpus))  # type: ignore[arg-type]


def _xids(*xids: Xid) -> Fault:
    return lambda facts: replace(facts, xids=xids)


def _port(name: str, **values: object) -> Fault:
    def fault(facts: NodeFacts) -> NodeFacts:
        hcas = tuple(
            replace(hca, ports=(replace(hca.ports[0], **values),)) if hca.name == name else hca for hca in facts.hcas
        )  # type: ignore[arg-type]
        return replace(facts, hcas=hcas)

    return fault


def _hcas(**values: object) -> Fault:
    return lambda facts: replace(facts, hcas=tuple(replace(hca, **values) for hca in facts.hcas))  # type: ignore[arg-type]


def _no_hcas(facts: NodeFacts) -> NodeFacts:
    return replace(facts, hcas=())


def _pod(**values: object) -> Fault:
    return lambda facts: replace(facts, kubernetes=Kubernetes(**values))  # type: ignore[arg-type]


def _netdev(name: str, **values: object) -> Fault:
    def fault(facts: NodeFacts) -> NodeFacts:
        netdevs = tuple(replace(netdev, **values) if netdev.name == name else netdev for netdev in facts.netdevs)  # type: ignore[arg-type]
        return replace(facts, netdevs=netdevs)

    return fault


def _pci(match: Callable[[PciDevice], bool], **values: object) -> Fault:
    def fault(facts: NodeFacts) -> NodeFacts:
        pci = tuple(replace(device, **values) if match(device) else device for device in facts.pci)  # type: ignore[arg-type]
        return replace(facts, pci=pci)

    return fault


def _and(*faults: Fault) -> Fault:
    def fault(facts: NodeFacts) -> NodeFacts:
        for one in faults:
            facts = one(facts)
        return facts

    return fault


def _first_gpu_bus(device: PciDevice) -> bool:
    return device.address == "0000:0c:00.0"


def _many_ports(facts: NodeFacts) -> NodeFacts:
    port = HcaPort(1, "ACTIVE", link_layer="InfiniBand")
    return replace(facts, gpus=(), hcas=tuple(Hca(f"ib{idx}", ports=(port,)) for idx in range(40)))


def _lone_card(facts: NodeFacts) -> NodeFacts:
    """All compute ports of a machine moved away from the GPUs, the management card put beside one of them."""
    gpu = facts.pci_of(facts.gpus[0].pci)
    assert gpu is not None
    moved = tuple(
        replace(device, path=gpu.path, root=gpu.root, numa=gpu.numa)
        if device.address == "0000:5a:00.0"
        else replace(device, path=(f"0000:ee:{idx % 32:02x}.0",))
        if any(hca.pci == device.address for hca in facts.hcas)
        else device
        for idx, device in enumerate(facts.pci)
    )
    return replace(facts, pci=moved)


def _without_places(facts: NodeFacts) -> NodeFacts:
    pci = tuple(replace(device, root=None, path=None, numa=None) for device in facts.pci)
    return replace(facts, pci=pci)


def _lost_half(facts: NodeFacts) -> NodeFacts:
    """The second socket's NICs are gone."""
    lost = {"mlx5_9", "mlx5_10", "mlx5_12", "mlx5_13", "mlx5_14", "mlx5_15", "mlx5_16", "mlx5_17"}
    return replace(facts, hcas=tuple(hca for hca in facts.hcas if hca.name not in lost))


def _virtual_functions(facts: NodeFacts) -> NodeFacts:
    pci = tuple(replace(device, physfn="unknown") for device in facts.pci)
    return replace(facts, pci=pci, kubernetes=Kubernetes(is_host_network=True))


LOW_MEMLOCK = _and(_memory(memlock_bytes=65536), _platform(capabilities=()))
BAD_GIDS = (Gid(0, "fe80::1", "IB/RoCE v1", "bond0"), Gid(1, "fe80::1", "RoCE v2", "bond0"))

NODE_FAULTS: list[tuple[str, str, Fault, dict[str, str]]] = [
    ("interface-unknown", DGX, lambda facts: replace(facts, node_ip="203.0.113.9"), {}),
    ("interface-down", DGX, _netdev("mgmt0", has_carrier=False), {}),
    ("interface-guess", DGX, _netdev("ibp12s0", addresses=("192.168.7.1/24",)), {}),
    ("interface-user-missing", DGX, lambda facts: facts, {"NCCL_SOCKET_IFNAME": "ens5"}),
    ("interface-user-missing", DGX, lambda facts: facts, {"GLOO_SOCKET_IFNAME": "ens5"}),
    ("node-address-loopback", DGX, lambda facts: replace(facts, node_ip="127.0.0.1"), {}),
    ("hca-user-differs", DGX, lambda facts: facts, {"NCCL_IB_HCA": "mlx5_1"}),
    ("hca-user-differs", OCI, lambda facts: facts, {"NCCL_IB_HCA": "=ib0"}),
    ("hca-doubt", LENOVO, _lone_card, {}),
    ("hca-too-many", DGX, _many_ports, {}),
    ("rdma-absent", DGX, _no_hcas, {}),
    ("rdma-absent", DGX, _hcas(has_device_node=False), {}),
    ("rdma-absent", DGX, _and(_no_hcas, _pod(allocatable={"rdma/ib": "8"})), {}),
    ("rdma-host-network-vf", OCI, _virtual_functions, {}),
    ("port-down", DGX, _port("mlx5_2", state="DOWN", phys_state="Polling"), {}),
    ("port-down", DGX, _port("mlx5_2", state="INIT", phys_state="LinkUp"), {}),
    ("port-slow", DGX, _port("mlx5_2", rate_gbps=100.0), {}),
    ("subnet-manager-missing", DGX, _port("mlx5_2", sm_lid=0), {}),
    ("gid-none", BOND, _port("mlx5_bond_0", gids=BAD_GIDS), {}),
    ("gid-user-wrong", BOND, lambda facts: facts, {"NCCL_IB_GID_INDEX": "1"}),
    ("gid-garbage", BOND, _port("mlx5_bond_1", unreadable_gids=(2,)), {}),
    ("roce-mtu-small", OCI, _netdev("rdma0", mtu=1500), {}),
    (
        "provider-plugin-missing",
        OCI,
        _pod(labels={"node.kubernetes.io/instance-type": "a3-ultragpu-8g"}),
        {},
    ),
    (
        "efa-missing",
        AWS,
        _and(
            lambda facts: replace(facts, hcas=facts.hcas[:30]),
            _pod(labels={"node.kubernetes.io/instance-type": "p5.48xlarge"}),
        ),
        {},
    ),
    ("efa-huge-pages", AWS, _memory(huge_pages_free=0), {}),
    ("efa-fork-safe", AWS, lambda facts: facts, {"RDMAV_FORK_SAFE": "1"}),
    ("gpu-missing", DGX, lambda facts: replace(facts, gpus=facts.gpus[:7]), {}),
    ("gpu-recovery", DGX, _gpu(3, recovery_action="gpu-reset"), {}),
    ("gpu-memory", DGX, _gpu(3, is_remap_pending=True), {}),
    ("gpu-memory", DGX, _gpu(3, is_remap_failed=True), {}),
    ("gpu-ecc", DGX, _gpu(3, num_ecc_uncorrected=2), {}),
    ("gpu-xid", DGX, _xids(Xid(79), Xid(31)), {}),
    ("gpu-throttled", DGX, _gpu(3, throttle_reasons=("hw-thermal-slowdown",)), {}),
    ("gpu-mig", DGX, _gpu(3, is_mig=True), {}),
    ("nvlink-down", DGX, _and(_all_gpus(num_nvlinks_active=12), _gpu(3, num_nvlinks_active=11)), {}),
    ("fabric-manager", DGX, _all_gpus(fabric_state="in-progress"), {}),
    ("pcie-narrow", DGX, _gpu(3, pcie_width=8, max_pcie_width=16), {}),
    ("pcie-narrow", DGX, _pci(_first_gpu_bus, link_width=8, max_link_width=16), {}),
    ("peermem-unlinked", DGX, _platform(peer_memory="nvidia_peermem", is_peer_memory_linked=False), {}),
    (
        "gpudirect-off",
        DGX,
        _and(_platform(peer_memory="absent"), _software(is_open_driver=False, kernel="6.8.0")),
        {},
    ),
    ("gpudirect-off", DGX, _and(_platform(peer_memory="absent"), _software(kernel="5.4.0-150")), {}),
    ("acs-on", DGX, _pci(lambda device: device.class_code == "0x060400", acs_redirect=True), {}),
    ("iommu-on", DGX, _platform(is_iommu_on=True, is_iommu_passthrough=False), {}),
    ("affinity-unknown", OCI, _and(_without_places, _cpus(numa=())), {}),
    ("affinity-far", OCI, _lost_half, {}),
    ("shm-small", DGX, _memory(dev_shm_bytes=64 << 20), {}),
    ("shm-full", DGX, _memory(dev_shm_bytes=32 << 30, dev_shm_free_bytes=100 << 20), {}),
    ("memlock-low", DGX, LOW_MEMLOCK, {}),
    ("memory-killer", DGX, _memory(num_oom_kills=3), {}),
    ("cpu-share-small", DGX, _cpus(cgroup_cpus=2.0), {}),
    ("binding-impossible", DGX, _cpus(allowed=tuple(range(48, 64))), {}),
    ("port-range-narrow", DGX, _platform(port_range=(50000, 50099)), {}),
    ("nccl-bad-version", DGX, _software(nccl="2.28.3"), {}),
    ("facts-incomplete", DGX, lambda facts: replace(facts, unread=("nvml: driver not loaded",)), {}),
]


def _look(nodes: Sequence[NodeFacts], **user_env: str) -> list[Finding]:
    return findings(nodes, request=GangRequest(num_nodes=max(2, len(nodes))), user_env=user_env)


@pytest.mark.parametrize(
    ("id", "machine", "fault", "user_env"),
    NODE_FAULTS,
    ids=[f"{fault[0]}-{idx}" for idx, fault in enumerate(NODE_FAULTS)],
)
def test_a_fault_on_one_node_is_found(
    recorded: Recorded, id: str, machine: str, fault: Fault, user_env: dict[str, str]
) -> None:
    healthy = recorded(machine)
    before = {finding.id for finding in _look([healthy])}
    found = {finding.id: finding for finding in _look([fault(healthy)], **user_env)}
    assert id not in before
    assert id in found
    finding = found[id]
    assert finding.nodes == (machine,)
    for text in (finding.evidence, finding.meaning, finding.cure):
        assert len(text) > 10


def _nodes(facts: NodeFacts, count: int = 4) -> list[NodeFacts]:
    """Equal healthy nodes of one gang, each with its own name and address."""
    nodes = []
    for idx in range(count):
        address = f"10.20.30.{idx + 10}"
        netdevs = tuple(
            replace(netdev, addresses=(f"{address}/24",)) if facts.node_ip and netdev.addresses else netdev
            for netdev in facts.netdevs
        )
        gpus = tuple(replace(gpu, uuid=f"GPU-{idx}-{gpu.index}") for gpu in facts.gpus)
        nodes.append(replace(facts, hostname=f"n{idx}", node_ip=address, netdevs=netdevs, gpus=gpus))
    return nodes


def _rails(nodes: list[NodeFacts]) -> list[NodeFacts]:
    """Gives each bond of each node an address in its rail's subnet."""
    found = []
    for position, facts in enumerate(nodes):
        hcas, netdevs = list(facts.hcas), list(facts.netdevs)
        for rail, hca in enumerate(hcas):
            if not hca.name.startswith("mlx5_bond"):
                continue
            address = f"10.{rail}.0.{position + 1}"
            gid = Gid(3, f"::ffff:{address}", "RoCE v2", hca.netdevs[0])
            hcas[rail] = replace(hca, ports=(replace(hca.ports[0], gids=(gid,)),))
            netdevs = [
                replace(netdev, addresses=(f"{address}/24",)) if netdev.name == hca.netdevs[0] else netdev
                for netdev in netdevs
            ]
        found.append(replace(facts, hcas=tuple(hcas), netdevs=tuple(netdevs)))
    return found


def _move_rail(facts: NodeFacts) -> NodeFacts:
    gid = Gid(3, "::ffff:10.99.0.1", "RoCE v2", "bond1")
    moved = _port("mlx5_bond_1", gids=(gid,))(facts)
    return _netdev("bond1", addresses=("10.99.0.1/24",))(moved)


GANG_FAULTS: list[tuple[str, str, Fault]] = [
    ("same-machine-twice", DGX, lambda facts: replace(facts, node_ip="10.20.30.10")),
    ("mtu-mismatch", DGX, _netdev("mgmt0", mtu=9000)),
    ("mtu-mismatch", OCI, _netdev("rdma3", mtu=4220)),
    ("transport-mismatch", DGX, _no_hcas),
    ("hca-missing", DGX, lambda facts: replace(facts, hcas=facts.hcas[1:])),
    ("rate-mismatch", DGX, _and(*[_port(f"mlx5_{idx}", rate_gbps=100.0) for idx in range(12)])),
    ("gid-subnets", BOND, _move_rail),
    ("gid-index-differs", BOND, _port("mlx5_bond_0", gids=(Gid(7, "::ffff:10.0.0.9", "RoCE v2", "bond0"),))),
    *[
        (f"version-skew-{name.replace('_', '-')}", DGX, _software(**{name: "9.9"}))
        for name in ("nccl", "torch", "ofi_nccl", "driver", "cuda", "python", "kernel")
    ],
    ("gpu-mismatch", DGX, lambda facts: replace(facts, gpus=facts.gpus[:-1])),
    (
        "firmware-skew",
        DGX,
        lambda facts: replace(facts, hcas=tuple(replace(hca, fw_version="20.99") for hca in facts.hcas)),
    ),
]


@pytest.mark.parametrize(
    ("id", "machine", "fault"), GANG_FAULTS, ids=[f"{fault[0]}-{idx}" for idx, fault in enumerate(GANG_FAULTS)]
)
def test_a_node_that_differs_is_named(recorded: Recorded, id: str, machine: str, fault: Fault) -> None:
    """Of four nodes the third is odd; it alone must be named, and equal nodes raise nothing."""
    healthy = _software(**dict.fromkeys(("nccl", "torch", "ofi_nccl", "driver", "cuda", "python", "kernel"), "1.0"))(
        replace(
            recorded(machine),
            hcas=tuple(replace(hca, board_id="MT_0000000223", fw_version="20.1") for hca in recorded(machine).hcas),
        )
    )
    nodes = _nodes(healthy)
    if machine == BOND:
        nodes = _rails(nodes)
    assert [finding for finding in _look(nodes) if finding.severity > Severity.INFO] == []
    assert id not in {finding.id for finding in _look(nodes)}
    nodes[2] = fault(nodes[2])
    found = [finding for finding in _look(nodes) if finding.id == id]
    assert found
    named = {"n0", "n2"} if id == "same-machine-twice" else {"n2"}
    assert {node for finding in found for node in finding.nodes} == named


def test_a_missing_card_does_not_shift_the_rails_after_it(recorded: Recorded) -> None:
    """Compared by position, every rail after the lost one would seem to be in a wrong subnet."""
    nodes = _rails(_nodes(recorded(BOND)))
    nodes[2] = replace(nodes[2], hcas=tuple(hca for hca in nodes[2].hcas if hca.name != "mlx5_bond_1"))
    found = {finding.id for finding in _look(nodes)}
    assert "hca-missing" in found
    assert not found & {"gid-subnets", "mtu-mismatch"}


def test_nodes_with_other_device_names_are_compared_by_position(recorded: Recorded) -> None:
    """Virtual functions are numbered differently on each host."""
    nodes = _rails(_nodes(recorded(BOND)))
    nodes[1] = replace(nodes[1], hcas=tuple(replace(hca, name=hca.name.replace("bond", "vf")) for hca in nodes[1].hcas))
    assert "mtu-mismatch" not in {finding.id for finding in _look(nodes)}
    nodes[1] = _netdev("bond2", mtu=1500)(nodes[1])
    assert "mtu-mismatch" in {finding.id for finding in _look(nodes)}


def test_of_two_nodes_that_differ_both_are_named(recorded: Recorded) -> None:
    """There is no majority to be right."""
    nodes = _nodes(recorded(DGX), 2)
    nodes[1] = _netdev("mgmt0", mtu=9000)(nodes[1])
    (finding,) = [finding for finding in _look(nodes) if finding.id == "mtu-mismatch"]
    assert finding.nodes == ("n0", "n1")
    assert "1500 on n0" in finding.evidence
    assert "9000 on n1" in finding.evidence


def test_one_fault_on_many_nodes_is_one_finding(recorded: Recorded) -> None:
    nodes = [_memory(dev_shm_bytes=64 << 20)(facts) for facts in _nodes(recorded(DGX), 16)]
    (finding,) = [finding for finding in _look(nodes) if finding.id == "shm-small"]
    assert len(finding.nodes) == 16


def test_counters_that_grow_are_link_errors(recorded: Recorded) -> None:
    """Totals since boot say little; what grows between two looks does."""
    before = _port("mlx5_0", counters={"link_downed": 3, "symbol_error": 7})(recorded(DGX))
    after = _port("mlx5_0", counters={"link_downed": 4, "symbol_error": 7})(recorded(DGX))
    (finding,) = counter_growth(before, after)
    assert (finding.id, finding.severity) == ("link-errors", Severity.ERROR)
    assert "link_downed +1" in finding.evidence
    assert counter_growth(before, before) == []
    assert counter_growth(after, before) == [], "a counter that was reset is no error"


def test_rdma_resource_that_the_pod_forgot_is_named(recorded: Recorded) -> None:
    facts = _and(_no_hcas, _pod(allocatable={"rdma/ib": "8", "cpu": "64"}))(recorded(DGX))
    (finding,) = [finding for finding in _look([facts]) if finding.id == "rdma-absent"]
    assert finding.severity == Severity.ERROR
    assert "rdma/ib" in finding.cure


def test_virtual_machines_are_not_blamed_for_what_they_show(recorded: Recorded) -> None:
    """Link widths and IOMMUs of a VM are the hypervisor's invention."""
    facts = _and(_gpu(0, pcie_width=1, max_pcie_width=16), _platform(is_iommu_on=True, is_iommu_passthrough=False))(
        recorded(AWS)
    )
    assert {finding.id for finding in _look([facts])} <= {"interface-guess"}


def test_a_laptop_is_silent() -> None:
    assert findings([NodeFacts("laptop", gpus=(Gpu(0, name="GeForce"),))]) == []


def test_no_finding_exists_without_a_fault_that_triggers_it() -> None:
    folder = Path(launcher.fabric.findings.__file__).parent
    written = set()
    for path in folder.glob("checks_*.py"):
        written |= set(re.findall(r'"([a-z]+(?:-[a-z0-9]+)+)"', path.read_text()))
    seeded = {fault[0] for fault in NODE_FAULTS} | {fault[0] for fault in GANG_FAULTS} | {"link-errors"}
    not_ids = {
        "hw-slowdown",
        "hw-thermal-slowdown",
        "sw-thermal-slowdown",
        "hw-power-brake",
        "not-started",
        "in-progress",
    }
    assert written - not_ids - seeded == set()
