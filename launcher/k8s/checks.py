"""What a job on Kubernetes may not be, seen from its own values: names, amounts, what fits a pod. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.errors import SpecError
from launcher.k8s import names
from launcher.k8s.choices import CacheMode, Preload, ScheduleWith
from launcher.k8s.quantity import GIB, MIB, format_bytes, format_cpus, parse_quantity

if TYPE_CHECKING:
    from launcher.k8s.options import KubeJob, KubeOptions


def check_names(kube: KubeOptions) -> None:
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


def check_amounts(kube: KubeOptions) -> None:
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


def check_fit(job: KubeJob) -> None:
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
