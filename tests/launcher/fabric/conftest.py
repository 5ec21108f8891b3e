"""Facts of the recorded machines, read once per session through the real probe."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.fabric.facts import NodeFacts
from tests.launcher.fabric.machines import NODE_IP, give_address, lay_out, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NodeFacts]:
    """Facts of a recorded machine whose node address is on its management interface: healthy as far as is known."""
    cache: dict[str, NodeFacts] = {}

    def read(name: str) -> NodeFacts:
        if name not in cache:
            layout = lay_out(name, tmp_path_factory.mktemp(name))
            netdev = record(name)["expected"]["socket_ifname"] or "mgmt0"
            if netdev == "mgmt0":
                layout.write("sys/class/net/mgmt0/operstate", "up\n")
                layout.write("sys/class/net/mgmt0/mtu", "1500\n")
            give_address(layout, netdev)
            cache[name] = layout.probe(node_ip=NODE_IP)
        return cache[name]

    return read
