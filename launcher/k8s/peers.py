"""The caches of a job's nodes as peers: each byte leaves the object store once, and goes from node to node from there. Pure.

A headless Service is the list of peers: its name resolves to the addresses of all workers, ready or not, because a preload runs before Ray
is up. They believe each other by a key from a Secret, which is never in a manifest: `submit` makes one for a job that names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode
from launcher.k8s.options import PEER_PORT, CacheSettings, KubeJob

KEY = "key"
"""Of the Secret: at least 16 random bytes, in hexadecimal digits or as they are."""
KEY_VOLUME, KEY_FOLDER = "cache-peer-key", "/railhead/peer-key"
TLS_VOLUME, TLS_FOLDER = "cache-peer-tls", "/railhead/peer-tls"
PORT_NAME = "cache-peers"


def service_name(job: KubeJob) -> str:
    return f"{job.kube.name}-cache-peers"


def secret_name(job: KubeJob) -> str:
    """The Secret that is named, or the one that `submit` makes."""
    return job.kube.cache.peer_secret or f"{job.kube.name}-peer-key"


def makes_key(job: KubeJob) -> bool:
    """True: the Secret is the job's own, and is made with it."""
    return job.kube.cache.peers and job.kube.cache.peer_secret is None


def how_to_make_key(secret: Mapping[str, Any]) -> str:
    name, namespace = secret["metadata"]["name"], secret["metadata"]["namespace"]
    return f"kubectl create secret generic {name} --namespace {namespace} --from-literal={KEY}=$(openssl rand -hex 32)"


def check_peers(settings: CacheSettings) -> None:
    """Raises SpecError where peers are asked for and there is no daemon of the job's own, and the other way round."""
    if not settings.peers:
        for flag, name in (("secret", settings.peer_secret), ("tls-secret", settings.peer_tls_secret)):
            if name is not None:
                raise SpecError(f"--cache-peer-{flag} {name} without --cache-peers", advice="add --cache-peers")
    elif settings.mode is CacheMode.DAEMONSET:
        raise SpecError(
            "--cache-peers with --cache daemonset: the nodes' daemons are not the job's, and choose their peers themselves",
            advice="leave it out; kubectl apply -k k8s/cache-peers makes peers of them",
        )
    elif settings.mode is CacheMode.NONE:
        raise SpecError("--cache-peers with --cache none: there is nothing to share", advice="give --cache-capacity")


def peer_arguments(job: KubeJob) -> list[str]:
    """What the sidecar is told. Each daemon finds itself among the addresses, and asks the others."""
    if not job.kube.cache.peers:
        return []
    words = [
        *("--peers", f"dns:{service_name(job)}:{PEER_PORT}"),
        *("--peer-listen", f"0.0.0.0:{PEER_PORT}"),
        *("--peer-key-file", f"{KEY_FOLDER}/{KEY}"),
    ]
    if job.kube.cache.peer_tls_secret is not None:
        for flag, file in (("cert", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt")):
            words += [f"--peer-tls-{flag}", f"{TLS_FOLDER}/{file}"]
    return words


def peer_ports(job: KubeJob) -> list[dict[str, Any]]:
    return [{"name": PORT_NAME, "containerPort": PEER_PORT}] if job.kube.cache.peers else []


def peer_mounts(job: KubeJob) -> list[dict[str, Any]]:
    return [{"name": name, "mountPath": folder, "readOnly": True} for name, folder, _ in _secrets(job)]


def peer_volumes(job: KubeJob) -> list[dict[str, Any]]:
    """Readable by the pod's group, which the daemon's user is in, and by nobody else."""
    return [{"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}} for name, _, secret in _secrets(job)]


def _secrets(job: KubeJob) -> list[tuple[str, str, str]]:
    """Volume, folder, Secret."""
    settings = job.kube.cache
    if not settings.peers:
        return []
    found = [(KEY_VOLUME, KEY_FOLDER, secret_name(job))]
    if settings.peer_tls_secret is not None:
        found.append((TLS_VOLUME, TLS_FOLDER, settings.peer_tls_secret))
    return found
