"""What only Kubernetes has to be told about a job, frozen and checked when it is built; the job itself is a `launcher.spec.JobSpec`.

Each field is a flag of `render` and `submit`, and a key of a job file, under the same name (`launcher.k8s.flags` lists them).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import SpecError
from launcher.k8s import names
from launcher.k8s.quantity import GIB, MIB, format_bytes, format_cpus, parse_quantity, parse_size
from launcher.spec import JobSpec

DEFAULT_RAY_VERSION = "2.60.0"
"""What k8s/Dockerfile installs (a test compares it with constraints.txt). It must be the image's: KubeRay chooses probes by it."""
CACHE_PORT = 9400
"""Metrics and probes of the cache. Ray's containers take 6379, 8000, 8080, 8265, 10001, 44217, 44227 and 52365, and workers 10002-19999."""
PEER_PORT = 9401
"""Where a cache serves its peers."""
CACHE_PATH = "/railhead/cache"
SOCKET_FOLDER = "/railhead/run"
CODE_PATH = "/railhead/code"
DEFAULT_UID = 1000
"""The user of Ray's own images and of k8s/Dockerfile."""
MAX_CONFIG_BYTES = 900 * 1024
"""A ConfigMap may have 1 MiB, its own fields included."""


class Submission(enum.Enum):
    """How KubeRay hands the job to Ray."""

    JOB = "K8sJobMode"
    """A pod of its own submits it and follows its output: the log that `submit` shows. Works with every KubeRay."""
    HTTP = "HTTPMode"
    """The operator posts it to the dashboard. No pod holds the output: read it from the head."""
    SIDECAR = "SidecarMode"
    """A container in the head pod submits it (KubeRay 1.5)."""


class Scheduler(enum.Enum):
    """Who decides when the gang may start."""

    NONE = "none"
    KUEUE = "kueue"
    VOLCANO = "volcano"
    YUNIKORN = "yunikorn"
    KAI = "kai"


class CacheMode(enum.Enum):
    """Where the cache daemon of a node runs."""

    NONE = "none"
    SIDECAR = "sidecar"
    """A native sidecar in each worker pod; its files live as long as the volume."""
    DAEMONSET = "daemonset"
    """The node's daemon (k8s/base) serves all pods of the node and outlives jobs."""


class CacheVolume(enum.Enum):
    EMPTY_DIR = "emptydir"
    """The node's disk for ephemeral storage; gone with the pod."""
    EPHEMERAL = "ephemeral"
    """A volume of its own for each pod, from a storage class; gone with the pod."""
    HOST_PATH = "hostpath"
    """A directory of the node; stays for the next job."""


class Preload(enum.Enum):
    NONE = "none"
    BEFORE = "before"
    """Each worker's data is on its disk before Ray starts there."""
    BESIDE = "beside"
    """Warms while the gang is placed and training starts."""


class ScheduleWith(enum.Enum):
    CRON_JOB = "cronjob"
    """A CronJob whose pod submits the job. Works with every KubeRay and with queues."""
    RAY_CRON_JOB = "raycronjob"
    """KubeRay's own (1.6, behind a feature gate that is closed by default); cannot carry queue labels."""


@dataclass(frozen=True)
class SecretVariable:
    """A variable whose value is in a Secret of the namespace."""

    variable: str
    secret: str
    key: str


@dataclass(frozen=True)
class CacheSettings:
    """The node cache; its size is `JobSpec.cache.capacity`."""

    mode: CacheMode = CacheMode.NONE
    volume: CacheVolume = CacheVolume.EMPTY_DIR
    storage_class: str | None = None
    """For `ephemeral`; None: the cluster's default class."""
    host_path: str = "/var/lib/railhead"
    """For `hostpath` and `daemonset`: a directory on the node's fast disk; its `run` folder holds the daemon's socket."""
    memory: str = "8Gi"
    """Limit of the sidecar: half a GiB for its processes, the rest is page cache of the files it writes, which the kernel counts here."""
    cpus: str = "2"
    image: str | None = None
    """None: the job's image, which has both packages."""
    preload: Preload = Preload.NONE
    peers: bool = False
    """The sidecars of the job fetch from each other what one of them has fetched. Flags and job files say so for several workers."""
    peer_secret: str | None = None
    """A Secret with the peers' shared `key`. None: `submit` makes one for the job."""
    peer_tls_secret: str | None = None
    """A Secret with tls.crt, tls.key and ca.crt: bytes between nodes are then encrypted. None: they are not."""


