"""What admission would say of a job's pods, asked before the job exists. Pure.

A RayJob is taken whatever its pods are: that a namespace forbids privileged ones, or that there is no such priority class, is said later,
in events of a cluster that never gets its pods. So each template is offered as a pod of its own, as a dry run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.k8s.refusals import ApiRefused

# Kubernetes' own admission plugins, whose word does not depend on who creates the pod. Webhooks may refuse a bare pod and take KubeRay's.
_FINAL = {
    "violates PodSecurity": "the namespace's Pod Security Standard forbids it; its administrator can change the label "
    "pod-security.kubernetes.io/enforce, or leave out the flag that needs the right (--fabric, --run-as-user)",
    "no PriorityClass with name": "kubectl get priorityclasses shows those that there are",
    "error looking up service account": "kubectl get serviceaccounts shows those that there are",
    "usage per Container": "the namespace's LimitRange decides that; ask for less, or for another limit",
    "usage per Pod": "the namespace's LimitRange decides that; ask for less, or for another limit",
}


def trial_pods(main: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One pod for the head and one for each worker group of a RayJob; nothing for other kinds.

    The account that the job brings along is not there yet, so the namespace's own stands for it.
    """
    cluster = main["spec"].get("rayClusterSpec") if main["kind"] == "RayJob" else None
    if cluster is None:
        return
    name, namespace = main["metadata"]["name"], main["metadata"]["namespace"]
    groups = [
        ("head", cluster["headGroupSpec"]),
        *((one["groupName"], one) for one in cluster.get("workerGroupSpecs", [])),
    ]
    for group, spec in groups:
        template = copy.deepcopy(spec["template"])
        if template["spec"].get("serviceAccountName") == name:
            del template["spec"]["serviceAccountName"]
        metadata = {**template.get("metadata", {}), "name": f"{name}-{group.lower()}"[:63], "namespace": namespace}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def advice_if_final(refusal: ApiRefused) -> str | None:
    """What to do about a pod that nobody could create here; None if KubeRay may fare better, or later."""
    return next((advice for sign, advice in _FINAL.items() if sign in refusal.message), None)


def may_not_ask(refusal: ApiRefused) -> bool:
    """The right to create pods is missing, or a webhook knows no dry runs: nothing was learnt."""
    return "cannot create resource" in refusal.message or "dry run" in refusal.message or "dryRun" in refusal.message
