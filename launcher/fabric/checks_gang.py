"""Checks that compare the nodes of a gang: what differs that must not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from launcher.fabric.facts import ERROR_COUNTERS, Hca, NodeFacts
from launcher.fabric.findings import Finding, GangCheck, Severity, View
from launcher.fabric.interfaces import subnet_of
from launcher.fabric.nccl import gid_index, is_ipv4_gid, is_routable_gid


def same_machine(views: Sequence[View]) -> list[Finding]:
    found = []
    for what in ("address", "GPU"):
        seen: dict[str, list[str]] = defaultdict(list)
        for view in views:
            facts = view.facts
            value = facts.node_ip if what == "address" else next((gpu.uuid for gpu in facts.gpus if gpu.uuid), None)
            if value is not None:
                seen[value].append(view.facts.hostname)
        for value, hosts in seen.items():
            if len(hosts) > 1:
                found.append(
                    Finding(
                        "same-machine-twice",
                        Severity.INFO if all(view.is_one_machine for view in views) else Severity.ERROR,
                        tuple(hosts),
                        f"{len(hosts)} nodes have the {what} {value}",
                        "two nodes of the gang are one machine: its GPUs would be used twice, NCCL refuses duplicates",
                        "start one Ray node per machine, or drop one of the files",
                    )
                )
    return found


def mtu(views: Sequence[View]) -> list[Finding]:
    """Interfaces that carry the same traffic with different MTU: the socket interface, and each rail's netdev."""
    values: dict[str, dict[str, int]] = defaultdict(dict)
    for view in views:
        netdev = view.facts.netdev_by_name.get(view.env.interface.name or "")
        if netdev is not None and netdev.mtu is not None:
            values["socket"][view.facts.hostname] = netdev.mtu
    for view, rails in _rails(views):
        for rail, hca in rails.items():
            for member in hca.netdevs:
                rail_dev = view.facts.netdev_by_name.get(member)
                if rail_dev is not None and rail_dev.mtu is not None:
                    values[rail][view.facts.hostname] = rail_dev.mtu
    return [
        finding
        for where, by_host in values.items()
        for finding in _odd(
            by_host,
            "mtu-mismatch",
            Severity.ERROR,
            f"MTU of the {where} interface: ",
            "small messages pass, large ones hang",
            "set one MTU on all hosts and switch ports of this network",
        )
    ]


def transport(views: Sequence[View]) -> list[Finding]:
    by_host = {view.facts.hostname: view.env.hcas.transport for view in views if view.facts.gpus}
    return _odd(
        by_host,
        "transport-mismatch",
        Severity.ERROR,
        "network of the nodes: ",
        "nodes with different networks cannot talk over the fast one: NCCL fails, or all fall back to TCP",
        "leave the odd nodes out, or see their own findings for why RDMA is missing there",
    )


def hca_count(views: Sequence[View]) -> list[Finding]:
    by_host = {view.facts.hostname: len(view.env.hcas.ports) for view in views if view.env.hcas.transport != "socket"}
    return _odd(
        by_host,
        "hca-missing",
        Severity.ERROR,
        "usable RDMA ports: ",
        "rails do not match: some GPUs of the odd node have no port of their own, and the gang waits for them",
        "look for a port that is down on the odd node, or a pod that was given fewer devices",
    )


def hca_rate(views: Sequence[View]) -> list[Finding]:
    by_host = {}
    for view in views:
        chosen = {(port.hca, port.port) for port in view.env.hcas.ports}
        rates = [
            port.rate_gbps
            for hca in view.facts.hcas
            for port in hca.ports
            if (hca.name, port.port) in chosen and port.rate_gbps is not None
        ]
        if rates:
            by_host[view.facts.hostname] = f"{min(rates):g} Gb/s"
    return _odd(
        by_host,
        "rate-mismatch",
        Severity.WARNING,
        "slowest RDMA port: ",
        "a collective runs at the speed of its slowest link",
        "check cable, transceiver and switch port of the odd node",
    )