@dataclass(frozen=True)
class KubeOptions:
    """What the cluster must know besides the job."""

    name: str
    """Of the RayJob, and of all that belongs to it."""
    image: str
    """With bash, python, ray and railhead in it; see docs/kubernetes-image.md."""
    gpus: int
    """GPUs of each worker pod; 0 for a job on CPUs."""
    cpus: float
    """CPUs of each worker pod."""
    memory: str
    """Memory limit of each worker pod's Ray container; /dev/shm counts against it."""
    namespace: str = "default"
    shm: str = ""
    """Size of /dev/shm; empty: a quarter of the memory."""
    gpu_resource: str = "nvidia.com/gpu"
    head_cpus: float = 2
    head_memory: str = "8Gi"
    ray_version: str = DEFAULT_RAY_VERSION
    kuberay: str | None = None
    """The operator's release; what it would drop or refuse is then refused here. None: whatever the manifest needs."""
    feature_gates: tuple[str, ...] = ()
    """Gates that the operator has opened, beyond its defaults."""
    image_pull_secrets: tuple[str, ...] = ()
    image_pull_policy: str | None = None
    run_as_user: int | None = None
    """uid of all containers: the cache's socket opens for its own user (and root) only. None: 1000; 0 where RDMA must lock memory."""
    service_account: str | None = None
    """An account that exists. None: one of the job's own, which may do nothing."""
    priority_class: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    instance_type: str | None = None
    """Label node.kubernetes.io/instance-type of the workers' nodes; `efa` counts its devices by it."""
    tolerations: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    secret_env: tuple[SecretVariable, ...] = ()
    env_from_secrets: tuple[str, ...] = ()
    """Secrets whose every key becomes a variable of Ray's containers and the cache."""
    working_dir: str | None = None
    """URI of a zip that Ray unpacks on each node (s3://…, gs://…, https://…)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Small files, name → text, that travel in a ConfigMap and lie in /railhead/code."""
    claims: tuple[tuple[str, str], ...] = ()
    """PersistentVolumeClaims and where they are mounted in the workers: for checkpoints, which must outlive pods and nodes."""
    data: tuple[str, ...] = ()
    """URLs that `preload` warms."""
    cache: CacheSettings = CacheSettings()
    fabric: str = "none"
    fabric_resource: str | None = None
    """Name of the RDMA device resource, where the site chose it, like rdma/hca_shared_devices_a."""
    fabric_networks: tuple[str, ...] = ()
    """One for each NIC: Multus attachments (`roce`), or the node pool's networks (`gke-…`) where they have other names than Google's."""
    fabric_image: str | None = None
    """Of the daemon that TCPX and TCPXO need in the pod, to fit the plugin on the nodes. None: the one of Google's manifests."""
    scheduler: Scheduler = Scheduler.NONE
    queue: str | None = None
    topology: str | None = None
    """Kueue: `required=LABEL` or `preferred=LABEL`: the gang within one domain of this node label."""
    submission: Submission = Submission.JOB
    autoscale: bool = False
    """Ray's autoscaler adds workers between the job's least and most nodes."""
    spot: bool = False
    """The workers may be taken away: tolerates the providers' spot taints, keeps the head on ordinary nodes."""
    grace_s: float | None = None
    """From SIGTERM to SIGKILL of a pod. None: the launcher's own shutdown time and half a minute for Ray, at least 60 s."""
    deadline_s: int | None = None
    """activeDeadlineSeconds: counts queueing and image pulls, and begins anew with each cluster retry."""
    start_deadline_s: int | None = None
    """preRunningDeadlineSeconds (KubeRay 1.6): ends a job that waits too long for its pods, and not one that trains."""
    cluster_retries: int = 0
    """backoffLimit: new clusters after the first. Restarts within the cluster are `--max-restarts`."""
    ttl_s: int = 60
    """How long the ended job's cluster stays, to be looked at. Its GPUs are kept as long."""
    schedule: str | None = None
    """Cron expression: the job runs again and again."""
    schedule_with: ScheduleWith = ScheduleWith.CRON_JOB
    time_zone: str | None = None
    disruption_budget: bool = True
    network_policy: bool = False
    """Only the job's own pods, the operator and monitoring may connect to it."""
    operator_namespace: str = "kuberay-system"
    monitoring_namespace: str = "monitoring"
    pod_monitor: bool = False
    """A PodMonitor for the Prometheus operator."""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_amounts(self)


