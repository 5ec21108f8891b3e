"""Each mistake that only the operator or the cluster reveals is found in a finished manifest, whoever wrote it.

One good manifest, spoiled one way at a time: the rule that is meant must speak, and the good one must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher.k8s.manifest import HASH_ANNOTATION, render
from launcher.k8s.releases import release_of_field, requirements
from launcher.k8s.rules import Operator, check, check_edit
from tests.launcher.k8s.jobs import good, group, head, job, ray_job, worker

Spoil = Callable[[dict[str, Any]], object]


def _swap(one: dict[str, Any]) -> None:
    """The sidecar as an ordinary container, listed first."""
    spec = worker(one)
    sidecar = spec.pop("initContainers")[0]
    del sidecar["restartPolicy"]
    spec["containers"].insert(0, sidecar)


def _sidecar(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = worker(one)["initContainers"][0]
    return found


def _ray(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = worker(one)["containers"][0]
    return found


def _cluster(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = one["spec"]["rayClusterSpec"]
    return found


def _labels(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _cluster(one)["headGroupSpec"]["template"]["metadata"]["labels"]
    return found


def _gpus_in_requests_only(one: dict[str, Any]) -> None:
    del _ray(one)["resources"]["limits"]["nvidia.com/gpu"]


MISTAKES: dict[str, tuple[str, Spoil]] = {
    "1 a sidecar before Ray": ("ray-is-container-0", _swap),
    "2 a port on the head without the dashboard's": (
        "head-ports",
        lambda one: head(one)["containers"][0].update(ports=[{"name": "cache", "containerPort": 9400}]),
    ),
    "2 two truths about a port": (
        "head-ports",
        lambda one: (
            _cluster(one)["headGroupSpec"]["rayStartParams"].update({"dashboard-port": "8266"}),
            head(one)["containers"][0].update(ports=[{"name": "dashboard", "containerPort": 8265}]),
        ),
    ),
    "3 replicas above maxReplicas": ("replicas-outside-range", lambda one: group(one).update(replicas=3)),
    "3 replicas below minReplicas": ("replicas-outside-range", lambda one: group(one).update(replicas=1)),
    "3 a range upside down": ("replica-range", lambda one: group(one).update(minReplicas=3)),
    "4 replicas forgotten": ("replicas-missing", lambda one: group(one).pop("replicas")),
    "4 no worker at all": ("replicas-missing", lambda one: group(one).update(replicas=0, minReplicas=0)),
    "5 numOfHosts 0": ("num-of-hosts", lambda one: group(one).update(numOfHosts=0)),
    "5 replicas in pods where numOfHosts multiplies": ("num-of-hosts", lambda one: group(one).update(numOfHosts=2)),
    "6 a name of 48 characters": ("name", lambda one: one["metadata"].update(name="r" * 48)),
    "6 a name with a dot": ("name", lambda one: one["metadata"].update(name="res.net")),
    "6 a name with a leading digit": ("name", lambda one: one["metadata"].update(name="1net")),
    "8 two groups of one name": ("group-name", lambda one: _cluster(one)["workerGroupSpecs"].append(group(good()))),
    "8 a group called headgroup": ("group-name", lambda one: group(one).update(groupName="headgroup")),
    "8 a group called head": ("group-name", lambda one: group(one).update(groupName="Head")),
    "9 a TTL without a shutdown": ("ttl", lambda one: one["spec"].update(shutdownAfterJobFinishes=False)),
    "9 deletion rules beside the shutdown": (
        "ttl",
        lambda one: one["spec"].update(deletionStrategy={"deletionRules": []}),
    ),
    "10 a deadline taken as a total": (
        "deadline-per-retry",
        lambda one: one["spec"].update(activeDeadlineSeconds=900, backoffLimit=2),
    ),
    "10 a deadline without time for the queue": (
        "deadline-too-short",
        lambda one: one["spec"].update(activeDeadlineSeconds=60),
    ),
    "11 a semicolon for the submitter's shell": (
        "entrypoint",
        lambda one: one["spec"].update(entrypoint="python a.py; rm -r x"),
    ),
    "11 a variable for the submitter's shell": (
        "entrypoint",
        lambda one: one["spec"].update(entrypoint='python a.py "$HOME"'),
    ),
    "11 an open quote": ("entrypoint", lambda one: one["spec"].update(entrypoint="python a.py it's")),
    "11 a line break": ("entrypoint", lambda one: one["spec"].update(entrypoint="python a.py 'a\nb'")),
    "11 no entrypoint": ("entrypoint", lambda one: one["spec"].update(entrypoint="")),
    "12 SidecarMode with restartPolicy Always": (
        "restart-policy",
        lambda one: (
            one["spec"].pop("submitterPodTemplate"),
            one["spec"].update(submissionMode="SidecarMode"),
            head(one).update(restartPolicy="Always"),
        ),
    ),
    "12 autoscaler v2 with restartPolicy Always": (
        "restart-policy",
        lambda one: (
            _cluster(one).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}),
            worker(one).update(restartPolicy="Always"),
        ),
    ),
    "13 a readiness that waits for the training": (
        "sidecar-readiness-waits",
        lambda one: _sidecar(one).update(readinessProbe={"exec": {"command": ["test", "-f", "/tmp/training"]}}),
    ),
    "14 a start that waits for Ray": (
        "sidecar-startup-waits",
        lambda one: _sidecar(one).update(startupProbe={"tcpSocket": {"port": 52365}}),
    ),
    "14 an init container with KubeRay's name": (
        "reserved-init-name",
        lambda one: _sidecar(one).update(name="wait-gcs-ready"),
    ),
    "15 GPUs in requests only": ("device-in-requests-only", _gpus_in_requests_only),
    "15 GPUs said twice": (
        "resources-twice",
        lambda one: (group(one).update(resources={"GPU": "8"}), group(one)["rayStartParams"].update({"num-gpus": "8"})),
    ),
    "16 created-by on the head": (
        "head-selector-label",
        lambda one: _labels(one).update({"app.kubernetes.io/created-by": "railhead"}),
    ),
    "16 ray.io/identifier on the head": (
        "head-selector-label",
        lambda one: _labels(one).update({"ray.io/identifier": "x"}),
    ),
    "17 a cache at /dev/shm": (
        "mount-over-ray",
        lambda one: _ray(one)["volumeMounts"][-1].update(mountPath="/dev/shm"),
    ),
    "17 a cache at /tmp/ray": (
        "mount-over-ray",
        lambda one: _ray(one)["volumeMounts"][-1].update(mountPath="/tmp/ray/x"),
    ),
    "17 memory volumes without room": (
        "memory-volume-without-room",
        lambda one: _ray(one)["resources"]["limits"].update(memory="130Gi"),
    ),
    "17 a memory volume without a bound": (
        "memory-volume-without-room",
        lambda one: worker(one)["volumes"][0]["emptyDir"].pop("sizeLimit"),
    ),
    "18 no rayVersion": ("ray-version", lambda one: _cluster(one).pop("rayVersion")),
    "18 not the image's": ("ray-version", lambda one: _ray(one).update(image="rayproject/ray:2.40.0")),
    "18 a token for an old Ray": ("auth-version", lambda one: _cluster(one).update(rayVersion="2.50.0")),
    "19 a queue label on pods": (
        "queue-label-on-pod",
        lambda one: group(one)["template"]["metadata"]["labels"].update({"volcano.sh/queue-name": "q"}),
    ),
    "19 scheduler-plugins": (
        "queue",
        lambda one: one["metadata"]["labels"].update({"ray.io/scheduler-name": "scheduler-plugins"}),
    ),
    "19 KAI with K8sJobMode": ("queue", lambda one: one["metadata"]["labels"].update({"kai.scheduler/queue": "q"})),
    "20 a network policy behind a closed gate": ("closed-gate", lambda one: _cluster(one).update(networkPolicy={})),
    "20 TLS behind a closed gate": ("closed-gate", lambda one: _cluster(one).update(tlsOptions={})),
    "20 a history server behind a closed gate": (
        "closed-gate",
        lambda one: _cluster(one).update(historyServerOptions={}),
    ),
    "a variable given twice": (
        "duplicate-env",
        lambda one: _ray(one)["env"].append({"name": "RAILHEAD_RUNS", "value": "/x"}),
    ),
    "a variable of KubeRay's": (
        "reserved-env",
        lambda one: _ray(one)["env"].append({"name": "RAY_CLUSTER_NAME", "value": "x"}),
    ),
    "a submitter without restartPolicy": (
        "submitter",
        lambda one: one["spec"]["submitterPodTemplate"]["spec"].pop("restartPolicy"),
    ),
    "a submitter where there is none": ("submitter", lambda one: one["spec"].update(submissionMode="HTTPMode")),
    "a sidecar that expects RAY_ADDRESS": (
        "sidecar-wants-ray-address",
        lambda one: _sidecar(one).update(args=["--ray", "$(RAY_ADDRESS)"]),
    ),
    "a sidecar on Ray's metrics port": (
        "port-clash",
        lambda one: _sidecar(one).update(ports=[{"name": "cache-metrics", "containerPort": 8080}]),
    ),
    "a mount without a volume": ("mount-without-volume", lambda one: worker(one)["volumes"].pop(1)),
    "two volumes at one path": (
        "duplicate-mount",
        lambda one: _ray(one)["volumeMounts"].append(_ray(one)["volumeMounts"][0]),
    ),
    "two volumes of one name": (
        "duplicate-volume",
        lambda one: worker(one)["volumes"].append({"name": "runs", "emptyDir": {}}),
    ),
    "a quantity that is none": ("quantity", lambda one: _ray(one)["resources"]["limits"].update(cpu="4 cores")),
    "a request above its limit": (
        "request-over-limit",
        lambda one: _ray(one)["resources"]["requests"].update(cpu="200"),
    ),
    "fewer workers than the gang": (
        "gang-size",
        lambda one: group(one).update(replicas=1, minReplicas=1, maxReplicas=1),
    ),
    "both a cluster and a selector": (
        "cluster",
        lambda one: one["spec"].update(clusterSelector={"ray.io/cluster": "x"}),
    ),
    "labels in start parameters": ("labels-in-params", lambda one: group(one)["rayStartParams"].update(labels="a=b")),
    "a start parameter that is no text": ("param-type", lambda one: group(one)["rayStartParams"].update(block=True)),
    "a start parameter for the shell": ("param-shell", lambda one: group(one)["rayStartParams"].update({"x": "$(id)"})),
    "a job that Kueue should hold, running": (
        "queue",
        lambda one: (
            one["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
            one["spec"].update(suspend=False),
        ),
    ),
    "an image without bash": ("image-without-bash", lambda one: _ray(one).update(image="reg/python:3.11-alpine")),
    "a distroless image": ("image-without-bash", lambda one: _ray(one).update(image="gcr.io/distroless/python3")),
    "two ways of deletion": (
        "ttl",
        lambda one: one["spec"].update(
            deletionStrategy={"deletionRules": [], "onSuccess": {}}, shutdownAfterJobFinishes=False
        ),
    ),
    "half a way of deletion": ("ttl", lambda one: one["spec"].update(deletionStrategy={"onSuccess": {}})),
    "a manager that nobody knows": ("managed-by", lambda one: one["spec"].update(managedBy="me")),
    "retries on somebody's cluster": (
        "retries",
        lambda one: one["spec"].update(backoffLimit=1, submissionMode="InteractiveMode"),
    ),
}


@pytest.mark.parametrize(("rule", "spoil"), MISTAKES.values(), ids=MISTAKES.keys())
def test_each_mistake_is_named(rule: str, spoil: Spoil) -> None:
    one = good()
    spoil(one)
    found = check([one])
    assert rule in {violation.rule for violation in found}
    assert all(violation.message for violation in found)


def test_a_good_manifest_breaks_no_rule() -> None:
    """Without this the tests above could pass for any manifest."""
    assert check([good()]) == []


def test_open_gates_are_believed() -> None:
    one = good()
    one["spec"]["rayClusterSpec"]["networkPolicy"] = {}
    assert check([one], Operator("1.7.0", frozenset({"RayClusterNetworkPolicy"}))) == []


def test_20_a_field_that_an_old_crd_would_drop_is_named_with_the_release() -> None:
    one = good()
    group(one)["priority"] = 3
    (found,) = [violation for violation in check([one], Operator("1.6.0")) if violation.rule == "old-operator"]
    assert "workerGroupSpecs[].priority needs KubeRay 1.7.0" in found.message


def test_a_native_sidecar_needs_the_release_whose_schema_knows_it() -> None:
    """Before 1.1 restartPolicy is pruned from init containers: the daemon would then be waited for until it ends, which is never."""
    paths = {need.path: need.release for need in requirements(good())}
    assert paths["spec.rayClusterSpec.workerGroupSpecs[].template.spec.initContainers[].restartPolicy"] == "1.1.0"


def test_the_api_servers_word_for_a_field_finds_its_release() -> None:
    assert release_of_field("spec.preRunningDeadlineSeconds") == "1.6.0"
    assert release_of_field("spec.rayClusterSpec.workerGroupSpecs[3].idleTimeoutSeconds") == "1.3.0"


def test_7_an_edit_neither_changes_a_job_nor_revives_a_refused_one() -> None:
    """KubeRay ignores changes to the cluster of an existing RayJob, and ValidationFailed is final."""
    old, new = ray_job(render(job())), ray_job(render(job({"spare_nodes": 1})))
    changed = check_edit(old, new, HASH_ANNOTATION)
    assert changed is not None and "ignores changes" in changed.message
    refused = check_edit(
        {**old, "status": {"jobDeploymentStatus": "ValidationFailed", "message": "bad"}}, old, HASH_ANNOTATION
    )
    assert refused is not None and "does not revive it" in refused.message
    assert check_edit(old, old, HASH_ANNOTATION) is None
