"""Submitting, following, stopping: on our own fake, and on a real cluster with KubeRay where there is one, the same tests:

RAILHEAD_TEST_KUBECONFIG=~/.kube/config RAILHEAD_TEST_NAMESPACE=default RAILHEAD_TEST_IMAGE=registry/railhead:0.1.0 \
    python -m pytest tests/contracts/test_submit_contract.py

Jobs there have one small worker without GPUs and a name of the test's own; they are deleted. On the fake, `plays` is KubeRay and the job.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.k8s import client
from launcher.k8s.client import Kube
from launcher.k8s.pods import JOB_LABEL
from tests.fakes.apiserver import FakeApiServer, serving

REAL = os.environ.get("RAILHEAD_TEST_KUBECONFIG")
NAMESPACE = os.environ.get("RAILHEAD_TEST_NAMESPACE", "default")
IMAGE = os.environ.get("RAILHEAD_TEST_IMAGE", "registry.example/railhead:0.1.0")
NUM_LINES = 300
HANG_S = 900.0
"""A guard: a real cluster may have to pull the image."""
SCRIPT = """
import sys
for idx in range(int(sys.argv[1])):
    print(f"step {idx}", flush=True)
sys.exit(int(sys.argv[2]))
"""
SAMPLES = sorted((Path(__file__).parents[2] / "k8s" / "samples").glob("*.job.yaml"))
OWN_KINDS = ("RayJob", "ServiceAccount", "ConfigMap", "PodDisruptionBudget", "Service", "Secret", "NetworkPolicy")
"""All that a job of these tests may leave behind."""

pytestmark = [pytest.mark.timeout(HANG_S + 60)]


@dataclass
class Site:
    """A cluster, and one job's name in it."""

    name: str
    kube: Kube
    fake: FakeApiServer | None

    def words(self, *flags: str, lines: int = NUM_LINES, code: int = 0) -> list[str]:
        size = [
            "--nnodes",
            "1",
            "--nproc-per-node",
            "1",
            "--gpus",
            "0",
            "--cpus",
            "1",
            "--memory",
            "2Gi",
            "--head-cpus",
            "1",
        ]
        where = ["--name", self.name, "--namespace", NAMESPACE, "--image", IMAGE, "--network-policy"]
        return ["submit", *where, *size, *flags, "--ship", "job.py", "job.py", str(lines), str(code)]

    def plays(self, lines: int = NUM_LINES, code: int = 0) -> None:
        """The job runs as soon as somebody watches it; the connection to a long log is cut twice. A real cluster does its own."""
        fake, pod = self.fake, f"{self.name}-abc"
        cuts = (1000, 5) if lines > 100 else ()
        if fake is None:
            return

        def run() -> None:
            labels = {"batch.kubernetes.io/job-name": self.name}
            fake.put("pods", {"kind": "Pod", "metadata": {"name": pod, "namespace": NAMESPACE, "labels": labels}})
            fake.log(
                pod, *(f"2026-01-01T00:00:{idx // 100:02}.{idx % 100 // 4:03}Z step {idx}" for idx in range(lines))
            )
            fake.logs[pod].cut_after_bytes = list(cuts)
            fake.set_status(self.name, NAMESPACE, jobDeploymentStatus="Running", jobStatus="RUNNING")

        def end() -> None:
            fake.log(pod, ended=True)
            ended = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": f"failed with exit code {code}"}
            fake.set_status(
                self.name,
                NAMESPACE,
                **(ended if code else {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}),
            )

        fake.when("GET", "rayjobs", "watch=true", then=run)
        fake.when("GET", "/log", count=len(cuts) + 1, then=end)
        for count in range(
            2, len(cuts) + 3
        ):  # something happens, so that the follower, whose log was cut, goes on at once
            fake.when("GET", "rayjobs", "watch=true", count=count, then=self._touch)

    def _touch(self) -> None:
        assert self.fake is not None
        self.fake.set_status(self.name, NAMESPACE, message="still running")

    def left(self) -> set[str]:
        """Kinds of which something of this job is there."""
        return {
            kind
            for kind in OWN_KINDS
            if self.kube.list(kind, NAMESPACE, labelSelector=f"{JOB_LABEL}={self.name}")["items"]
        }


