"""The flags that `render` and `submit` take besides the launcher's own: one row each, which are also the keys of a job file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.k8s import values
from launcher.k8s.choices import CacheMode, CacheVolume, Preload, Scheduler, ScheduleWith, Submission
from launcher.k8s.fabric import FABRICS
from launcher.k8s.options import DEFAULT_RAY_VERSION

JOB, POD, NODES, ENV, CACHE, FABRIC, QUEUE, LIFE, AROUND = (
    "The job",
    "Its pods",
    "Where they run",
    "Code and variables",
    "Node cache",
    "Fabric",
    "Queue",
    "Life",
    "Around it",
)
GROUPS = (JOB, POD, NODES, ENV, CACHE, FABRIC, QUEUE, LIFE, AROUND)


@dataclass(frozen=True)
class Flag:
    """One flag of Kubernetes'."""

    name: str
    group: str
    help: str
    metavar: str = ""
    """Empty: a switch."""
    parse: Callable[[str], Any] = values.text
    is_repeated: bool = False
    """Given more than once, or as a list in a job file, it adds up; else the last one counts."""

    @property
    def is_switch(self) -> bool:
        return not self.metavar


FLAGS: tuple[Flag, ...] = (
    Flag("file", JOB, "Job file in YAML; flags override it. See docs/kubernetes-jobfile.md.", "FILE"),
    Flag(
        "name",
        JOB,
        "Of the RayJob: at most 47 small letters, digits and dashes. [from the script]",
        "NAME",
        values.name,
    ),
    Flag("namespace", JOB, "[default]", "NAME", values.name),
    Flag("image", JOB, "With railhead, ray and bash in it; the same for all pods.", "IMAGE"),
    Flag("ray-version", JOB, f"Ray's version in the image. [{DEFAULT_RAY_VERSION}]", "VERSION", values.release),
    Flag("kuberay", JOB, "The operator's release: what it would drop is refused.", "VERSION", values.release),
    Flag("feature-gates", JOB, "Feature gates that the operator has opened.", "NAME,…", values.words),
    Flag("gpus", POD, "GPUs of each worker; 0 for a job on CPUs. Must be given.", "N", values.whole),
    Flag("cpus", POD, "CPUs of each worker. [10 for each GPU, else one for each rank]", "N", values.cpus),
    Flag("memory", POD, "Memory of each worker. [64Gi for each GPU, else 4Gi for each rank]", "SIZE", values.quantity),
    Flag("shm", POD, "/dev/shm of each worker, part of its memory. [a quarter of it]", "SIZE", values.quantity),
    Flag("gpu-resource", POD, "[nvidia.com/gpu]", "NAME"),
    Flag("head-cpus", POD, "[2]", "N", values.cpus),
    Flag("head-memory", POD, "[8Gi]", "SIZE", values.quantity),
    Flag("image-pull-secrets", POD, "", "NAME,…", values.names),
    Flag("image-pull-policy", POD, "", "Always|IfNotPresent|Never", values.pull_policy),
    Flag("run-as-user", POD, "uid of all containers. [1000; 0 where RDMA must lock memory]", "UID", values.whole),
    Flag("service-account", POD, "An account that exists. [one that may do nothing]", "NAME", values.object_name),
    Flag("priority-class", POD, "", "NAME", values.object_name),
    Flag("node-selector", NODES, "Labels of the workers' nodes.", "KEY=VALUE", values.label_pair, is_repeated=True),
    Flag("instance-type", NODES, "Label node.kubernetes.io/instance-type of the workers' nodes.", "TYPE"),
    Flag("toleration", NODES, "", "KEY[=VALUE][:EFFECT]", values.toleration, is_repeated=True),
    Flag("spot", NODES, "Workers on nodes that may be taken away, the head on others."),
    Flag("autoscale", NODES, "Ray's autoscaler adds workers from least to most of --nnodes MIN:MAX."),
    Flag("label", NODES, "Of all objects and pods.", "KEY=VALUE", values.label_pair, is_repeated=True),
    Flag(
        "env",
        ENV,
        "A variable of ranks and cache; NAME alone takes it from here.",
        "NAME[=VALUE]",
        values.env_pair,
        is_repeated=True,
    ),
    Flag("secret-env", ENV, "A variable from a Secret.", "NAME=SECRET/KEY", values.secret_env, is_repeated=True),
    Flag("env-from-secret", ENV, "All keys of a Secret as variables.", "SECRET", values.object_name, is_repeated=True),
    Flag(
        "claim",
        ENV,
        "A PersistentVolumeClaim mounted in each worker, for checkpoints (ReadWriteMany for several).",
        "NAME=/PATH",
        values.claim,
        is_repeated=True,
    ),
    Flag("ship", ENV, "Small files that go along in a ConfigMap.", "FILE", values.text, is_repeated=True),
    Flag("working-dir", ENV, "A zip that Ray unpacks on each node (s3://…), or with --upload-to a folder.", "URI|DIR"),
    Flag("upload-to", ENV, "Where submit puts --working-dir, as a zip named by its content.", "URL"),
    Flag(
        "cache",
        CACHE,
        "[sidecar if --cache-capacity is given, else none]",
        "none|sidecar|daemonset",
        values.one_of(CacheMode),
    ),
    Flag("cache-volume", CACHE, "[emptydir]", "emptydir|ephemeral|hostpath", values.one_of(CacheVolume)),
    Flag("cache-storage-class", CACHE, "For --cache-volume ephemeral.", "NAME", values.object_name),
    Flag(
        "cache-host-path",
        CACHE,
        "The node's directory for hostpath and daemonset. [/var/lib/railhead]",
        "DIR",
        values.absolute_path,
    ),
    Flag("cache-memory", CACHE, "Limit of the sidecar, its page cache included. [8Gi]", "SIZE", values.quantity),
    Flag("cache-cpus", CACHE, "[2]", "N", values.quantity),
    Flag("cache-image", CACHE, "[the job's]", "IMAGE"),
    Flag("data", CACHE, "What --preload warms.", "URL", values.text, is_repeated=True),
    Flag(
        "preload",
        CACHE,
        "Warm --data before Ray starts on a node, or beside it. [none]",
        "none|before|beside",
        values.one_of(Preload),
    ),
    Flag(
        "cache-peers",
        CACHE,
        "Nodes fetch from each other what one of them has fetched. [where several workers have a sidecar]",
    ),
    Flag("no-cache-peers", CACHE, "Each node fetches for itself."),
    Flag(
        "cache-peer-secret",
        CACHE,
        "A Secret with the peers' shared `key`. [submit makes one]",
        "NAME",
        values.object_name,
    ),
    Flag(
        "cache-peer-tls-secret",
        CACHE,
        "Encrypt between peers: a Secret with tls.crt, tls.key, ca.crt.",
        "NAME",
        values.object_name,
    ),
    Flag("fabric", FABRIC, f"{', '.join(FABRICS)}; auto (submit only) looks at the nodes. [none]", "NAME"),
    Flag("fabric-resource", FABRIC, "The RDMA device resource, as the site calls it.", "NAME"),
    Flag("fabric-networks", FABRIC, "One network for each NIC: roce (Multus), gke-….", "NAME,…", values.words),
    Flag("fabric-image", FABRIC, "Daemon of gke-tcpx and gke-tcpxo. [as in Google's manifests]", "IMAGE"),
    Flag("scheduler", QUEUE, "[none]", "none|kueue|volcano|yunikorn|kai", values.one_of(Scheduler)),
    Flag("queue", QUEUE, "Name of the queue.", "NAME"),
    Flag("topology", QUEUE, "Kueue: all workers in one domain of a node label.", "required|preferred=LABEL"),
    Flag(
        "submission",
        LIFE,
        "How KubeRay hands the job to Ray. [job: a pod of its own]",
        "job|http|sidecar",
        values.one_of(Submission, by_name=True),
    ),
    Flag(
        "grace",
        LIFE,
        "From SIGTERM to SIGKILL of a pod. [--shutdown-timeout and 30 s, at least 60 s]",
        "TIME",
        values.duration,
    ),
    Flag(
        "deadline",
        LIFE,
        "Ends the job; counts queueing too, and anew with each cluster retry.",
        "TIME",
        values.duration,
    ),
    Flag(
        "start-deadline", LIFE, "Ends the job if its pods do not come in time (KubeRay 1.6).", "TIME", values.duration
    ),
    Flag("cluster-retries", LIFE, "New clusters after the first. Within one: --max-restarts. [0]", "N", values.whole),
    Flag("ttl", LIFE, "How long the ended job's cluster, with its GPUs, stays. [60]", "TIME", values.duration),
    Flag("schedule", LIFE, "Cron expression: run again and again.", "CRON"),
    Flag("schedule-with", LIFE, "[cronjob]", "cronjob|raycronjob", values.one_of(ScheduleWith)),
    Flag("time-zone", LIFE, "Of the schedule.", "NAME"),
    Flag("no-disruption-budget", AROUND, "No PodDisruptionBudget."),
    Flag("network-policy", AROUND, "Only the job, the operator and monitoring may connect to its pods."),
    Flag("operator-namespace", AROUND, "[kuberay-system]", "NAME", values.name),
    Flag("monitoring-namespace", AROUND, "[monitoring]", "NAME", values.name),
    Flag("pod-monitor", AROUND, "A PodMonitor for the Prometheus operator."),
)
BY_NAME = {flag.name: flag for flag in FLAGS}
