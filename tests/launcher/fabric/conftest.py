"""Facts of the recorded machines, read once per session through the real probe."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.fabric.facts import NodeFacts
from tests.launcher.fabric.machines import healthy_facts


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NodeFacts]:
    """Facts of a recorded machine whose node address is on its management interface: healthy as far as is known."""
    cache: dict[str, NodeFacts] = {}

    def read(name: str) -> NodeFacts:
        if name not in cache:
            cache[name] = healthy_facts(name, tmp_path_factory.mktemp(name))
        return cache[name]

    return read
