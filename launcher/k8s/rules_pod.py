"""What KubeRay, the API server and the kubelet ask of one pod template. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.k8s.names import is_env_name, is_label_key, is_label_value
from launcher.k8s.quantity import parse_quantity
from launcher.k8s.violation import RAY_PORTS, Violation

RESERVED_ENV = (
    "RAY_CLUSTER_NAME",
    "RAY_CLUSTER_NAMESPACE",
    "RAY_CLOUD_INSTANCE_ID",
    "RAY_NODE_TYPE_NAME",
    "KUBERAY_GEN_RAY_START_CMD",
    "KUBERAY_GEN_AUTOSCALER_START_CMD",
    "RAY_PORT",
    "RAY_ADDRESS",
    "RAY_IP",
    "FQ_RAY_IP",
)
RESERVED_INIT_NAMES = ("wait-gcs-ready", "wait-for-tls-ip-san")
HEAD_SELECTOR_LABELS = ("app.kubernetes.io/created-by", "ray.io/identifier")
QUEUE_LABELS = (
    "kueue.x-k8s.io/queue-name",
    "volcano.sh/queue-name",
    "yunikorn.apache.org/queue",
    "yunikorn.apache.org/app-id",
    "kai.scheduler/queue",
    "ray.io/gang-scheduling-enabled",
    "ray.io/priority-class-name",
)
NETWORK_DAEMONS = ("tcpx-daemon", "tcpxo-daemon")
"""Google's: their probes read a file of their own, and they are known to wait for nobody."""
SHM_VOLUME = "shared-mem"


def check_pod(where: str, template: Mapping[str, Any]) -> Iterator[Violation]:
    """Of a head, a worker group or a submitter; `where` names it."""
    spec = template["spec"]
    containers, inits = spec["containers"], spec.get("initContainers", [])
    for container in (*containers, *inits):
        yield from _env(where, container)
        yield from _resources(where, container)
        yield from _mounts(where, container, spec.get("volumes", []))
    yield from _names(where, containers, inits, spec.get("volumes", []))
    yield from _ports(where, (*containers, *(one for one in inits if one.get("restartPolicy") == "Always")))
    yield from _labels(where, template.get("metadata", {}))


