"""The whole thread: four ranks on two Ray nodes train a ResNet on scanned digits that a real S3 server holds, through two cache daemons.

The same training is run without any cache first; everything is compared with that, sample by sample and loss by loss.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.proxy_process import ProxyProcess
from benchmarks.seaweed import SeaweedServer, aws_environment
from tests.raycluster import RayUnderTest, ray_environment
from train_examples.audit import findings, read_history

# One xdist worker for both servers: the group of the Ray tests, where the cluster is up already.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.e2e,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).parents[2]
EPOCHS = 2
RANKS = 4

Losses = dict[tuple[int, int], dict[int, float]]


@dataclass(frozen=True)
class Digits:
    """The data set at the S3 server, behind a proxy that counts what leaves it."""

    url: str
    proxy: ProxyProcess
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**ray_environment(), **aws_environment(self.proxy.endpoint)}


@pytest.fixture(scope="module")
def digits(weed: SeaweedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Digits]:
    weed.make_bucket("digits")
    with ProxyProcess(f"127.0.0.1:{weed.port}") as proxy:
        data = Digits("s3://digits/v1", proxy, tmp_path_factory.mktemp("digits"))
        prepare = [
            sys.executable,
            "train_examples/prepare_digits.py",
            "--url",
            data.url,
            "--copies",
            "4",
            "--num-shards",
            "6",
        ]
        subprocess.run(prepare, cwd=ROOT, env=data.environment, check=True)
        yield data


@pytest.fixture(scope="module")
def without_cache(digits: Digits) -> Losses:
    """The reference: four ranks on this machine, reading the origin directly."""
    audit = digits.directory / "audit-reference"
    with _training(digits, audit, "--nproc-per-node", str(RANKS)) as process:
        _finish(process)
    return _losses(audit)


@contextmanager
def _training(digits: Digits, audit: Path, *launcher_args: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "launcher", "--log-dir", str(audit) + "-runs", *launcher_args]
    command += [str(ROOT / "train_examples/resnet.py"), "--data", digits.url, "--epochs", str(EPOCHS)]
    command += ["--global-batch-size", "256", "--log-every", "1", "--audit-dir", str(audit)]
    errors = audit.with_suffix(".stderr")
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, cwd=digits.directory, env=digits.environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _finish(process: subprocess.Popen[str], on_line: Callable[[str], None] = lambda line: None) -> str:
    """Reads to the end; everything that was printed. The training must have succeeded."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        on_line(line)
    output = "".join(lines)
    assert process.wait() == 0, output
    return output


def _on_ray(cluster: RayUnderTest, directory: Path) -> list[str]:
    args = ["--address", cluster.address, "--carry-env", "AWS_*", "--nnodes", "2", "--nproc-per-node", str(RANKS // 2)]
    return [*args, "--cache-dir", f"{directory}/cache-$RAILHEAD_TEST_NODE", "--cache-capacity", "200MB"]


def _losses(audit: Path) -> Losses:
    """(epoch, step) → rank → loss, after the audit found every sample exactly once per epoch."""
    history = read_history(audit)
    assert findings(history) == []
    return {place: step.losses for place, step in history.steps.items()}


def _daemon_pids(audit: Path) -> list[int]:
    """Of the two daemons, from the run's journal."""
    journals = list(Path(str(audit) + "-runs").glob("*/journal.jsonl"))
    events = [
        json.loads(line)
        for journal in journals
        if not journal.parent.is_symlink()
        for line in journal.read_text().splitlines()
    ]
    return [event["pid"] for event in events if event["kind"] == "CacheServing"]


def test_four_ranks_train_through_two_daemons_and_the_second_epoch_takes_no_byte_from_the_origin(
    digits: Digits, without_cache: Losses, ray_cluster: RayUnderTest
) -> None:
    """The promise of the project in one run: same samples, same losses, and the data leaves the origin once for both nodes, whose daemons
    were told of each other by the launcher alone."""
    audit = digits.directory / "audit-cached"
    digits.proxy.reset_counters()
    after_first_epoch: list[int] = []

    def on_line(line: str) -> None:
        if "epoch 0 done" in line:
            after_first_epoch.append(digits.proxy.bytes_from_origin())

    with _training(digits, audit, *_on_ray(ray_cluster, digits.directory / "plain")) as process:
        output = _finish(process, on_line)
    assert _losses(audit) == without_cache
    assert len(_daemon_pids(audit)) == 2
    assert after_first_epoch, output
    assert after_first_epoch[0] > 0
    assert digits.proxy.bytes_from_origin() == after_first_epoch[0]
    objects = digits.proxy.counters()["objects"].values()
    assert sum(o["repeated_bytes"] for o in objects) <= 0.02 * sum(o["bytes"] for o in objects)


def test_killing_a_daemon_in_mid_epoch_changes_neither_the_samples_nor_the_result(
    digits: Digits, without_cache: Losses, ray_cluster: RayUnderTest
) -> None:
    """A failing cache is a slower cache: readers of the dead daemon's node go on from the origin."""
    audit = digits.directory / "audit-killed"
    killed: list[int] = []

    def on_line(line: str) -> None:
        if "epoch 0 step    4/" in line and not killed:
            killed.append(_daemon_pids(audit)[0])
            os.kill(killed[0], signal.SIGKILL)

    with _training(digits, audit, *_on_ray(ray_cluster, digits.directory / "killed")) as process:
        output = _finish(process, on_line)
    assert killed, output
    assert _losses(audit) == without_cache