def gid_subnets(views: Sequence[View]) -> list[Finding]:
    """Rails whose subnet on one host differs from the subnet on the others, by the interface's prefix length."""
    subnets: dict[str, dict[str, str]] = defaultdict(dict)
    indices: dict[str, str] = {}
    for view, rails in _rails(views):
        for rail, hca in rails.items():
            subnet = _rail_subnet(view.facts, hca)
            if subnet is not None:
                subnets[rail][view.facts.hostname] = subnet
    for view in views:
        if view.env.hcas.transport != "roce":
            continue
        chosen = [port for hca in view.facts.hcas if hca.name in view.env.hcas.hcas for port in hca.ports if port.gids]
        if chosen:
            indices[view.facts.hostname] = ",".join(sorted({str(gid_index(port)) for port in chosen}))
    found = []
    for rail, by_host in subnets.items():
        # Every host a subnet of its own is a routed design, not a mistake.
        if len(set(by_host.values())) == len(by_host):
            continue
        found += _odd(
            by_host,
            "gid-subnets",
            Severity.WARNING,
            f"subnet of {rail}: ",
            "the odd host's port is cabled to another rail, or has an address of another network: connections time out",
            "compare cabling and addresses of this rail; set NCCL_IB_ADDR_RANGE if a port has several addresses",
        )
    if len(set(indices.values())) > 1:
        found += _odd(
            indices,
            "gid-index-differs",
            Severity.ERROR if any("NCCL_IB_GID_INDEX" in view.user_env for view in views) else Severity.INFO,
            "index of the RoCE v2 entry: ",
            "one NCCL_IB_GID_INDEX cannot be right for all hosts",
            "leave NCCL_IB_GID_INDEX unset: NCCL ≥ 2.21 searches on each host",
        )
    return found


def _rails(views: Sequence[View]) -> list[tuple[View, dict[str, Hca]]]:
    """For each RoCE node its rails, under names that mean the same on all nodes.

    By device name where the nodes use the same names, so that a node that lost one card is not compared one off; else by
    position, if all have equally many (virtual functions are numbered differently on each host); else not at all.
    """
    roce = [view for view in views if view.env.hcas.transport == "roce"]
    names = [view.env.hcas.hcas for view in roce]
    largest: set[str] = max((set(own) for own in names), key=len, default=set())
    by_name = all(set(own) <= largest for own in names)
    if not by_name and len({len(own) for own in names}) > 1:
        return []
    found = []
    for view, own in zip(roce, names, strict=True):
        hcas = {hca.name: hca for hca in view.facts.hcas}
        found.append((view, {name if by_name else f"rail {idx}": hcas[name] for idx, name in enumerate(own)}))
    return found


def _rail_subnet(facts: NodeFacts, hca: Hca) -> str | None:
    for member in hca.netdevs:
        netdev = facts.netdev_by_name.get(member)
        if netdev is not None:
            for port in hca.ports:
                for gid in port.gids:
                    if is_ipv4_gid(gid.gid) and is_routable_gid(gid.gid):
                        return subnet_of(netdev, gid.gid.rpartition(":")[2])
    return None


def versions(views: Sequence[View]) -> list[Finding]:
    found = []
    for name, severity, meaning in (
        ("nccl", Severity.ERROR, 'ranks with different NCCL fail to start ("version mismatch") or hang'),
        ("torch", Severity.ERROR, "ranks with different torch disagree on protocols and checkpoints"),
        ("ofi_nccl", Severity.ERROR, "ranks with different network plugins cannot connect"),
        ("driver", Severity.WARNING, "kernels and NCCL may take different paths on different nodes"),
        ("cuda", Severity.WARNING, "kernels and NCCL may take different paths on different nodes"),
        ("python", Severity.WARNING, "pickled objects may not be readable on the other nodes"),
        ("kernel", Severity.INFO, "GPUDirect and cgroups may behave differently"),
    ):
        by_host = {
            view.facts.hostname: value for view in views if (value := getattr(view.facts.software, name)) is not None
        }
        found += _odd(
            by_host,
            f"version-skew-{name.replace('_', '-')}",
            severity,
            f"{name} ",
            meaning,
            "use one image on all nodes" if name != "driver" else "bring the drivers of all nodes to one version",
        )
    return found


