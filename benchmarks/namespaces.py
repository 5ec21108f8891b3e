"""Nodes in network namespaces: each with one interface on a common switch, so that links can be slowed, narrowed and cut.

Needs root and `ip`. Everything has a name that no other test run uses, and is removed by the context manager.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.fabric.serve import ProcessPeer, command_of


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs the programs ip and tc"
    name = f"rh{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


@dataclass
class Network:
    """Node i is namespace `{prefix}n{i}`, with interface eth0 at 10.66.0.{i+1}; its port on the switch is `p{i}`."""

    prefix: str
    num_nodes: int

    def namespace(self, node: int) -> str:
        return f"{self.prefix}n{node}"

    @property
    def switch(self) -> str:
        return f"{self.prefix}sw"

    def address(self, node: int) -> str:
        return f"10.66.0.{node + 1}"

    def add_node(self) -> int:
        """One more node on the switch; its number."""
        self.num_nodes += 1
        _add_node(self, self.num_nodes - 1)
        return self.num_nodes - 1

    def at_node(self, node: int, *command: str) -> None:
        run("ip", "netns", "exec", self.namespace(node), *command)

    def at_switch(self, *command: str) -> None:
        run("ip", "netns", "exec", self.switch, *command)

    def limit(self, node: int, rate_mbit: int) -> None:
        """Sets the rate of a node's link, both ways."""
        shape = ["root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "32kb", "latency", "50ms"]
        self.at_node(node, "tc", "qdisc", "replace", "dev", "eth0", *shape)
        self.at_switch("tc", "qdisc", "replace", "dev", f"p{node}", *shape)

    def drop_new_connections_to(self, node: int) -> None:
        """A stateful firewall in front of a node: TCP segments with SYN and without ACK towards it vanish."""
        port = f"p{node}"
        self.at_switch("tc", "qdisc", "replace", "dev", port, "root", "handle", "1:", "htb", "default", "10")
        for minor in ("10", "20"):
            self.at_switch(
                *("tc", "class", "add", "dev", port, "parent", "1:", "classid", f"1:{minor}", "htb", "rate", "200mbit")
            )
        self.at_switch("tc", "qdisc", "add", "dev", port, "parent", "1:20", "blackhole")
        # The flags are byte 33 of a packet whose IP header has no options; 0x12 looks at SYN and ACK.
        match = ["match", "ip", "protocol", "6", "0xff", "match", "u8", "0x02", "0x12", "at", "33"]
        self.at_switch(
            *("tc", "filter", "add", "dev", port, "parent", "1:", "protocol", "ip", "u32", *match, "flowid", "1:20")
        )

    def peer(self, node: int, address: str | None = None) -> ProcessPeer:
        return ProcessPeer(["ip", "netns", "exec", self.namespace(node), *command_of(address or self.address(node))])

    @contextlib.contextmanager
    def peers(self) -> Iterator[list[ProcessPeer]]:
        """One peer process per node; all ended at the end."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(closing(self.peer(node))) for node in range(self.num_nodes)]


@contextlib.contextmanager
def closing(peer: ProcessPeer) -> Iterator[ProcessPeer]:
    try:
        yield peer
    finally:
        assert peer.close() == 0


@contextlib.contextmanager
def network(num_nodes: int, rate_mbit: int | None = None) -> Iterator[Network]:
    """A switch and `num_nodes` nodes, every link at `rate_mbit` (a rate that this machine's CPUs can keep up with)."""
    made = Network(f"rh{secrets.token_hex(3)}", num_nodes)
    try:
        run("ip", "netns", "add", made.switch)
        made.at_switch("ip", "link", "add", "br0", "type", "bridge")
        made.at_switch("ip", "link", "set", "br0", "up")
        for node in range(num_nodes):
            _add_node(made, node)
            if rate_mbit is not None:
                made.limit(node, rate_mbit)
        yield made
    finally:
        for name in [made.switch, *(made.namespace(node) for node in range(made.num_nodes))]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _add_node(made: Network, node: int) -> None:
    name = made.namespace(node)
    run("ip", "netns", "add", name)
    run(
        *("ip", "link", "add", f"p{node}", "netns", made.switch),
        *("type", "veth", "peer", "name", "eth0", "netns", name),
    )
    made.at_switch("ip", "link", "set", f"p{node}", "master", "br0")
    made.at_switch("ip", "link", "set", f"p{node}", "up")
    made.at_node(node, "ip", "link", "set", "lo", "up")
    made.at_node(node, "ip", "addr", "add", f"{made.address(node)}/24", "dev", "eth0")
    made.at_node(node, "ip", "link", "set", "eth0", "up")
