"""Gangs that lose nodes, get others, shrink, grow and are told to leave, on real raylets that are killed whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.journal import read_journal
from tests.launcher.test_preemption import TRAIN
from tests.launcher.test_ray_launch import DEADLINE_S, launched, script, wait_until
from tests.raycluster import RayUnderTest, kill_node, ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(300)]

# Writes down, for this attempt, its place and the raylet's descendants that it is one of; then waits to be ended, or ends if told so.
WHERE = """
import json, os, time
pids, pid = [], os.getpid()
while pid > 1:
    pids.append(pid)
    pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
attempt, rank = os.environ["RAILHEAD_ATTEMPT"], os.environ["RANK"]
with open(f"{attempt}.{rank}.part", "w") as file:
    json.dump({"pids": pids, "world_size": int(os.environ["WORLD_SIZE"])}, file)
os.rename(f"{attempt}.{rank}.part", f"{attempt}.{rank}")
while not os.path.exists("enough"):
    time.sleep(0.05)
"""


@pytest.fixture
def raylets(ray_cluster: RayUnderTest) -> Iterator[list[int]]:
    """Two nodes with the resource `elastic`, for a test to kill; more may be added to the list."""
    made = [ray_cluster.add_node("elastic") for _ in range(2)]
    yield made
    for raylet in made:
        kill_node(raylet)


def at(directory: Path, attempt: int, rank: int, raylets: list[int]) -> tuple[int, int]:
    """The raylet below which this rank of this attempt runs, and the size of its world, once it has started."""
    file = directory / f"{attempt}.{rank}"
    wait_until(
        file.exists, f"rank {rank} of attempt {attempt} does not start: {(directory / 'stderr.txt').read_text()}"
    )
    told = json.loads(file.read_text())
    (raylet,) = set(raylets) & set(told["pids"])
    return raylet, told["world_size"]


def stderr(directory: Path) -> str:
    return (directory / "stderr.txt").read_text()


def test_a_spare_takes_the_place_of_the_node_of_rank_0_and_its_store(
    ray_cluster: RayUnderTest, raylets: list[int], tmp_path: Path
) -> None:
    """torchrun's job ends there. The survivor keeps its rank, and no restart is spent: --max-restarts is 0. A first spare has died while it
    waited: nobody is stopped for it, and another is looked for."""
    raylets.append(ray_cluster.add_node("elastic"))
    flags = ("--nnodes=2", "--spare-nodes=1", "--resources=elastic=1")
    with launched(ray_cluster, tmp_path, *flags, script(tmp_path, WHERE)) as process:
        first, survivor = at(tmp_path, 0, 0, raylets)[0], at(tmp_path, 0, 1, raylets)[0]
        wait_until(lambda: "is ready" in stderr(tmp_path), "the spare is not ready")
        (spare,) = set(raylets) - {first, survivor}
        kill_node(spare)
        raylets.append(ray_cluster.add_node("elastic"))
        wait_until(lambda: stderr(tmp_path).count("is ready") == 2, "no other spare is found")
        assert " lost: " in stderr(tmp_path)
        assert not (tmp_path / "1.0").exists(), "the gang was stopped for a spare"
        kill_node(first)
        assert at(tmp_path, 1, 1, raylets) == (survivor, 2)
        assert at(tmp_path, 1, 0, raylets)[0] not in (first, survivor)
        (tmp_path / "enough").touch()
        assert process.wait(DEADLINE_S) == 0, stderr(tmp_path)


def test_a_gang_shrinks_at_once_and_grows_when_a_node_joins(
    ray_cluster: RayUnderTest, raylets: list[int], tmp_path: Path
) -> None:
    flags = ("--nnodes=1:2", "--max-restarts=1", "--grow-delay=0.2", "--resources=elastic=1")
    with launched(ray_cluster, tmp_path, *flags, script(tmp_path, WHERE)) as process:
        lost, survivor = at(tmp_path, 0, 0, raylets)[0], at(tmp_path, 0, 1, raylets)[0]
        kill_node(lost)
        assert at(tmp_path, 1, 0, raylets) == (survivor, 1)
        raylets.append(ray_cluster.add_node("elastic"))
        assert at(tmp_path, 2, 0, raylets) == (survivor, 2)
        assert at(tmp_path, 2, 1, raylets) == (raylets[-1], 2)
        (tmp_path / "enough").touch()
        assert process.wait(DEADLINE_S) == 0, stderr(tmp_path)
    assert "at no cost to --max-restarts" in stderr(tmp_path)


DRAIN = """
import sys, time, ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
node_id, address = sys.argv[1:]
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot notice", int((time.time() + 120) * 1000))
assert accepted, why
"""


def test_ranks_of_a_drained_node_save_and_go_on_elsewhere_without_losing_a_step(
    ray_cluster: RayUnderTest, raylets: list[int], tmp_path: Path
) -> None:
    """Ray's notice reaches ranks that use launcher.preemption as one common step; every step is done once, on both ranks."""
    raylets.append(ray_cluster.add_node("elastic"))
    flags = ("--nnodes=2", "--spare-nodes=1", "--resources=elastic=1")
    with launched(ray_cluster, tmp_path, *flags, script(tmp_path, TRAIN), "1000") as process:
        wait_until(lambda: (tmp_path / "ready").exists(), f"it does not train: {stderr(tmp_path)}")
        wait_until(lambda: "spare node" in stderr(tmp_path), "the spare is not ready")
        (journal,) = tmp_path.glob("railhead-runs/2*/journal.jsonl")
        ready = next(entry for entry in read_journal(str(journal)) if entry.kind == "NodesReady")
        node_id = ready.fields["nodes"][0]["node_id"].partition("#")[0]
        command = [sys.executable, "-c", DRAIN, node_id, ray_cluster.address]
        subprocess.run(command, env=ray_environment(), check=True, timeout=DEADLINE_S)
        assert process.wait(DEADLINE_S) == 0, stderr(tmp_path)
    assert "all 2 ranks have saved their state" in stderr(tmp_path)
    for rank in range(2):
        seen = [int(line) for line in (tmp_path / f"seen{rank}.txt").read_text().split()]
        assert seen == list(range(1000)), "a step was lost or done twice"


def test_a_frozen_launcher_does_not_let_ranks_run_on(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """As behind a cut link: nobody hears of it, and its ranks may be running elsewhere. They end by the agent's own clock."""
    with launched(ray_cluster, tmp_path, "--heartbeat-timeout=3", script(tmp_path, WHERE)) as process:
        file = tmp_path / "0.0"
        wait_until(file.exists, "it does not start")
        rank = json.loads(file.read_text())["pids"][0]
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: not Path(f"/proc/{rank}").exists(), "the rank lives on")
        process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE_S) == 75
    assert " lost: " in stderr(tmp_path)
