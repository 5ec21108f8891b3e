"""The cluster contract over a real Ray cluster of two raylets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cluster.ports import Cluster
from launcher.spec import JobSpec, Program, ProgramKind
from tests.contracts.cluster_contract import ClusterContract, House
from tests.raycluster import NODES, RayUnderTest, ray_environment


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(300)
class TestRayCluster(ClusterContract):
    @pytest.fixture
    def house(self, tmp_path: Path, ray_cluster: RayUnderTest, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
        from launcher.cluster.ray import connect

        monkeypatch.setenv("RAY_AUTH_MODE", ray_environment()["RAY_AUTH_MODE"])

        def make() -> Cluster:
            return connect(ray_cluster.address, JobSpec(Program(ProgramKind.SCRIPT, "program.py")))

        house = House(make, tmp_path, NODES)
        yield house
        house.cluster.close()