@dataclass(frozen=True)
class KubeJob:
    """A job and where it runs: all that a manifest is made from."""

    spec: JobSpec
    kube: KubeOptions

    @property
    def num_workers(self) -> int:
        """Worker pods that are there from the start, the launcher's spare nodes among them. With autoscaling the rest come when needed."""
        nodes = self.spec.min_nodes if self.kube.autoscale else self.spec.max_nodes
        return nodes + self.spec.spare_nodes

    @property
    def max_workers(self) -> int:
        return self.spec.max_nodes + self.spec.spare_nodes

    @property
    def memory_bytes(self) -> int:
        return int(parse_quantity(self.kube.memory))

    @property
    def shm_bytes(self) -> int:
        return int(parse_quantity(self.kube.shm)) if self.kube.shm else self.memory_bytes // 4 // MIB * MIB

    @property
    def capacity_bytes(self) -> int:
        """Of the node cache; 0 without one."""
        return parse_size(self.spec.cache.capacity) if self.spec.cache is not None else 0

    @property
    def grace_s(self) -> int:
        return int(self.kube.grace_s if self.kube.grace_s is not None else max(60, self.spec.shutdown_timeout_s + 30))

    @property
    def leave_s(self) -> int:
        """Of it, what the ranks of a pod that goes have: then Ray ends, and after it the cache."""
        return max(1, self.grace_s - 10)

    def __post_init__(self) -> None:
        _check_fit(self)


def _check_names(kube: KubeOptions) -> None:
    limit = names.MAX_RAYJOB_NAME
    if kube.schedule is not None:
        is_ray = kube.schedule_with is ScheduleWith.RAY_CRON_JOB
        # The CronJob's Jobs are called name-<11 characters>, and so are the RayJobs that they submit.
        limit = names.MAX_RAYCRONJOB_NAME if is_ray else names.MAX_RAYJOB_NAME - 11
    fault = names.rfc1035_fault(kube.name, limit)
    if fault:
        kind = "a scheduled job's" if kube.schedule is not None else "a RayJob's"
        raise SpecError(
            f"--name {kube.name}: {kind} name {fault}",
            advice=f"for example --name {names.suggest_name(kube.name, limit)}",
        )
    fault = names.rfc1035_fault(kube.namespace)
    if fault:
        raise SpecError(
            f"--namespace {kube.namespace}: a namespace's name {fault}", advice="is there a typing mistake?"
        )
    if not kube.image or any(letter.isspace() for letter in kube.image):
        raise SpecError(f"--image {kube.image!r} is no image", advice="for example --image registry/team/train:1.4")
    for flag, labels in (("node-selector", kube.node_selector), ("label", kube.labels)):
        for key, value in labels.items():
            if not names.is_label_key(key) or not names.is_label_value(value):
                raise SpecError(
                    f"--{flag} {key}={value}: Kubernetes takes no such label",
                    advice="at most 63 letters, digits, dashes, dots and underscores, beginning and ending with a letter or digit",
                )


