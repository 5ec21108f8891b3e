"""Who is taken as another node of the gang: the node on which the agent says that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray")

from launcher.cluster.ray import keeper, survey
from launcher.cluster.ray.acquire import StartedAgent
from launcher.cluster.ray.agent_actor import Hello
from launcher.cluster.ray.keeper import Keeper, Wanted
from launcher.cluster.ray.survey import ClusterNode
from launcher.spec import JobSpec, Program, ProgramKind

NODES = {name: ClusterNode(name, f"host-{name}", f"10.0.0.{number}") for number, name in enumerate("abc")}


@pytest.mark.parametrize(
    ("asked_for", "is_at", "taken"), [("a", "a", ["a"]), ("a", "b", ["b"]), ("a", "c", []), ("a", "gone", [])]
)
def test_an_agent_whose_bundle_was_moved_is_taken_where_it_is_and_never_twice(
    monkeypatch: pytest.MonkeyPatch, asked_for: str, is_at: str, taken: Sequence[str]
) -> None:
    """Ray moves a bundle off a node that it finds dead or draining while we ask for an agent there. Taken for the old node, the gang would
    be told an address at which no store can listen, again and again. `c` is held already."""
    found: list[StartedAgent] = []
    ended: list[Any] = []
    monkeypatch.setattr(survey, "live_nodes", lambda: NODES)
    monkeypatch.setattr(keeper, "hear", lambda ref, node: Hello(is_at, "1", "3", f"host-{is_at}", "/"))
    monkeypatch.setattr(keeper, "check", lambda *args: None)
    monkeypatch.setattr(keeper.ray, "kill", ended.append)
    spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"))
    held = frozenset({"c"})
    one = Keeper(spec, None, lambda: Wanted(1, held), found.append, print, list, print)  # type: ignore[arg-type]
    one._settle(keeper._Trial(NODES[asked_for], "actor", None, 0.0))
    assert [agent.node.node_id for agent in found] == taken
    assert ended == ([] if taken else ["actor"])
