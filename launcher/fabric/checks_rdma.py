"""Checks of one node's RDMA devices: are they here, usable, up, at full speed, with addresses, and chosen rightly."""

from __future__ import annotations

from launcher.fabric import nccl
from launcher.fabric.facts import HcaPort
from launcher.fabric.findings import Finding, NodeCheck, Severity, View
from launcher.fabric.topology import Near, gpu_hca

RDMA_RESOURCES = ("rdma/", "nvidia.com/hostdev", "nvidia.com/rdma", "nvidia.com/sriov", "vpc.amazonaws.com/efa")
"""Beginnings of the names under which device plugins offer RDMA devices to pods."""

ROCE_MTU = 4200
"""Ethernet MTU below which RoCE cannot use its own 4096-byte MTU."""


def hca_user(view: View) -> list[Finding]:
    value = view.user_env.get("NCCL_IB_HCA")
    ports = nccl.usable_ports(view.facts)
    if not value or not ports or not view.is_multi_node:
        return []
    wanted = nccl.parse_names(value)
    taken = {(name, port.port) for name, port in ports if wanted.takes(name, port.port)}
    chosen = {(port.hca, port.port) for port in view.env.hcas.ports}
    if taken == chosen:
        return []
    shown = ", ".join(sorted({name for name, _ in taken})) or "nothing"
    ours = ", ".join(view.env.hcas.hcas) or "none"
    unit = '; without "=" each name is a prefix' if not wanted.is_exact and taken - chosen else ""
    return [
        view.finding(
            "hca-user-differs",
            Severity.WARNING if taken else Severity.ERROR,
            f"NCCL_IB_HCA={value} takes {shown}{unit}; the facts say {ours}",
            "traffic may go through storage or management ports, or leave ports idle"
            if taken
            else "NCCL finds no InfiniBand device and runs over TCP",
            "unset NCCL_IB_HCA: the launcher sets exact names per node; `doctor --explain NCCL_IB_HCA` shows why",
        )
    ]


def hca_doubt(view: View) -> list[Finding]:
    found = []
    choice = view.env.hcas
    if choice.doubt is not None:
        found.append(
            view.finding(
                "hca-doubt",
                Severity.WARNING,
                choice.doubt,
                f"place and speed disagree about which ports carry the training; taken: {', '.join(choice.hcas)}",
                "set NCCL_IB_HCA yourself if that is wrong",
            )
        )
    usable = len(choice.ports)
    if choice.transport in ("infiniband", "roce") and usable > nccl.MAX_HCAS:
        found.append(
            view.finding(
                "hca-too-many",
                Severity.WARNING,
                f"{usable} RDMA ports fit equally; NCCL uses {nccl.MAX_HCAS} at most",
                "NCCL keeps the first it finds, which may not be those of the GPUs",
                "set NCCL_IB_HCA to the ports that belong to the training network",
            )
        )
    return found


def rdma_absent(view: View) -> list[Finding]:
    """RDMA impossible here, and why, as far as the facts tell."""
    facts = view.facts
    if view.env.hcas.transport != "socket" or not view.is_multi_node or not facts.gpus:
        return []
    offered = sorted(name for name in facts.kubernetes.allocatable if name.startswith(RDMA_RESOURCES))
    asked = [name for name in facts.kubernetes.requested if name.startswith(RDMA_RESOURCES)]
    hidden = [hca.name for hca in facts.hcas if hca.has_device_node is False]
    idle = [device.address for device in facts.pci if (device.class_code or "").startswith("0x0207") and not facts.hcas]
    if hidden:
        why = f"{', '.join(hidden[:4])} are seen in /sys, but /dev/infiniband has no device for them"
        cure = "request the RDMA resource for the pod, or mount /dev/infiniband (privileged, hostNetwork)"
        severity = Severity.ERROR
    elif offered and not asked:
        why = f"the node offers {', '.join(offered)}; the pod asked for none of it"
        cure = f"add {offered[0]} to the pod's resource limits"
        severity = Severity.ERROR
    elif idle:
        why = f"InfiniBand cards at {', '.join(idle[:4])}, but /sys/class/infiniband is empty"
        cure = "load the driver (mlx5_core, mlx5_ib) on the host, or give the pod its RDMA device"
        severity = Severity.ERROR
    elif facts.hcas:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(view.env.hcas.excluded.items())[:4])
        cure = "bring the ports up (`ibstat`, subnet manager, switch)"
        severity = Severity.ERROR
    else:
        why = "no RDMA device on this node"
        cure = "nothing, if the machine was bought without; else check the driver and the pod's resources"
        severity = Severity.WARNING
    return [
        view.finding(
            "rdma-absent", severity, why, "collectives between nodes will run over TCP sockets, far slower", cure
        )
    ]


