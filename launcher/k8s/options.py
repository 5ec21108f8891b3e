"""What only Kubernetes has to be told about a job, frozen and checked when it is built; the job itself is a `launcher.spec.JobSpec`.

Each field is a flag of `render` and `submit`, and a key of a job file, under the same name (`launcher.k8s.flags` lists them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.k8s.checks import check_amounts, check_fit, check_names
from launcher.k8s.choices import CacheMode, CacheVolume, Preload, Scheduler, ScheduleWith, Submission
from launcher.k8s.quantity import MIB, parse_quantity, parse_size
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
        check_names(self)
        check_amounts(self)


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
        check_fit(self)
