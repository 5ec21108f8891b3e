"""`python -m launcher --address …` as a person runs it, on two real raylets: whole gangs, true exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import launcher
from launcher.spec import RestartBudget
from tests.raycluster import RayUnderTest, kill_node, ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(300)]

DEADLINE_S = 60.0
"""Only what is broken ever takes so long."""
ORPHAN_S = 2.0
"""The promise."""

ALL_REDUCE = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
with open(f"rank{dist.get_rank()}.txt", "w") as file:
    print(total.item(), os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"], os.environ.get("OMP_NUM_THREADS"), file=file)
dist.destroy_process_group()
"""

# Writes down its process and that of a child in a session of its own, then waits to be ended.
WAIT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
with open(f"{os.environ['RANK']}.part", "w") as file:
    print(os.getpid(), child.pid, file=file)
os.rename(f"{os.environ['RANK']}.part", f"{os.environ['RANK']}.pids")
time.sleep(600)
"""


@contextmanager
def launched(cluster: RayUnderTest, cwd: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The command, running; ended at the end, whatever happened. Its standard error is in `stderr.txt`."""
    command = [sys.executable, "-m", "launcher", "--address", cluster.address, *args]
    with (cwd / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=cwd, env=ray_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def run(cluster: RayUnderTest, cwd: Path, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with launched(cluster, cwd, *args) as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, (cwd / "stderr.txt").read_text()


def script(directory: Path, text: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.py").write_text(text)
    return "train.py"


def wait_until(claim: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def pids_of(directory: Path, num_ranks: int) -> list[int]:
    """Processes that the ranks of WAIT wrote down, once all have."""
    wait_until(lambda: len(list(directory.glob("*.pids"))) == num_ranks, "not all ranks have started")
    return [int(pid) for file in directory.glob("*.pids") for pid in file.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def placement_groups(cluster: RayUnderTest) -> list[str]:
    """States of the groups that are not removed."""
    program = (
        "import json, logging, ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR);"
        "from ray.util import placement_group_table as table;"
        "print(json.dumps([group['state'] for group in table().values() if group['state'] != 'REMOVED']))"
    )
    command = [sys.executable, "-c", program, cluster.address]
    done = subprocess.run(
        command, env=ray_environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    states: list[str] = json.loads(done.stdout)
    return states


def test_four_ranks_on_two_nodes_reduce_together(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """An unmodified script, contiguous ranks, a store that answers at the first node's address."""
    code, _, err = run(ray_cluster, tmp_path, "--nnodes=2", "--nproc-per-node=2", script(tmp_path, ALL_REDUCE))
    assert code == 0, err
    # OMP_NUM_THREADS=1 as under torchrun, not the number of CPUs that Ray gives to its own workers.
    assert [(tmp_path / f"rank{rank}.txt").read_text().split() for rank in range(4)] == [
        ["10.0", "0", "0", "1"],
        ["10.0", "1", "0", "1"],
        ["10.0", "0", "1", "1"],
        ["10.0", "1", "1", "1"],
    ]


def test_the_first_failure_is_told_with_its_cause_and_where(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    text = """
import os, time
if os.environ["RANK"] == "3":
    raise ValueError("the third is bad")
time.sleep(600)
"""
    code, _, err = run(ray_cluster, tmp_path, "--nnodes=2", "--nproc-per-node=2", script(tmp_path, text))
    assert code == 1
    first = next(line for line in err.splitlines() if "failed" in line)
    assert "rank 3 on" in first
    assert "ValueError: the third is bad" in first
    assert f"log {tmp_path}" in first
    assert 'train.py", line 4' in err


def test_a_killed_node_is_told_and_its_ranks_end(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    raylet_pid = ray_cluster.add_node("doomed")
    try:
        with launched(ray_cluster, tmp_path, "--resources=doomed=1", script(tmp_path, WAIT)) as process:
            pids = pids_of(tmp_path, 1)
            kill_node(raylet_pid)
            assert process.wait(DEADLINE_S) == 75
            wait_until(lambda: not alive(pids), "ranks of a dead node live on")
            assert "lost: its agent's process is gone" in (tmp_path / "stderr.txt").read_text()
    finally:
        kill_node(raylet_pid)


def test_every_line_arrives_once_and_in_order(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """Ray's own forwarding folds equal lines (ray#37873) and gives up under load."""
    num_lines = 20_000
    text = f"""
for idx in range({num_lines // 2}):
    print("the same line")
    print("line", idx)
print("no newline at the end", end="")
"""
    code, out, _ = run(ray_cluster, tmp_path, "--nnodes=2", "--show-ranks=all", script(tmp_path, text))
    assert code == 0
    expected = [line for idx in range(num_lines // 2) for line in ("the same line", f"line {idx}")] + [
        "no newline at the end"
    ]
    lines = out.splitlines()
    for rank in range(2):
        prefix = f"[rank{rank}] "
        assert [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] == expected
    assert len(lines) == 2 * len(expected)


def test_the_users_settings_reach_ranks_on_other_nodes(
    ray_cluster: RayUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "VERSION")
    monkeypatch.setenv("MY_SETTING", "mine")
    monkeypatch.setenv("NOT_ASKED", "x")
    text = "import os; print(os.environ.get('NCCL_DEBUG'), os.environ.get('MY_SETTING'), os.environ.get('NOT_ASKED'), os.getcwd())"
    flags = ("--nnodes=2", "--show-ranks=1", "--carry-env=MY_SETTING")
    code, out, _ = run(ray_cluster, tmp_path, *flags, script(tmp_path, text))
    assert (code, out) == (0, f"[rank1] VERSION mine None {tmp_path}\n")


def test_a_killed_launcher_leaves_nobody(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """Ranks, and what ranks started in sessions of their own, on both nodes. (Ray itself kills only an actor's direct children.)"""
    with launched(ray_cluster, tmp_path, "--nnodes=2", "--nproc-per-node=2", script(tmp_path, WAIT)) as process:
        pids = pids_of(tmp_path, 4)
        assert len(alive(pids)) == 8
        process.send_signal(signal.SIGKILL)
        deadline_s = time.monotonic() + ORPHAN_S
        while alive(pids) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not alive(pids)


def test_a_refusal_is_immediate_and_names_what_would_fit(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    name = script(tmp_path, "print('never')")
    code, out, err = run(ray_cluster, tmp_path, "--nnodes=2", "--nproc-per-node=5", "--place-timeout=3600", name)
    assert (code, out) == (69, "")
    assert "lacks CPU (asked 5, total 4, free 4)" in err
    assert "`--nproc-per-node 4` would fit now" in err
    code, _, err = run(ray_cluster, tmp_path, "--nnodes=2", "--resources=second=1", "--place-timeout=3600", name)
    assert code == 69
    assert "`--nnodes 1` would fit now" in err
    code, _, err = run(ray_cluster, tmp_path, "--nproc-per-node=gpu", name)
    assert code == 69
    assert "--nproc-per-node gpu" in err


def test_who_waits_for_others_says_so_and_starts_when_they_end(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    holder = ("--nnodes=2", "--cpus-per-proc=4", script(first, WAIT))
    waiter = ("--nnodes=2", "--cpus-per-proc=3")
    with launched(ray_cluster, first, *holder) as holding:
        pids_of(first, 2)
        with launched(ray_cluster, second, *waiter, script(second, "print('at last')")) as waiting:
            wait_until(
                lambda: "lacks CPU (asked 3, total 4, free 0)" in (second / "stderr.txt").read_text(),
                "it does not say why it waits",
            )
            # A second one that waits is interrupted: it must take its demand back.
            with launched(ray_cluster, third, *waiter, script(third, "")) as interrupted:
                wait_until(lambda: "lacks CPU" in (third / "stderr.txt").read_text(), "it does not say why it waits")
                assert sorted(placement_groups(ray_cluster)) == ["CREATED", "PENDING", "PENDING"]
                interrupted.send_signal(signal.SIGINT)
                assert interrupted.wait(DEADLINE_S) == 130
                assert sorted(placement_groups(ray_cluster)) == ["CREATED", "PENDING"]
            holding.send_signal(signal.SIGTERM)
            assert holding.wait(DEADLINE_S) == 143
            out, _ = waiting.communicate(timeout=DEADLINE_S)
            assert (waiting.returncode, out) == (0, "[rank0] at last\n")


def test_waiting_ends_at_its_deadline(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with launched(ray_cluster, first, "--nnodes=2", "--cpus-per-proc=4", script(first, WAIT)):
        pids_of(first, 2)
        code, _, err = run(ray_cluster, second, "--place-timeout=1", script(second, "print('never')"))
    assert code == 69
    assert "did not come free in time" in err
    assert "--place-timeout" in err


def test_an_interrupt_stops_the_ranks_of_all_nodes(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    with launched(ray_cluster, tmp_path, "--nnodes=2", "--nproc-per-node=2", script(tmp_path, WAIT)) as process:
        pids = pids_of(tmp_path, 4)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert not alive(pids)


def test_a_directory_that_a_node_lacks_is_refused(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """The ranks would fail one by one with a FileNotFoundError; a person needs to know which directory, and where."""
    from launcher.cluster.ray.acquire import check
    from launcher.cluster.ray.agent_actor import Hello, installed_version
    from launcher.cluster.ray.survey import ClusterNode
    from launcher.errors import RequestRefused
    from launcher.spec import JobSpec, Program, ProgramKind

    spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), cwd="/home/me/project")
    node = ClusterNode("id", "gpu-7", "10.0.0.7")
    with pytest.raises(RequestRefused, match="gpu-7 has no directory /home/me/project"):
        check(Hello("id", installed_version(), "3.11", "gpu-7", None), node, spec)
    with pytest.raises(RequestRefused, match=r"gpu-7 has railhead 0\.0\.1"):
        check(Hello("id", "0.0.1", "3.11", "gpu-7", "/"), node, spec)


def test_a_restart_starts_all_ranks_again_on_the_same_nodes(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    text = """
import os, sys, time
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
open(f"{rank}.{attempt}", "w").close()
if attempt == "0":
    if rank == "2":
        sys.exit(9)
    time.sleep(600)
"""
    flags = ("--nnodes=2", "--nproc-per-node=2", "--max-restarts=1")
    code, _, err = run(ray_cluster, tmp_path, *flags, script(tmp_path, text))
    assert code == 0, err
    assert {path.name for path in tmp_path.glob("*.1")} == {f"{rank}.1" for rank in range(4)}
    assert os.path.exists(tmp_path / "2.0")


# In the first attempt waits to be ended, in the second says where it is. Its ancestors show on which raylet it runs.
MOVES = """
import os, time
pids, pid = [], os.getpid()
while pid > 1:
    pids.append(pid)
    pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
with open("0.part", "w") as file:
    print(*pids, file=file)
os.rename("0.part", os.environ["TORCHELASTIC_RESTART_COUNT"] + ".pids")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(600)
"""


STEPS = """
import os, time, torch
torch.set_num_threads(1)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(200):
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    time.sleep(0.01)
    if step == 150 and os.environ["RAILHEAD_ATTEMPT"] == "0" and os.environ["RANK"] == "1":
        raise ValueError("broken")
"""


def test_a_run_on_ray_is_accounted_for_like_one_on_this_machine(
    ray_cluster: RayUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python, with steps that are counted on other nodes and noted by the launcher."""
    monkeypatch.chdir(tmp_path)
    clean = ray_environment()
    for name in {*os.environ} - {*clean}:
        monkeypatch.delenv(name)
    for name, value in clean.items():
        monkeypatch.setenv(name, value)
    program = launcher.Program(launcher.ProgramKind.SCRIPT, script(tmp_path, STEPS))
    spec = launcher.JobSpec(program, 2, 2, restarts=RestartBudget(1), exclude_file="none")
    with launcher.Job(spec, address=ray_cluster.address, show=False) as job:
        result = job.wait(timeout_s=DEADLINE_S * 2)
        data = job.report()
    assert result.is_success and data is not None, result
    assert (data["state"], data["num_restarts"], data["attempts"][1]["steps"]) == ("done", 1, 200)
    assert data["attempts"][0]["failure"]["exception"] == "ValueError"
    assert abs(sum(data["goodput"]["shares"].values()) - 1) < 0.01
    assert data["goodput"]["seconds"]["steps"] > 0 and data["goodput"]["seconds"]["restart"] > 0


def test_a_lost_node_is_replaced_by_one_that_is_free(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """Without --spare-nodes: a free node of the cluster is looked for, the agent there is a new one, the job the same."""
    raylets = {ray_cluster.add_node("spare"), ray_cluster.add_node("spare")}
    try:
        flags = ("--resources=spare=1", "--max-restarts=1")
        with launched(ray_cluster, tmp_path, *flags, script(tmp_path, MOVES)) as process:
            (first,) = raylets & set(pids_of(tmp_path, 1))
            kill_node(first)
            assert process.wait(DEADLINE_S) == 0, (tmp_path / "stderr.txt").read_text()
        second = {int(pid) for pid in (tmp_path / "1.pids").read_text().split()}
        assert raylets & second == raylets - {first}
    finally:
        for raylet in raylets:
            kill_node(raylet)