def rdma_host_network_vf(view: View) -> list[Finding]:
    facts = view.facts
    functions = [
        hca.name
        for hca in facts.hcas
        if hca.name in view.env.hcas.hcas
        and (device := facts.pci_of(hca.pci)) is not None
        and device.physfn is not None
    ]
    if facts.kubernetes.is_host_network is not True or not functions or len(functions) < len(view.env.hcas.hcas):
        return []
    return [
        view.finding(
            "rdma-host-network-vf",
            Severity.ERROR,
            f"hostNetwork pod with virtual functions only ({', '.join(functions[:4])})",
            "virtual functions are addressed in the pod's own network; with hostNetwork their peers cannot be reached",
            "drop hostNetwork and attach the functions with Multus, or use the physical functions with hostNetwork",
        )
    ]


def ports_down(view: View) -> list[Finding]:
    """Ports that belong to the training network by their place, but do not work."""
    facts, found = view.facts, []
    matrix = gpu_hca(facts)
    chosen = view.env.hcas.hcas
    for hca_idx, hca in enumerate(facts.hcas):
        is_local = any((near := row[hca_idx].near) is not None and near <= Near.PXB for row in matrix)
        for port in hca.ports:
            if port.state in ("ACTIVE", None):
                continue
            evidence = f"{hca.name} port {port.port} is {port.state} ({port.phys_state or 'physical state unknown'})"
            if is_local:
                cure = f"check cable, transceiver and switch port of {hca.name}; `ibstat {hca.name}`"
                if port.state in ("INIT", "ARMED") and port.link_layer == "InfiniBand":
                    cure = "the link is up but no subnet manager configured it: start opensm or check the switch's"
                meaning = (
                    "a GPU's own port is missing: its traffic goes through a farther one, and the gang waits for it"
                )
                found.append(view.finding("port-down", Severity.ERROR, evidence, meaning, cure))
            elif not chosen:
                found.append(
                    view.finding(
                        "port-down",
                        Severity.ERROR,
                        evidence,
                        "no RDMA port of this node works",
                        f"check cable and switch port of {hca.name}; `ibstat {hca.name}`",
                    )
                )
    return found


def port_slow(view: View) -> list[Finding]:
    """A port among the GPUs' own that negotiated less than its sisters."""
    facts = view.facts
    matrix = gpu_hca(facts)
    rates: dict[str, float] = {}
    for hca_idx, hca in enumerate(facts.hcas):
        if any((near := row[hca_idx].near) is not None and near <= Near.PXB for row in matrix):
            for port in hca.ports:
                if port.state == "ACTIVE" and port.rate_gbps is not None:
                    rates[f"{hca.name}:{port.port}"] = port.rate_gbps
    fastest = max(rates.values(), default=0.0)
    slow = {name: rate for name, rate in rates.items() if rate < fastest}
    if not slow or 2 * len(slow) > len(rates):
        return []
    shown = ", ".join(f"{name.removesuffix(':1')} {rate:g}" for name, rate in slow.items())
    return [
        view.finding(
            "port-slow",
            Severity.WARNING,
            f"{shown} Gb/s; the other ports beside GPUs run at {fastest:g} Gb/s",
            "a collective runs at the speed of its slowest link",
            "check cable and transceiver (a port that trains down to fewer lanes or a lower speed), or the port's settings",
        )
    ]


