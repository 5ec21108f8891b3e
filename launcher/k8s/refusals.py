"""The API server's refusals, each as one sentence with what to do. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ClusterUnavailable, LauncherError, RequestRefused, SpecError
from launcher.k8s.releases import release_of_field


@dataclass(eq=False)  # not frozen: Python itself writes an exception's traceback
class ApiRefused(Exception):
    """The API server's answer that is no success: its HTTP status and its Status object."""

    code: int
    reason: str = ""
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code} {self.reason}: {self.message}"


def explain(refusal: ApiRefused, kind: str, name: str, namespace: str) -> LauncherError:
    """Whose fault it is, in the type; what happened and what to do, in the text."""
    subject = f"{kind} {namespace}/{name}"
    match refusal.code:
        case 401:
            return ClusterUnavailable(
                f"the cluster does not know you: {refusal.message or 'Unauthorized'}",
                advice="log in again (kubectl get pods shows the same), or choose another --context",
            )
        case 403:
            return _forbidden(refusal, subject)
        case 404:
            return _not_found(refusal, kind, name, namespace)
        case 400 | 422:
            return _invalid(refusal, subject)
        case 409:
            return RequestRefused(
                f"{subject} exists already, or was changed by somebody else: {refusal.message}",
                advice="look at it, and try again",
            )
        case 429 | 500 | 502 | 503 | 504:
            return ClusterUnavailable(
                f"the API server answers {refusal.code} again and again: {refusal.message or refusal.reason}",
                advice="try again later: a job that was created is found, not run twice",
            )
    return RequestRefused(f"{subject}: the API server answered {refusal}", advice="kubectl may say more")


def _forbidden(refusal: ApiRefused, subject: str) -> LauncherError:
    if "exceeded quota" in refusal.message:
        found = re.search(r"exceeded quota: (\S+), requested: (.*), used: (.*), limited: (.*)", refusal.message)
        detail = (
            f"quota {found[1]}: asked for {found[2]}, used {found[3]}, limit {found[4]}" if found else refusal.message
        )
        return RequestRefused(
            f"{subject} goes beyond the quota of the namespace: {detail}",
            advice="wait, ask for less, or for more quota",
        )
    found = re.search(r'cannot (\w+) resource "([^"]+)" in API group "([^"]*)"', refusal.message)
    if found is None:
        return RequestRefused(
            f"{subject} is forbidden: {refusal.message}", advice="an admission policy of the cluster decided this"
        )
    what = f"{found[2]}.{found[3]}" if found[3] else found[2]
    place = re.search(r'in the namespace "([^"]+)"', refusal.message)
    where, flag = (f" in namespace {place[1]}", f" -n {place[1]}") if place else ("", "")
    return RequestRefused(
        f"you may not {found[1]} {what}{where}",
        advice=f"check with: kubectl auth can-i {found[1]} {what}{flag}; k8s/base/user-role.yaml has the rights that are needed",
    )


def _not_found(refusal: ApiRefused, kind: str, name: str, namespace: str) -> LauncherError:
    if refusal.details.get("kind") == "namespaces" or f'namespaces "{namespace}" not found' in refusal.message:
        return RequestRefused(
            f"there is no namespace {namespace}", advice=f"kubectl create namespace {namespace}, or give --namespace"
        )
    if refusal.details.get("name"):
        return RequestRefused(
            f"there is no {kind} {name} in namespace {namespace}",
            advice=f"python -m launcher list --namespace {namespace}",
        )
    if kind.startswith("Ray"):
        return RequestRefused(
            f"this cluster does not know the kind {kind}: KubeRay is not installed, or older than 1.0",
            advice="install it: helm install kuberay-operator kuberay/kuberay-operator --namespace kuberay-system --create-namespace",
        )
    owner = "the Prometheus operator" if kind == "PodMonitor" else "its operator"
    return RequestRefused(
        f"this cluster does not know the kind {kind}", advice=f"install {owner}, or leave out the flag that asks for it"
    )


def _invalid(refusal: ApiRefused, subject: str) -> LauncherError:
    found = re.search(r'unknown field "([^"]+)"', refusal.message)
    if found is None:
        return SpecError(f"{subject} is not what the API server takes: {refusal.message}", advice="")
    release = release_of_field(found[1])
    if release is None:
        return SpecError(
            f"{subject}: the cluster's KubeRay does not know {found[1]}",
            advice="it is older than the manifest: give --kuberay VERSION",
        )
    return SpecError(
        f"{subject}: {found[1]} needs KubeRay {release}, and the cluster's is older and would drop it",
        advice="leave out the flag that asks for it, or upgrade the operator; --kuberay VERSION says so beforehand",
    )
