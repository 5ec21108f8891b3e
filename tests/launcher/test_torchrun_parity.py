"""What runs under torchrun runs here unmodified: the same programs under the real torchrun and under the launcher, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEADLINE_S = 100.0
TORCHRUN = ("-m", "torch.distributed.run")
OURS = ("-m", "launcher")

# Writes down all that a rank can see of its birth.
PROBE = """
import json, os, sys
seen = {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "path0": sys.path[0], "name": __name__, "file": __file__,
        "package": __package__, "has_spec": __spec__ is not None, "main_is_me": sys.modules["__main__"].__dict__ is globals(),
        "session_leader": os.getsid(0) == os.getpid()}
with open(f"{os.environ['PROBE_OUT']}.{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}.json", "w") as file:
    json.dump(seen, file)
"""

# Ports, addresses, ids and paths differ from run to run under torchrun too.
DIFFERENT_EACH_TIME = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "PROBE_OUT")
TORCHRUNS_OWN = ("TORCHELASTIC_SIGNALS_TO_HANDLE",)
"""How torchrun hands a flag from one of its layers to the next; ranks inherit it by accident."""
OUR_OWN = ("RAILHEAD_RUN_DIR", "RAILHEAD_ATTEMPT", "PYTHONUNBUFFERED")
"""PYTHONUNBUFFERED: torchrun says `python -u`, which child processes of the rank do not inherit."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what its ranks have seen, by `RANK.RESTART_COUNT`."""

    code: int
    seen: dict[str, dict[str, Any]]
    out: str
    err: str