def _check_amounts(kube: KubeOptions) -> None:
    sizes = (("memory", kube.memory), ("head-memory", kube.head_memory), ("shm", kube.shm or "1Gi"))
    for flag, text in (*sizes, ("cache-memory", kube.cache.memory), ("cache-cpus", kube.cache.cpus)):
        try:
            amount = parse_quantity(text)
        except ValueError as error:
            raise SpecError(f"--{flag} {text}: expected {error}") from error
        if flag.endswith(("memory", "shm")) and amount < 64 * MIB:
            raise SpecError(
                f"--{flag} {text}: that is {amount:g} bytes", advice="is the unit missing? For example 64Gi"
            )
    for flag, number, least in (
        ("gpus", kube.gpus, 0),
        ("cpus", kube.cpus, 0.1),
        ("head-cpus", kube.head_cpus, 0.1),
        ("cluster-retries", kube.cluster_retries, 0),
        ("ttl", kube.ttl_s, 0),
        ("deadline", kube.deadline_s if kube.deadline_s is not None else 1, 1),
        ("start-deadline", kube.start_deadline_s if kube.start_deadline_s is not None else 1, 1),
    ):
        if number < least:
            raise SpecError(f"--{flag} {number:g} is too little", advice=f"give {least:g} or more")


def _check_fit(job: KubeJob) -> None:
    """What the gang asks of a node must be in the pod: Ray would wait for it for ever."""
    spec, kube = job.spec, job.kube
    if kube.gpus and kube.gpus % spec.nproc_per_node and spec.resources.gpus_per_proc is None:
        raise SpecError(
            f"--nproc-per-node {spec.nproc_per_node} with --gpus {kube.gpus}: the GPUs cannot be shared out evenly",
            advice=f"give --nproc-per-node {kube.gpus}, one rank for each GPU",
        )
    gpus = spec.nproc_per_node * (spec.resources.gpus_per_proc or 0)
    if gpus > kube.gpus:
        raise SpecError(
            f"{spec.nproc_per_node} ranks with {spec.resources.gpus_per_proc:g} GPUs each need {gpus:g} GPUs, "
            f"and a pod has --gpus {kube.gpus}",
            advice=f"give --gpus {gpus:g}",
        )
    per_proc = 1.0 if spec.resources.cpus_per_proc is None else spec.resources.cpus_per_proc
    need = spec.nproc_per_node * per_proc
    if need > -(-kube.cpus // 1):
        raise SpecError(
            f"{spec.nproc_per_node} ranks with {per_proc:g} CPUs each need {need:g} CPUs, and a pod has --cpus {format_cpus(kube.cpus)}: "
            "Ray would wait for ever",
            advice=f"give --cpus {need:g} or more, or less --cpus-per-proc",
        )
    _check_memory(job)
    _check_cache(job)


def _check_memory(job: KubeJob) -> None:
    if job.shm_bytes > job.memory_bytes // 2:
        raise SpecError(
            f"--shm {job.kube.shm} is more than half of --memory {job.kube.memory}: /dev/shm counts against the memory limit",
            advice=f"give --memory {format_bytes(job.shm_bytes * 2)} or more, or a smaller --shm",
        )
    if job.grace_s < job.spec.shutdown_timeout_s:
        raise SpecError(
            f"--grace {job.grace_s} ends before --shutdown-timeout {job.spec.shutdown_timeout_s:g}: "
            "a rank that writes its checkpoint would be killed in the middle",
            advice=f"give --grace {job.spec.shutdown_timeout_s + 30:g}",
        )


def _check_cache(job: KubeJob) -> None:
    kube, capacity = job.kube, job.capacity_bytes
    if kube.cache.mode is CacheMode.NONE:
        if capacity or kube.cache.preload is not Preload.NONE:
            raise SpecError(
                "a cache size or a preload is given, and --cache none",
                advice="leave --cache out, or give --cache sidecar or --cache daemonset",
            )
        return
    if kube.cache.mode is CacheMode.SIDECAR and capacity < GIB // 16:
        raise SpecError(
            f"--cache sidecar needs its size; --cache-capacity is {capacity} bytes", advice="for example 500GiB"
        )
    if kube.cache.preload is not Preload.NONE and not kube.data:
        raise SpecError(
            f"--preload {kube.cache.preload.value} does not know what to warm",
            advice="name it: --data s3://bucket/train",
        )
