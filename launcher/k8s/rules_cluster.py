"""What KubeRay asks of the Ray cluster in a RayJob: its groups, start parameters, versions and gates. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.k8s.names import is_label_key, is_label_value
from launcher.k8s.releases import reaches
from launcher.k8s.rules_pod import check_pod, check_ray_pod
from launcher.k8s.violation import Operator, Violation

ALPHA_FIELDS = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
RESERVED_GROUPS = ("head", "headgroup")
_WITHOUT_BASH = re.compile(r"distroless|(^|/)(busybox|alpine|scratch|wolfi-base)(:|@|$)|:[^/]*alpine")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def check_cluster(cluster: Mapping[str, Any], operator: Operator, *, mode: str) -> Iterator[Violation]:
    """The rules for `rayClusterSpec`; `mode` is the RayJob's submissionMode."""
    head = cluster["headGroupSpec"]
    groups = cluster.get("workerGroupSpecs", [])
    yield from _versions(cluster)
    yield from _images(cluster)
    yield from _gates(cluster, operator)
    yield from _group_names(cluster)
    yield from _head(head)
    for name, group in (("head", head), *((f"worker group {group['groupName']}", group) for group in groups)):
        yield from check_pod(name, group["template"])
        yield from check_ray_pod(name, group["template"], is_head=group is head)
        yield from _start_params(name, group)
    for group in groups:
        yield from _replicas(group, is_autoscaled=bool(cluster.get("enableInTreeAutoscaling")))
    yield from _restart_policies(cluster, mode)


def _replicas(group: Mapping[str, Any], *, is_autoscaled: bool) -> Iterator[Violation]:
    where = f"worker group {group['groupName']}"
    least, most, replicas = group.get("minReplicas"), group.get("maxReplicas"), group.get("replicas")
    if group.get("numOfHosts", 1) < 1:
        yield Violation(
            "num-of-hosts",
            f"{where}: numOfHosts {group['numOfHosts']} gives no pod at all",
            "leave it out, or give 1 or more",
        )
    if least is None or most is None or least < 0 or least > most:
        yield Violation(
            "replica-range",
            f"{where}: minReplicas {least} and maxReplicas {most} are no range",
            "give both, the first not above the second",
        )
        return
    if replicas is None:
        yield Violation(
            "replicas-missing",
            f"{where}: replicas is missing, so there will be minReplicas workers ({least}), and the cluster counts as ready with them",
            "give replicas",
        )
    elif replicas == 0 and not is_autoscaled:
        yield Violation(
            "replicas-missing", f"{where}: replicas is 0, the job would start on the head alone", "give 1 or more"
        )
    elif not least <= replicas <= most:
        yield Violation(
            "replicas-outside-range",
            f"{where}: replicas {replicas} is outside minReplicas {least} to maxReplicas {most}; KubeRay clamps it without a word, "
            "and the job waits for ranks that never come",
            f"give replicas within {least} to {most}, or widen the range",
        )


def _group_names(cluster: Mapping[str, Any]) -> Iterator[Violation]:
    names = [group["groupName"].lower() for group in cluster.get("workerGroupSpecs", [])]
    for name, count in Counter(names).items():
        if count > 1:
            yield Violation(
                "group-name",
                f"{count} worker groups are called {name}; nothing else notices it",
                "give each its own name",
            )
        if name in RESERVED_GROUPS:
            yield Violation(
                "group-name", f"a worker group is called {name}, which is the head's own name", "give it another name"
            )
    for group in cluster.get("workerGroupSpecs", []):
        for key, value in group.get("labels", {}).items():
            if not is_label_key(key) or not is_label_value(value):
                yield Violation("label", f"worker group {group['groupName']}: {key}={value} is no label")


def _head(head: Mapping[str, Any]) -> Iterator[Violation]:
    ray = head["template"]["spec"]["containers"][0]
    ports = {port.get("name"): port["containerPort"] for port in ray.get("ports", [])}
    if ports and "dashboard" not in ports:
        yield Violation(
            "head-ports",
            f"head: container 0 lists ports {', '.join(map(str, ports.values()))} and none called dashboard; the service then lacks it, "
            "and the job is never submitted",
            "list no ports at all, which gives KubeRay's own, or put the port on a sidecar",
        )
    params = head.get("rayStartParams", {})
    for param, name in (("port", "gcs-server"), ("dashboard-port", "dashboard")):
        if param in params and str(ports.get(name, params[param])) != str(params[param]):
            yield Violation(
                "head-ports",
                f"head: rayStartParams {param} is {params[param]} and the container's port {name} is {ports[name]}",
                "make them equal",
            )


