"""KubeRay's own rules, and its neighbours', as code: what no schema shows and the cluster reveals late, or never. Pure.

KubeRay checks a RayJob after the API server has taken it. Some mistakes end as `ValidationFailed`, from which nothing recovers; others
are never named: the job waits for ever, or runs on the head alone. `check` finds them in the finished manifest, so it serves manifests that
were written by hand as well. docs/kubernetes-rules.md lists them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.k8s.names import (
    MAX_CRONJOB_NAME,
    MAX_RAYCRONJOB_NAME,
    MAX_RAYJOB_NAME,
    is_object_name,
    rfc1035_fault,
    suggest_name,
)
from launcher.k8s.releases import reaches, requirements
from launcher.k8s.rules_cluster import check_cluster
from launcher.k8s.rules_pod import QUEUE_LABELS, check_pod
from launcher.k8s.violation import Operator, Violation

__all__ = ["Operator", "Violation", "check", "check_edit"]

_NAME_LIMITS = {"RayJob": MAX_RAYJOB_NAME, "RayCronJob": MAX_RAYCRONJOB_NAME, "CronJob": MAX_CRONJOB_NAME}
_SUBMITTERLESS = ("HTTPMode", "SidecarMode", "InteractiveMode")
MAX_KUEUE_POD_SETS = 18
KUBERAY, MULTIKUEUE = "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"


def check(objects: Sequence[Mapping[str, Any]], operator: Operator | None = None) -> list[Violation]:
    """All violations of these manifests, in the order of the manifests; empty if there is none."""
    operator = operator or Operator()
    found: list[Violation] = []
    for one in objects:
        found += _name(one)
        found += _release(one, operator)
        if one["kind"] == "RayJob":
            found += _ray_job(one, operator)
        elif one["kind"] == "RayCronJob":
            found += _ray_cron_job(one, operator)
        elif one["kind"] == "CronJob":
            found += check_pod("CronJob", one["spec"]["jobTemplate"]["spec"]["template"])
    return found


def check_edit(existing: Mapping[str, Any], wanted: Mapping[str, Any], hash_annotation: str) -> Violation | None:
    """Why an existing RayJob cannot become the wanted one: KubeRay ignores edits, and repairing a refused job does not revive it.

    None: they are the same job, which can be followed.
    """
    name = existing["metadata"]["name"]
    status = existing.get("status", {})
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        reason = status.get("message") or status.get("reason") or "no reason given"
        return Violation(
            "edit",
            f"RayJob {name} was refused by KubeRay ({reason}), and an edit does not revive it",
            f"delete it: python -m launcher stop {name}; then submit again",
        )
    old, new = (one["metadata"].get("annotations", {}).get(hash_annotation) for one in (existing, wanted))
    if old == new:
        return None
    return Violation(
        "edit",
        f"a RayJob {name} exists with another specification, and KubeRay ignores changes to one that exists",
        f"choose another --name, or end that one first: python -m launcher stop {name}",
    )


def _name(one: Mapping[str, Any]) -> Iterator[Violation]:
    kind, name = one["kind"], one["metadata"]["name"]
    limit = _NAME_LIMITS.get(kind)
    if limit is not None:
        fault = rfc1035_fault(name, limit)
        if fault:
            yield Violation("name", f"{kind} {name}: the name {fault}", f"for example {suggest_name(name, limit)}")
    elif not is_object_name(name):
        yield Violation("name", f"{kind} {name!r}: Kubernetes takes no such name", f"for example {suggest_name(name)}")


def _release(one: Mapping[str, Any], operator: Operator) -> Iterator[Violation]:
    for need in requirements(one):
        if not reaches(operator.release, need.release):
            yield Violation(
                "old-operator",
                f"{need.path} needs KubeRay {need.release}, and the cluster has {operator.release}, which would drop it without a word",
                "leave out the option that asks for it, or upgrade the operator",
            )


def _ray_job(one: Mapping[str, Any], operator: Operator) -> Iterator[Violation]:
    spec = one["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    cluster = spec.get("rayClusterSpec")
    if (cluster is None) == (spec.get("clusterSelector") is None):
        yield Violation("cluster", "a RayJob has either rayClusterSpec or clusterSelector", "give exactly one of them")
    yield from _life(spec)
    yield from _entrypoint(spec)
    yield from _submitter(spec, mode)
    yield from _queue(one, mode)
    if cluster is not None:
        yield from check_cluster(cluster, operator, mode=mode)
        yield from _gang_size(spec)


def _life(spec: Mapping[str, Any]) -> Iterator[Violation]:
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    has_rules = "deletionRules" in spec.get("deletionStrategy", {})
    deadline, retries = spec.get("activeDeadlineSeconds"), spec.get("backoffLimit", 0)
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield Violation(
            "ttl", "ttlSecondsAfterFinished needs shutdownAfterJobFinishes", "set shutdownAfterJobFinishes: true"
        )
    if has_rules and ends:
        yield Violation("ttl", "deletionRules and shutdownAfterJobFinishes exclude each other", "keep one of them")
    if not ends and not has_rules and "rayClusterSpec" in spec:
        yield Violation(
            "ttl",
            "nothing ends the cluster after the job: it keeps its GPUs for ever",
            "set shutdownAfterJobFinishes: true",
            is_fatal=False,
        )
    strategy = spec.get("deletionStrategy")
    if strategy is not None:
        legacy = {"onSuccess", "onFailure"} & set(strategy)
        if (legacy and has_rules) or not (has_rules or len(legacy) == 2):
            yield Violation(
                "ttl",
                "deletionStrategy has either deletionRules, or both onSuccess and onFailure",
                "keep one of the two ways",
            )
    if spec.get("managedBy", KUBERAY) not in (KUBERAY, MULTIKUEUE):
        yield Violation("managed-by", f"managedBy {spec['managedBy']}: only {KUBERAY} and {MULTIKUEUE} are taken")
    if spec.get("suspend") and (not ends or "clusterSelector" in spec):
        yield Violation("suspend", "suspend needs shutdownAfterJobFinishes, and no clusterSelector")
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and spec[key] <= 0:
            yield Violation("deadline", f"{key} {spec[key]} must be above 0")
    if deadline is not None and retries:
        yield Violation(
            "deadline-per-retry",
            f"activeDeadlineSeconds {deadline} begins anew with each of {retries} retries: up to {(retries + 1) * deadline} s in all",
            is_fatal=False,
        )
    if deadline is not None and deadline < 600:
        yield Violation(
            "deadline-too-short",
            f"activeDeadlineSeconds {deadline} counts from the queue on; pulling a GPU image alone can take as long",
            "give more, or preRunningDeadlineSeconds (--start-deadline) for the wait alone",
            is_fatal=False,
        )
    if retries and ("clusterSelector" in spec or spec.get("submissionMode") == "InteractiveMode"):
        yield Violation("retries", "backoffLimit goes neither with clusterSelector nor with InteractiveMode")


def _entrypoint(spec: Mapping[str, Any]) -> Iterator[Violation]:
    """It passes one shell in every mode, so it must be written as shlex.join writes: anything else changes meaning on the way."""
    text = spec.get("entrypoint", "")
    advice = "quote each argument as shlex.join does; `python -m launcher render` does it"
    try:
        is_plain = bool(text) and shlex.join(shlex.split(text)) == text and "\n" not in text
    except ValueError as error:
        yield Violation("entrypoint", f"entrypoint: {error}: {text}", advice)
        return
    if not is_plain:
        yield Violation(
            "entrypoint",
            f"entrypoint holds quotes, $, ;, a line break or the like that the submitter's shell would act on: {text!r}",
            advice,
        )


def _submitter(spec: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    template = spec.get("submitterPodTemplate")
    if template is None:
        return
    if mode in _SUBMITTERLESS:
        yield Violation("submitter", f"{mode} has no submitter pod", "leave submitterPodTemplate out")
        return
    policy = template["spec"].get("restartPolicy")
    if policy not in ("Never", "OnFailure"):
        yield Violation(
            "submitter",
            f"the submitter's restartPolicy is {policy or 'unset'}; a Job takes Never or OnFailure",
            "give Never",
        )
    yield from check_pod("submitter", template)


def _queue(one: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    labels, spec = one["metadata"].get("labels", {}), one["spec"]
    if "kai.scheduler/queue" in labels and mode == "K8sJobMode":
        yield Violation(
            "queue", "KAI refuses K8sJobMode, and the job stays in Initializing", "use SidecarMode or HTTPMode"
        )
    if labels.get("ray.io/scheduler-name") == "scheduler-plugins":
        yield Violation(
            "queue",
            "scheduler-plugins knows RayCluster only; a RayJob fails on each reconcile",
            "use Kueue, Volcano or YuniKorn",
        )
    if "kueue.x-k8s.io/queue-name" not in labels:
        return
    if not spec.get("shutdownAfterJobFinishes") or "rayClusterSpec" not in spec:
        yield Violation("queue", "Kueue wants rayClusterSpec and shutdownAfterJobFinishes: true")
    if spec.get("suspend") is False:
        yield Violation(
            "queue", "Kueue owns `suspend`: a job that is not suspended passes by the queue", "leave it out"
        )
    cluster = spec.get("rayClusterSpec", {})
    if cluster.get("enableInTreeAutoscaling"):
        yield Violation("queue", "Kueue takes autoscaling only as elastic slices", "leave the autoscaler out")
    num_sets = 1 + len(cluster.get("workerGroupSpecs", [])) + (mode == "K8sJobMode")
    if num_sets > MAX_KUEUE_POD_SETS:
        yield Violation(
            "queue", f"{num_sets} pod sets, and Kueue takes {MAX_KUEUE_POD_SETS}", "use fewer worker groups"
        )


def _gang_size(spec: Mapping[str, Any]) -> Iterator[Violation]:
    """The pods that come must be those that the launcher in the entrypoint waits for."""
    found = re.search(r"-m launcher .*?--nnodes[ =](\d+)(?::(\d+))?\b", spec.get("entrypoint", ""))
    cluster = spec["rayClusterSpec"]
    if found is None:
        return
    least, most = int(found[1]), int(found[2] or found[1])
    groups = cluster.get("workerGroupSpecs", [])
    key = "maxReplicas" if cluster.get("enableInTreeAutoscaling") else "replicas"
    pods = sum((group.get(key) or 0) * group.get("numOfHosts", 1) for group in groups)
    if pods < least:
        yield Violation(
            "gang-size",
            f"the job waits for {least} nodes, and the cluster has {pods} worker pods",
            f"give {least} replicas",
        )
    for group in groups:
        hosts = group.get("numOfHosts", 1)
        if hosts > 1 and group.get("replicas") == most:
            yield Violation(
                "num-of-hosts",
                f"worker group {group['groupName']}: replicas {most} with numOfHosts {hosts} makes {most * hosts} pods for {most} nodes",
                f"give replicas {-(-most // hosts)}: it counts groups of hosts",
            )


def _ray_cron_job(one: Mapping[str, Any], operator: Operator) -> Iterator[Violation]:
    spec, labels = one["spec"], one["metadata"].get("labels", {})
    if "RayCronJob" not in operator.gates:
        yield Violation(
            "closed-gate",
            "RayCronJob is behind a feature gate of that name, which is closed by default: nothing would ever run",
            "open it and say so: --feature-gates RayCronJob; or use --schedule-with cronjob",
        )
    if "TZ=" in spec["schedule"]:
        yield Violation("schedule", f"the schedule {spec['schedule']!r} may hold no TZ=", "use timeZone")
    for key in QUEUE_LABELS:
        if key in labels:
            yield Violation(
                "queue",
                f"label {key}: a RayCronJob passes no labels on, so its jobs pass by the queue",
                "use --schedule-with cronjob",
            )
    yield from _ray_job(
        {"kind": "RayJob", "metadata": {"name": one["metadata"]["name"]}, "spec": spec["jobTemplate"]}, operator
    )
