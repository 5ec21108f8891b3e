"""The node's look at its hardware at each start: what ranks get from it, and that it never costs the job anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster.local import LocalCluster
from launcher.fabric.binding import Binding
from launcher.fabric.codec import from_json
from launcher.fabric.facts import Cpus, Gpu, NodeFacts, NumaNode, PciDevice
from launcher.gang.events import FabricSurveyed, Notice, RankExited
from launcher.gang.rank_env import differing
from launcher.gang.world import NodeInfo
from launcher.node import survey
from launcher.node.nccl_logs import NcclPaths
from launcher.node.survey import Survey, advise, is_needed
from launcher.spec import JobSpec, Program, ProgramKind
from tests.contracts.cluster_contract import House
from tests.launcher.fabric.machines import healthy_facts

SPEC = JobSpec(Program(ProgramKind.SCRIPT, "train.py"))
ONE_EACH = tuple(sorted(os.sched_getaffinity(0)))[:2]


def two_sockets(gpus: int = 2) -> NodeFacts:
    """A machine with two memory nodes of one CPU each, those of this machine, and a GPU beside each."""
    return NodeFacts(
        "twin",
        gpus=tuple(Gpu(idx, f"0000:0{idx}:00.0") for idx in range(gpus)),
        pci=tuple(PciDevice(f"0000:0{idx}:00.0", numa=idx) for idx in range(gpus)),
        cpus=Cpus(num_cpus=2, allowed=ONE_EACH, numa=tuple(NumaNode(idx, (cpu,)) for idx, cpu in enumerate(ONE_EACH))),
    )


@pytest.fixture
def dgx(tmp_path: Path) -> NodeFacts:
    return healthy_facts("dgx-a100", tmp_path / "dgx")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[NodeFacts], None]:
    """From now on every node of this process is such a machine."""

    def set_facts(facts: NodeFacts) -> None:
        monkeypatch.setattr("launcher.fabric.probe.probe", lambda **_: facts)
        monkeypatch.setattr(survey, "_GPU_SIGNS", ("/",) if facts.gpus else ())

    return set_facts


def environments(house: House) -> list[dict[str, object]]:
    files = sorted(house.run_dir.glob("attempt_0/rank_*/environment.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(lambda: LocalCluster(2, {"NCCL_IB_TC": "7", "OMP_NUM_THREADS": "3", **os.environ}), tmp_path, 2)
    yield house
    house.cluster.close()


def run_on(house: House, *words: str) -> None:
    house.start(house.begin(*words))
    house.sink.wait_for(RankExited, 4)


def test_ranks_of_a_gpu_node_get_what_its_hardware_asks_for_with_reason_and_source(
    house: House, dgx: NodeFacts, seen: Callable[[NodeFacts], None]
) -> None:
    """Otherwise NCCL takes storage cards for compute cards, and the first interface it sees."""
    seen(dgx)
    run_on(house, "succeed")
    for account in environments(house):
        found = {item["name"]: item for item in account["set"]}  # type: ignore[attr-defined]
        assert found["NCCL_IB_HCA"]["value"].startswith("=mlx5_0,")
        assert found["NCCL_SOCKET_IFNAME"]["value"] == "=mgmt0"
        assert "storage" not in found["NCCL_IB_HCA"]["value"]
        assert found["NCCL_IB_HCA"]["reason"]
        assert found["NCCL_IB_HCA"]["source"]
        assert found["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]["value"].startswith(str(house.run_dir / "attempt_0"))
        assert account["binding"], "a sentence also where nothing is bound"


def test_a_users_value_reaches_the_rank_and_the_difference_is_written_down(
    house: House, dgx: NodeFacts, seen: Callable[[NodeFacts], None]
) -> None:
    seen(dgx)
    house.cluster = LocalCluster(2, {**os.environ, "NCCL_IB_HCA": "mlx5_1"})
    run_on(house, "succeed")
    for account in environments(house):
        assert "NCCL_IB_HCA" not in {item["name"] for item in account["set"]}  # type: ignore[attr-defined]
        (kept,) = [item for item in account["yours"] if item["name"] == "NCCL_IB_HCA"]  # type: ignore[attr-defined]
        assert (kept["value"], kept["ours"][:8]) == ("mlx5_1", "=mlx5_0,")
        assert account["inherited"]["NCCL_IB_HCA"] == "mlx5_1"  # type: ignore[index]


@pytest.mark.skipif(len(ONE_EACH) < 2, reason="needs two CPUs")
def test_each_rank_runs_on_the_cpus_beside_its_gpu(house: House, seen: Callable[[NodeFacts], None]) -> None:
    """The kernel's own word, from within the rank: it is bound from its first instruction, and so is all that it starts."""
    seen(two_sockets())
    house._script.write_text(
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-S', '-c', 'import os; print(*os.sched_getaffinity(0))']\n"
        "child = subprocess.run(command, capture_output=True, text=True)\n"
        "print(os.environ['LOCAL_RANK'], *os.sched_getaffinity(0), child.stdout.strip())"
    )
    run_on(house, "x")
    lines = sorted(house.sink.wait_for_output(b"\n", 4).decode().split())
    said = sorted(file.read_text().split() for file in house.run_dir.glob("attempt_0/rank_*/stdout.log"))
    first, second = map(str, ONE_EACH)
    assert said == [["0", first, first]] * 2 + [["1", second, second]] * 2
    assert lines
    assert {str(account["binding"]).split(":")[0] for account in environments(house)} == {
        f"CPUs {cpu}, memory of node {node} preferred" for node, cpu in enumerate(ONE_EACH)
    }


