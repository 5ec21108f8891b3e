"""Hangs with real processes: who holds up the job is named, everybody's stacks are on disk, and then the policy holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import EXIT_HUNG
from launcher.gang.observations import RankStack
from launcher.journal import Entry
from launcher.node import stacks
from tests.launcher.launched import Launched, launch, wait_until
from tests.raycluster import RayUnderTest, ray_environment

# Each attempt hangs in a way of its own; the last one does not. Watched from the hang on: how fast this machine trains is not the question.
HANGS = """
import contextlib, os, signal, time, torch, torch.distributed as dist
from launcher import pause_watch
attempt, rank = int(os.environ["RAILHEAD_ATTEMPT"]), int(os.environ["RANK"])
unwatched = contextlib.ExitStack()
unwatched.enter_context(pause_watch())
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)

def train(num_steps):
    for _ in range(num_steps):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()

def spin():
    while True: pass

def wait_elsewhere():
    time.sleep(600)

train(3 + attempt)  # each gets somewhere, or the next would be kept waiting
if attempt < 4: unwatched.close()
if attempt == 0 and rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
if attempt == 1 and rank == 0: spin()
if attempt == 2 and rank == 1: wait_elsewhere()
if attempt == 3: dist.recv(torch.zeros(1), 1 - rank)
train(3)
"""


CASES = {
    0: (1, "FROZEN", "is stopped (state T"),
    1: (0, "SPINNING", "spins in one place"),
    2: (1, "AWAY", "stays in one place that is no collective"),
    3: (None, "ALL_WAIT", "all 2 ranks wait for each other"),
}
"""By attempt: whose doing it is, and how it is said."""


# Reading torch's symbols for native frames takes seconds of a core for each rank; what is told from stacks needs none.
WITHOUT_NATIVE_FRAMES = """
import sys
from launcher import monitor
from launcher.node import stacks
monitor._NATIVE_S = 0.0
stacks._take_native = lambda rank, pid, directory: stacks.RankStack(rank)
from launcher.cli import main
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_whoever_holds_up_the_job_is_named_with_stacks_on_disk_and_the_job_starts_again(tmp_path: Path) -> None:
    """One job in five attempts: stopped, livelocked, gone elsewhere, all waiting for each other, and good."""
    options = ["--nproc-per-node", "2", "--max-restarts", "4", "--hang-timeout", "1"]
    (tmp_path / "train.py").write_text(HANGS)
    with Launched(tmp_path, *options, "train.py", program=["-c", WITHOUT_NATIVE_FRAMES]) as launched:
        code, _, err = launched.finish(patience_s=170)
    assert code == 0, err
    hung = [(entry.fields["attempt"], entry.fields["rank"]) for entry in launched.journal("RankHung")]
    assert hung == [(attempt, rank) for attempt, (rank, _, _) in CASES.items()], err
    names = [entry.fields["diagnosis"] for entry in launched.journal("Named")]
    for attempt, (rank, kind, words) in CASES.items():
        assert {"kind": kind, "culprits": [] if rank is None else [rank], "is_certain": True} in names, err
        assert words in err
        assert f"restart {attempt + 1} of 4" in err
        for each in range(2):
            text = (launched.run_dir / f"attempt_{attempt}" / "stacks" / f"rank_{each}.txt").read_text()
            assert "train.py" in text
    assert_the_odd_one_out_is_shown_first(err.splitlines())
    assert "instrument.py" not in err, "what is ours is on no stack that is shown"


def assert_the_odd_one_out_is_shown_first(lines: list[str]) -> None:
    """With where it stands."""
    spins = next(idx for idx, line in enumerate(lines) if "spins in one place, and 1 other" in line)
    assert lines[spins + 1].startswith("  rank 0: spin (train.py:")
    assert lines[spins + 2].startswith("  rank 1: _engine_run_backward (torch/autograd/graph.py:")


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(300)
def test_on_ray_a_rank_of_another_node_is_named_with_its_host_and_all_stacks_are_on_disk(
    ray_cluster: RayUnderTest, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        HANGS.replace("attempt, rank =", "attempt, rank = 1, int(os.environ['RANK'])\n_ =")
    )
    options = ["--address", ray_cluster.address, "--nnodes", "2", "--hang-timeout", "1", "--on-hang", "stop"]
    with Launched(tmp_path, *options, "train.py", env=ray_environment()) as launched:
        code, _, err = launched.finish()
    assert code == EXIT_HUNG, err
    (named,) = launched.journal("Named")
    assert named.fields["diagnosis"] == {"kind": "SPINNING", "culprits": [0], "is_certain": True}, err
    (ready,) = launched.journal("NodesReady")
    assert f"rank 0 on {ready.fields['nodes'][0]['hostname']} hangs: spins in one place" in err
    for rank in range(2):  # both raylets of the test are on this machine
        assert "train.py" in (launched.run_dir / "attempt_0" / "stacks" / f"rank_{rank}.txt").read_text()