def _start_params(where: str, group: Mapping[str, Any]) -> Iterator[Violation]:
    params, resources = group.get("rayStartParams", {}), group.get("resources", {})
    doubled = [name for name in _RESOURCE_PARAMS if name in params]
    if resources and doubled:
        yield Violation(
            "resources-twice",
            f"{where}: {', '.join(doubled)} in rayStartParams and `resources` on the group exclude each other",
            "give the amounts in one place",
        )
    if "labels" in params:
        yield Violation("labels-in-params", f"{where}: labels in rayStartParams is refused", "use the group's `labels`")
    for name, value in params.items():
        if not isinstance(value, str):
            yield Violation(
                "param-type", f"{where}: rayStartParams {name} must be a text, not {value!r}", f'write "{value}"'
            )
        elif re.search(r"[;&|`$<>\n]", value):
            yield Violation(
                "param-shell", f"{where}: rayStartParams {name} is pasted unquoted into a shell line: {value!r}"
            )


def _versions(cluster: Mapping[str, Any]) -> Iterator[Violation]:
    release = cluster.get("rayVersion")
    if not release:
        yield Violation(
            "ray-version",
            "rayVersion is missing: KubeRay then probes with wget, which slim images lack, and refuses tokens",
            "give --ray-version",
        )
        return
    if cluster.get("authOptions", {}).get("mode") == "token" and not reaches(release, "2.52"):
        yield Violation("auth-version", f"tokens need Ray 2.52, and rayVersion is {release}", "leave authOptions out")
    images = {
        group["template"]["spec"]["containers"][0]["image"]
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", []))
    }
    for image in sorted(images):
        tag = re.search(r"(?:^|/)ray(?:-ml)?:(\d+\.\d+\.\d+)", image)
        if tag and tag[1] != release:
            yield Violation(
                "ray-version",
                f"rayVersion is {release} and image {image} holds Ray {tag[1]}: KubeRay would use the wrong probes",
                f"give --ray-version {tag[1]}",
            )


def _images(cluster: Mapping[str, Any]) -> Iterator[Violation]:
    """KubeRay starts Ray by `/bin/bash -c`. Only names tell before the image is pulled; what they do not tell, `submit` sees in the pod."""
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        image = group["template"]["spec"]["containers"][0]["image"]
        if _WITHOUT_BASH.search(image):
            yield Violation(
                "image-without-bash",
                f"image {image} has no bash by its name, and KubeRay starts Ray with /bin/bash",
                "build on an image with bash: docs/kubernetes-image.md",
            )
            return


def _gates(cluster: Mapping[str, Any], operator: Operator) -> Iterator[Violation]:
    for key, gate in ALPHA_FIELDS.items():
        if key in cluster and gate not in operator.gates:
            yield Violation(
                "closed-gate",
                f"{key} is alpha: with the operator's feature gate {gate} closed, which is the default, the whole job is ValidationFailed",
                f"open the gate and say so: --feature-gates {gate}; or leave it out (--network-policy makes one of Kubernetes' own)",
            )
    tolerance = cluster.get("gcsFaultToleranceOptions", {})
    if tolerance.get("backend") == "rocksdb" and "GCSFaultToleranceEmbeddedStorage" not in operator.gates:
        yield Violation(
            "closed-gate",
            "the rocksdb backend needs the feature gate GCSFaultToleranceEmbeddedStorage",
            "open it, or use Redis",
        )


def _restart_policies(cluster: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    head = cluster["headGroupSpec"]["template"]["spec"].get("restartPolicy")
    if mode == "SidecarMode" and head not in (None, "Never"):
        yield Violation(
            "restart-policy", f"SidecarMode wants the head's restartPolicy Never or unset, not {head}", "give Never"
        )
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        return
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        policy = group["template"]["spec"].get("restartPolicy")
        if policy not in (None, "Never"):
            where = group.get("groupName", "head")
            yield Violation(
                "restart-policy",
                f"autoscaler v2 wants restartPolicy Never or unset everywhere, and {where} has {policy}",
                "give Never",
            )
