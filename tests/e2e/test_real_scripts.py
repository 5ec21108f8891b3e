"""Scripts as the documentation of PyTorch, Accelerate, Lightning and Transformers teaches them, unmodified: under torchrun and under the
launcher they end alike and print the same results.

Each has lines that begin with `result`, with losses and weights to the digit: the same ranks, seeds, batches and collectives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
ARGUMENTS = {"ddp_snapshots.py": ["3", "1", "--batch_size=32"], "hf_causal_lm.py": ["--learning_rate", "5e-3"]}
NEEDS = {"accelerate": "accelerate", "lightning": "lightning", "hf": "transformers"}
STEPS = {
    "accelerate_inference.py": 2,
    "accelerate_loop.py": 8,
    "checkpoint_dcp.py": 3,
    "ddp_elastic.py": 5,
    "ddp_snapshots.py": 12,
    "fsdp2.py": 5,
    "hf_causal_lm.py": 6,
    "hf_trainer.py": 6,
    "imagenet_style.py": 8,
    "lightning_fabric.py": 12,
    "lightning_trainer.py": 8,
    "tensor_parallel.py": 5,
    "recorded_main.py": None,
    "spawned_workers.py": None,
}
"""Optimizer steps of each rank, which the launcher sees without being told. None: no optimizer, or not in the rank's own process."""
FLAGS = ["--nproc-per-node=2", "--redirects=1", "--log-dir=logs"]
DEADLINE_S = 240.0
"""Only what hangs takes so long; importing Transformers twice on two busy cores takes some tens of seconds."""

pytestmark = pytest.mark.timeout(3 * DEADLINE_S)


TORCHS_OWN = "terminate called without an active exception"
"""Seldom torch aborts an interpreter that has done its work and is ending, whoever started it: a thread of its own is not joined yet."""


def results(command: list[str], script: str, directory: Path) -> list[str]:
    """The result lines of all ranks, sorted; fails with the whole output where the command fails."""
    for attempt in range(3):
        code, output = run(command, script, directory / str(attempt))
        if code == 0 or TORCHS_OWN not in output:
            break
    assert code == 0, output
    # Each rank's own file: on a shared descriptor the end of a line may come after another rank's words.
    logs = {path.resolve() for path in (directory / str(attempt)).glob("logs/*/attempt_0/*/stdout.log")}
    return sorted(found for path in logs for found in re.findall(r"^result .*$", path.read_text(), re.MULTILINE))


def run(command: list[str], script: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output."""
    cwd.mkdir(parents=True)
    shutil.copy(SCRIPTS / script, cwd / script)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAILHEAD_", "PET_"))}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *FLAGS, script, *ARGUMENTS.get(script, [])],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_a_script_of_the_documentation_gives_the_same_under_torchrun_and_here(script: str, tmp_path: Path) -> None:
    """Drop-in means that nobody changes a script: each is what a reader of that documentation would have."""
    needed = NEEDS.get(script.split("_")[0])
    if needed is not None:
        pytest.importorskip(needed)
    theirs = results(["torch.distributed.run", "--standalone"], script, tmp_path / "torchrun")
    ours = results(["launcher"], script, tmp_path / "launcher")
    assert ours == theirs
    assert len({line for line in ours if "rank 0" in line or "RANK=0" in line}) >= 1
    assert len(ours) >= 2, "each rank has said something"
    assert steps_seen(tmp_path / "launcher") == [STEPS[script]] * 2


def steps_seen(directory: Path) -> list[int | None]:
    """Of each rank, in the last try."""
    entries = [json.loads(line) for line in max(directory.glob("*/logs/*/journal.jsonl")).read_text().splitlines()]
    return [entry["steps"] for entry in entries if entry["kind"] == "RankExited"]
