"""A job that runs again and again. Pure.

A CronJob's pod submits the RayJob from a ConfigMap and follows it, so the CronJob knows when the last one still runs, and shows how it
ended. The RayJob belongs to the CronJob's Job, and goes with it when Kubernetes tidies old Jobs away. It has that Job's name, which
Kubernetes makes from the time: a pod that is tried again finds the RayJob there instead of running it twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from launcher.errors import SpecError
from launcher.k8s import extras
from launcher.k8s.choices import ScheduleWith
from launcher.k8s.options import KubeJob

MANIFEST_FOLDER = "/railhead/manifest"
MANIFEST_KEY = "job.json"
_FIELDS = 5


def scheduled(job: KubeJob, ray_job: dict[str, Any], around: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objects that make `ray_job` again at each time of `--schedule`."""
    schedule = job.kube.schedule or ""
    if "TZ=" in schedule:
        raise SpecError(
            f"--schedule {schedule!r}: a time zone inside the schedule is refused",
            advice="write the five fields alone and give --time-zone Europe/Berlin",
        )
    if not schedule.startswith("@") and len(schedule.split()) != _FIELDS:
        raise SpecError(
            f"--schedule {schedule!r} has {len(schedule.split())} fields, a cron expression has {_FIELDS}",
            advice='for every night at two: --schedule "0 2 * * *"',
        )
    if job.kube.schedule_with is ScheduleWith.RAY_CRON_JOB:
        return [_ray_cron_job(job, ray_job)]
    return [_manifest(job, ray_job), *_rights(job), _cron_job(job)]


def _ray_cron_job(job: KubeJob, ray_job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {"schedule": job.kube.schedule}
    if job.kube.time_zone is not None:
        spec["timeZone"] = job.kube.time_zone
    spec["jobTemplate"] = ray_job["spec"]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": extras.metadata(job, job.kube.name),
        "spec": spec,
    }


def _manifest(job: KubeJob, ray_job: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": extras.metadata(job, f"{job.kube.name}-manifest"),
        "data": {MANIFEST_KEY: json.dumps(ray_job, indent=1) + "\n"},
    }


def _rights(job: KubeJob) -> list[dict[str, Any]]:
    """To create RayJobs and to follow them; nothing else, and in this namespace only."""
    name = f"{job.kube.name}-submitter"
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["pods", "pods/log", "events"], "verbs": ["get", "list"]},
    ]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": extras.metadata(job, name)},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": extras.metadata(job, name),
            "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": extras.metadata(job, name),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": job.kube.namespace}],
        },
    ]


def _cron_job(job: KubeJob) -> dict[str, Any]:
    labels = {"RUN_NAME": "batch.kubernetes.io/job-name", "RUN_UID": "batch.kubernetes.io/controller-uid"}
    arguments = [
        "--manifest",
        f"{MANIFEST_FOLDER}/{MANIFEST_KEY}",
        "--name",
        "$(RUN_NAME)",
        "--owner-job-uid",
        "$(RUN_UID)",
    ]
    container: dict[str, Any] = {
        "name": "submit",
        "image": job.kube.image,
        "command": ["python", "-m", "launcher", "submit"],
        "args": arguments,
        "env": [
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}
            for name, label in labels.items()
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [{"name": "manifest", "mountPath": MANIFEST_FOLDER, "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if job.kube.image_pull_policy:
        container["imagePullPolicy"] = job.kube.image_pull_policy
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": f"{job.kube.name}-submitter",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000},
        "containers": [container],
        "volumes": [{"name": "manifest", "configMap": {"name": f"{job.kube.name}-manifest"}}],
    }
    if job.kube.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in job.kube.image_pull_secrets]
    spec: dict[str, Any] = {"schedule": job.kube.schedule}
    if job.kube.time_zone is not None:
        spec["timeZone"] = job.kube.time_zone
    # A controller that was away must not start a night's job at noon; nor may two run at once.
    spec |= {"startingDeadlineSeconds": 600, "concurrencyPolicy": "Forbid"}
    spec["jobTemplate"] = {"spec": {"backoffLimit": 2, "template": {"spec": pod}}}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": extras.metadata(job, job.kube.name),
        "spec": spec,
    }