# With the limits that a job's own steps set, made short: what healthy jobs do for longer than the limit, and then one rank stops.
HEALTHY = """
import os, signal, time, torch, torch.distributed as dist
import torch.utils.data as data
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
time.sleep(2.5)  # a long first step: nothing is known of this job yet
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)

def train(num_steps):
    for _ in range(num_steps):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()

def evaluate():  # in one call
    time.sleep(2.5)

def write_checkpoint():
    until = time.monotonic() + 2.5
    with open("checkpoint", "wb") as file:
        while time.monotonic() < until:
            file.write(bytes(1 << 20))
            file.seek(0)

def crunch():  # a computation without I/O, in one place
    while True:
        try: os.stat("noticed")
        except FileNotFoundError: continue
        return

def batches():
    for _ in data.DataLoader(range(10)):
        time.sleep(0.25)

train(5)
for phase in (evaluate, write_checkpoint, crunch, batches):
    if rank == 0: phase()
    train(5)
open(f"healthy.{rank}", "w").close()
if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)
train(5)
"""

# The learnt limits are tens of seconds, and those for what may be work minutes: a test waits for the same, faster.
QUICKER = """
import sys
from launcher.gang import patience
from launcher.node import agent
patience.LIMITS = patience.Limits(quick_s=1.5)
agent.look_every_s = patience.look_every_s = lambda timeout_s: 0.1
from launcher.cli import main
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_what_healthy_jobs_do_for_longer_than_the_learnt_limit_is_no_hang_and_a_stopped_rank_is(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(HEALTHY)
    options = ["--nproc-per-node", "2", "train.py"]
    with Launched(tmp_path, *options, program=["-c", QUICKER]) as launched:
        wait_until(lambda: noticed_in(launched, "crunch"), "who computes to be noticed", patience_s=100)
        (tmp_path / "noticed").touch()
        code, _, err = launched.finish(patience_s=110)
    assert code == EXIT_HUNG, err
    diagnosis = noticed_in(launched, "crunch")[0].fields["diagnosis"]
    assert diagnosis == {"kind": "SPINNING", "culprits": [0], "is_certain": True}
    assert "rank 0 on" in err and "computes in one place, and 1 other waits for it since" in err
    assert ": crunch (train.py:" in err
    names = [entry.fields["diagnosis"] for entry in launched.journal("Named")]
    assert names == [{"kind": "FROZEN", "culprits": [1], "is_certain": True}], err
    assert (tmp_path / "healthy.0").exists() and (tmp_path / "healthy.1").exists()


def noticed_in(launched: Launched, function: str) -> list[Entry]:
    """A machine that is busy with something else may make a healthy rank seem to compute for long, so only those."""
    if not (launched.run_dir / "journal.jsonl").exists():
        return []
    return [entry for entry in launched.journal("Noticed") if f"{function} (" in entry.fields["where"][0]]


SLOW = """
import os, time, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
while True:
    if rank == 1 and not os.path.exists("faster"): time.sleep(0.03)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
"""

QUICKER_TO_JUDGE = """
import sys
from launcher.gang import patience, stragglers
from launcher.node import agent
stragglers.WINDOW_S = 0.8  # four of them are two minutes
agent.look_every_s = patience.look_every_s = lambda timeout_s: 0.1
from launcher.cli import main
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_a_rank_that_makes_the_other_wait_is_named_with_its_host_until_it_keeps_up(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SLOW)
    with Launched(tmp_path, "--nproc-per-node", "2", "train.py", program=["-c", QUICKER_TO_JUDGE]) as launched:
        wait_until(lambda: straggling(launched), "the straggler to be named", patience_s=100)
        (tmp_path / "faster").touch()
        wait_until(lambda: len(straggling(launched)) == 2, "it to keep up")
        launched.look()
        launched.process.terminate()
        _, _, err = launched.finish()
    assert [(entry.fields["rank"], entry.fields["has_ended"]) for entry in straggling(launched)] == [
        (1, False),
        (1, True),
    ]
    host = launched.journal("NodesReady")[0].fields["nodes"][0]["hostname"]
    assert f"rank 1 on {host} makes the others wait" in err
    assert f"rank 1 on {host} keeps up with the others again" in err


