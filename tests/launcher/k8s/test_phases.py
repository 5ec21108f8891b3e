"""What the cluster reports, in the words of somebody who waits."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.k8s.logcursor import LogCursor
from launcher.k8s.phases import ending, phase_of


def job(deployment: str = "Initializing", **changes: Any) -> dict[str, Any]:
    group = {"replicas": 1}
    return {
        "metadata": {"name": "resnet", "labels": {}},
        "spec": {"rayClusterSpec": {"workerGroupSpecs": [group]}},
        "status": {"jobDeploymentStatus": deployment},
        **changes,
    }


def pod(
    name: str, *, node: str | None = "n1", ready: bool = False, conditions: Any = (), **statuses: Any
) -> dict[str, Any]:
    found = [*conditions, *([{"type": "Ready", "status": "True"}] if ready else [])]
    return {
        "metadata": {"name": name, "labels": {"railhead.dev/role": "head" if "head" in name else "worker"}},
        "spec": {"nodeName": node} if node else {},
        "status": {"conditions": found, **statuses},
    }


def waiting(container: str, reason: str, message: str = "") -> dict[str, Any]:
    return {"name": container, "image": "reg/t:1", "state": {"waiting": {"reason": reason, "message": message}}}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/4 nodes: 4 Insufficient nvidia.com/gpu"}
RUNNING = {"name": "cache", "started": False, "state": {"running": {}}}
PRELOAD = {"name": "preload", "started": False, "state": {"running": {}}}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "held by Kueue": (
        job(spec={"suspend": True}, metadata={"name": "r", "labels": {"kueue.x-k8s.io/queue-name": "q"}}),
        [],
        "queued: in queue q",
    ),
    "no pods yet": (job(), [], "placing: 0 of 2 pods have a node"),
    "no room": (
        job(),
        [pod("head"), pod("w", node=None, conditions=[UNSCHEDULABLE])],
        "placing: 1 of 2 pods have a node; 0/4 nodes: 4 Insufficient nvidia.com/gpu",
    ),
    "a wrong image": (
        job(),
        [pod("head"), pod("w", containerStatuses=[waiting("ray-worker", "ImagePullBackOff", "not found")])],
        "pulling: the image of w (reg/t:1) cannot be pulled: not found",
    ),
    "an image without bash": (
        job(),
        [
            pod("head"),
            pod(
                "w",
                containerStatuses=[waiting("ray-worker", "CreateContainerError", 'exec: "/bin/bash": no such file')],
            ),
        ],
        'starting: w: the image has no bash, which KubeRay needs to start Ray: exec: "/bin/bash": no such file',
    ),
    "a container that gave up": (
        job(),
        [
            pod("head"),
            pod(
                "w",
                containerStatuses=[
                    {"name": "ray-worker", "state": {"terminated": {"exitCode": 1, "message": "a\nno plugin\n"}}}
                ],
            ),
        ],
        "starting: w: container ray-worker ended with 1: no plugin",
    ),
    "a sidecar that came back": (
        job(),
        [
            pod("head", ready=True),
            pod("w", initContainerStatuses=[{**RUNNING, "lastState": {"terminated": {"exitCode": 1, "message": "x"}}}]),
        ],
        "warming: the cache of 1 of 1 nodes is starting",
    ),
    "pulling": (
        job(),
        [pod("head", ready=True), pod("w", containerStatuses=[waiting("ray-worker", "ContainerCreating")])],
        "pulling: the image on 1 of 2 nodes",
    ),
    "the cache starts": (
        job(),
        [pod("head", ready=True), pod("w", initContainerStatuses=[RUNNING])],
        "warming: the cache of 1 of 1 nodes is starting",
    ),
    "the cache is filled": (
        job(),
        [pod("head", ready=True), pod("w", initContainerStatuses=[RUNNING, PRELOAD])],
        "warming: the cache of 1 of 1 nodes is being filled",
    ),
    "Ray starts": (job(), [pod("head", ready=True), pod("w")], "starting: Ray is up in 1 of 2 pods"),
    "all there": (
        job(),
        [pod("head", ready=True), pod("w", ready=True)],
        "starting: all pods are ready; the job is being handed to Ray",
    ),
    "training": (job("Running"), [], "training"),
}


@pytest.mark.parametrize(("one", "pods", "said"), CASES.values(), ids=CASES.keys())
def test_each_wait_is_named_with_its_reason(one: dict[str, Any], pods: list[dict[str, Any]], said: str) -> None:
    assert str(phase_of(one, pods, [], 1.0)) == said


def test_a_job_that_nobody_takes_is_said_to_lack_an_operator() -> None:
    """The CRD alone takes the job; without the operator it would lie there for ever, without a word."""
    assert "does the KubeRay operator run" in str(phase_of(job(""), [], [], 31.0))


def test_kueues_own_reason_is_shown() -> None:
    event = {
        "involvedObject": {"kind": "Workload"},
        "type": "Warning",
        "message": "insufficient quota for nvidia.com/gpu",
    }
    assert "insufficient quota" in str(phase_of(job(spec={"suspend": True}), [], [event], 1.0))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "… with exit code 3, last"}, 3),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "no word of a code"}, 1),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"}, 75),
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, 75),
        ({"jobDeploymentStatus": "ValidationFailed"}, 2),
    ],
)
def test_the_exit_code_is_0_only_for_success(status: dict[str, str], code: int) -> None:
    end = ending({"status": status})
    assert end is not None and end.exit_code == code


def test_a_running_job_has_no_ending() -> None:
    assert ending(job("Running")) is None


def test_times_without_trailing_zeros_are_put_in_order() -> None:
    """Go writes .1 for .100000000: as texts .1Z would come after .15Z."""
    cursor = LogCursor()
    assert [
        cursor.take(line)
        for line in ("2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.15Z b", "2026-01-01T00:00:01Z c")
    ] == ["a", "b", "c"]
