"""The pod templates of head, workers and submitter. Pure.

Container 0 is Ray, whatever else is in the pod: KubeRay reads and writes only that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.k8s.cachepod import cache_parts
from launcher.k8s.options import CODE_PATH, DEFAULT_UID, KubeJob
from launcher.k8s.quantity import MIB, format_bytes, format_cpus
from launcher.k8s.releases import reaches
from launcher.k8s.wiring import Wiring

JOB_LABEL = "railhead.dev/job"
ROLE_LABEL = "railhead.dev/role"
SUBMITTER = "ray-job-submitter"
"""The container whose log is the job's output: KubeRay's own name for it in SidecarMode, and ours elsewhere."""
RUNS_PATH = "/railhead/runs"
CODE_VOLUME = "code"
_NO_TOKEN = {"name": "RAY_AUTH_MODE", "value": "disabled"}
TOKEN_SINCE_RAY, TOKEN_SINCE_KUBERAY = "2.52", "1.5.1"

# At SIGTERM Ray drains its node for 30 s of its own. The hook has done that by then, and told with the pod's own deadline.
_NO_SECOND_DRAIN = ({"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "0"},)
_LEAVE = ("python", "-m", "launcher.k8s.leave")

# Labels and taints by which providers tell nodes that may be taken away.
SPOT_LABELS = (
    ("cloud.google.com/gke-spot", "true"),
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
_SPOT_TAINTS = (("cloud.google.com/gke-spot", "true"), ("kubernetes.azure.com/scalesetpriority", "spot"))


def head_template(job: KubeJob) -> dict[str, Any]:
    """The head drives and trains nothing: it has neither GPUs nor the fabric, nor the rights that go with it."""
    kube = job.kube
    resources = _resources({"cpu": format_cpus(kube.head_cpus), "memory": kube.head_memory})
    spec: dict[str, Any] = {
        **_pod(job, Wiring()),
        "containers": [_ray_container(job, "head", resources, mounts=[], env=[_stop_wait(job)])],
        "volumes": _job_volumes(job),
    }
    if kube.spot:
        spec["affinity"] = _spot_affinity(is_wanted=False)
    return {"metadata": {"labels": job_labels(job, "head")}, "spec": spec}


def worker_template(job: KubeJob, wiring: Wiring, annotations: dict[str, str]) -> dict[str, Any]:
    kube = job.kube
    cache = cache_parts(job, user_env(job), env_from(job))
    shm = {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": format_bytes(job.shm_bytes)}}
    claims = [(f"claim-{idx}", name, path) for idx, (name, path) in enumerate(kube.claims)]
    mounts = [
        {"name": "shared-mem", "mountPath": "/dev/shm"},
        *cache.ray_mounts,
        *map(dict, wiring.mounts),
        *({"name": volume, "mountPath": path} for volume, _, path in claims),
    ]
    limits = {"cpu": format_cpus(kube.cpus), "memory": kube.memory, **dict(wiring.resources)}
    if kube.gpus:
        limits[kube.gpu_resource] = str(kube.gpus)
    ray = _ray_container(job, "worker", _resources(limits), mounts=mounts, env=list(cache.ray_env))
    if wiring.setup:
        # KubeRay joins `command` with its own line: `<command> && ulimit …; ray start …`
        ray["command"] = [wiring.setup]
    context = _ray_context(wiring)
    if context:
        ray["securityContext"] = context
    spec: dict[str, Any] = {**_pod(job, wiring), "containers": [ray]}
    before = [*cache.init_containers, *({**one, **_pull_policy(job)} for one in wiring.daemons)]
    if before:
        spec["initContainers"] = before
    spec["volumes"] = [
        shm,
        *cache.volumes,
        *map(dict, wiring.volumes),
        *({"name": volume, "persistentVolumeClaim": {"claimName": name}} for volume, name, _ in claims),
        *_job_volumes(job),
    ]
    if wiring.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    selector = dict(kube.node_selector)
    if kube.instance_type:
        selector.setdefault("node.kubernetes.io/instance-type", kube.instance_type)
    if selector:
        spec["nodeSelector"] = selector
    tolerations = _worker_tolerations(job)
    if tolerations:
        spec["tolerations"] = tolerations
    if kube.spot:
        spec["affinity"] = _spot_affinity(is_wanted=True)
    metadata: dict[str, Any] = {"labels": job_labels(job, "worker")}
    notes = {**dict(wiring.annotations), **annotations}
    if notes:
        metadata["annotations"] = notes
    return {"metadata": metadata, "spec": spec}


def submitter_template(job: KubeJob) -> dict[str, Any]:
    """KubeRay's own default takes neither pull secrets nor tolerations from the head; without a command, its submit line is used."""
    container: dict[str, Any] = {
        "name": SUBMITTER,
        "image": job.kube.image,
        **_pull_policy(job),
        **({"env": [_NO_TOKEN]} if _goes_without_token(job) else {}),
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
    return {
        "metadata": {"labels": job_labels(job, "submitter")},
        "spec": {**_pod(job, Wiring()), "containers": [container]},
    }


def object_store_bytes(job: KubeJob) -> int:
    """Ray's object store takes 30 % of the memory if it is let; training hardly uses it, and wants the memory."""
    return max(80 * MIB, min(512 * MIB, job.shm_bytes // 2))


def job_labels(job: KubeJob, role: str) -> dict[str, str]:
    return {JOB_LABEL: job.kube.name, ROLE_LABEL: role, **dict(job.kube.labels)}


def uid_of(job: KubeJob, wiring: Wiring) -> int:
    """An added capability is effective for root only, so RDMA without root would depend on the node's own memlock limit."""
    if job.kube.run_as_user is not None:
        return job.kube.run_as_user
    return 0 if wiring.locks_memory or wiring.privileged else DEFAULT_UID


def service_account(job: KubeJob) -> str | None:
    """None: with autoscaling KubeRay makes an account with the rights that its autoscaler needs."""
    if job.kube.service_account is not None or job.kube.autoscale:
        return job.kube.service_account
    return job.kube.name


def uses_token(job: KubeJob) -> bool:
    """Ray 2.60 asks for a token unless told otherwise; KubeRay hands one to all of the job's pods from 1.5.1 on."""
    return reaches(job.kube.ray_version, TOKEN_SINCE_RAY) and reaches(job.kube.kuberay, TOKEN_SINCE_KUBERAY)


def _goes_without_token(job: KubeJob) -> bool:
    """Ray would ask for one that KubeRay does not hand out."""
    return reaches(job.kube.ray_version, TOKEN_SINCE_RAY) and not uses_token(job)


def user_env(job: KubeJob) -> list[dict[str, Any]]:
    """What the user asked for; the cache and the preload get the same, because the object store's keys are among it."""
    plain: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in job.spec.env.items()]
    secret = [
        {"name": one.variable, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}}
        for one in job.kube.secret_env
    ]
    return plain + secret


def env_from(job: KubeJob) -> list[dict[str, Any]]:
    return [{"secretRef": {"name": name}} for name in job.kube.env_from_secrets]


def needed_secrets(node: Any) -> set[str]:
    """Names of all Secrets without which a pod of these manifests does not start.

    >>> sorted(needed_secrets([{"imagePullSecrets": [{"name": "pull"}]}, {"envFrom": [{"secretRef": {"name": "s3"}}]}]))
    ['pull', 's3']
    """
    found: set[str] = set()
    if isinstance(node, list | tuple):
        for item in node:
            found |= needed_secrets(item)
    if not isinstance(node, Mapping):
        return found
    for key, value in node.items():
        if key in ("secretRef", "secretKeyRef") and not value.get("optional"):
            found.add(value["name"])
        elif key == "secret" and isinstance(value, Mapping) and "secretName" in value and not value.get("optional"):
            found.add(value["secretName"])
        elif key == "imagePullSecrets":
            found |= {one["name"] for one in value}
        else:
            found |= needed_secrets(value)
    return found


def _stop_wait(job: KubeJob) -> dict[str, Any]:
    """Ray kills a job that it stops after 3 s unless told otherwise; the launcher gives its ranks `--shutdown-timeout` for a checkpoint."""
    return {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(job.leave_s)}


def _ray_container(
    job: KubeJob, role: str, resources: dict[str, Any], mounts: list[dict[str, Any]], env: list[dict[str, Any]]
) -> dict[str, Any]:
    ours = [{"name": "RAILHEAD_RUNS", "value": RUNS_PATH}, *_NO_SECOND_DRAIN, *env]
    if _goes_without_token(job):
        ours.append(_NO_TOKEN)
    theirs = user_env(job)
    named = {entry["name"] for entry in theirs}
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": job.kube.image,
        **_pull_policy(job),
        "env": [*(entry for entry in ours if entry["name"] not in named), *theirs],
        "resources": resources,
        "volumeMounts": [{"name": "runs", "mountPath": RUNS_PATH}, *mounts],
        "lifecycle": {"preStop": {"exec": {"command": [*_LEAVE, role, "--seconds", str(job.leave_s)]}}},
        # What a container that fails wrote last is then in its status, where `status` reads it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if env_from(job):
        container["envFrom"] = env_from(job)
    if job.kube.files:
        container["volumeMounts"].append({"name": CODE_VOLUME, "mountPath": CODE_PATH})
    return container


def _job_volumes(job: KubeJob) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "runs", "emptyDir": {}}]
    if job.kube.files:
        volumes.append({"name": CODE_VOLUME, "configMap": {"name": f"{job.kube.name}-code"}})
    return volumes


