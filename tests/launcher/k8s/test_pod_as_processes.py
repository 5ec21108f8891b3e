"""The rendered pods, run without Kubernetes: the very commands, variables and probes as processes of this machine (podrun.py has how).

The job is submitted once every pod is ready, and the submitter's line goes through a shell, as KubeRay does both.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cache.client import Cache
from launcher.k8s.leave import _has_agent
from launcher.k8s.manifest import Rendered, render
from launcher.k8s.request import cut, with_job_file
from launcher.k8s.resolve import to_job
from tests.counting_origin import CountingOrigin, random_bytes
from tests.launcher.k8s.jobs import ray_job
from tests.launcher.k8s.podrun import (
    HANG_S,
    REPOSITORY,
    Namespace,
    Pod,
    fails,
    free_port,
    probe,
    process,
    ray_line,
    until_probed,
    until_ready,
)

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.e2e, pytest.mark.timeout(240)]

NOTE = 'it\'s $HOME; `id` && "two words"'
SHARD = random_bytes(3 << 20)


def rendered_job(url: str) -> Rendered:
    """The checked-in sample as `python -m launcher render` makes it, with one rank in each pod, a spare worker, and a network policy."""
    samples = REPOSITORY / "k8s" / "samples"
    flags = ["--nproc-per-node", "1", "--cpus", "1", "--spare-nodes", "1", "--network-policy", "smoke.py", url, NOTE]
    request = with_job_file(cut(flags), (samples / "smoke.job.yaml").read_text(), "smoke.job.yaml")
    return render(to_job(request, {}, lambda name: (samples / name).read_text()))


@dataclass
class Cluster:
    """The pods of a rendered job, up and ready, as they are when KubeRay hands the job to Ray."""

    job: Mapping[str, Any]
    namespace: Namespace
    origin: CountingOrigin
    head: Pod
    workers: list[Pod]
    daemons: list[subprocess.Popen[bytes]]
    """What each worker's sidecar runs."""
    raylets: list[subprocess.Popen[bytes]]
    """What each worker's Ray container runs."""
    dashboard: str
    env: Mapping[str, str]
    """What KubeRay gives to every container 0."""

    @contextmanager
    def submitted(self, name: str, entrypoint: str) -> Iterator[subprocess.Popen[str]]:
        """The submitter's line, through the shell. The ConfigMap is mounted at one path in all pods; here the head's stands for it."""
        line = f"ray job submit --address {self.dashboard} --submission-id {name} -- {entrypoint}"
        (submitter,) = self.job["spec"]["submitterPodTemplate"]["spec"]["containers"]
        with subprocess.Popen(
            ["bash", "-c", self.head.place(self.head.ray, line)],
            env=self.head.env(submitter) | self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as started:
            try:
                yield started
            finally:
                started.kill()

    def hook(self, pod: Pod, *words: str) -> subprocess.Popen[str]:
        """The preStop hook of a pod's Ray container, as the kubelet starts it."""
        command = pod.ray["lifecycle"]["preStop"]["exec"]["command"]
        return subprocess.Popen([*command, *words], env=pod.env(pod.ray) | self.env, stderr=subprocess.PIPE, text=True)

    def account(self, pod: Pod) -> dict[str, Any]:
        """What the pod's daemon says of itself at the port of its probes."""
        with urllib.request.urlopen(pod.url(pod.sidecar, "cache-metrics", "/status"), timeout=HANG_S) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head, three workers (one of them a spare), three sidecars, each with the commands, variables and probes of the rendered sample."""
    folder = tmp_path_factory.mktemp("pods")
    origin = CountingOrigin()
    rendered = rendered_job(origin.put("shard", SHARD))
    one, namespace = ray_job(rendered), Namespace(rendered, folder)
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
        stack.callback(origin.close)
        workers = [
            Pod(group["template"], folder / f"w{idx}", namespace, f"127.0.0.{11 + idx}")
            for idx in range(group["replicas"])
        ]
        namespace.publish(workers)
        for pod in workers:
            pod.folder.mkdir()
            assert not probe(pod, pod.sidecar, "startupProbe"), (
                "nothing has started, and the kubelet would let Ray start"
            )
        daemons = [
            stack.enter_context(process(pod.command(pod.sidecar), pod.env(pod.sidecar), pod.folder / "cache.log"))
            for pod in workers
        ]
        for pod, daemon in zip(workers, daemons, strict=True):
            until_probed(pod, pod.sidecar, daemon, pod.folder / "cache.log")
            assert probe(pod, pod.sidecar, "readinessProbe") and probe(pod, pod.sidecar, "livenessProbe")

        head = Pod(spec["headGroupSpec"]["template"], folder / "head", namespace)
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
        started = stack.enter_context(process(ray_line(head.ray, params, "--head"), head.env(head.ray) | env, log))
        until_ready(params, started, log)  # as `wait-gcs-ready` keeps workers until the head is there
        raylets = []
        for pod in workers:
            params = {
                **group["rayStartParams"],
                "address": f"127.0.0.1:{gcs}",
                "node-ip-address": "127.0.0.1",
                "num-cpus": pod.ray["resources"]["limits"]["cpu"],
                **_agent_ports(),
            }
            log = pod.folder / "ray.log"
            started = stack.enter_context(process(ray_line(pod.ray, params), pod.env(pod.ray) | env, log))
            until_ready(params, started, log)  # one after the other: raylets of one machine get in each other's way
            raylets.append(started)
        yield Cluster(one, namespace, origin, head, workers, daemons, raylets, f"http://127.0.0.1:{dashboard}", env)


def test_the_rendered_job_trains_and_its_nodes_lend_each_other_what_left_the_origin_once(cluster: Cluster) -> None:
    """Each rank reads through its own pod's daemon, and the arguments arrive as they were written. The daemons find each other by the
    Service and believe each other by the Secret, both as they were rendered; the network policy lets them."""
    for pod in cluster.workers:
        (peer_port,) = (port["containerPort"] for port in pod.sidecar["ports"] if port["name"] == "cache-peers")
        assert cluster.namespace.lets_in(pod, peer_port, cluster.workers[0].template["metadata"]["labels"])
        assert not cluster.namespace.lets_in(pod, peer_port, {"app": "a stranger"})
    _until(lambda: all(cluster.account(pod)["peers"]["members"] == 3 for pod in cluster.workers))
    with cluster.submitted("smoke-1", cluster.job["spec"]["entrypoint"]) as submitted:
        output, _ = submitted.communicate()
    assert submitted.returncode == 0, output + _logs(cluster.head.folder.parent)
    read = f"{len(SHARD)} bytes read, {2 * len(SHARD)} by all {NOTE}"
    with_ranks = [
        pod for pod in cluster.workers if f" of 2: cache at {pod.volume('cache-run')}/cache.sock, {read}" in output
    ]
    assert len(with_ranks) == 2, f"two ranks, and a spare without one: {output}"
    counters = [cluster.account(pod)["counters"] for pod in cluster.workers]
    assert cluster.origin.bytes_sent == len(SHARD) == sum(one["fetched_bytes"] for one in counters)
    lent = sum(one["lent_bytes"] for one in counters)
    assert lent == sum(one["borrowed_bytes"] for one in counters) and lent in (len(SHARD), 2 * len(SHARD))
    assert all(probe(pod, pod.sidecar, "livenessProbe") for pod in cluster.workers)


def test_the_probes_fail_when_the_daemon_hangs_and_pass_when_it_goes_on(cluster: Cluster) -> None:
    """Of a process that is there and does nothing, only the probes know: the kubelet starts the daemon anew."""
    pod, daemon = cluster.workers[0], cluster.daemons[0]
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        for kind in ("readinessProbe", "livenessProbe"):
            assert fails(pod, pod.sidecar, kind, timeout_s=0.3)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    for kind in ("readinessProbe", "livenessProbe"):
        assert not fails(pod, pod.sidecar, kind, timeout_s=5.0)


SAVES = """\
import os, pathlib, signal, sys, time
here, rank, attempt = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ["RAILHEAD_ATTEMPT"]
def save(*_):
    time.sleep(4)  # Ray alone would kill after 3
    (here / f"saved-{attempt}-{rank}").touch()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, save)
