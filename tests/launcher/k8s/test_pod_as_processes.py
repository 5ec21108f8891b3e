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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
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


@dataclass
class Cluster:
    """The pods of a rendered job, up and ready, as they are when KubeRay hands the job to Ray."""

    job: Mapping[str, Any]
    head: Pod
    workers: list[Pod]
    daemons: list[subprocess.Popen[bytes]]
    raylets: list[subprocess.Popen[bytes]]
    """What each worker's Ray container runs."""
    dashboard: str
    env: Mapping[str, str]
    """What KubeRay gives to every container 0."""

    def submit(self, name: str, entrypoint: str, *words: str) -> subprocess.Popen[str]:
        """The submitter's line, through the shell. The ConfigMap is mounted at one path in all pods; here the head's stands for it."""
        line = f"ray job submit --address {self.dashboard} --submission-id {name} {shlex.join(words)} -- {entrypoint}"
        (submitter,) = self.job["spec"]["submitterPodTemplate"]["spec"]["containers"]
        return subprocess.Popen(
            ["bash", "-c", self.head.place(ray_of(self.head), line)],
            env=self.head.env(submitter) | self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def hook(self, pod: Pod, *words: str) -> subprocess.Popen[str]:
        """The preStop hook of a pod's Ray container, as the kubelet starts it."""
        command = ray_of(pod)["lifecycle"]["preStop"]["exec"]["command"]
        return subprocess.Popen(
            [*command, *words], env=pod.env(ray_of(pod)) | self.env, stderr=subprocess.PIPE, text=True
        )


def ray_of(pod: Pod) -> Mapping[str, Any]:
    (container,) = pod.template["spec"]["containers"]
    found: Mapping[str, Any] = container
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head, two workers, two cache sidecars, each with the commands, variables and probes of the rendered sample."""
    folder = tmp_path_factory.mktemp("pods")
    one, maps = rendered_job(folder)
    spec = one["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    gcs, dashboard = free_port(), free_port()
    assert spec["authOptions"] == {"mode": "token"}
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        # A busy machine starts a raylet in more than the 30 s that Ray waits for it.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
    }
    with ExitStack() as stack:
        daemons, raylets = [], []
        workers = [Pod(group["template"], folder / f"w{idx}", maps) for idx in range(group["replicas"])]
        for pod in workers:
            (sidecar,) = pod.template["spec"]["initContainers"]
            log = pod.folder / "cache.log"
            pod.folder.mkdir()
            daemon = stack.enter_context(process(pod.command(sidecar), pod.env(sidecar), log))
            until_probed(pod, sidecar, daemon, log)
            assert probe(pod, sidecar, "readinessProbe") and probe(pod, sidecar, "livenessProbe")
            daemons.append(daemon)

        head = Pod(spec["headGroupSpec"]["template"], folder / "head", maps)
        head.folder.mkdir()
        params = {
            **spec["headGroupSpec"]["rayStartParams"],
            "port": str(gcs),
            "dashboard-port": str(dashboard),
            "dashboard-host": "127.0.0.1",
            "node-ip-address": "127.0.0.1",
            "temp-dir": _short_folder(stack),
            **_agent_ports(),
        }
        log = head.folder / "ray.log"
        # On the head the address is nobody else's: KubeRay sets RAY_ADDRESS to its own port, which `ray start --head` does not read.
        started = stack.enter_context(
            process(ray_line(ray_of(head), params, "--head"), head.env(ray_of(head)) | env, log)
        )
        until_ready(params, started, log)  # as `wait-gcs-ready` keeps workers until the head is there
        for pod in workers:
            params = {
                **group["rayStartParams"],
                "address": f"127.0.0.1:{gcs}",
                "node-ip-address": "127.0.0.1",
                "num-cpus": ray_of(pod)["resources"]["limits"]["cpu"],
                **_agent_ports(),
            }
            log = pod.folder / "ray.log"
            started = stack.enter_context(process(ray_line(ray_of(pod), params), pod.env(ray_of(pod)) | env, log))
            until_ready(params, started, log)
            raylets.append(started)
        yield Cluster(one, head, workers, daemons, raylets, f"http://127.0.0.1:{dashboard}", env)
        for daemon in daemons:
            daemon.terminate()
            assert daemon.wait(timeout=10) == 0


def test_the_rendered_job_trains(cluster: Cluster) -> None:
    """Each rank reads through its own pod's daemon, and the arguments arrive as they were written."""
    submitted = cluster.submit("smoke-1", cluster.job["spec"]["entrypoint"])
    output, _ = submitted.communicate()
    assert submitted.returncode == 0, output + _logs(cluster.head.folder.parent)
    read = f"{256 * 64} bytes read, {2 * 256 * 64} by all {NOTE}"
    for pod in cluster.workers:
        assert f" of 2: cache at {pod.volume('cache-run')}/cache.sock, {read}" in output
        (sidecar,) = pod.template["spec"]["initContainers"]
        assert probe(pod, sidecar, "livenessProbe")


SAVES = """\
import os, pathlib, signal, sys, time
here, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def save(*_):
    time.sleep(4)  # Ray alone would kill after 3
    (here / f"saved-{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(here / f"started-{rank}").touch()
while True:
    time.sleep(0.1)
"""


def test_ranks_of_a_job_whose_pods_go_have_time_to_save(cluster: Cluster, tmp_path: Path) -> None:
    """As at `stop`: all pods are told to go at once. Without the hooks Ray would end with its ranks within the second."""
    (tmp_path / "save.py").write_text(SAVES)
    words = ["python", "-m", "launcher", "--address", "auto", "--nnodes", "2", str(tmp_path / "save.py"), str(tmp_path)]
    submitted = cluster.submit("saves-1", shlex.join(words))
    try:
        _until(lambda: {path.name for path in tmp_path.glob("started-*")} == {"started-0", "started-1"}, submitted)
        hooks = [
            cluster.hook(pod, "--proc", str(_processes(raylet, tmp_path / pod.folder.name)))
            for pod, raylet in zip(cluster.workers, cluster.raylets, strict=True)
        ]
        hooks.append(cluster.hook(cluster.head, "--dashboard", cluster.dashboard))
        for hook in hooks:
            said = hook.communicate()[1]
            assert hook.returncode == 0 and "is told to go" in said and "not told" not in said, said
        assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    finally:
        submitted.kill()
        submitted.communicate()


def _processes(root: subprocess.Popen[bytes], folder: Path) -> Path:
    """A pod sees its own processes only; here its /proc is made of those that its container has started."""
    folder.mkdir()
    for one in (psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)):
        (folder / str(one.pid)).symlink_to(f"/proc/{one.pid}")
    return folder


def _until(holds: Callable[[], bool], submitted: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if holds():
            return
        assert submitted.poll() is None, submitted.communicate()[0]
        time.sleep(0.1)
    pytest.fail("it never happened")


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
