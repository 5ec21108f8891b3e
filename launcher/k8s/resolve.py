"""A request as a KubeJob: defaults, and what one flag means for another. Files are read through a function that is passed in. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode, CacheVolume, Preload
from launcher.k8s.flags import BY_NAME
from launcher.k8s.names import MAX_RAYJOB_NAME, suggest_name
from launcher.k8s.options import CACHE_PATH, CacheSettings, KubeJob, KubeOptions
from launcher.k8s.request import NOT_HERE, Request, located, value_of
from launcher.options.intent import understand
from launcher.options.parse import CommandLine, Given
from launcher.spec import ProgramKind


def to_job(request: Request, environ: Mapping[str, str], read_text: Callable[[str], str]) -> KubeJob:
    """The job. Raises SpecError; one about a value in a job file begins with its line."""
    for name, reason in NOT_HERE.items():
        if name in request.line.given:
            raise SpecError(f"{request.line.given[name]}: not here: {reason}", advice=f"leave --{name} out")
    try:
        return _build(request, environ, read_text)
    except SpecError as error:
        raise located(error, request) from error


def _build(request: Request, environ: Mapping[str, str], read_text: Callable[[str], str]) -> KubeJob:
    capacity = request.line.text("cache-capacity")
    line = request.line
    if capacity is not None:
        line = replace(line, given={**line.given, "cache-dir": Given(CACHE_PATH, "--cache-dir")})
    intent = understand(line, {"RAY_ADDRESS": "auto"}, ".")
    spec = intent.spec
    gpus = _gpus(request, spec.nproc_per_node)
    if intent.procs_wish is not None:
        spec = replace(spec, nproc_per_node=_procs(intent.procs_wish, gpus, request))
    spec = replace(spec, env=_environment(request, environ))
    get = request.get
    kube = KubeOptions(
        name=get("name", None) or _default_name(line),
        image=get("image", None) or _missing("image", "the image that all pods run: --image registry/team/train:1.4"),
        gpus=gpus,
        cpus=get("cpus", float(10 * gpus or spec.nproc_per_node * max(1.0, spec.resources.cpus_per_proc or 1.0))),
        memory=get("memory", f"{64 * gpus or 4 * spec.nproc_per_node}Gi"),
        cache=_cache(request, has_size=capacity is not None, is_alone=spec.max_nodes + spec.spare_nodes == 1),
        files=_files(request, read_text),
        env_from_secrets=request.all("env-from-secret"),
        secret_env=request.all("secret-env"),
        node_selector=dict(request.all("node-selector")),
        tolerations=request.all("toleration"),
        labels=dict(request.all("label")),
        data=request.all("data"),
        claims=request.all("claim"),
        spot=request.has("spot"),
        autoscale=request.has("autoscale"),
        network_policy=request.has("network-policy"),
        pod_monitor=request.has("pod-monitor"),
        disruption_budget=not request.has("no-disruption-budget"),
        **_plain(request),
    )
    return KubeJob(spec, kube)


# Flags whose value is a field as it is: flag → field.
_PLAIN = {
    "namespace": "namespace",
    "ray-version": "ray_version",
    "kuberay": "kuberay",
    "feature-gates": "feature_gates",
    "shm": "shm",
    "gpu-resource": "gpu_resource",
    "head-cpus": "head_cpus",
    "head-memory": "head_memory",
    "image-pull-secrets": "image_pull_secrets",
    "image-pull-policy": "image_pull_policy",
    "run-as-user": "run_as_user",
    "service-account": "service_account",
    "priority-class": "priority_class",
    "instance-type": "instance_type",
    "working-dir": "working_dir",
    "fabric": "fabric",
    "fabric-resource": "fabric_resource",
    "fabric-networks": "fabric_networks",
    "fabric-image": "fabric_image",
    "scheduler": "scheduler",
    "queue": "queue",
    "topology": "topology",
    "submission": "submission",
    "grace": "grace_s",
    "deadline": "deadline_s",
    "start-deadline": "start_deadline_s",
    "cluster-retries": "cluster_retries",
    "ttl": "ttl_s",
    "schedule": "schedule",
    "schedule-with": "schedule_with",
    "time-zone": "time_zone",
    "operator-namespace": "operator_namespace",
    "monitoring-namespace": "monitoring_namespace",
}


def _plain(request: Request) -> dict[str, Any]:
    return {field_name: request.get(flag, None) for flag, field_name in _PLAIN.items() if request.texts(flag)}


def _gpus(request: Request, nproc: int) -> int:
    if not request.texts("gpus"):
        raise SpecError(
            "how many GPUs does each worker have? --gpus is missing",
            advice=f"give --gpus {nproc if nproc > 1 else 8}, or --gpus 0 for a job on CPUs",
        )
    return int(request.get("gpus", 0))


def _procs(wish: str, gpus: int, request: Request) -> int:
    if gpus and wish in ("gpu", "auto"):
        return gpus
    if wish == "gpu":
        raise SpecError("--nproc-per-node gpu with --gpus 0", advice="give a number, or --nproc-per-node cpu")
    if not request.texts("cpus"):
        raise SpecError(
            f"--nproc-per-node {wish}: of how many CPUs? --cpus is missing", advice="give --cpus, or a number of ranks"
        )
    return max(1, int(request.get("cpus", 1.0)))


def _cache(request: Request, *, has_size: bool, is_alone: bool) -> CacheSettings:
    get, default = request.get, CacheSettings()
    mode = get("cache", CacheMode.SIDECAR if has_size else CacheMode.NONE)
    return CacheSettings(
        mode=mode,
        volume=get("cache-volume", CacheVolume.EMPTY_DIR),
        storage_class=get("cache-storage-class", None),
        host_path=get("cache-host-path", default.host_path),
        memory=get("cache-memory", default.memory),
        cpus=get("cache-cpus", default.cpus),
        image=get("cache-image", None),
        preload=get("preload", Preload.NONE),
        peers=_has_peers(request, mode, is_alone=is_alone),
        peer_secret=get("cache-peer-secret", None),
        peer_tls_secret=get("cache-peer-tls-secret", None),
    )


def _has_peers(request: Request, mode: CacheMode, *, is_alone: bool) -> bool:
    """Where nothing is said: as soon as there is somebody to share with (docs/decisions/0080-peers-by-default.md)."""
    if request.has("no-cache-peers"):
        if request.has("cache-peers"):
            raise SpecError("--cache-peers and --no-cache-peers contradict each other", advice="keep one of them")
        return False
    if request.texts("cache-peers"):
        return request.has("cache-peers")
    return mode is CacheMode.SIDECAR and not is_alone


def _files(request: Request, read_text: Callable[[str], str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for given in request.texts("ship"):
        for path in given.value.split(","):
            name = PurePath(path).name
            if name in files:
                raise SpecError(
                    f"{given}: two files are called {name}", advice="a ConfigMap is one flat folder; rename one"
                )
            files[name] = read_text(path)
    return files


def _environment(request: Request, environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for given in request.texts("env"):
        name, value = value_of(given, BY_NAME["env"].parse)
        if value is None and name not in environ:
            raise SpecError(f"{given}: {name} is not set here", advice=f"set it, or write {name}=VALUE")
        found[name] = environ[name] if value is None else value
    return found


def _default_name(line: CommandLine) -> str:
    """From the script: `train.py` becomes `train`."""
    if line.target is None:
        _missing("name", "what to call the job: --name resnet")
    target = str(line.target)
    stem = PurePath(target).stem if not line.has("module") else target
    return suggest_name(stem or ProgramKind.SCRIPT.value, MAX_RAYJOB_NAME)


def _missing(name: str, what: str) -> str:
    raise SpecError(f"--{name} is missing", advice=f"say {what}")
