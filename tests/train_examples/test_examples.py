"""The examples as a user runs them: under torchrun, under the launcher with a cache, alone, and through a failure.

All on two ranks, where a sum of gradients has one order, so that equal means bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train_examples.audit import History, findings, read_history

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("train_examples"), pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).resolve().parents[2] / "train_examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = {
    "resnet": ["--epochs", "2", "--global-batch-size", "64", "--width", "8"],
    "gpt": ["--steps", "40", "--layers", "1", "--global-batch-size", "8", "--seq-len", "64", "--eval-windows", "16"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    for script, options in (("prepare_digits", ["--copies", "1", "--num-shards", "3"]), ("prepare_text", [])):
        run([sys.executable, str(EXAMPLES / f"{script}.py"), "--url", f"file://{root}/{script}", *options], root)
    return {"resnet": f"file://{root}/prepare_digits", "gpt": f"file://{root}/prepare_text"}


@pytest.fixture(scope="module", params=["resnet", "gpt"])
def reference(
    request: pytest.FixtureRequest, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, str, History]:
    """(example, data url, output, history) of an uninterrupted run under torchrun, without a cache."""
    example: str = request.param
    directory = tmp_path_factory.mktemp(f"reference-{example}")
    output = run([*TORCHRUN, *script(example, data[example], directory)], directory)
    return example, data[example], output, read_history(directory / "audit")


def test_an_uninterrupted_run_learns_and_passes_the_audit(reference: tuple[str, str, str, History]) -> None:
    example, _, output, history = reference
    assert findings(history) == []
    losses = [step.losses[0] for _, step in sorted(history.steps.items())]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    if example == "resnet":
        (accuracy,) = re.findall(r"final test accuracy (\d+\.\d+) %", output)
        assert float(accuracy) > 50
    else:
        assert re.search(r"evaluation: \d\.\d+ bits per byte", output)
    assert "cache: none, reading the origin directly" in output
    assert re.search(r"account: \d+ steps, [\d,]+ samples/s; waited for data .* of the step time", output)


def test_launcher_and_cache_give_the_same_losses_through_a_killed_rank(
    reference: tuple[str, str, str, History], tmp_path: Path
) -> None:
    """A rank is killed in mid-epoch; the launcher starts a second attempt, which resumes from the last checkpoint.
    What the model was trained on, and every loss on the way, are those of the uninterrupted run under torchrun
    without a cache."""
    example, url, _, expected = reference
    command = [sys.executable, "-m", "launcher", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--cache-capacity", "1GiB"]
    command += [
        *script(example, url, tmp_path),
        "--checkpoint-dir",
        str(tmp_path / "checkpoints"),
        "--checkpoint-every",
        "7",
    ]
    with started(command, tmp_path) as process:
        os.kill(pid_of_rank_at_step(tmp_path / "audit", rank=1, num_steps=10, process=process), signal.SIGKILL)
        output, _ = process.communicate(timeout=220)
    assert process.returncode == 0, output
    history = read_history(tmp_path / "audit")
    assert findings(history) == []
    assert history.num_void > 0
    assert "resumed at epoch 0, step" in output
    # The daemon outlives the attempt: what the first one has read, the second finds.
    assert re.findall(r"cache: \w+, \d+ % resident", output) == [
        "cache: cold, 0 % resident",
        "cache: warm, 100 % resident",
    ]
    assert {place: step.samples for place, step in history.steps.items()} == {
        place: step.samples for place, step in expected.steps.items()
    }
    assert {place: step.losses for place, step in history.steps.items()} == {
        place: step.losses for place, step in expected.steps.items()
    }


def test_alone_it_trains_on_the_same_global_batches(reference: tuple[str, str, str, History], tmp_path: Path) -> None:
    example, url, _, expected = reference
    run([sys.executable, *script(example, url, tmp_path), "--max-steps", "3"], tmp_path)
    for place, step in read_history(tmp_path / "audit").steps.items():
        assert step.samples[0] == expected.steps[place].samples[0] + expected.steps[place].samples[1]


def script(example: str, url: str, directory: Path) -> list[str]:
    return [str(EXAMPLES / f"{example}.py"), "--data", url, "--audit-dir", str(directory / "audit"), *SIZES[example]]


def environment() -> dict[str, str]:
    """Without what an outer launcher or cache may have set."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAILHEAD_", "PET_", "TORCHELASTIC_", "RAY_"))
    } | {"OMP_NUM_THREADS": "1"}


def run(command: list[str], directory: Path) -> str:
    with started(command, directory) as process:
        output, _ = process.communicate(timeout=220)
    assert process.returncode == 0, output
    return output


class started:  # noqa: N801  used like a function
    """A program in a process group of its own, which is gone at the end whatever happened."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()


def pid_of_rank_at_step(directory: Path, *, rank: int, num_steps: int, process: subprocess.Popen[str]) -> int:
    """Waits until a rank has recorded so many steps; its process id."""
    for lines in audit_lines(directory, rank, process):
        if len(lines) > num_steps:
            return int(json.loads(lines[0])["pid"])
    raise AssertionError("unreachable")


def audit_lines(directory: Path, rank: int, process: subprocess.Popen[str]) -> Iterator[list[str]]:
    deadline_s = time.monotonic() + 150
    while time.monotonic() < deadline_s and process.poll() is None:
        for path in directory.glob(f"*-rank{rank:05}.jsonl"):
            yield path.read_text().splitlines()
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"rank {rank} did not get that far: {process.communicate()[0]}")