started = here / f"started-{attempt}-{rank}"
started.with_suffix(".part").write_text(f"{os.environ['RAILHEAD_CACHE_SOCKET']} {os.environ['WORLD_SIZE']}")
started.with_suffix(".part").rename(started)
while not (here / "enough").exists():
    time.sleep(0.1)
"""


def started(folder: Path, attempt: int) -> dict[str, str]:
    """Rank → where it runs: its pod's cache socket, and the size of its world."""
    return {path.name.rpartition("-")[2]: path.read_text() for path in folder.glob(f"started-{attempt}-[0-9]")}


def launch(folder: Path, *flags: str) -> str:
    (folder / "save.py").write_text(SAVES)
    words = [
        "python",
        "-m",
        "launcher",
        "--address",
        "auto",
        "--nnodes",
        "2",
        *flags,
        str(folder / "save.py"),
        str(folder),
    ]
    return shlex.join(words)


def test_a_spot_worker_that_goes_alone_is_replaced_by_the_spare_after_its_ranks_have_saved(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The pod's hook tells Ray, Ray the launcher, the launcher the ranks; the pod may go once its ranks have, and training goes on with as
    many nodes as before, at no cost to --max-restarts."""
    flags = ("--spare-nodes", "1", "--max-restarts", "0")
    with cluster.submitted("spot-1", launch(tmp_path, *flags)) as submitted:
        _until(lambda: started(tmp_path, 0).keys() == {"0", "1"}, submitted)
        first = started(tmp_path, 0)
        idx = next(idx for idx, pod in enumerate(cluster.workers) if str(pod.folder) in first["0"])
        gone, raylet = cluster.workers[idx], cluster.raylets[idx]
        hook = cluster.hook(gone, "--proc", str(_processes(raylet, tmp_path / "proc")))
        said = hook.communicate()[1]
        assert hook.returncode == 0 and "is told to go" in said and "not told" not in said, said
        assert {path.name for path in tmp_path.glob("saved-0-*")} == {"saved-0-0", "saved-0-1"}
        assert not _has_agent(tmp_path / "proc"), (
            "the hook returned because nothing of the job is left there, not because its time was up"
        )
        raylet.terminate()  # as the kubelet does when the hook has returned; the sidecar comes after Ray
        raylet.wait(HANG_S)
        cluster.daemons[idx].terminate()
        assert cluster.daemons[idx].wait(HANG_S) == 0
        _until(lambda: started(tmp_path, 1).keys() == {"0", "1"}, submitted)
        second = started(tmp_path, 1)
        assert all(where.endswith(" 2") for where in second.values()), "the world is as large as before"
        assert not any(str(gone.folder) in where for where in second.values())
        assert second["1"] == first["1"], "who stayed keeps its rank"
        (tmp_path / "enough").touch()
        output, _ = submitted.communicate(timeout=HANG_S)
        assert submitted.returncode == 0, output + _logs(cluster.head.folder.parent)


def test_ranks_of_a_job_whose_pods_go_have_time_to_save(cluster: Cluster, tmp_path: Path) -> None:
    """As at `stop`: all pods are told to go at once. Without the hooks Ray would end with its ranks within the second."""
    with cluster.submitted("saves-1", launch(tmp_path)) as submitted:
        _until(lambda: started(tmp_path, 0).keys() == {"0", "1"}, submitted)
        hooks = [
            cluster.hook(pod, "--proc", str(_processes(raylet, tmp_path / pod.folder.name)))
            for pod, raylet in zip(cluster.workers, cluster.raylets, strict=True)
            if any(str(pod.folder) in where for where in started(tmp_path, 0).values())
        ]
        hooks.append(cluster.hook(cluster.head, "--dashboard", cluster.dashboard))
        for hook in hooks:
            said = hook.communicate()[1]
            assert hook.returncode == 0 and "is told to go" in said and "not told" not in said, said
        assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0-0", "saved-0-1"}


def test_a_sidecar_ends_soon_after_sigterm_with_readers_and_a_fetch_in_flight(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    """It is the last to go, with ten seconds of the pod's grace for Ray and for it. How long it took is reported (2 s are promised);
    what is asserted is that it ends by itself, with 0, while a reader waits for it and the object store says nothing."""
    idx = next(idx for idx, daemon in enumerate(cluster.daemons) if daemon.poll() is None)
    pod, daemon = cluster.workers[idx], cluster.daemons[idx]
    url = cluster.origin.put("slow", SHARD)
    cluster.origin.hold("slow", from_byte=1)
    with Cache(f"{pod.volume('cache-run')}/cache.sock") as cache, cache.open(url) as shard:
        reads: list[int] = []
        reader = threading.Thread(target=lambda: reads.append(len(shard.read(0, len(SHARD)))))
        reader.start()
        _until(lambda: bool(cluster.account(pod)["in_flight_blocks"]))
        began_s = time.monotonic()
        daemon.terminate()
        assert daemon.wait(HANG_S) == 0
        took_s = time.monotonic() - began_s
        record_property("sidecar_sigterm_s", round(took_s, 3))
        print(f"sidecar ended {took_s:.2f} s after SIGTERM")
        assert fails(pod, pod.sidecar, "livenessProbe", timeout_s=1.0)
        cluster.origin.release()
        reader.join(HANG_S)
    assert reads == [len(SHARD)], "the reader went on from the origin"


def _processes(root: subprocess.Popen[bytes], folder: Path) -> Path:
    """A pod sees its own processes only; here its /proc is made of those that its container has started."""
    folder.mkdir()
    for one in (psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)):
        (folder / str(one.pid)).symlink_to(f"/proc/{one.pid}")
    return folder


def _until(holds: Callable[[], bool], submitted: subprocess.Popen[str] | None = None) -> None:
    for _ in range(600):
        if holds():
            return
        assert submitted is None or submitted.poll() is None, submitted.communicate()[0]
        time.sleep(0.1)
    pytest.fail("it never happened")


def _agent_ports() -> dict[str, str]:
    """What each pod has for itself on Kubernetes, and processes of one machine must share out."""
    return {"metrics-export-port": str(free_port()), "dashboard-agent-listen-port": str(free_port())}


def _short_folder(stack: ExitStack) -> str:
    """Ray's sockets lie in it, and the kernel allows 107 bytes for a path."""
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True))


def _logs(folder: Path) -> str:
    return "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*/*.log")))


def test_the_submitters_words_reach_the_script_unchanged() -> None:
    """What the shell in between would act on stands quoted in the entrypoint."""
    assert shlex.split(ray_job(rendered_job("http://x/shard"))["spec"]["entrypoint"])[-1] == NOTE
