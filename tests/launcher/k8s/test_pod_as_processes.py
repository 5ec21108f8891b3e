"""The rendered pods, run without Kubernetes: the very commands, variables and probes as processes of this machine.

What a kubelet and KubeRay would do is done here by hand: volumes become folders of the pod's own, container ports free ports, `ray start`
is made from rayStartParams and pasted into a bash line as the operator pastes it, the job is submitted once every pod is ready, and the
submitter's line goes through a shell.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.k8s.manifest import render
from launcher.k8s.request import cut, to_job, with_job_file
from tests.launcher.k8s.jobs import ray_job

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.e2e, pytest.mark.timeout(240)]

NOTE = 'it\'s $HOME; `id` && "two words"'
REPOSITORY = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Pod:
    """One pod's place on this machine: a folder for each of its volumes, a free port for each of its containers' ports."""

    template: Mapping[str, Any]
    folder: Path
    config_maps: Mapping[str, Mapping[str, str]]
    ports: dict[int, int] = field(default_factory=dict)

    def volume(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            path.mkdir(parents=True)
            source = next(volume for volume in self.template["spec"]["volumes"] if volume["name"] == name)
            for file, text in self.config_maps.get(source.get("configMap", {}).get("name", ""), {}).items():
                (path / file).write_text(text)
        return path

    def port(self, number: int) -> int:
        return self.ports.setdefault(number, free_port())

    def place(self, container: Mapping[str, Any], text: str) -> str:
        """A word of the container's command or environment, as it is here. /dev/shm is this machine's own."""
        for mount in sorted(container.get("volumeMounts", []), key=lambda mount: -len(mount["mountPath"])):
            if mount["mountPath"] != "/dev/shm":
                text = text.replace(mount["mountPath"], str(self.volume(mount["name"])))
        for port in container.get("ports", []):
            text = text.replace(f"0.0.0.0:{port['containerPort']}", f"127.0.0.1:{self.port(port['containerPort'])}")
        return text

    def env(self, container: Mapping[str, Any]) -> dict[str, str]:
        plain = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PYTHONPATH": str(REPOSITORY),
        }
        return plain | {entry["name"]: self.place(container, entry["value"]) for entry in container.get("env", [])}

    def command(self, container: Mapping[str, Any]) -> list[str]:
        return [self.place(container, word) for word in (*container.get("command", []), *container.get("args", []))]


@contextmanager
def process(argv: list[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, which is ended with SIGTERM, and what is left of it with SIGKILL."""
    with log.open("wb") as output:
        started = subprocess.Popen(argv, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield started
        finally:
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def probe(pod: Pod, container: Mapping[str, Any], kind: str) -> bool:
    """Once, as the kubelet does it: any answer from 200 to 399 counts."""
    action = container[kind]["httpGet"]
    number = next(port["containerPort"] for port in container["ports"] if port["name"] == action["port"])
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{pod.port(number)}{action['path']}", timeout=5) as answer:
            return 200 <= answer.status < 400
    except (urllib.error.URLError, OSError):
        return False


def until_probed(pod: Pod, container: Mapping[str, Any], started: subprocess.Popen[bytes], log: Path) -> None:
    """The startup probe, as often as the manifest allows."""
    for _ in range(container["startupProbe"]["failureThreshold"]):
        if probe(pod, container, "startupProbe"):
            return
        assert started.poll() is None, log.read_text()
        time.sleep(container["startupProbe"]["periodSeconds"] / 4)
    pytest.fail(f"the startup probe never passed: {log.read_text()}")


def ray_line(container: Mapping[str, Any], params: Mapping[str, str], *words: str) -> list[str]:
    """KubeRay's line: the user's command, then `ray start` with its parameters unquoted, under `bash -c`."""
    start = " ".join(
        ["ulimit -n 65536; ray start", *words, *(f"--{name}={value}" for name, value in params.items()), "--block"]
    )
    own = " ".join([*container.get("command", []), *container.get("args", [])])
    return ["bash", "-c", f"{own} && {start}" if own else start]


def until_ready(params: Mapping[str, str], started: subprocess.Popen[bytes], log: Path) -> None:
    """KubeRay's own probe of container 0: the job is submitted when it passes in every pod."""
    url = f"http://127.0.0.1:{params['dashboard-agent-listen-port']}/api/healthz"
    for _ in range(600):
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert started.poll() is None, log.read_text()
        time.sleep(0.1)
    pytest.fail(f"{url} never answered: {log.read_text()}")


def rendered_job(tmp_path: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The checked-in sample as `python -m launcher render` makes it, with one rank in each pod instead of two."""
    (tmp_path / "shard").write_bytes(bytes(range(256)) * 64)
    samples = REPOSITORY / "k8s" / "samples"
    flags = ["--nproc-per-node", "1", "--cpus", "1", "smoke.py", f"file://{tmp_path}/shard", NOTE]
    request = with_job_file(cut(flags), (samples / "smoke.job.yaml").read_text(), "smoke.job.yaml")
    rendered = render(to_job(request, {}, lambda name: (samples / name).read_text()))
    maps = {one["metadata"]["name"]: one["data"] for one in rendered.objects if one["kind"] == "ConfigMap"}
    return ray_job(rendered), maps


def test_the_rendered_job_trains(tmp_path: Path) -> None:
    """Head, two workers, two cache sidecars, and the submitter's line through the shell; each rank reads through its own pod's daemon."""
    one, maps = rendered_job(tmp_path)
    cluster = one["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    gcs, dashboard = free_port(), free_port()
    token = (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        if cluster["authOptions"]["mode"] == "token"
        else {}
    )
    # A busy machine starts a raylet in more than the 30 s that Ray waits for it.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
    with ExitStack() as stack:
        sidecars = []
        workers = [Pod(group["template"], tmp_path / f"w{idx}", maps) for idx in range(group["replicas"])]
        for pod in workers:
            (sidecar,) = pod.template["spec"]["initContainers"]
            log = pod.folder / "cache.log"
            pod.folder.mkdir()
            daemon = stack.enter_context(process(pod.command(sidecar), pod.env(sidecar), log))
            until_probed(pod, sidecar, daemon, log)
            assert probe(pod, sidecar, "readinessProbe") and probe(pod, sidecar, "livenessProbe")
            sidecars.append((pod, sidecar, daemon))

        head = Pod(cluster["headGroupSpec"]["template"], tmp_path / "head", maps)
        head.folder.mkdir()
        (container,) = head.template["spec"]["containers"]
        ports = {
            "port": str(gcs),
            "dashboard-port": str(dashboard),
            "dashboard-host": "127.0.0.1",
            "node-ip-address": "127.0.0.1",
        }
        params = {
            **cluster["headGroupSpec"]["rayStartParams"],
            **ports,
            **_agent_ports(),
            "temp-dir": _short_folder(stack),
        }
        log = head.folder / "ray.log"
        started = stack.enter_context(
            process(ray_line(container, params, "--head"), head.env(container) | token | quiet, log)
        )
        until_ready(params, started, log)  # as `wait-gcs-ready` keeps workers until the head is there
        for pod in workers:
            (container,) = pod.template["spec"]["containers"]
            params = {
                **group["rayStartParams"],
                "address": f"127.0.0.1:{gcs}",
                "node-ip-address": "127.0.0.1",
                **_agent_ports(),
            }
            params["num-cpus"] = container["resources"]["limits"]["cpu"]
            env = pod.env(container) | token | quiet | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
            log = pod.folder / "ray.log"
            until_ready(params, stack.enter_context(process(ray_line(container, params), env, log)), log)

        submitted = f"ray job submit --address http://127.0.0.1:{dashboard} --submission-id smoke-1 -- {one['spec']['entrypoint']}"
        # The ConfigMap is mounted at one path in all pods; here each has its own folder, and the line runs in the head's.
        submitted = head.place(head.template["spec"]["containers"][0], submitted)
        (submitter,) = one["spec"]["submitterPodTemplate"]["spec"]["containers"]
        done = subprocess.run(
            ["bash", "-c", submitted], env=head.env(submitter) | token, capture_output=True, text=True, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output + _logs(tmp_path)
        read = f"{256 * 64} bytes read, {2 * 256 * 64} by all {NOTE}"
        for pod, sidecar, _ in sidecars:
            assert f" of 2: cache at {pod.volume('cache-run')}/cache.sock, {read}" in output
            assert probe(pod, sidecar, "livenessProbe")
        for _, _, daemon in sidecars:
            daemon.terminate()
            assert daemon.wait(timeout=10) == 0


def _agent_ports() -> dict[str, str]:
    """What each pod has for itself on Kubernetes, and processes of one machine must share out."""
    return {"metrics-export-port": str(free_port()), "dashboard-agent-listen-port": str(free_port())}


def _short_folder(stack: ExitStack) -> str:
    """Ray's sockets lie in it, and the kernel allows 107 bytes for a path."""
    import tempfile

    return stack.enter_context(tempfile.TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True))


def _logs(folder: Path) -> str:
    return "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*/*.log")))


def test_the_submitters_words_reach_the_script_unchanged(tmp_path: Path) -> None:
    """What the shell in between would act on stands quoted in the entrypoint."""
    one, _ = rendered_job(tmp_path)
    assert shlex.split(one["spec"]["entrypoint"])[-1] == NOTE
    assert json.dumps(one)
