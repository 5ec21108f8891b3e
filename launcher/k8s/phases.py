"""What a job is waiting for, in one line, from what the cluster reports. Pure.

The order is that of a job's life: queued, placing, pulling, warming, starting, training, ended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import EXIT_NODE_LOST, EXIT_OK, EXIT_USAGE

Object = Mapping[str, Any]

EXIT_FAILED = 1
TERMINAL = ("Complete", "Failed", "ValidationFailed")
_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_BROKEN = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError", "CrashLoopBackOff")


@dataclass(frozen=True)
class Phase:
    """Where a job stands."""

    name: str
    detail: str = ""
    is_hopeless: bool = False
    """True: no waiting helps; what was asked for must change."""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


@dataclass(frozen=True)
class Ending:
    """How a job ended, as an exit code and a sentence."""

    exit_code: int
    sentence: str


def ending(job: Object) -> Ending | None:
    """None while it has not ended.

    >>> ending({"status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "command failed with exit code 3"}})
    Ending(exit_code=3, sentence='failed: command failed with exit code 3')
    """
    status = job.get("status", {})
    deployment, result = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment not in TERMINAL:
        return None
    reason, message = status.get("reason", ""), status.get("message", "")
    why = ": ".join(text for text in (reason, message) if text) or "KubeRay gives no reason"
    if deployment == "ValidationFailed":
        return Ending(EXIT_USAGE, f"KubeRay refuses the job: {why}; stop it, repair it and submit again")
    if deployment == "Complete" and result != "FAILED":
        word = "stopped" if result == "STOPPED" else "ended with 0"
        return Ending(EXIT_OK if result != "STOPPED" else EXIT_FAILED, word)
    if result != "FAILED" or reason in (
        "DeadlineExceeded",
        "PreRunningDeadlineExceeded",
        "JobStatusCheckTimeoutExceeded",
    ):
        return Ending(EXIT_NODE_LOST, f"ended by the platform: {why}")
    found = re.search(r"exit code (\d+)", message)
    return Ending(int(found[1]) if found and 0 < int(found[1]) < 256 else EXIT_FAILED, f"failed: {why}")


def phase_of(job: Object, pods: Sequence[Object], events: Sequence[Object], age_s: float) -> Phase:
    """`pods`: the job's own. `events`: of its namespace, newest last. `age_s`: seconds since it was created."""
    end = ending(job)
    if end is not None:
        return Phase("ended", end.sentence)
    status = job.get("status", {})
    deployment = status.get("jobDeploymentStatus", "")
    if deployment == "Running":
        return Phase("training")
    if job.get("spec", {}).get("suspend"):
        queue = job.get("metadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name")
        return Phase("queued", _last(events, ("Workload",)) or (f"in queue {queue}" if queue else "suspended"))
    if deployment == "Retrying":
        return Phase("starting", "a new cluster, after a failure")
    if not deployment and age_s > 30:
        return Phase(
            "queued",
            f"nobody has taken the job for {age_s:.0f} s: does the KubeRay operator run, and watch this namespace?",
        )
    return _of_pods(job, [pod for pod in pods if _role(pod) in ("head", "worker")], events)


def _of_pods(job: Object, pods: Sequence[Object], events: Sequence[Object]) -> Phase:
    wanted = 1 + sum(
        group.get("replicas", 0) for group in job["spec"].get("rayClusterSpec", {}).get("workerGroupSpecs", [])
    )
    unplaced = [pod for pod in pods if not pod.get("spec", {}).get("nodeName")]
    broken = next((phase for pod in pods for phase in [_trouble(pod)] if phase), None)
    if broken:
        return broken
    if len(pods) < wanted or unplaced:
        placed = len(pods) - len(unplaced)
        why = next((text for pod in unplaced for text in [_unschedulable(pod)] if text), None) or _last(
            events, ("RayJob", "RayCluster", "PodGroup")
        )
        return Phase("placing", f"{placed} of {wanted} pods have a node" + (f"; {why}" if why else ""))
    unready = [pod for pod in pods if not _is_ready(pod)]
    warming = [pod for pod in unready if _runs(pod, "preload")]
    if warming:
        return Phase("warming", f"the cache of {len(warming)} of {wanted - 1} nodes is being filled")
    starting_cache = [pod for pod in unready if _is_starting(pod, "cache")]
    if starting_cache:
        return Phase("warming", f"the cache of {len(starting_cache)} of {wanted - 1} nodes is starting")
    pulling = [pod for pod in unready if _pulls(pod)]
    if pulling:
        return Phase("pulling", f"the image on {len(pulling)} of {wanted} nodes")
    if unready:
        return Phase("starting", f"Ray is up in {wanted - len(unready)} of {wanted} pods")
    return Phase("starting", "all pods are ready; the job is being handed to Ray")


def is_placed(phase: Phase) -> bool:
    """True once every pod has a node and its image (`--wait-placed`)."""
    return phase.name in ("warming", "starting", "training", "ended")


def _role(pod: Object) -> str:
    return str(pod.get("metadata", {}).get("labels", {}).get("railhead.dev/role", ""))


def _statuses(pod: Object) -> list[Object]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _trouble(pod: Object) -> Phase | None:
    """What will hardly mend itself, in words."""
    name = pod["metadata"]["name"]
    for one in _statuses(pod):
        waiting = one.get("state", {}).get("waiting", {})
        ended = one.get("state", {}).get("terminated") or one.get("lastState", {}).get("terminated") or {}
        reason, text = waiting.get("reason", ""), waiting.get("message") or ended.get("message", "")
        if reason in _NO_IMAGE:
            said = f"the image of {name} ({one.get('image', '')}) cannot be pulled: {text or reason}"
            return Phase("pulling", said, is_hopeless=reason == "InvalidImageName")
        if (reason in _BROKEN or ended.get("reason") in _BROKEN) and "bash" in text:
            return Phase(
                "starting", f"{name}: the image has no bash, which KubeRay needs to start Ray: {text}", is_hopeless=True
            )
        if reason in _BROKEN:
            return Phase(
                "starting", f"{name}: container {one['name']} does not start ({reason}): {text or 'see its log'}"
            )
        if ended.get("reason") == "OOMKilled":
            return Phase("starting", f"{name}: container {one['name']} was killed for memory; give it more")
        now = one.get("state", {}).get("terminated", {})
        if now.get("exitCode"):
            last = str(now.get("message") or "see its log").strip().rpartition("\n")[2]
            return Phase("starting", f"{name}: container {one['name']} ended with {now['exitCode']}: {last}")
    return None


def _unschedulable(pod: Object) -> str | None:
    for condition in pod.get("status", {}).get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "") or None
    return None


def _is_ready(pod: Object) -> bool:
    return any(
        c.get("type") == "Ready" and c.get("status") == "True" for c in pod.get("status", {}).get("conditions", [])
    )


def _runs(pod: Object, container: str) -> bool:
    return any(one["name"] == container and "running" in one.get("state", {}) for one in _statuses(pod))


def _is_starting(pod: Object, container: str) -> bool:
    return any(
        one["name"] == container and not one.get("started") and "running" in one.get("state", {})
        for one in _statuses(pod)
    )


def _pulls(pod: Object) -> bool:
    waiting = [one.get("state", {}).get("waiting", {}).get("reason") for one in _statuses(pod)]
    return "ContainerCreating" in waiting or (bool(waiting) and waiting[0] == "PodInitializing")


def _last(events: Sequence[Object], kinds: Sequence[str]) -> str | None:
    """The newest warning, or the newest word at all, of objects of these kinds."""
    own = [event for event in events if event.get("involvedObject", {}).get("kind") in kinds]
    chosen = [event for event in own if event.get("type") == "Warning"] or own
    return str(chosen[-1].get("message", "")) or None if chosen else None
