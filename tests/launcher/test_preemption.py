"""Ranks agree on the step after which they save: the same one, none passed, whatever the order in which they are told."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.preemption import Agreement


class MemoryStore:
    """The TCPStore's operations that the agreement uses, in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            value = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(value).encode()
            return value

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self._lock:
            if self._values.get(key, b"") == expected.encode():
                self._values[key] = desired.encode()
            return self._values[key]


def train_until_told(store: Any, told_at: list[int], linger_s: float) -> list[int]:
    """Threads as ranks, each told after its own step, in lockstep as a collective in every step keeps them; the step each stopped after."""
    world_size = len(told_at)
    collective = threading.Barrier(world_size)
    stopped = [-1] * world_size

    def rank_of(rank: int) -> None:
        agreement = Agreement(store, rank, world_size, linger_s)
        try:
            for step in range(200):
                collective.wait(30)
                if step >= told_at[rank] and agreement.is_due(step):
                    stopped[rank] = step
                    return
        except threading.BrokenBarrierError:
            pass

    ranks = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    return stopped


def test_ranks_that_are_told_in_the_same_step_stop_right_after_it() -> None:
    """With steps of half a minute, each step more is a minute of grace."""
    assert train_until_told(MemoryStore(), [7, 7, 7], linger_s=10.0) == [7, 7, 7]


@pytest.mark.parametrize("seed", range(12))
def test_ranks_that_are_told_at_different_times_stop_after_the_same_step(seed: int) -> None:
    """Without any patience (nobody lingers), so that every order of notices, announcements and decisions comes up."""
    chance = random.Random(seed)
    told_at = [chance.randrange(20) for _ in range(chance.randrange(2, 6))]
    stopped = train_until_told(MemoryStore(), told_at, linger_s=chance.choice([0.0, 0.001]))
    assert len(set(stopped)) == 1, (told_at, stopped)
    assert max(told_at) <= stopped[0] <= max(told_at) + 3, (told_at, stopped)


def test_the_agreement_works_over_a_real_store() -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert len(set(train_until_told(store, [3, 5, 4], linger_s=0.01))) == 1


def test_without_the_launcher_nothing_is_changed(tmp_path: Path) -> None:
    """A script with these three lines runs under plain python and dies of SIGTERM as it always did."""
    text = "from launcher import preemption; import sys, os, signal;"
    text += "assert not preemption.requested(3) and 'torch' not in sys.modules; os.kill(os.getpid(), signal.SIGTERM)"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAILHEAD", "TORCHELASTIC"))}
    done = subprocess.run([sys.executable, "-c", text], env=environ, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


# Saves after the agreed step and goes; says which samples it has seen. A worker process of its own must die of SIGTERM as ever.
TRAIN = """
import os, signal, sys, time, json
import torch, torch.distributed as dist
from launcher import preemption
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
start = json.load(open("saved.json"))["step"] + 1 if os.path.exists("saved.json") else 0
for step in range(start, int(sys.argv[1])):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    with open(f"seen{rank}.txt", "a") as seen:
        print(step, file=seen)
    if rank == 0 and step == 5 and start == 0:
        open("ready", "w").close()
    if preemption.requested(step):
        dist.barrier()
        if rank == 0:
            with open("saved.part", "w") as file:
                json.dump({"step": step}, file)
            os.rename("saved.part", "saved.json")
        dist.barrier()
        preemption.exit_saved()
    if start == 0:
        time.sleep(0.02)
dist.destroy_process_group()
"""


def launch(directory: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher", "--standalone", "--nproc-per-node=2", *args]
    (directory / "train.py").write_text(TRAIN)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    return subprocess.Popen(
        [*command, "train.py", "1000"], cwd=directory, env=environ, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        threading.Event().wait(0.02)


def test_a_preempted_job_ends_resumable_and_goes_on_without_losing_a_step(tmp_path: Path) -> None:
    """Slurm's SIGUSR1, as it is configured for many clusters."""
    process = launch(tmp_path, "--signals-to-handle=SIGTERM,SIGUSR1")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 79, err
    assert "every rank has saved its state" in err
    again = launch(tmp_path)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    for rank in range(2):
        seen = [int(line) for line in (tmp_path / f"seen{rank}.txt").read_text().split()]
        assert seen == list(range(1000)), "a step was lost or done twice"


def test_after_a_failure_a_rank_that_saves_itself_is_not_waited_for(tmp_path: Path) -> None:
    """It would wait for a dead rank's word through the whole grace (an hour here), for SIGTERM does not end it."""
    text = "import os, signal, time\nfrom launcher import preemption\nimport pathlib\n"
    text += "rank = os.environ['RANK']\npathlib.Path('here' + rank).touch()\n"
    text += "while not (os.path.exists('here0') and os.path.exists('here1')): time.sleep(0.01)\n"
    text += "if rank == '1': os._exit(5)\nwhile True: time.sleep(1)\n"
    (tmp_path / "train.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "launcher",
        "--standalone",
        "--nproc-per-node=2",
        "--shutdown-timeout=3600",
        "train.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5, done.stderr