def _pod(job: KubeJob, wiring: Wiring) -> dict[str, Any]:
    """What all three have in common. restartPolicy Never: KubeRay replaces a worker whose Ray ended, and autoscaling demands it."""
    uid = uid_of(job, wiring)
    context: dict[str, Any] = {"runAsUser": uid, "fsGroup": uid}
    if uid:
        context["runAsNonRoot"] = True
    account = service_account(job)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "securityContext": context,
    }
    if account is not None:
        pod["serviceAccountName"] = account
    if not job.kube.autoscale:
        pod["automountServiceAccountToken"] = False
    if job.kube.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in job.kube.image_pull_secrets]
    if job.kube.priority_class is not None:
        pod["priorityClassName"] = job.kube.priority_class
    return pod


def _ray_context(wiring: Wiring) -> dict[str, Any]:
    if wiring.privileged:
        return {"privileged": True}
    return {"capabilities": {"add": ["IPC_LOCK"]}} if wiring.locks_memory else {}


def _resources(limits: dict[str, str]) -> dict[str, Any]:
    """Requests equal to limits: Ray counts limits, the scheduler requests, and a gang wants both to mean the same."""
    return {"requests": dict(limits), "limits": dict(limits)}


def _worker_tolerations(job: KubeJob) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [dict(one) for one in job.kube.tolerations]
    if job.kube.gpus:
        found.append({"key": job.kube.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    if job.kube.spot:
        found += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in _SPOT_TAINTS
        ]
    return found


def _spot_affinity(*, is_wanted: bool) -> dict[str, Any]:
    """Terms are alternatives, expressions of one term hold together: on any provider's spot node, or on none's."""
    operator = "In" if is_wanted else "NotIn"
    expressions = [{"key": key, "operator": operator, "values": [value]} for key, value in SPOT_LABELS]
    terms = [{"matchExpressions": [one]} for one in expressions] if is_wanted else [{"matchExpressions": expressions}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _pull_policy(job: KubeJob) -> dict[str, str]:
    return {"imagePullPolicy": job.kube.image_pull_policy} if job.kube.image_pull_policy else {}