def gpus(views: Sequence[View]) -> list[Finding]:
    by_host = {view.facts.hostname: _gpu_summary(view.facts) for view in views}
    return _odd(
        by_host,
        "gpu-mismatch",
        Severity.WARNING,
        "GPUs: ",
        "the gang runs at the pace of its slowest GPU; with fewer GPUs a node cannot hold its ranks",
        "use nodes of one kind; if a GPU is missing, see that node's own findings",
    )


def firmware(views: Sequence[View]) -> list[Finding]:
    by_board: dict[str, dict[str, str]] = defaultdict(dict)
    for view in views:
        for hca in view.facts.hcas:
            if hca.board_id and hca.fw_version and hca.name in view.env.hcas.hcas:
                by_board[hca.board_id][view.facts.hostname] = hca.fw_version
    return [
        finding
        for board, by_host in by_board.items()
        for finding in _odd(
            by_host,
            "firmware-skew",
            Severity.INFO,
            f"firmware of {board}: ",
            "cards of one kind may behave differently",
            "bring all cards to one firmware",
        )
    ]


def counter_growth(before: NodeFacts, after: NodeFacts) -> list[Finding]:
    """Links of one node that lost or repeated packets between two looks at it."""
    earlier = {(hca.name, port.port): port.counters for hca in before.hcas for port in hca.ports}
    found = []
    for hca in after.hcas:
        for port in hca.ports:
            base = earlier.get((hca.name, port.port), {})
            grown = {
                name: port.counters[name] - base[name]
                for name in ERROR_COUNTERS
                if name in port.counters and name in base and port.counters[name] > base[name]
            }
            if grown:
                shown = ", ".join(f"{name} +{delta}" for name, delta in grown.items())
                found.append(
                    Finding(
                        "link-errors",
                        Severity.ERROR if "link_downed" in grown else Severity.WARNING,
                        (after.hostname,),
                        f"{hca.name}:{port.port}: {shown}",
                        "the link loses or repeats packets; collectives stall while it recovers",
                        f"check cable and transceiver of {hca.name}; on RoCE also PFC and ECN of the switch",
                    )
                )
    return found


def _gpu_summary(facts: NodeFacts) -> str:
    names = Counter(gpu.name or "unknown" for gpu in facts.gpus)
    return " + ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "none"


def _odd(
    by_host: Mapping[str, object],
    id: str,
    severity: Severity,
    what: str,
    meaning: str,
    cure: str,
) -> list[Finding]:
    """A finding that names the hosts whose value is not the most frequent one; nothing if all agree."""
    counts = Counter(by_host.values())
    if len(counts) < 2:
        return []
    (usual, usual_count), (_, second_count), *_ = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    if usual_count == second_count:
        # No majority: nobody can say who is wrong.
        shown = "; ".join(f"{value} on {host}" for host, value in list(by_host.items())[:6])
        return [Finding(id, severity, tuple(by_host), f"{what}{shown}", meaning, cure)]
    odd = tuple(host for host, value in by_host.items() if value != usual)
    shown = "; ".join(f"{by_host[host]} on {host}" for host in odd[:4])
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    return [Finding(id, severity, odd, f"{what}{shown}{more}, {usual} on {usual_count} others", meaning, cure)]


CHECKS: tuple[GangCheck, ...] = (
    same_machine,
    mtu,
    transport,
    hca_count,
    hca_rate,
    gid_subnets,
    versions,
    gpus,
    firmware,
)
