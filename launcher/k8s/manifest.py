"""A job on Kubernetes as manifests: plain dicts, the RayJob last. Pure: printed, compared, tested, and only then sent.

`render` never returns what the cluster would refuse, or would take and never run: all rules of `launcher.k8s.rules` are applied to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from launcher.errors import SpecError
from launcher.k8s import extras, pods, schedule
from launcher.k8s.choices import ScheduleWith, Submission
from launcher.k8s.entrypoint import entrypoint
from launcher.k8s.fabric import wire
from launcher.k8s.options import CODE_PATH, MAX_CONFIG_BYTES, KubeJob
from launcher.k8s.peers import check_peers, how_to_make_key
from launcher.k8s.queues import Queueing, queueing
from launcher.k8s.releases import requirements, version
from launcher.k8s.rules import Operator, Violation, check
from launcher.k8s.wiring import Wiring
from launcher.spec import JobSpec, ProgramKind

HASH_ANNOTATION = "railhead.dev/spec-hash"
WORKER_GROUP = "workers"


@dataclass(frozen=True)
class Rendered:
    """The objects of a job, in the order in which they make sense, and what has to be said about them."""

    objects: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    needs_kuberay: str = ""
    """The oldest release that takes it."""
    own_secrets: tuple[dict[str, Any], ...] = ()
    """Secrets of the job's own, without their values: whoever creates the job makes those up, and no manifest ever holds them."""
    needed_secrets: frozenset[str] = frozenset()
    """Secrets that must be there already."""

    @property
    def main(self) -> dict[str, Any]:
        """The RayJob, or the object that makes RayJobs on schedule."""
        return self.objects[-1]


def render(job: KubeJob) -> Rendered:
    """The job's objects. Raises SpecError for what cannot be, with what to do."""
    wiring, queue = wire(job.kube), queueing(job)
    _check_files(job)
    check_peers(job.kube.cache)
    if job.kube.network_policy and wiring.host_network:
        raise SpecError(
            f"--network-policy with --fabric {job.kube.fabric}: workers in the host's network are no pods to a policy, and the head would "
            "turn them away",
            advice="leave --network-policy out; the nodes' own firewall decides there",
        )
    around = [
        *extras.account(job),
        *extras.code(job),
        *extras.peer_service(job),
        *extras.disruption_budget(job),
        *extras.network_policy(job),
        *extras.pod_monitor(job),
    ]
    main = _ray_job(job, wiring, queue)
    main["metadata"]["annotations"] = {HASH_ANNOTATION: fingerprint([*around, main])}
    objects = [*around, *(schedule.scheduled(job, main, around) if job.kube.schedule is not None else [main])]
    # A CronJob carries the RayJob as text, so it is checked beside it.
    checked = objects if main in objects or job.kube.schedule_with is ScheduleWith.RAY_CRON_JOB else [*objects, main]
    violations = check(checked, Operator(job.kube.kuberay, frozenset(job.kube.feature_gates)))
    _refuse([one for one in violations if one.is_fatal])
    oldest = max((need.release for one in checked for need in requirements(one)), key=version, default="1.1.0")
    said = [one.message for one in violations if not one.is_fatal]
    notes = (*(text for text in (queue.note, wiring.note) if text), *said, *_notes(job))
    own = tuple(extras.peer_key(job))
    needed = pods.needed_secrets(checked) - {one["metadata"]["name"] for one in own}
    return Rendered(tuple(objects), notes, oldest, own, frozenset(needed))


