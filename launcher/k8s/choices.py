"""The words that a job on Kubernetes chooses among: values of its flags, and of the fields of `launcher.k8s.options`. Pure."""

from __future__ import annotations

import enum


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