def check_ray_pod(where: str, template: Mapping[str, Any], *, is_head: bool) -> Iterator[Violation]:
    """Of a head or a worker group, whose container 0 KubeRay takes for Ray."""
    spec = template["spec"]
    ray, *sidecars = spec["containers"]
    natives = [one for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
    if not ray["name"].startswith("ray"):
        yield Violation(
            "ray-is-container-0",
            f"{where}: container 0 is {ray['name']}, and KubeRay takes container 0 for Ray",
            "list the Ray container first, or make the sidecar a native one (an init container with restartPolicy Always)",
        )
    yield from _operator_env(where, ray)
    yield from _memory_volumes(where, ray, spec.get("volumes", []))
    yield from _reserved_mounts(where, ray, spec.get("volumes", []))
    for container in spec.get("initContainers", []):
        if container["name"] in RESERVED_INIT_NAMES:
            yield Violation(
                "reserved-init-name",
                f"{where}: an init container is called {container['name']}, which KubeRay adds itself",
                "give it another name",
            )
    for container in (*sidecars, *natives):
        if container["name"] not in NETWORK_DAEMONS:
            yield from _sidecar_probes(where, container)
        yield from _sidecar_env(where, container)
    labels = template.get("metadata", {}).get("labels", {})
    for key in QUEUE_LABELS:
        if key in labels:
            yield Violation(
                "queue-label-on-pod",
                f"{where}: label {key} is on the pod template, where it does nothing",
                "put it on the RayJob's metadata (--scheduler, --queue)",
            )
    for key in HEAD_SELECTOR_LABELS if is_head else ():
        if key in labels:
            yield Violation(
                "head-selector-label",
                f"{where}: label {key} replaces KubeRay's own, the head's service no longer finds it, and all workers wait for ever",
                "leave the label out, or put it on the RayJob",
            )


def _env(where: str, container: Mapping[str, Any]) -> Iterator[Violation]:
    counts = Counter(entry["name"] for entry in container.get("env", []))
    for name, count in counts.items():
        if count > 1:
            yield Violation(
                "duplicate-env",
                f"{where}: variable {name} is there {count} times in {container['name']}; the API server refuses that in a RayJob",
                f"give {name} once",
            )
        if not is_env_name(name):
            yield Violation(
                "env-name", f"{where}: {name!r} is no name of a variable", "letters, digits and underscores"
            )


def _operator_env(where: str, ray: Mapping[str, Any]) -> Iterator[Violation]:
    for entry in ray.get("env", []):
        if entry["name"] in RESERVED_ENV:
            yield Violation(
                "reserved-env",
                f"{where}: variable {entry['name']} is set by KubeRay itself in Ray's container",
                "leave it out",
            )


def _sidecar_env(where: str, container: Mapping[str, Any]) -> Iterator[Violation]:
    words = [*container.get("command", []), *container.get("args", [])]
    words += [str(entry.get("value", "")) for entry in container.get("env", [])]
    if any(re.search(r"\$[({]?RAY_ADDRESS\b", word) for word in words):
        yield Violation(
            "sidecar-wants-ray-address",
            f"{where}: sidecar {container['name']} uses RAY_ADDRESS, which KubeRay gives to container 0 only",
            "let the sidecar do without Ray",
        )


def _sidecar_probes(where: str, container: Mapping[str, Any]) -> Iterator[Violation]:
    own = {port["containerPort"] for port in container.get("ports", [])}
    own_names = {port.get("name") for port in container.get("ports", [])}
    consequence = {
        "startupProbe": "a native sidecar comes before Ray, so the pod never starts",
        "readinessProbe": "the job is submitted only when every pod is ready, so it never is",
        "livenessProbe": "the sidecar is killed again and again",
    }
    for kind, then in consequence.items():
        probe = container.get(kind)
        if probe is None:
            continue
        action = probe.get("httpGet") or probe.get("tcpSocket") or probe.get("grpc")
        if action is not None and (action["port"] in own or action["port"] in own_names):
            continue
        asks = f"port {action['port']}, which is not its own" if action is not None else "a command"
        yield Violation(
            f"sidecar-{kind.removesuffix('Probe')}-waits",
            f"{where}: the {kind} of sidecar {container['name']} asks {asks}; if that waits for Ray or the training, {then}",
            "probe a port that the sidecar itself declares",
        )


def _resources(where: str, container: Mapping[str, Any]) -> Iterator[Violation]:
    limits = container.get("resources", {}).get("limits", {})
    requests = container.get("resources", {}).get("requests", {})
    for group in (limits, requests):
        for name, text in group.items():
            try:
                parse_quantity(str(text))
            except ValueError as error:
                yield Violation("quantity", f"{where}: {container['name']} has {name}: {text}; expected {error}")
                return
    for name, text in requests.items():
        is_device = "/" in name or name.startswith("hugepages-")
        if is_device and name not in limits:
            yield Violation(
                "device-in-requests-only",
                f"{where}: {container['name']} has {name} in requests only; Ray does not see it and Kubernetes refuses the pod",
                "put it in limits",
            )
        elif name in limits and parse_quantity(str(text)) > parse_quantity(str(limits[name])):
            yield Violation(
                "request-over-limit",
                f"{where}: {container['name']} requests {text} of {name}, above its limit {limits[name]}",
            )
        elif is_device and parse_quantity(str(text)) != parse_quantity(str(limits[name])):
            yield Violation(
                "device-request",
                f"{where}: {container['name']} requests {text} of {name} and its limit is {limits[name]}; devices are not overcommitted",
            )


def _mounts(where: str, container: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> Iterator[Violation]:
    names = {volume["name"] for volume in volumes}
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in names:
            yield Violation(
                "mount-without-volume",
                f"{where}: {container['name']} mounts {mount['name']}, and the pod has no such volume",
            )
    paths = Counter(mount["mountPath"] for mount in container.get("volumeMounts", []))
    for path, count in paths.items():
        if count > 1:
            yield Violation("duplicate-mount", f"{where}: {container['name']} mounts {count} volumes at {path}")


def _memory_volumes(where: str, ray: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> Iterator[Violation]:
    """What is written into a memory-backed volume counts against the limit of the container that writes it."""
    limit = ray.get("resources", {}).get("limits", {}).get("memory")
    if limit is None:
        return
    mounted = {mount["name"] for mount in ray.get("volumeMounts", [])}
    in_memory = [
        volume
        for volume in volumes
        if volume["name"] in mounted and volume.get("emptyDir", {}).get("medium") == "Memory"
    ]
    unbounded = [volume["name"] for volume in in_memory if "sizeLimit" not in volume["emptyDir"]]
    try:
        total = sum(parse_quantity(str(volume["emptyDir"].get("sizeLimit", "0"))) for volume in in_memory)
        room = parse_quantity(str(limit)) * 0.75
    except ValueError as error:
        yield Violation("quantity", f"{where}: memory {limit} and its volumes' sizeLimit: expected {error}")
        return
    if unbounded or total > room:
        size = f"{', '.join(unbounded)} without a sizeLimit" if unbounded else f"{total / 2**30:.1f} GiB"
        yield Violation(
            "memory-volume-without-room",
            f"{where}: memory-backed volumes of {size} count against Ray's memory limit of {limit}",
            "raise --memory, or lower --shm to half of it",
        )


def _reserved_mounts(where: str, ray: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> Iterator[Violation]:
    by_name = {volume["name"]: volume for volume in volumes}
    for mount in ray.get("volumeMounts", []):
        path = mount["mountPath"].rstrip("/")
        if path == "/tmp/ray" or path.startswith("/tmp/ray/"):
            yield Violation(
                "mount-over-ray",
                f"{where}: {mount['name']} is mounted at {path}, where Ray keeps its session",
                "mount it elsewhere",
            )
        source = by_name.get(mount["name"], {})
        if path == "/dev/shm" and source.get("emptyDir", {}).get("medium") != "Memory":
            yield Violation(
                "mount-over-ray",
                f"{where}: {mount['name']} is mounted at /dev/shm and is not memory: NCCL and DataLoader workers pass their data there",
                "mount it elsewhere, and size /dev/shm with --shm",
            )


def _names(
    where: str,
    containers: Sequence[Mapping[str, Any]],
    inits: Sequence[Mapping[str, Any]],
    volumes: Sequence[Mapping[str, Any]],
) -> Iterator[Violation]:
    for kind, items in (("container", (*containers, *inits)), ("volume", volumes)):
        for name, count in Counter(item["name"] for item in items).items():
            if count > 1:
                yield Violation(
                    f"duplicate-{kind}", f"{where}: {count} {kind}s are called {name}", "give each its own name"
                )


def _ports(where: str, containers: Sequence[Mapping[str, Any]]) -> Iterator[Violation]:
    """All containers of a pod share one network: a port is taken by whoever listens first."""
    taken: dict[int, str] = {}
    for idx, container in enumerate(containers):
        for port in container.get("ports", []):
            number = port["containerPort"]
            if idx > 0 and number in RAY_PORTS:
                yield Violation(
                    "port-clash",
                    f"{where}: {container['name']} listens at {number}, which is {RAY_PORTS[number]}",
                    "choose another port",
                )
            elif number in taken and taken[number] != container["name"]:
                yield Violation(
                    "port-clash",
                    f"{where}: {taken[number]} and {container['name']} both listen at {number}",
                    "choose another port",
                )
            taken.setdefault(number, container["name"])


def _labels(where: str, metadata: Mapping[str, Any]) -> Iterator[Violation]:
    for key, value in metadata.get("labels", {}).items():
        if not is_label_key(key) or not is_label_value(value):
            yield Violation(
                "label",
                f"{where}: {key}={value} is no label",
                "at most 63 letters, digits, dashes, dots and underscores",
            )
