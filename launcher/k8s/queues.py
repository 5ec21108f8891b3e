"""What each queue wants on a RayJob, and what it forbids. Pure; sources are the schedulers' own integrations with KubeRay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode, Scheduler, ScheduleWith, Submission
from launcher.k8s.options import KubeJob

TOPOLOGY_WORDS = ("required", "preferred")


@dataclass(frozen=True)
class Queueing:
    """All labels go on the RayJob: on pod templates these schedulers do not read them."""

    labels: Mapping[str, str] = field(default_factory=dict)
    pod_annotations: Mapping[str, str] = field(default_factory=dict)
    """On the workers' pod template (Kueue reads the topology request there)."""
    note: str = ""


def queueing(job: KubeJob) -> Queueing:
    """Raises SpecError for a combination that the queue refuses, or silently ignores."""
    kube = job.kube
    if kube.scheduler is Scheduler.NONE:
        for flag, value in (("queue", kube.queue), ("topology", kube.topology)):
            if value is not None:
                raise SpecError(
                    f"--{flag} {value}: whose? No --scheduler is given",
                    advice="add --scheduler kueue, volcano, yunikorn or kai",
                )
        return Queueing()
    if kube.queue is None:
        raise SpecError(
            f"--scheduler {kube.scheduler.value} needs a queue",
            advice="name it: --queue NAME, as its administrator did",
        )
    if kube.topology is not None and kube.scheduler is not Scheduler.KUEUE:
        raise SpecError(
            f"--topology {kube.topology} is Kueue's, and --scheduler is {kube.scheduler.value}",
            advice="use --scheduler kueue, or leave --topology out",
        )
    if kube.schedule is not None and kube.schedule_with is ScheduleWith.RAY_CRON_JOB:
        raise SpecError(
            f"--schedule-with raycronjob with --queue {kube.queue}: a RayCronJob gives its jobs no queue label",
            advice="use --schedule-with cronjob",
        )
    return _BY_SCHEDULER[kube.scheduler](job, kube.queue)


def _kueue(job: KubeJob, queue: str) -> Queueing:
    if job.kube.autoscale:
        raise SpecError(
            "--scheduler kueue with --autoscale: Kueue admits a whole gang and takes autoscaling only as elastic slices",
            advice="leave --autoscale out; Kueue's ProvisioningRequest makes the cluster grow for a queued job (docs/kubernetes-queues.md)",
        )
    labels = {"kueue.x-k8s.io/queue-name": queue}
    if job.kube.priority_class is not None:
        labels["kueue.x-k8s.io/priority-class"] = job.kube.priority_class
    return Queueing(labels, _topology(job.kube.topology), "Kueue suspends the job until it is admitted")


def _topology(asked: str | None) -> dict[str, str]:
    if asked is None:
        return {}
    word, equals, label = asked.partition("=")
    if word not in TOPOLOGY_WORDS or not equals or not label:
        raise SpecError(
            f"--topology {asked}: expected required=LABEL or preferred=LABEL",
            advice="for example --topology required=cloud.provider.com/topology-rack, a level of the cluster's Topology",
        )
    return {f"kueue.x-k8s.io/podset-{word}-topology": label}


def _volcano(job: KubeJob, queue: str) -> Queueing:
    labels = {"volcano.sh/queue-name": queue}
    if job.kube.priority_class is not None:
        labels["ray.io/priority-class-name"] = job.kube.priority_class
    return Queueing(labels, note=f"the operator must run with --batch-scheduler=volcano{_left_out(job)}")


def _yunikorn(job: KubeJob, queue: str) -> Queueing:
    # Task groups are made from minReplicas, which a gang always has: min_nodes is at least 1.
    labels = {
        "ray.io/gang-scheduling-enabled": "true",
        "yunikorn.apache.org/app-id": job.kube.name,
        "yunikorn.apache.org/queue": queue,
    }
    return Queueing(labels, note=f"the operator must run with --batch-scheduler=yunikorn{_left_out(job)}")


def _left_out(job: KubeJob) -> str:
    """KubeRay sums containers for these schedulers, and native sidecars are none."""
    return "; its sums leave the cache sidecar out" if job.kube.cache.mode is CacheMode.SIDECAR else ""


def _kai(job: KubeJob, queue: str) -> Queueing:
    if job.kube.submission is Submission.JOB:
        raise SpecError(
            "--scheduler kai with --submission job: KAI refuses K8sJobMode, and the job would stay in Initializing",
            advice="use --submission sidecar (KubeRay 1.5) or --submission http",
        )
    return Queueing({"kai.scheduler/queue": queue}, note="the operator must run with --batch-scheduler=kai-scheduler")


_BY_SCHEDULER: Mapping[Scheduler, Callable[[KubeJob, str], Queueing]] = {
    Scheduler.KUEUE: _kueue,
    Scheduler.VOLCANO: _volcano,
    Scheduler.YUNIKORN: _yunikorn,
    Scheduler.KAI: _kai,
}