def launch(
    directory: Path, launcher: tuple[str, ...], argv: list[str], extra: Mapping[str, str] | None = None
) -> Outcome:
    """Runs the command in `directory`; a rank that calls PROBE leaves a file outside of it."""
    probe = directory.parent / f"probe-{launcher[1].partition('.')[0]}"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PET_", "RAY_", "PYTEST", "COV_"))
    }
    for name in ("OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        inherited.pop(name, None)
    env = {**inherited, "RAILHEAD_RUNS": str(directory.parent / "runs"), "PROBE_OUT": str(probe), **(extra or {})}
    done = subprocess.run(
        [sys.executable, *launcher, *argv],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    seen = {
        path.name.split(".", 1)[1].removesuffix(".json"): json.loads(path.read_text())
        for path in probe.parent.glob(f"{probe.name}.*.json")
    }
    return Outcome(done.returncode, seen, done.stdout, done.stderr)


def both(tmp_path: Path, argv: list[str], extra: Mapping[str, str] | None = None) -> tuple[Outcome, Outcome]:
    """torchrun's outcome and ours."""
    directory = tmp_path / "job"
    return launch(directory, TORCHRUN, argv, extra), launch(directory, OURS, argv, extra)


def assert_born_alike(theirs: Outcome, ours: Outcome) -> None:
    """All that ranks have seen is equal but for what must differ."""
    assert ours.code == theirs.code == 0, ours.err + theirs.err
    assert ours.seen.keys() == theirs.seen.keys()
    assert theirs.seen, "no rank has left a note"
    for key, their_rank in theirs.seen.items():
        our_rank = ours.seen[key]
        assert {k: v for k, v in our_rank.items() if k != "env"} == {k: v for k, v in their_rank.items() if k != "env"}
        assert comparable(our_rank["env"]) == comparable(their_rank["env"])
        assert all(our_rank["env"].get(name) for name in DIFFERENT_EACH_TIME)


def comparable(env: Mapping[str, str]) -> dict[str, str]:
    left_out = {*DIFFERENT_EACH_TIME, *TORCHRUNS_OWN, *OUR_OWN, "RAILHEAD_RUNS"}
    return {name: value for name, value in env.items() if name not in left_out}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A directory with the probe as a script whose name has a space, as a module, and as a program."""
    directory = tmp_path / "job"
    (directory / "pkg").mkdir(parents=True)
    (directory / "my train.py").write_text(PROBE)
    (directory / "pkg" / "__init__.py").touch()
    (directory / "pkg" / "train.py").write_text(PROBE)
    program = directory / "train.sh"
    program.write_text('#!/bin/sh\nexec "$PROBE_PYTHON" "my train.py" "$@"\n')
    program.chmod(0o755)
    return directory


def test_a_script_is_born_alike(job: Path, tmp_path: Path) -> None:
    """Arguments with spaces and dashes, with names of the launcher's flags, empty, and torchrun's macro."""
    args = ["--lr", "0.1", "a b", "-m", "--nproc_per_node=9", "", "--out", "x${local_rank}", "--", "-1"]
    assert_born_alike(*both(tmp_path, ["--nproc_per_node", "2", "my train.py", *args]))


def test_a_module_is_born_alike(job: Path, tmp_path: Path) -> None:
    """`-m`, and flags as variables; what the user set is kept."""
    extra = {
        "PET_NPROC_PER_NODE": "2",
        "PET_ROLE": "trainer",
        "PET_RDZV_ID": "job7",  # torchrun takes it only together with the next two
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "localhost:0",
        "OMP_NUM_THREADS": "3",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "NODE_RANK": "5",
    }
    theirs, ours = both(tmp_path, ["--max-restarts=2", "-m", "pkg.train", "--flag"], extra)
    assert_born_alike(theirs, ours)
    assert ours.seen["0.0"]["env"]["OMP_NUM_THREADS"] == "3"
    assert ours.seen["0.0"]["env"]["TORCHELASTIC_RUN_ID"] == theirs.seen["0.0"]["env"]["TORCHELASTIC_RUN_ID"] == "job7"


def test_a_program_is_born_alike(job: Path, tmp_path: Path) -> None:
    """`--no-python`, `--standalone`."""
    argv = ["--standalone", "--nproc-per-node=2", "--no-python", "./train.sh", "a b", "--x"]
    assert_born_alike(*both(tmp_path, argv, {"PROBE_PYTHON": sys.executable}))


# Rank 1 fails in the first attempt, once rank 0 has left its note.
FLAKY = """
import time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    while os.environ["RANK"] == "1" and not os.path.exists(os.environ["PROBE_OUT"] + ".0.0.json"):
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        sys.exit(3)
    time.sleep(600)
"""


def test_a_failing_rank_restarts_all_of_them(job: Path, tmp_path: Path) -> None:
    (job / "flaky.py").write_text(PROBE + FLAKY)
    theirs, ours = both(tmp_path, ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1", "flaky.py"])
    assert ours.seen.keys() == {"0.0", "1.0", "0.1", "1.1"}
    assert_born_alike(theirs, ours)


RECORDED = """
import sys
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    raise ValueError("told by record")

main()
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (RECORDED, "ValueError: told by record"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ],
    ids=["record", "exit", "signal"],
)
def test_what_fails_there_fails_here_and_is_told(job: Path, tmp_path: Path, text: str, told: str) -> None:
    """torchrun ends with 1 whatever the rank's code; here it is the rank's own (docs/launcher.md), never 0."""
    (job / "fail.py").write_text(text)
    theirs, ours = both(tmp_path, ["--nproc-per-node=1", "fail.py"])
    assert theirs.code != 0
    assert ours.code == {"record": 1, "exit code 7": 7, "SIGSEGV": 139}.get(told, 1)
    assert told in next(line for line in ours.err.splitlines() if "failed" in line)


ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
store = dist.distributed_c10d._get_default_store()
store.set(f"k{dist.get_rank()}", "v")
store.wait(["k0", "k1"])
# One write: under torchrun both ranks have the same standard output, and an unbuffered print writes each word by itself.
print(f"{dist.get_rank()} {dist.get_world_size()} {value.item()}\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_an_all_reduce_gives_the_same(job: Path, tmp_path: Path) -> None:
    """The store at MASTER_ADDR:MASTER_PORT is live, and ranks meet in it."""
    (job / "reduce.py").write_text(ALL_REDUCE)
    theirs, ours = both(tmp_path, ["--nproc-per-node=2", "--local-ranks-filter=0,1", "reduce.py"])
    assert (theirs.code, ours.code) == (0, 0), ours.err
    assert sorted(line.partition("] ")[2] for line in ours.out.splitlines()) == ["0 2 3.0", "1 2 3.0"]
    assert sorted(line.rpartition("]:")[2] for line in theirs.out.splitlines()) == ["0 2 3.0", "1 2 3.0"]