@pytest.fixture(params=["fake", "real"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(SCRIPT)
    name = f"railhead-test-{secrets.token_hex(4)}"
    if request.param == "real":
        if REAL is None:
            pytest.skip("needs a cluster with KubeRay: set RAILHEAD_TEST_KUBECONFIG, RAILHEAD_TEST_IMAGE")
        monkeypatch.setenv("KUBECONFIG", os.path.expanduser(REAL))
        found = Site(name, Kube(), None)
        yield found
        found.kube.delete("RayJob", NAMESPACE, name)
        found.kube.close()
        return
    with serving(tmp_path) as (fake, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr(client.time, "sleep", lambda _: None)
        monkeypatch.setattr(Kube.__init__, "__kwdefaults__", {"sleep": lambda _: None})
        fake.namespaces.add(NAMESPACE)
        found = Site(name, Kube(), fake)
        yield found
        found.kube.close()


def steps(text: str) -> list[int]:
    """What the script itself wrote, in order; the launcher's own lines are around it."""
    return [int(found) for found in re.findall(r"^step (\d+)$", text, re.MULTILINE)]


def test_a_job_is_followed_to_its_end_and_no_line_is_lost(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plays()
    assert main(site.words()) == 0
    said = capsys.readouterr()
    assert steps(said.out) == list(range(NUM_LINES))
    assert "launcher: training\n" in said.err and f"launcher: {site.name} ended with 0\n" in said.err


def test_the_scripts_exit_code_is_the_commands(site: Site) -> None:
    site.plays(1, 7)
    assert main(site.words(lines=1, code=7)) == 7


def test_for_programs_every_line_is_an_object(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.plays(3)
    assert main(site.words("--json", lines=3)) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"submitted", "phase", "output", "ended"} <= {one["event"] for one in events}
    assert steps("\n".join(one["line"] for one in events if one["event"] == "output")) == [0, 1, 2]
    assert events[-1] == {"event": "ended", "text": f"{site.name} ended with 0", "exit_code": 0}


def test_a_submitter_that_comes_again_finds_the_job_and_another_job_of_its_name_is_refused(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second job would train the same model twice, over the same checkpoints."""
    assert main(site.words("--detach")) == 0
    first = site.kube.get("RayJob", NAMESPACE, site.name)["metadata"]["uid"]
    assert main(site.words("--detach")) == 0
    assert "found, submitted before" in capsys.readouterr().err
    assert main(site.words("--detach", lines=1)) == 69
    assert "exists with another specification" in capsys.readouterr().err
    assert site.kube.get("RayJob", NAMESPACE, site.name)["metadata"]["uid"] == first


def test_a_dry_run_and_a_refusal_leave_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(site.words("--dry-run")) == 0
    assert main(site.words("--secret-env", f"KEY={site.name}-none/key")) == 69
    assert f"there is no Secret {site.name}-none" in capsys.readouterr().err
    assert main(site.words("--priority-class", "no such class")) == 2
    assert site.left() == set()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name.removesuffix(".job.yaml"))
def test_the_api_server_would_take_each_sample(site: Site, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    """Its Secrets and its priority class are the site's own; that they are missing is said, and is all that may be wrong."""
    code = main(["submit", "--file", str(path), "--name", site.name[:30], "--namespace", NAMESPACE, "--dry-run"])
    said = capsys.readouterr().err
    assert code == 0 or (code == 69 and re.search("there is no Secret|no PriorityClass", said)), said


def test_what_was_made_goes_with_stop(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(site.words("--detach")) == 0
    assert {"RayJob", "ServiceAccount", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"} <= site.left()
    assert main(["list", "--namespace", NAMESPACE]) == 0
    assert main(["status", site.name, "-n", NAMESPACE]) == 0
    listed, status = (line for line in capsys.readouterr().out.splitlines() if site.name in line)
    assert listed.startswith(f"{site.name} ") and status.startswith(f"{NAMESPACE}/{site.name} ")
    assert main(["stop", site.name, "--namespace", NAMESPACE]) == 0
    until(lambda: site.left() == set(), "what belongs to the job goes with it")
    assert main(["stop", site.name, "--namespace", NAMESPACE]) == 0
    assert capsys.readouterr().out.endswith("was not there\n")


def test_wait_placed_comes_back_while_the_job_goes_on(site: Site) -> None:
    site.plays()
    assert main(site.words("--wait-placed")) == 0
    assert site.kube.exists("RayJob", NAMESPACE, site.name)


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal itself, to the command as people run it; the words that it prints are then run."""
    command = [sys.executable, "-m", "launcher", *site.words()]
    folder = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=folder) as submitted:
        assert submitted.stderr is not None
        said = ""
        while "submitted\n" not in said:
            line = submitted.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        # It is following once it has said what the job waits for.
        said += submitted.stderr.readline()
        submitted.send_signal(signal.SIGINT)
        rest = submitted.communicate(timeout=HANG_S)[1]
    assert submitted.returncode == 130, said + rest
    (again,) = re.findall(r"detached; the job goes on. To follow it again: python -m launcher (.*)", rest)
    assert site.kube.exists("RayJob", NAMESPACE, site.name)
    site.plays()
    assert main(again.split()) == 0
    assert steps(capsys.readouterr().out) == list(range(NUM_LINES))


def until(holds: Callable[[], bool], claim: str) -> None:
    deadline_s = time.monotonic() + HANG_S
    while not holds():
        assert time.monotonic() < deadline_s, claim
        time.sleep(0.2)
