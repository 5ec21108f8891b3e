"""Ray's tables in our words; the tables are Ray's own messages, filled by hand."""

from __future__ import annotations

import pytest
from ray._private import state as ray_state
from ray.core.generated import autoscaler_pb2

from launcher.cluster.ray import survey
from launcher.gang.offers import NodeGroup
from launcher.spec import JobSpec, Program, ProgramKind, Resources


def config(*groups: tuple[str, dict[str, int], int]) -> autoscaler_pb2.ClusterConfig:
    message = autoscaler_pb2.ClusterConfig()
    for name, resources, max_count in groups:
        group = message.node_group_configs.add(name=name, max_count=max_count)
        for resource, amount in resources.items():
            group.resources[resource] = amount
    return message


def test_what_an_autoscaler_may_add_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 is Ray's word for no bound."""
    message = config(("gpu", {"GPU": 8, "CPU": 96}, 4), ("cpu", {"CPU": 64}, -1))
    monkeypatch.setattr(ray_state.state, "get_cluster_config", lambda: message)
    assert survey.groups() == (NodeGroup("gpu", {"GPU": 8, "CPU": 96}, 4), NodeGroup("cpu", {"CPU": 64}, None))


def test_a_cluster_without_an_autoscaler_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_state.state, "get_cluster_config", lambda: None)
    assert survey.groups() == ()


def test_draining_and_dead_nodes_offer_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray still lists them; a gang placed on a draining node dies with it."""
    nodes = [
        {"NodeID": name, "Alive": name != "dead", "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1", "Labels": {},
         "Resources": {"CPU": 8.0, "node:10.0.0.1": 1.0, "object_store_memory": 5.0, "memory": 9.0}}
        for name in ("here", "leaving", "dead")
    ]  # fmt: skip
    monkeypatch.setattr(survey.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_state.state, "get_draining_nodes", lambda: {"leaving": 0})
    monkeypatch.setattr(
        ray_state, "available_resources_per_node", lambda: {"here": {"CPU": 3.0, f"CPU_group_0_{'ab' * 18}": 1.0}}
    )
    (offer,) = survey.offers()
    assert (offer.host, offer.total, offer.free) == ("here", {"CPU": 8.0, "memory": 9.0}, {"CPU": 3.0})


def test_a_rank_asks_for_one_cpu_unless_told_otherwise() -> None:
    program = Program(ProgramKind.SCRIPT, "train.py")
    assert survey.gang_request(JobSpec(program, nproc_per_node=4)).bundle == {"CPU": 4.0}
    asked = Resources(cpus_per_proc=0, gpus_per_proc=1, per_node=(("rdma", 1.0),))
    assert survey.gang_request(JobSpec(program, nproc_per_node=4, resources=asked)).bundle == {"GPU": 4.0, "rdma": 1.0}
