"""What a machine's death is not: a link cut without a word, a raylet, an actor, a spare or the head lost alone; on real raylets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.raynodes import RayNode, RayNodes, environment, ray_nodes
from tests.launcher.test_ray_elastic import WHERE
from tests.launcher.test_ray_launch import DEADLINE_S, alive, script, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(300)]


MARKS = {"RAILHEAD_CHAOS": f"test-{os.getpid()}"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head and five nodes, in network namespaces where they can be made. The tests break them, the last one the head."""
    with ray_nodes(4, env=MARKS) as cluster:
        cluster.add(2, keeps_zombies=True)
        yield cluster


@dataclass
class Job:
    """A job of ranks that write down where they are (WHERE)."""

    cluster: RayNodes
    directory: Path
    process: subprocess.Popen[bytes]

    def said(self) -> str:
        return (self.directory / "stderr.txt").read_text()

    def wait_for_words(self, words: str, num_times: int = 1) -> None:
        wait_until(lambda: self.said().count(words) >= num_times, f"never said {words!r}: {self.said()}")

    def pids(self, attempt: int, rank: int) -> list[int]:
        """The rank's process and its ancestors, once it has started."""
        file = self.directory / f"{attempt}.{rank}"
        wait_until(file.exists, f"rank {rank} of attempt {attempt} does not start: {self.said()}")
        told: list[int] = json.loads(file.read_text())["pids"]
        return told

    def node(self, attempt: int, rank: int) -> RayNode:
        return self.cluster.of_process(self.pids(attempt, rank))

    def end(self) -> int:
        (self.directory / "enough").touch()
        return self.process.wait(DEADLINE_S)


PATIENT_FOR_2_S = """
import runpy
from launcher.cluster.ray import head
head.PATIENCE_S = 2.0
runpy.run_module("launcher", run_name="__main__")
"""


@contextlib.contextmanager
def job(cluster: RayNodes, directory: Path, *flags: str, program: Sequence[str] = ("-m", "launcher")) -> Iterator[Job]:
    """Two ranks on two nodes, the command on the head; ended at the end, whatever happened."""
    command = [sys.executable, *program, f"--address={cluster.address}", "--nnodes=2", *flags]
    with (directory / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            cluster.inside(0, *command, script(directory, WHERE)),
            cwd=directory,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        yield Job(cluster, directory, process)
    finally:
        process.kill()
        process.wait()


def test_a_job_lives_through_an_actor_a_raylet_and_a_link_that_are_lost_alone(nodes: RayNodes, tmp_path: Path) -> None:
    """Without a restart of its budget, each time elsewhere, and never twice at once. torchrun's job ends when the node of rank 0 is
    lost; Ray notices a cut link after tens of seconds, and a dead raylet that nobody reaps after fourteen."""
    with job(nodes, tmp_path, "--spare-nodes=3", "--max-restarts=0") as running:
        running.wait_for_words("is ready", num_times=3)

        rank_0, *ancestors = running.pids(0, 0)
        actor = next(pid for pid in ancestors if b"ray::AgentActor" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(actor, signal.SIGKILL)
        assert running.node(1, 0).idx != running.node(0, 0).idx, "an actor's node was given to the gang again at once"
        assert alive([rank_0]) == []

        rank_0 = running.pids(1, 0)[0]
        os.kill(running.node(1, 0).raylet, signal.SIGKILL)
        assert running.node(2, 0).idx != running.node(1, 0).idx
        assert alive([rank_0]) == []

        if nodes.network is not None:  # else there is no link to cut: root is needed
            cut_off, rank_0 = running.node(2, 0), running.pids(2, 0)[0]
            nodes.cut(cut_off.idx)
            assert running.node(3, 0).idx != cut_off.idx
            assert alive([rank_0]) == [], "a rank behind the cut runs on while another has its place"
            assert "not heard of for 4 s" in running.said()
            cut_off.kill()
        assert running.end() == 0, running.said()


@pytest.mark.parametrize("seed", [3])
def test_a_short_chaos_loses_no_sample_and_leaves_nothing(nodes: RayNodes, tmp_path: Path, seed: int) -> None:
    """`python -m benchmarks.chaos` is the long one: there, whole nodes and links as well."""
    (tmp_path / "tmp").mkdir()
    kinds = chaos.choose("kill_rank,kill_guardian,kill_fork_server,kill_store,freeze_agent,drain")
    chaos.run(chaos.Chaos(nodes, MARKS, tmp_path, random.Random(seed), kinds), 5)


def test_a_lost_head_ends_the_job_with_a_word_and_without_orphans(nodes: RayNodes, tmp_path: Path) -> None:
    """Ray ends every process of a cluster without a head after a minute, without a word. Here two seconds of patience instead of thirty."""
    with job(nodes, tmp_path, program=("-c", PATIENT_FOR_2_S)) as running:
        ranks = [running.pids(0, rank)[0] for rank in range(2)]
        os.kill(nodes.nodes[0].gcs, signal.SIGKILL)
        assert running.process.wait(DEADLINE_S) == 75, running.said()
        wait_until(lambda: not alive(ranks), "ranks outlive the launcher")
        assert "the head of the Ray cluster at" in running.said()
        assert "start the cluster again, then the job" in running.said()