def subnet_manager(view: View) -> list[Finding]:
    lost = [
        f"{hca.name}:{port.port}"
        for hca in view.facts.hcas
        for port in hca.ports
        if port.link_layer == "InfiniBand" and port.state == "ACTIVE" and port.sm_lid == 0
    ]
    if not lost:
        return []
    return [
        view.finding(
            "subnet-manager-missing",
            Severity.ERROR,
            f"sm_lid is 0 on {', '.join(lost[:4])}",
            "no subnet manager is known: new connections cannot be routed",
            "start opensm, or check the subnet manager of the switch",
        )
    ]


def gids(view: View) -> list[Finding]:
    """RoCE ports whose table holds nothing that NCCL can use, or where the user's index is wrong."""
    if view.env.hcas.transport != "roce" or not view.is_multi_node:
        return []
    v6 = view.env.decision("NCCL_IB_ADDR_FAMILY")
    family = (v6.effective if v6 else view.user_env.get("NCCL_IB_ADDR_FAMILY")) or "AF_INET"
    user_index = view.user_env.get("NCCL_IB_GID_INDEX", "").strip()
    ports = [(name, port) for name, port in _chosen(view) if port.gids]
    found = [_gid_garbage(view, name, port) for name, port in _chosen(view) if port.unreadable_gids]
    problems: dict[str, list[str]] = {}
    for name, port in ports:
        search = nccl.gid_index(port, family=family)
        index = int(user_index) if user_index.isascii() and user_index.isdigit() else search
        problem = nccl.gid_problem(port, index)
        if problem is not None:
            also = f"; NCCL's own search gives {search}" if user_index else f"; {len(port.gids)} entries"
            problems.setdefault(f"{problem}{also}", []).append(name)
    for problem, names in problems.items():
        if user_index:
            finding = view.finding(
                "gid-user-wrong",
                Severity.ERROR,
                f"NCCL_IB_GID_INDEX={user_index} on {', '.join(names)}: {problem}",
                "connections fail with ibv_modify_qp errors or time out (WC error 12)",
                "unset NCCL_IB_GID_INDEX: NCCL ≥ 2.21 finds the entry on each host itself",
            )
        else:
            finding = view.finding(
                "gid-none",
                Severity.ERROR,
                f"no routable RoCE v2 entry on {', '.join(names)} ({problem})",
                "RoCE connections cannot be made over these ports (ibv_modify_qp fails or times out)",
                "give their network interfaces an address (in a pod: attach the RDMA network's interfaces as well)",
            )
        found.append(finding)
    return found


def _gid_garbage(view: View, name: str, port: HcaPort) -> Finding:
    slots = ", ".join(str(slot) for slot in port.unreadable_gids[:4])
    return view.finding(
        "gid-garbage",
        Severity.WARNING,
        f"{name}: GID slots {slots} hold no address",
        "the table was read while it changed, or the driver is broken; NCCL may choose a wrong entry",
        f"look at /sys/class/infiniband/{name}/ports/{port.port}/gids; reload the driver",
    )


def roce_mtu(view: View) -> list[Finding]:
    if view.env.hcas.transport != "roce":
        return []
    small = {
        netdev.name: netdev.mtu
        for hca in view.facts.hcas
        if hca.name in view.env.hcas.hcas
        for name in hca.netdevs
        if (netdev := view.facts.netdev_by_name.get(name)) is not None
        and netdev.mtu is not None
        and netdev.mtu < ROCE_MTU
    }
    if not small:
        return []
    shown = ", ".join(f"{name} {mtu}" for name, mtu in small.items())
    return [
        view.finding(
            "roce-mtu-small",
            Severity.INFO,
            f"MTU {shown}",
            f"RoCE uses its 4096-byte MTU only from {ROCE_MTU} on; below, more packets for the same bytes",
            "raise the MTU of hosts and switches together (9000 is usual)",
        )
    ]


def _chosen(view: View) -> list[tuple[str, HcaPort]]:
    wanted = {(port.hca, port.port) for port in view.env.hcas.ports}
    return [(hca.name, port) for hca in view.facts.hcas for port in hca.ports if (hca.name, port.port) in wanted]


CHECKS: tuple[NodeCheck, ...] = (
    hca_user,
    hca_doubt,
    rdma_absent,
    rdma_host_network_vf,
    ports_down,
    port_slow,
    subnet_manager,
    gids,
    roce_mtu,
)