def straggling(launched: Launched) -> list[Entry]:
    return launched.journal("Straggling") if (launched.run_dir / "journal.jsonl").exists() else []


ALONE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
import torch.optim.optimizer as optimizer
for _ in range(5):
    for hook in optimizer.hooks: hook(optimizer, (), {})
open("ready", "w").close()
while True: pass
"""


def launch_alone(directory: Path, *options: str) -> Launched:
    """With a torch that is a few lines: what is tried here does not need another."""
    for name, text in {
        "torch/__init__.py": "",
        "torch/optim/__init__.py": "",
        "torch/optim/optimizer.py": "hooks = []\ndef register_optimizer_step_post_hook(hook): hooks.append(hook)",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return launch(directory, ALONE, "--start-method", "spawn", "--hang-timeout", "1", *options)


def test_stop_means_no_restart_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    with launch_alone(tmp_path, "--on-hang", "stop", "--max-restarts", "3") as launched:
        code, _, err = launched.finish()
    assert code == EXIT_HUNG, err
    assert "no restart: --on-hang stop" in err
    assert "rank 0 on" in err and "hangs: spins in one place" in err


def test_report_leaves_the_job_alone(tmp_path: Path) -> None:
    with launch_alone(tmp_path, "--on-hang", "report") as launched:
        launched.wait_for_file("ready")
        launched.wait_for_file("railhead-runs/latest/attempt_0/stacks/rank_0.txt")
        wait_for_kinds(launched, "GivenUp")
        assert launched.process.poll() is None
        assert launched.journal("RankHung") == []
        launched.process.terminate()
        code, _, err = launched.finish()
    assert code == 143
    assert "the job is left alone (--on-hang report)" in err


def wait_for_kinds(launched: Launched, *kinds: str) -> None:
    wait_until(
        lambda: (launched.run_dir / "journal.jsonl").exists() and launched.journal(*kinds), f"{kinds} in the journal"
    )


def test_without_py_spy_the_rank_writes_its_stacks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing another process is not permitted everywhere; handling a signal is."""
    with launch_alone(tmp_path, "--hang-timeout", "off") as launched:
        launched.wait_for_file("ready")
        (started,) = launched.journal("RanksStarted")
        pid = started.fields["pids"][0]
        monkeypatch.setattr(stacks, "_py_spy", lambda *_: ("", "py-spy: not permitted"))
        directory = launched.run_dir / "attempt_0"
        taken = take({0: pid}, directory)
        assert taken[0].how == "faulthandler"
        assert taken[0].frames[0].startswith("<module> (")
        assert "train.py:" in taken[0].frames[0]
        assert (directory / "stacks" / "rank_0.txt").exists()
        launched.process.terminate()
        launched.finish()


def test_a_process_that_does_not_listen_is_not_sent_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of that signal is death: `--no-python` programs, or a rank that has no observer."""
    monkeypatch.setattr(stacks, "_py_spy", lambda *_: ("", "py-spy: not permitted"))
    with Launched(tmp_path, "--no-python", "sleep", "600") as launched:
        wait_for_kinds(launched, "RanksStarted")
        (started,) = launched.journal("RanksStarted")
        pid = started.fields["pids"][0]
        directory = launched.run_dir / "attempt_0"
        (directory / "rank_0" / "faulthandler.log").touch()
        (taken,) = take({0: pid}, directory)
        assert (taken.frames, taken.how) == ((), "py-spy: not permitted")
        assert launched.process.poll() is None and launched.journal("RankExited") == []
        launched.process.terminate()
        launched.finish()


def take(pids: dict[int, int], directory: Path) -> tuple[RankStack, ...]:
    found: list[tuple[RankStack, ...]] = []
    stacks.take(pids, str(directory), False, found.append)

    wait_until(lambda: found, "the stacks")
    return found[0]
