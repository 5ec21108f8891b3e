"""What a command takes from elsewhere: a job file, files that travel along, a folder to pack, a manifest, the cluster's nodes. Shell."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import SpecError
from launcher.k8s.fabric import recognise
from launcher.k8s.request import Request, with_job_file
from launcher.k8s.rules import check
from launcher.k8s.upload import Package, pack


def packed(request: Request) -> tuple[Request, Package | None]:
    """`--working-dir DIR --upload-to URL` as the zip that it becomes. Nothing is sent yet."""
    folder, target = request.text("working-dir"), request.text("upload-to")
    if folder is None or "://" in folder:
        if target is not None:
            raise SpecError(f"--upload-to {target}: of what?", advice="name a folder: --working-dir .")
        return request, None
    if target is None:
        raise SpecError(
            f"--working-dir {folder} is a folder here, which the cluster does not see",
            advice="say where it may be put: --upload-to s3://bucket/code; for a few small files --ship suffices",
        )
    package = pack(Path(folder), target)
    return request.with_value("working-dir", package.uri), package


def with_fabric(request: Request, kube: Any, say: Callable[..., None]) -> Request:
    """`--fabric auto`: what the cluster's GPU nodes show."""
    if request.text("fabric") != "auto":
        return request
    nodes = kube.list("Node", "")["items"]
    found = recognise(nodes, request.text("gpu-resource") or "nvidia.com/gpu")
    say("fabric", f"fabric {found.fabric}: {found.evidence}", fabric=found.fabric)
    request = request.with_value("fabric", found.fabric)
    if found.instance_type and not request.texts("instance-type"):
        request = request.with_value("instance-type", found.instance_type)
    if found.resource and not request.texts("fabric-resource"):
        request = request.with_value("fabric-resource", found.resource)
    return request


def read_manifest(request: Request) -> dict[str, Any]:
    """A RayJob from a file, under the name that is given, checked like one of our own."""
    import yaml

    path = request.text("manifest") or ""
    try:
        one = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: this is no YAML: {error}", advice="it must hold one RayJob") from error
    if not isinstance(one, dict) or one.get("kind") != "RayJob":
        raise SpecError(
            f"{path} holds no RayJob", advice="give the RayJob alone, as `python -m launcher render` prints it last"
        )
    metadata = one["metadata"] = one.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise SpecError(f"{path}: metadata is {metadata!r}", advice="it holds name and namespace")
    metadata["name"] = request.text("name") or metadata.get("name", "")
    metadata.setdefault("namespace", request.text("namespace"))
    owner = request.text("owner-job-uid")
    if owner:
        metadata["ownerReferences"] = [
            {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": owner}
        ]
    try:
        fatal = [violation for violation in check([one]) if violation.is_fatal]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        # Whatever a hand can write: rules read the fields that every RayJob has, and one of them is missing or of another kind.
        raise SpecError(
            f"{path}: this has not the shape of a RayJob: {_shape(error)}",
            advice="`kubectl explain rayjob.spec --recursive` shows the fields; `python -m launcher render …` makes one",
        ) from error
    if fatal:
        raise SpecError(f"{path}: {fatal[0].message}", advice=fatal[0].advice)
    return one


def _shape(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def with_file(request: Request) -> Request:
    path = request.texts("file")
    if not path:
        return request
    return with_job_file(request, _read_text(path[-1].value), path[-1].value)


class ShippedFiles:
    """Reads `--ship` files: those of a job file relative to it, those of the command line relative to where we are."""

    def __init__(self, request: Request) -> None:
        path = request.texts("file")
        self._folder = os.path.dirname(path[-1].value) if path else ""
        self._of_file = {
            name
            for given in request.texts("ship")
            if not given.source.startswith("--")
            for name in given.value.split(",")
        }

    def __call__(self, path: str) -> str:
        return _read_text(os.path.join(self._folder, path) if path in self._of_file else path)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}", advice="paths begin where the command runs") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no text file", advice="put it into the image") from error
