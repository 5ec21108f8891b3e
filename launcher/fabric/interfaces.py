"""The network interface by which a node is reached, by its exact name.

It is the one that owns the address the gang already uses for the node (Ray's node address): that address is known to be
reachable, every other choice is a guess. Without such an address the interface of the default route is taken, then the only
real one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from launcher.fabric.facts import Netdev, NodeFacts


@dataclass(frozen=True)
class Interface:
    """The chosen interface, or None with the reason why none could be chosen."""

    name: str | None
    reason: str
    address: str | None = None


def choose_interface(facts: NodeFacts) -> Interface:
    """The socket interface of one node."""
    if facts.node_ip is not None and not is_loopback(facts.node_ip):
        owner = owner_of(facts, facts.node_ip)
        if owner is not None:
            return Interface(owner.name, "owns the address by which the gang reaches this node", facts.node_ip)
        return Interface(
            None, f"no interface here owns {facts.node_ip}, the address by which the gang reaches this node"
        )
    default = facts.netdev_by_name.get(facts.default_netdev or "")
    if default is not None:
        return Interface(default.name, "carries the default route", _first_address(default))
    real = [netdev for netdev in facts.netdevs if netdev.is_virtual is False and netdev.operstate in ("up", "unknown")]
    if len(real) == 1:
        return Interface(real[0].name, "the only interface with a device behind it that is up", _first_address(real[0]))
    if not real:
        return Interface(None, "no interface with a device behind it is up")
    names = ", ".join(netdev.name for netdev in real)
    return Interface(None, f"the node's address is not known and several interfaces are up ({names})")


def owner_of(facts: NodeFacts, address: str) -> Netdev | None:
    """The interface that has this address."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        return None
    for netdev in facts.netdevs:
        if any(_address(item) == wanted for item in netdev.addresses):
            return netdev
    return None


def subnet_of(netdev: Netdev, address: str | None) -> str | None:
    """The subnet of an address on its interface, "10.0.0.0/24"."""
    for item in netdev.addresses:
        if address is None or _address(item) == _address(address):
            try:
                return str(ipaddress.ip_interface(item).network)
            except ValueError:
                return None
    return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_interface(text).ip
    except ValueError:
        return None


def is_loopback(text: str | None) -> bool:
    """Whether this is an address by which a machine reaches itself alone."""
    address = _address(text) if text is not None else None
    return address is not None and address.is_loopback


def _first_address(netdev: Netdev) -> str | None:
    routable = [item for item in netdev.addresses if (a := _address(item)) is not None and not a.is_link_local]
    return routable[0].split("/")[0] if routable else None
