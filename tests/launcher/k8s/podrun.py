"""What a kubelet, the cluster's DNS and KubeRay do with a rendered job, done by hand for processes of one machine.

Volumes become folders of the pod's own, its address one of loopback's, container ports free ports; a headless Service is a name that the
pods' processes resolve to the addresses that its selector picks; `ray start` is made from rayStartParams and pasted into a bash line as the
operator pastes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.k8s.manifest import Rendered
from launcher.k8s.peers import KEY

REPOSITORY = Path(__file__).parents[3]
HANG_S = 60.0
"""A guard against hanging, not a promise."""

# Python reads this at its start: names of Services are looked up in a file, which stands for the cluster's DNS.
_DNS = """
import os, socket
_getaddrinfo = socket.getaddrinfo
def getaddrinfo(host, port, *args, **kwargs):
    with open(os.path.join(os.path.dirname(__file__), "hosts")) as hosts:
        addresses = [line.split()[0] for line in hosts if line.split()[1] == host]
    if not addresses:
        return _getaddrinfo(host, port, *args, **kwargs)
    return [found for address in addresses for found in _getaddrinfo(address, port, *args, **kwargs)]
socket.getaddrinfo = getaddrinfo
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Namespace:
    """What the pods of a job have in common: ConfigMaps, Secrets, names, and which port stands for which."""

    def __init__(self, rendered: Rendered, folder: Path) -> None:
        self.config_maps = {
            one["metadata"]["name"]: one["data"] for one in rendered.objects if one["kind"] == "ConfigMap"
        }
        # As `submit` makes them up.
        self.secrets = {one["metadata"]["name"]: {KEY: secrets.token_hex(32)} for one in rendered.own_secrets}
        self.services = [one for one in rendered.objects if one["kind"] == "Service"]
        self.policies = [one for one in rendered.objects if one["kind"] == "NetworkPolicy"]
        self.dns = folder / "dns"
        self.dns.mkdir()
        (self.dns / "sitecustomize.py").write_text(_DNS)
        (self.dns / "hosts").touch()
        self._ports: dict[int, int] = {}

    def port(self, number: int) -> int:
        """Alike for all pods, which differ by address: a Service has one port for all of them."""
        return self._ports.setdefault(number, free_port())

    def publish(self, pods: Sequence[Pod]) -> None:
        """The addresses that each Service's name has, from the moment that a pod has one (`publishNotReadyAddresses`)."""
        lines = [
            f"{pod.address} {service['metadata']['name']}\n"
            for service in self.services
            for pod in pods
            if service["spec"]["publishNotReadyAddresses"]
            and service["spec"]["selector"].items() <= pod.template["metadata"]["labels"].items()
        ]
        (self.dns / "hosts").write_text("".join(lines))

    def lets_in(self, pod: Pod, number: int, from_labels: Mapping[str, str]) -> bool:
        """Whether the policies let a pod with these labels connect to the port; a pod that none selects takes everybody."""
        labels = pod.template["metadata"]["labels"]
        own = [one for one in self.policies if one["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]
        return not own or any(
            ("ports" not in rule or number in {port["port"] for port in rule["ports"]})
            and any(
                peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= from_labels.items()
                for peer in rule["from"]
            )
            for policy in own
            for rule in policy["spec"]["ingress"]
        )


@dataclass
class Pod:
    """One pod's place on this machine: a folder for each of its volumes, an address, a port for each of its containers' ports."""

    template: Mapping[str, Any]
    folder: Path
    namespace: Namespace
    address: str = "127.0.0.1"
    volumes: dict[str, Path] = field(default_factory=dict)

    def volume(self, name: str) -> Path:
        if name not in self.volumes:
            path = self.volumes[name] = self.folder / name
            path.mkdir(parents=True)
            source = next(volume for volume in self.template["spec"]["volumes"] if volume["name"] == name)
            for file, text in self.namespace.config_maps.get(source.get("configMap", {}).get("name", ""), {}).items():
                (path / file).write_text(text)
            secret = source.get("secret", {})
            for file, text in self.namespace.secrets.get(secret.get("secretName", ""), {}).items():
                (path / file).write_text(text)
                (path / file).chmod(secret["defaultMode"])
        return self.volumes[name]

    def place(self, container: Mapping[str, Any], text: str) -> str:
        """A word of the container's command or environment, as it is here. /dev/shm is this machine's own."""
        for mount in sorted(container.get("volumeMounts", []), key=lambda mount: -len(mount["mountPath"])):
            if mount["mountPath"] != "/dev/shm":
                text = text.replace(mount["mountPath"], str(self.volume(mount["name"])))
        for port in container.get("ports", []):
            number = port["containerPort"]
            text = text.replace(f"0.0.0.0:{number}", f"{self.address}:{self.namespace.port(number)}")
            if text.startswith("dns:"):
                text = text.replace(f":{number}", f":{self.namespace.port(number)}")
        return text

    def env(self, container: Mapping[str, Any]) -> dict[str, str]:
        plain = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PYTHONPATH": f"{self.namespace.dns}:{REPOSITORY}",
        }
        return plain | {entry["name"]: self.place(container, entry["value"]) for entry in container.get("env", [])}

    def command(self, container: Mapping[str, Any]) -> list[str]:
        return [self.place(container, word) for word in (*container.get("command", []), *container.get("args", []))]

    @property
    def ray(self) -> Mapping[str, Any]:
        (container,) = self.template["spec"]["containers"]
        found: Mapping[str, Any] = container
        return found

    @property
    def sidecar(self) -> Mapping[str, Any]:
        (container,) = self.template["spec"]["initContainers"]
        found: Mapping[str, Any] = container
        return found

    def url(self, container: Mapping[str, Any], port_name: str, path: str) -> str:
        number = next(port["containerPort"] for port in container["ports"] if port["name"] == port_name)
        return f"http://{self.address}:{self.namespace.port(number)}{path}"


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


def probe(pod: Pod, container: Mapping[str, Any], kind: str, timeout_s: float = 5.0) -> bool:
    """Once, as the kubelet does it: any answer from 200 to 399 counts."""
    action = container[kind]["httpGet"]
    try:
        with urllib.request.urlopen(pod.url(container, action["port"], action["path"]), timeout=timeout_s) as answer:
            return 200 <= answer.status < 400
    except (urllib.error.URLError, OSError):
        return False


def fails(pod: Pod, container: Mapping[str, Any], kind: str, timeout_s: float) -> bool:
    """The kubelet's judgement: as many failures in a row as the manifest says."""
    return not any(probe(pod, container, kind, timeout_s) for _ in range(container[kind]["failureThreshold"]))


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
