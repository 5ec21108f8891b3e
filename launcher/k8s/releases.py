"""Which KubeRay release knows which field of a RayJob. Pure.

An older operator's CRD drops a newer field without a word, so a manifest that needs one must be refused before it is sent. The table was
made by comparing the CRDs at each release's tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

RC = "rayClusterSpec"
FIRST_IN: Mapping[str, tuple[str, ...]] = {
    "1.1.0": (
        "submissionMode",
        "activeDeadlineSeconds",
        f"{RC}.suspend",
        f"{RC}.workerGroupSpecs[].numOfHosts",
        f"{RC}.workerGroupSpecs[].template.spec.initContainers[].restartPolicy",
    ),
    "1.2.0": ("backoffLimit", "submitterConfig"),
    "1.3.0": (
        "managedBy",
        f"{RC}.gcsFaultToleranceOptions",
        f"{RC}.managedBy",
        f"{RC}.workerGroupSpecs[].idleTimeoutSeconds",
        f"{RC}.workerGroupSpecs[].suspend",
    ),
    "1.4.0": (f"{RC}.autoscalerOptions.version",),
    "1.5.0": (
        "deletionStrategy",
        f"{RC}.headGroupSpec.resources",
        f"{RC}.headGroupSpec.labels",
        f"{RC}.workerGroupSpecs[].resources",
        f"{RC}.workerGroupSpecs[].labels",
    ),
    "1.5.1": (f"{RC}.authOptions",),
    "1.6.0": (
        "preRunningDeadlineSeconds",
        f"{RC}.authOptions.enableK8sTokenAuth",
        f"{RC}.authOptions.secretName",
        f"{RC}.upgradeStrategy",
    ),
    "1.7.0": (
        f"{RC}.autoscalerOptions.command",
        f"{RC}.autoscalerOptions.args",
        f"{RC}.gcsFaultToleranceOptions.backend",
        f"{RC}.gcsFaultToleranceOptions.storage",
        f"{RC}.headGroupSpec.ingressOptions",
        f"{RC}.historyServerOptions",
        f"{RC}.networkPolicy",
        f"{RC}.tlsOptions",
        f"{RC}.workerGroupSpecs[].priority",
    ),
}
MODE_FIRST_IN = {"InteractiveMode": "1.3.0", "SidecarMode": "1.5.0"}
"""Values, which no schema lists: an older operator refuses them."""


@dataclass(frozen=True)
class Requirement:
    """A field that is used, and the release that first has it."""

    path: str
    release: str


def requirements(manifest: Mapping[str, Any]) -> list[Requirement]:
    """What this object needs of the operator, newest first. Empty for kinds that are not KubeRay's."""
    kind = manifest.get("kind")
    if kind == "RayCronJob":
        template = {"kind": "RayJob", "spec": manifest["spec"]["jobTemplate"]}
        return [Requirement("kind RayCronJob", "1.6.0"), *requirements(template)]
    if kind != "RayJob":
        return []
    found = [
        Requirement(f"spec.{path}", release)
        for release, paths in FIRST_IN.items()
        for path in paths
        if any(True for _ in _values(manifest["spec"], path))
    ]
    mode = manifest["spec"].get("submissionMode")
    if mode in MODE_FIRST_IN:
        found.append(Requirement(f"submissionMode {mode}", MODE_FIRST_IN[mode]))
    return sorted(found, key=lambda one: version(one.release), reverse=True)


def version(text: str) -> tuple[int, ...]:
    """
    >>> version("v1.5.1") < version("1.6.0"), version("2.52") <= version("2.60.0")
    (True, True)
    """
    return tuple(int(part) for part in re.findall(r"\d+", text.split("-")[0])[:3])


def reaches(release: str | None, least: str) -> bool:
    """None: whatever is newest."""
    return release is None or version(release) >= version(least)


def release_of_field(path: str) -> str | None:
    """The release that first has this field (a path as the API server's refusal writes it); None if it is in no table.

    >>> release_of_field("spec.rayClusterSpec.workerGroupSpecs[0].priority"), release_of_field("spec.foo")
    ('1.7.0', None)
    """
    plain = re.sub(r"\[\d+\]", "[]", path).removeprefix("spec.")
    return next((release for release, paths in FIRST_IN.items() if plain in paths), None)


def _values(node: Any, path: str) -> Iterator[Any]:
    head, _, rest = path.partition(".")
    key = head.removesuffix("[]")
    if not isinstance(node, Mapping) or key not in node:
        return
    for child in node[key] if head.endswith("[]") else [node[key]]:
        if rest:
            yield from _values(child, rest)
        else:
            yield child