def test_a_binding_that_the_kernel_refuses_does_not_stop_the_rank(
    house: House, seen: Callable[[NodeFacts], None]
) -> None:
    """A container may have lost these CPUs since they were read."""
    facts = two_sockets()
    cpus = replace(facts.cpus, allowed=None, numa=(NumaNode(0, (4000,)), NumaNode(1, (4001,))))
    seen(replace(facts, cpus=cpus))
    run_on(house, "succeed")
    assert {event.status.code for event in house.sink.of(RankExited)} == {0}


def test_a_look_that_breaks_is_a_sentence_and_the_job_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> NodeFacts:
        raise RuntimeError("the driver is on fire")

    monkeypatch.setattr("launcher.fabric.probe.probe", broken)
    run_on(house, "succeed")
    event = house.sink.wait_for(FabricSurveyed)[0]
    assert (event.facts, event.problem) == ("", "RuntimeError: the driver is on fire")
    assert {event.status.code for event in house.sink.of(RankExited)} == {0}


def test_a_driver_that_hangs_does_not_hang_the_job(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr("launcher.fabric.probe.probe", lambda **_: hanging.wait(60) and None)
    monkeypatch.setattr(survey, "PATIENCE_S", 0.2)
    try:
        run_on(house, "succeed")
        assert "have not answered" in house.sink.wait_for(Notice)[0].text
    finally:
        hanging.set()


def test_on_a_laptop_ranks_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node without a GPU: nothing that a rank is given depends on the hardware, so it is looked at beside the running ranks."""
    monkeypatch.setattr(survey, "_GPU_SIGNS", ())
    assert not is_needed(SPEC, 1)
    assert is_needed(SPEC, 2)
    assert is_needed(replace(SPEC, bind="numa"), 1)
    has_ended = threading.Event()
    monkeypatch.setattr("launcher.fabric.probe.probe", lambda **_: has_ended.wait(60) and NodeFacts("laptop"))
    house = House(lambda: LocalCluster(1), tmp_path, 1)
    try:
        house.start(house.begin("succeed"))
        house.sink.wait_for(RankExited, 2)
        assert not house.sink.of(FabricSurveyed)
        has_ended.set()
        facts = from_json(house.sink.wait_for(FabricSurveyed)[0].facts)
        assert facts.hostname == "laptop"
        assert {account["binding"] for account in environments(house)} == {"not bound"}
    finally:
        has_ended.set()
        house.cluster.close()


def test_what_the_user_has_set_goes_to_the_launcher_without_the_rest() -> None:
    """Findings compare the user's values with ours; secrets have nothing to do there."""
    told: list[object] = []
    arrived = threading.Event()

    def tell(event: object) -> None:
        told.append(event)
        arrived.set()

    env = {"NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "x", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0"}
    Survey(NodeInfo("n", "n", "127.0.0.1", 1), SPEC, env, tell).begin()
    assert arrived.wait(60)
    (event,) = told
    assert isinstance(event, FabricSurveyed)
    assert event.user_env == (("CUDA_VISIBLE_DEVICES", "0"), ("NCCL_DEBUG", "INFO"))


@pytest.mark.parametrize(
    ("bind", "facts", "said"),
    [
        ("auto", two_sockets(), "GPU 1 is on memory node 1"),
        ("auto", two_sockets(gpus=0), "not bound: no GPU here"),
        ("numa", two_sockets(gpus=0), "rank 1 of 2 over 2 memory nodes"),
        ("none", two_sockets(), "not bound: binding is switched off"),
        ("auto", replace(two_sockets(), cpus=replace(two_sockets().cpus, allowed=ONE_EACH[:1])), "may be used here"),
    ],
)
def test_bind_says_what_it_does_and_why(bind: str, facts: NodeFacts, said: str) -> None:
    """The last one: CPUs that a container does not have (its cgroup's cpuset) are never bound to; all ranks then stay unbound."""
    advice = advise(facts, replace(SPEC, bind=bind), {}, 1, 2, NcclPaths("", "n0"))
    assert said in advice.environment.bindings[1]
    assert (advice.binding_of(1) is None) == advice.environment.bindings[1].startswith("not bound")
    assert advice.binding_of(7) is None


@pytest.mark.parametrize("machine", ["dgx-a100", "oci-bm-gpu-h100-8", "aws-p5-48xlarge", "h20-roce-bond4"])
def test_what_the_hardware_asks_for_does_not_keep_ranks_from_being_forked(machine: str, tmp_path: Path) -> None:
    """Libraries read these when a process group is made, not when torch is imported; else each restart on GPUs would import it again."""
    advice = advise(healthy_facts(machine, tmp_path), SPEC, {}, 2, 8, NcclPaths("/run/attempt_1", "n0"))
    names = {setting.name for setting in advice.environment.settings} - {"OMP_NUM_THREADS"}
    assert len(names) > 3
    assert differing(dict.fromkeys(names, "ours"), {}) == ()


CODE = """
import sys
sys.path.insert(0, {folder!r})
from guardian import bind
try:
    bind({cpus}, {node})
except OSError as error:
    print(error)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("Cpus_allowed_list")][0])
"""


def _bound(binding: Mapping[str, object]) -> list[str]:
    code = CODE.format(folder=str(Path(survey.__file__).parent), cpus=binding["cpus"], node=binding["memory_node"])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_memory_node_is_preferred_or_the_kernel_says_why_not() -> None:
    """A kernel without NUMA has no such call, one with it knows at least node 0."""
    cpu = min(os.sched_getaffinity(0))
    *problem, allowed = _bound({"cpus": [cpu], "memory_node": 0})
    assert allowed == str(cpu)
    assert not problem or "set_mempolicy" in problem[0]
    *problem, _ = _bound({"cpus": [cpu], "memory_node": 1000})
    assert "set_mempolicy" in problem[0]


def test_a_binding_reads_as_a_sentence() -> None:
    assert str(Binding(0, None, None, None, "nobody asked")) == "not bound: nobody asked"
