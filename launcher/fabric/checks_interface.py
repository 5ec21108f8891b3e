"""Checks of one node's socket interface: does it exist, is it up, do peers reach it, did the user name another."""

from __future__ import annotations

from launcher.fabric import nccl
from launcher.fabric.findings import Finding, NodeCheck, Severity, View
from launcher.fabric.interfaces import is_loopback


def interface_unknown(view: View) -> list[Finding]:
    chosen = view.env.interface
    if chosen.name is not None or not view.is_multi_node:
        return []
    return [
        view.finding(
            "interface-unknown",
            Severity.ERROR,
            chosen.reason,
            "NCCL and gloo choose an interface by name alone; peers may not be able to connect to it, and the start hangs",
            "start Ray on this node with --node-ip-address set to an address of the machine's own network, "
            "or set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
        )
    ]


def interface_down(view: View) -> list[Finding]:
    netdev = view.facts.netdev_by_name.get(view.env.interface.name or "")
    if netdev is None or not (netdev.has_carrier is False or netdev.operstate in ("down", "lowerlayerdown")):
        return []
    return [
        view.finding(
            "interface-down",
            Severity.ERROR,
            f"{netdev.name} is {netdev.operstate or 'unknown'}, carrier {'absent' if netdev.has_carrier is False else 'unknown'}",
            "the interface by which the gang reaches this node has no link",
            f"check cable and switch port of {netdev.name}; `ip link show {netdev.name}`",
        )
    ]


def interface_guess(view: View) -> list[Finding]:
    chosen = view.env.interface.name
    by_default = nccl.default_interfaces(view.facts.netdevs)
    if chosen is None or not view.is_multi_node or not by_default or by_default[0] == chosen:
        return []
    if view.env.decision("NCCL_SOCKET_IFNAME") and "NCCL_SOCKET_IFNAME" in view.user_env:
        return []
    return [
        view.finding(
            "interface-guess",
            Severity.INFO,
            f"NCCL alone would begin with {by_default[0]}; the gang's address is on {chosen}",
            "programs that are not started by this launcher may use the wrong interface here",
            f"nothing: the launcher sets NCCL_SOCKET_IFNAME={nccl.names_value([chosen])} on this node",
        )
    ]


def interface_user(view: View) -> list[Finding]:
    found = []
    names = [netdev.name for netdev in view.facts.netdevs]
    value = view.user_env.get("NCCL_SOCKET_IFNAME")
    if not names or not view.is_multi_node:
        return []
    if value:
        wanted = nccl.parse_names(value)
        taken = [netdev for netdev in view.facts.netdevs if wanted.takes(netdev.name)]
        if not any(netdev.addresses for netdev in taken):
            found.append(("NCCL_SOCKET_IFNAME", value, f"it fits none of {', '.join(names[:8])} with an address"))
    gloo = view.user_env.get("GLOO_SOCKET_IFNAME")
    if gloo and not all(name in names for name in gloo.split(",")):
        found.append(("GLOO_SOCKET_IFNAME", gloo, f"this node has {', '.join(names[:8])}"))
    return [
        view.finding(
            "interface-user-missing",
            Severity.ERROR,
            f"{variable}={text}: {why}",
            'one value was given for unequal hosts; the ranks of this node will fail with "no socket interface found"',
            f"unset {variable}: the launcher sets it per node",
        )
        for variable, text, why in found
    ]


def node_address(view: View) -> list[Finding]:
    address = view.facts.node_ip
    if address is None or not is_loopback(address) or not view.is_multi_node:
        return []
    return [
        view.finding(
            "node-address-loopback",
            Severity.INFO if view.is_one_machine else Severity.ERROR,
            f"the node's address is {address}",
            "other nodes cannot connect to it",
            "start Ray with --node-ip-address set to an address that the other nodes reach",
        )
    ]


CHECKS: tuple[NodeCheck, ...] = (interface_unknown, interface_down, interface_guess, interface_user, node_address)
