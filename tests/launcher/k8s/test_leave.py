"""A pod that is told to go: it says so to whom it may concern, and stays as long as somebody saves, and no longer."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray._private import ray_constants

from launcher.k8s.leave import AGENT, main
from launcher.k8s.manifest import render
from tests.launcher.k8s.jobs import head, job, ray_job, worker

ROOT = Path(__file__).parents[3]
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
HANG_S = "60"
"""Longer than any of these takes: a hook that waits for it in vain hangs the test."""


class Dashboard(BaseHTTPRequestHandler):
    """Ray's, as far as the hook asks it: jobs, which end when they were stopped and asked about twice more."""

    jobs: dict[str, str]
    stopped: list[tuple[str, str | None]]
    polls = 0

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        kind = type(self)
        kind.polls += bool(kind.stopped)
        if kind.polls > 2:
            kind.jobs = dict.fromkeys(kind.jobs, "STOPPED")
        found = [{"submission_id": name, "status": status} for name, status in kind.jobs.items()]
        self._answer([*found, {"submission_id": None, "status": "RUNNING", "type": "DRIVER"}])

    def do_POST(self) -> None:
        type(self).stopped.append((self.path, self.headers.get("Authorization")))
        self._answer({"stopped": True})

    def _answer(self, one: object) -> None:
        data = json.dumps(one).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def dashboard(**jobs: str) -> Iterator[tuple[str, type[Dashboard]]]:
    kind = type("Handler", (Dashboard,), {"jobs": jobs, "stopped": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", kind
        finally:
            server.shutdown()
            thread.join()


def test_a_head_stops_its_job_once_and_stays_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal would kill the ranks in the middle of their checkpoint."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    with dashboard(old="SUCCEEDED", smoke="RUNNING") as (url, ray):
        assert main(["head", "--seconds", HANG_S, "--dashboard", url]) == 0
        assert ray.stopped == [("/api/jobs/smoke/stop", "Bearer sesame")]
        assert ray.jobs["smoke"] == "STOPPED"


def test_a_head_without_a_job_goes_at_once() -> None:
    with dashboard(smoke="SUCCEEDED") as (url, ray):
        assert main(["head", "--seconds", HANG_S, "--dashboard", url]) == 0
        assert ray.stopped == []


def test_a_head_whose_dashboard_is_gone_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.k8s.leave._POLL_S", 0.0)
    assert main(["head", "--seconds", HANG_S, "--dashboard", "http://127.0.0.1:9"]) == 0


@contextmanager
def pod_processes(folder: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A /proc with an agent, as Ray titles it, and a raylet; and the agent."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    agent = subprocess.Popen(
        [f"{AGENT}.poll_events", "-c", code], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert agent.stdin is not None and agent.stdout is not None
    try:
        agent.stdout.readline()
        (folder / "1").mkdir()
        (folder / "1" / "cmdline").write_bytes(b"/x/raylet/raylet\0--a\0--node_id=ab12\0")
        (folder / str(agent.pid)).symlink_to(f"/proc/{agent.pid}")
        yield folder, agent
    finally:
        agent.kill()
        agent.wait()
        agent.stdin.close()
        agent.stdout.close()


def fake_ray(folder: Path, script: str) -> Path:
    path = folder / "bin" / "ray"
    path.parent.mkdir()
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path.parent


def test_a_worker_tells_ray_and_stays_until_its_agent_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "proc").mkdir()
    with pod_processes(tmp_path / "proc") as (proc, agent):
        told = tmp_path / "told"
        # The launcher, which hears of it, lets the agent go.
        binaries = fake_ray(
            tmp_path, f'printf "%s|" "$@" > {told}; kill {agent.pid}; while kill -0 {agent.pid}; do :; done'
        )
        monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
        reaper = threading.Thread(target=agent.wait)
        reaper.start()
        assert main(["worker", "--seconds", HANG_S, "--proc", str(proc)]) == 0
        reaper.join()
    words = told.read_text().split("|")
    assert words[0] == "drain-node" and "DRAIN_NODE_REASON_PREEMPTION" in words
    assert words[words.index("--node-id") + 1] == "ab12"
    assert 0 < int(words[words.index("--deadline-remaining-seconds") + 1]) <= int(HANG_S)
    assert "ranks have" in capfd.readouterr().err


def test_a_worker_stays_no_longer_than_it_may_and_says_why_ray_was_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "proc").mkdir()
    with pod_processes(tmp_path / "proc") as (proc, agent):
        monkeypatch.setenv("PATH", f"{fake_ray(tmp_path, 'echo no such cluster >&2; exit 1')}:/usr/bin:/bin")
        assert main(["worker", "--seconds", "1", "--proc", str(proc)]) == 0
        assert agent.poll() is None
    assert "Ray was not told: no such cluster" in capfd.readouterr().err


def test_a_worker_without_ranks_goes_at_once_and_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of every job: each pod would else stay for its whole grace, with its GPUs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["worker", "--seconds", HANG_S, "--proc", str(tmp_path)]) == 0


def test_the_agents_title_is_that_of_its_class() -> None:
    tree = ast.parse((ROOT / "launcher" / "cluster" / "ray" / "agent_actor.py").read_text())
    assert AGENT.removeprefix("ray::") in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_pods_hook_ends_before_its_grace_and_after_the_ranks() -> None:
    """Else the kubelet kills it, and what it waits for, in the middle; Ray's own wait for a stopped job is 3 s unless it is told."""
    one = ray_job(render(job({"shutdown_timeout_s": 120.0})))
    for pod, role in ((head(one), "head"), (worker(one), "worker")):
        ray = pod["containers"][0]
        command = ray["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:4] == ["python", "-m", "launcher.k8s.leave", role]
        assert 120 < float(command[command.index("--seconds") + 1]) < pod["terminationGracePeriodSeconds"]
    told = {each["name"]: each["value"] for each in head(one)["containers"][0]["env"]}
    assert float(told["RAY_JOB_STOP_WAIT_TIME_S"]) > 120


def test_ray_does_not_drain_a_second_time_after_the_hook() -> None:
    """`ray start --block` waits 30 s at SIGTERM for a node to become idle: longer than the hook leaves it, with the pod's GPUs."""
    one = ray_job(render(job()))
    for pod in (head(one), worker(one)):
        told = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert hasattr(ray_constants, DRAIN) and told[DRAIN] == "0"


def test_the_hook_imports_neither_torch_nor_ray_nor_the_kubernetes_client() -> None:
    """It has little time, and starts while the node is at its busiest."""
    heavy = {"torch", "ray", "kubernetes", "yaml"}
    code = f"import sys, launcher.k8s.leave; print(sorted({{name.split('.')[0] for name in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
