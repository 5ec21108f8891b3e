"""What NCCL does when nothing is set, replayed on facts, so that a rule can say "the default is right" or why it is not.

Sources: NCCL 2.30 `src/transport/net_ib/` (ports, GIDs), `src/misc/socket.cc` (interfaces), `src/misc/utils.cc` (the
syntax of name lists). Only what is needed to predict a choice is here; nothing is copied.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.fabric.facts import HcaPort, Netdev, NodeFacts

MAX_HCAS = 32
"""NCCL uses the first 32 ports it finds (MAX_IB_DEVS) and silently leaves the rest."""

SCANS_GIDS_SINCE = (2, 21)
"""From this version NCCL looks for the RoCE v2 GID itself; before, NCCL_IB_GID_INDEX was 0 unless set."""


@dataclass(frozen=True)
class NameList:
    """The syntax of NCCL_IB_HCA and NCCL_SOCKET_IFNAME: names or prefixes, `^` excludes, `=` exact, `:1` a port."""

    entries: tuple[tuple[str, int | None], ...]
    is_exact: bool
    is_excluding: bool

    def takes(self, name: str, port: int | None = None) -> bool:
        """Whether a device (and port) with this name is used.

        >>> parse_names("mlx5_1").takes("mlx5_10"), parse_names("=mlx5_1").takes("mlx5_10")
        (True, False)
        """
        if not self.entries:
            return True
        matched = any(
            (name == entry if self.is_exact else name.startswith(entry)) and (wanted in (None, port) or port is None)
            for entry, wanted in self.entries
        )
        return matched != self.is_excluding


def parse_names(value: str) -> NameList:
    """A name list as NCCL reads it: `^` first, then `=`, then comma-separated `name[:port[:…]]`."""
    rest = value
    is_excluding = rest.startswith("^")
    rest = rest[is_excluding:]
    is_exact = rest.startswith("=")
    rest = rest[is_exact:]
    entries: list[tuple[str, int | None]] = []
    for part in rest.split(","):
        name, *numbers = part.split(":")
        if name:
            port = int(numbers[0]) if numbers and numbers[0].isdigit() else None
            entries.append((name, port))
    return NameList(tuple(entries), is_exact, is_excluding)


def usable_ports(facts: NodeFacts) -> list[tuple[str, HcaPort]]:
    """Ports that NCCL takes by itself: ACTIVE, link layer InfiniBand or Ethernet; it looks at nothing else."""
    return [
        (hca.name, port)
        for hca in facts.hcas
        for port in hca.ports
        if port.state == "ACTIVE" and port.link_layer in ("InfiniBand", "Ethernet")
    ]


def gid_index(port: HcaPort, *, family: str = "AF_INET", roce_version: int = 2) -> int:
    """The index that NCCL ≥ 2.21 arrives at on a RoCE port; 0 when nothing fits (and the connection then fails).

    It walks the table and replaces its choice by an entry of the wanted address family, then by one of the wanted RoCE
    version; entries that are empty or link-local are passed over.
    """
    table = {gid.index: gid for gid in port.gids}
    wanted_ipv4 = family != "AF_INET6"
    best = 0
    for index in sorted(table):
        if index == 0:
            continue
        candidate, current = table[index], table.get(best)
        is_right_family = is_ipv4_gid(candidate.gid) == wanted_ipv4
        current_ipv4 = current is not None and is_ipv4_gid(current.gid)
        if is_right_family and current_ipv4 != wanted_ipv4:
            best = index
        elif is_right_family and is_routable_gid(candidate.gid):
            current_version = roce_version_of(current.type) if current is not None else None
            is_better = current_version != roce_version_of(candidate.type) or current is None
            if (is_better or not is_routable_gid(current.gid if current else "::")) and roce_version_of(
                candidate.type
            ) == roce_version:
                best = index
    return best


def gid_problem(port: HcaPort, index: int, *, roce_version: int = 2) -> str | None:
    """Why the entry at `index` will not carry RoCE traffic between subnets; None if it will."""
    gid = next((gid for gid in port.gids if gid.index == index), None)
    if gid is None:
        return f"slot {index} is empty"
    if not is_routable_gid(gid.gid):
        return f"slot {index} is link-local ({gid.gid}) and does not route"
    if gid.type is None:
        return None
    version = roce_version_of(gid.type)
    if version != roce_version:
        return f"slot {index} is of type {gid.type}, not RoCE v{roce_version}"
    return None


def is_ipv4_gid(gid: str) -> bool:
    """Whether a GID stands for an IPv4 address.

    >>> is_ipv4_gid("::ffff:10.0.0.1"), is_ipv4_gid("fe80::1")
    (True, False)
    """
    try:
        return ipaddress.IPv6Address(gid).ipv4_mapped is not None
    except ValueError:
        return False


def is_routable_gid(gid: str) -> bool:
    """Whether a GID is set and not link-local."""
    try:
        address = ipaddress.IPv6Address(gid)
    except ValueError:
        return False
    # NCCL looks at the lower half as well: a prefix with an empty interface part is not configured.
    is_set = int(address) & ((1 << 64) - 1) != 0
    mapped = address.ipv4_mapped
    return is_set and not address.is_link_local and (mapped is None or not mapped.is_unspecified)


def roce_version_of(gid_type: str | None) -> int | None:
    """1 or 2 from what gid_attrs/types shows; None for another or unreadable type."""
    if gid_type is None:
        return None
    if gid_type.startswith(("IB/RoCE v1", "RoCE v1")):
        return 1
    return 2 if gid_type.startswith("RoCE v2") else None


def default_interfaces(netdevs: Iterable[Netdev]) -> list[str]:
    """The interfaces that NCCL would use for sockets with nothing set (NCCL_COMM_ID aside), in its order.

    Names starting `ib` win; then anything that does not start with docker, lo or virbr; then those. It takes interfaces
    that are up and own an address; what they are for, it does not ask.
    """
    up = [netdev.name for netdev in netdevs if netdev.addresses and netdev.operstate not in ("down", "lowerlayerdown")]
    for choice in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"):
        names = parse_names(choice)
        found = [name for name in up if names.takes(name)]
        if found:
            return found
    return []


def parse_version(text: str | None) -> tuple[int, ...] | None:
    """The leading numbers of a version; None when there are none.

    >>> parse_version("2.27.5+cuda12.9"), parse_version("unknown")
    ((2, 27, 5), None)
    """
    if text is None:
        return None
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def names_value(names: Sequence[str]) -> str:
    """An exact list for NCCL_IB_HCA or NCCL_SOCKET_IFNAME."""
    return "=" + ",".join(names)
