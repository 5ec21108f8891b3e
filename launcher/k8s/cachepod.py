"""The node cache in a pod: a native sidecar that is the daemon, its volumes, and the containers that warm it. Pure.

The daemon's probes ask only the daemon: a sidecar that waited for Ray would keep Ray from starting, because init containers (which native
sidecars are) come first. Readers get open files over the daemon's socket, so the Ray container needs only the socket's folder; the cache's
volume is mounted there as well, read-only, for whoever wants to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.k8s.choices import CacheMode, CacheVolume, Preload
from launcher.k8s.options import CACHE_PATH, CACHE_PORT, DEFAULT_UID, SOCKET_FOLDER, KubeJob
from launcher.k8s.peers import peer_arguments, peer_mounts, peer_ports, peer_volumes
from launcher.k8s.quantity import GIB, format_bytes

SOCKET = f"{SOCKET_FOLDER}/cache.sock"
SOCKET_VARIABLE = "RAILHEAD_CACHE_SOCKET"
CONTAINER = "cache"
DATA_VOLUME = "cache-data"
SOCKET_VOLUME = "cache-run"

# "$@" is the preload. Its end is not the pod's: what it could not fetch training reads from the origin, more slowly.
_BEFORE = '"$@" || echo "preload ended with $?: training reads the rest from the origin"'
# A container that ends would make the pod unready, and the job would never be submitted: it stays, and goes at once on SIGTERM.
_BESIDE = (
    'trap \'kill $! 2>/dev/null; exit 0\' TERM; "$@" & wait $!; echo "preload ended with $?"; sleep infinity & wait'
)


@dataclass(frozen=True)
class CacheParts:
    """What the cache adds to a worker's pod template."""

    init_containers: tuple[dict[str, Any], ...] = ()
    volumes: tuple[dict[str, Any], ...] = ()
    ray_mounts: tuple[dict[str, Any], ...] = ()
    ray_env: tuple[dict[str, Any], ...] = ()


def cache_parts(job: KubeJob, env: Sequence[dict[str, Any]], env_from: Sequence[dict[str, Any]]) -> CacheParts:
    """`env`, `env_from`: the job's own variables; the daemon needs the object store's keys among them."""
    mode = job.kube.cache.mode
    if mode is CacheMode.NONE:
        return CacheParts()
    socket = {"name": SOCKET_VARIABLE, "value": SOCKET}
    if mode is CacheMode.DAEMONSET:
        folder = {"path": f"{job.kube.cache.host_path}/run", "type": "Directory"}
        return CacheParts(
            init_containers=_warmers(job, env, env_from),
            # type Directory: a node without the daemon is said by an event of the pod, not by silence
            volumes=({"name": SOCKET_VOLUME, "hostPath": folder},),
            ray_mounts=({"name": SOCKET_VOLUME, "mountPath": SOCKET_FOLDER},),
            ray_env=(socket,),
        )
    return CacheParts(
        init_containers=(*_owners(job), _sidecar(job, env, env_from), *_warmers(job, env, env_from)),
        volumes=(
            _data_volume(job),
            {"name": SOCKET_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            *peer_volumes(job),
        ),
        ray_mounts=(
            {"name": SOCKET_VOLUME, "mountPath": SOCKET_FOLDER},
            {"name": DATA_VOLUME, "mountPath": CACHE_PATH, "readOnly": True},
        ),
        ray_env=(socket,),
    )


def _owners(job: KubeJob) -> tuple[dict[str, Any], ...]:
    """The kubelet makes a hostPath for root, and fsGroup does not reach it: it is handed to the pod's user first."""
    if job.kube.cache.volume is not CacheVolume.HOST_PATH:
        return ()
    container = {
        "name": "cache-dir",
        "image": job.kube.cache.image or job.kube.image,
        **_pull_policy(job),
        "command": [
            "chown",
            str(job.kube.run_as_user if job.kube.run_as_user is not None else DEFAULT_UID),
            CACHE_PATH,
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "64Mi"}},
        "volumeMounts": [{"name": DATA_VOLUME, "mountPath": CACHE_PATH}],
        "securityContext": {"runAsUser": 0, "runAsNonRoot": False},
    }
    return (container,)