def fingerprint(objects: Sequence[dict[str, Any]]) -> str:
    """Tells one job from another of the same name; equal for equal objects."""
    text = json.dumps(objects, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_yaml(rendered: Rendered) -> str:
    """The manifests as a file that kubectl applies. The same job gives the same text, byte for byte."""
    head = [
        f"# Needs KubeRay {rendered.needs_kuberay} or newer.",
        *(f"# Note: {note}." for note in rendered.notes),
        *(
            f"# Not in here: Secret {one['metadata']['name']}. `submit` makes it; by hand:\n#   {how_to_make_key(one)}"
            for one in rendered.own_secrets
        ),
        *(
            [f"# Must be there: Secret {', '.join(sorted(rendered.needed_secrets))}."]
            if rendered.needed_secrets
            else []
        ),
    ]
    return "\n".join(head) + "\n" + dump(rendered.objects)


def dump(objects: Sequence[dict[str, Any]]) -> str:
    texts = [yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for one in objects]
    return "".join(f"---\n{text}" for text in texts)


def _ray_job(job: KubeJob, wiring: Wiring, queue: Queueing) -> dict[str, Any]:
    kube = job.kube
    spec: dict[str, Any] = {
        "entrypoint": entrypoint(_on_the_cluster(job)),
        "submissionMode": kube.submission.value,
        # The cluster goes after the end; the RayJob itself, with its status, stays until it is stopped.
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kube.ttl_s,
        "backoffLimit": kube.cluster_retries,
    }
    if kube.deadline_s is not None:
        spec["activeDeadlineSeconds"] = kube.deadline_s
    if kube.start_deadline_s is not None:
        spec["preRunningDeadlineSeconds"] = kube.start_deadline_s
    if kube.working_dir is not None:
        spec["runtimeEnvYAML"] = f"working_dir: {json.dumps(kube.working_dir)}\n"
    if kube.submission is Submission.JOB:
        spec["submitterPodTemplate"] = pods.submitter_template(job)
    spec["rayClusterSpec"] = _cluster(job, wiring, queue)
    metadata = extras.metadata(job, kube.name)
    metadata["labels"] |= dict(queue.labels)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _cluster(job: KubeJob, wiring: Wiring, queue: Queueing) -> dict[str, Any]:
    store = str(pods.object_store_bytes(job))
    cluster: dict[str, Any] = {"rayVersion": job.kube.ray_version}
    if pods.uses_token(job):
        cluster["authOptions"] = {"mode": "token"}
    if job.kube.autoscale:
        cluster["enableInTreeAutoscaling"] = True
        # What idles for a minute goes: nothing idles while a gang trains.
        cluster["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 60}
    cluster["headGroupSpec"] = {
        # num-cpus 0: ranks go to workers, never to the head, which has no GPUs and must outlive them.
        "rayStartParams": {"num-cpus": "0", "object-store-memory": store},
        "template": pods.head_template(job),
    }
    cluster["workerGroupSpecs"] = [
        {
            "groupName": WORKER_GROUP,
            "replicas": job.num_workers,
            "minReplicas": job.num_workers,
            "maxReplicas": job.max_workers if job.kube.autoscale else job.num_workers,
            "rayStartParams": {"object-store-memory": store},
            "template": pods.worker_template(job, wiring, dict(queue.pod_annotations)),
        }
    ]
    return cluster


def _on_the_cluster(job: KubeJob) -> JobSpec:
    """A script that travels in the ConfigMap lies where that is mounted."""
    program = job.spec.program
    if program.kind is ProgramKind.SCRIPT and program.target in job.kube.files:
        return replace(job.spec, program=replace(program, target=f"{CODE_PATH}/{program.target}"))
    return job.spec


def _check_files(job: KubeJob) -> None:
    total = sum(len(text.encode()) for text in job.kube.files.values())
    if total > MAX_CONFIG_BYTES:
        raise SpecError(
            f"--ship: {total} bytes in {len(job.kube.files)} files; a ConfigMap holds {MAX_CONFIG_BYTES}",
            advice="put the code into the image, or give a zip by URI with --working-dir s3://…",
        )
    uri = job.kube.working_dir
    if uri is not None and ("://" not in uri or set(uri) & set('$`"\\\n')):
        raise SpecError(
            f"--working-dir {uri}: expected the URI of a zip, without $, quotes or backticks",
            advice="for example s3://bucket/code.zip; KubeRay's submitter pastes it into a shell line",
        )


def _refuse(violations: Sequence[Violation]) -> None:
    if not violations:
        return
    first, rest = violations[0], violations[1:]
    more = "".join(f"\n  and: {one.message}" for one in rest)
    raise SpecError(f"{first.message}{more}", advice=first.advice)


def _notes(job: KubeJob) -> list[str]:
    spec, kube = job.spec, job.kube
    notes = []
    if spec.spare_nodes:
        notes.append(f"{spec.spare_nodes} spare worker(s) of {job.max_workers} wait idle with their GPUs")
    used = spec.nproc_per_node * (1 if spec.resources.gpus_per_proc is None else spec.resources.gpus_per_proc)
    if kube.gpus > used:
        notes.append(
            f"{kube.gpus - used:g} of {kube.gpus} GPUs of each worker idle: --nproc-per-node is {spec.nproc_per_node}"
        )
    if kube.submission is Submission.HTTP:
        notes.append("with --submission http no pod holds the job's output; it is in the head pod, below /tmp/ray")
    return notes


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; no anchors, which people do not read; lists indented under their key."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
