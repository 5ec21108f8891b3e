"""The cluster contract over the fake and over this machine, as one node and as two. (Ray: tests/launcher/test_ray_contract.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cluster.local import LocalCluster
from tests.contracts.cluster_contract import ClusterContract, House
from tests.fakes.cluster import FakeCluster


class FakeHouse(House):
    is_real = False


class TestFakeCluster(ClusterContract):
    @pytest.fixture
    def house(self, tmp_path: Path) -> Iterator[House]:
        house = FakeHouse(FakeCluster, tmp_path)
        yield house
        house.cluster.close()


class TestLocalCluster(ClusterContract):
    @pytest.fixture(params=[1, 2])
    def house(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
        num_nodes = int(request.param)
        house = House(lambda: LocalCluster(num_nodes), tmp_path, num_nodes)
        yield house
        house.cluster.close()