def volume_bytes(job: KubeJob) -> int:
    """The volume's size: the kubelet evicts a pod that outgrows its emptyDir, and the daemon's index and logs need room as well."""
    return job.capacity_bytes + job.capacity_bytes // 20 + GIB


def _sidecar(job: KubeJob, env: Sequence[dict[str, Any]], env_from: Sequence[dict[str, Any]]) -> dict[str, Any]:
    assert job.spec.cache is not None
    settings = job.kube.cache
    requests: dict[str, str] = {"cpu": settings.cpus, "memory": settings.memory}
    limits: dict[str, str] = {"memory": settings.memory}
    if settings.volume is CacheVolume.EMPTY_DIR:
        # The scheduler then takes a node whose disk has the room, instead of the kubelet evicting the pod when it is full.
        requests["ephemeral-storage"] = format_bytes(volume_bytes(job))
    probe = {"httpGet": {"path": "/healthz", "port": "cache-metrics"}}
    capacity = str(job.capacity_bytes)
    return {
        "name": CONTAINER,
        "image": settings.image or job.kube.image,
        **_pull_policy(job),
        "restartPolicy": "Always",
        "command": ["python", "-m", "cache", "serve"],
        "args": [
            *("--dir", CACHE_PATH),
            *("--capacity", capacity),
            *("--socket", SOCKET),
            *("--metrics", f"0.0.0.0:{CACHE_PORT}"),
            *("--log-format", "json"),
            *peer_arguments(job),
        ],
        **({"env": list(env)} if env else {}),
        **({"envFrom": list(env_from)} if env_from else {}),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "ports": [{"name": "cache-metrics", "containerPort": CACHE_PORT}, *peer_ports(job)],
        "resources": {"requests": requests, "limits": limits},
        # A start verifies the index of what is on disk: seconds for terabytes. Two minutes are beyond any that was seen.
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": 120},
        "readinessProbe": {**probe, "periodSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**probe, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "volumeMounts": [
            {"name": DATA_VOLUME, "mountPath": CACHE_PATH},
            {"name": SOCKET_VOLUME, "mountPath": SOCKET_FOLDER},
            *peer_mounts(job),
        ],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def _warmers(
    job: KubeJob, env: Sequence[dict[str, Any]], env_from: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    preload = job.kube.cache.preload
    if preload is Preload.NONE:
        return ()
    words = ["python", "-m", "cache", "preload", "--socket", SOCKET, "--no-verify", *job.kube.data]
    container: dict[str, Any] = {
        "name": "preload",
        "image": job.kube.cache.image or job.kube.image,
        **_pull_policy(job),
        "command": ["bash", "-c", _BEFORE if preload is Preload.BEFORE else _BESIDE, "preload", *words],
        **({"env": list(env)} if env else {}),
        **({"envFrom": list(env_from)} if env_from else {}),
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [{"name": SOCKET_VOLUME, "mountPath": SOCKET_FOLDER}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if preload is Preload.BESIDE:
        container["restartPolicy"] = "Always"
    return (container,)


def _data_volume(job: KubeJob) -> dict[str, Any]:
    settings = job.kube.cache
    size = format_bytes(volume_bytes(job))
    match settings.volume:
        case CacheVolume.EMPTY_DIR:
            source: dict[str, Any] = {"emptyDir": {"sizeLimit": size}}
        case CacheVolume.EPHEMERAL:
            claim: dict[str, Any] = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
            if settings.storage_class is not None:
                claim["storageClassName"] = settings.storage_class
            source = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
        case CacheVolume.HOST_PATH:
            source = {"hostPath": {"path": f"{settings.host_path}/cache", "type": "DirectoryOrCreate"}}
    return {"name": DATA_VOLUME, **source}


def _pull_policy(job: KubeJob) -> dict[str, str]:
    return {"imagePullPolicy": job.kube.image_pull_policy} if job.kube.image_pull_policy else {}
