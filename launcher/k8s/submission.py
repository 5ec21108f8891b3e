"""Sends a job to a cluster, exactly once. Shell: every decision is in `rules`, `refusals` and `phases`.

Order matters. First everything is asked for as a dry run, so a refusal leaves nothing behind. Then the RayJob is created: of two submitters
under one name the API server lets one win, and the other finds the job there and follows it. What belongs to the job comes after it, owned
by it, so whoever deletes the job, or dies half-way, leaves nothing lying about; pods that need it wait for the moment that it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import RequestRefused
from launcher.k8s.client import Kube
from launcher.k8s.manifest import HASH_ANNOTATION
from launcher.k8s.refusals import ApiRefused, explain
from launcher.k8s.rules import check_edit


@dataclass(frozen=True)
class Submitted:
    """The job's main object as the cluster has it now."""

    main: Mapping[str, Any]
    is_new: bool
    """False: an earlier submit had made it already."""


def dry_run(kube: Kube, objects: Sequence[Mapping[str, Any]]) -> None:
    """Asks the API server, its admission and its schemas. Raises LauncherError for the first refusal; creates nothing."""
    *around, main = objects
    try:
        kube.create(main, dry_run=True)
    except ApiRefused as refusal:
        if refusal.code != 409:
            raise _explained(refusal, main) from refusal
        _existing(kube, main)
    for one in around:
        try:
            kube.apply(one, dry_run=True)
        except ApiRefused as refusal:
            raise _explained(refusal, one) from refusal


def submit(kube: Kube, objects: Sequence[Mapping[str, Any]]) -> Submitted:
    """Creates the objects of a job, the main one last in the list, or finds them there. Raises LauncherError; then nothing new is left."""
    dry_run(kube, objects)
    *around, main = objects
    try:
        made, is_new = kube.create(main), True
    except ApiRefused as refusal:
        if refusal.code != 409:
            raise _explained(refusal, main) from refusal
        made, is_new = _existing(kube, main), False
    for one in around:
        try:
            kube.apply(_owned(one, made))
        except ApiRefused as refusal:
            if is_new:
                kube.delete(made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])
            raise _explained(refusal, one) from refusal
    return Submitted(made, is_new)


def _existing(kube: Kube, main: Mapping[str, Any]) -> dict[str, Any]:
    """The object of this name, if it is the same job. Raises RequestRefused if it is another."""
    try:
        found = kube.get(main["kind"], main["metadata"]["namespace"], main["metadata"]["name"])
    except ApiRefused as refusal:
        raise _explained(refusal, main) from refusal
    if found["metadata"].get("deletionTimestamp"):
        raise RequestRefused(
            f"{main['kind']} {main['metadata']['name']} is just being deleted", advice="wait a moment and submit again"
        )
    violation = check_edit(found, main, HASH_ANNOTATION)
    if violation is not None:
        raise RequestRefused(violation.message, advice=violation.advice)
    return found


def _owned(one: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    owned = copy.deepcopy(dict(one))
    owned["metadata"]["ownerReferences"] = [
        {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
    ]
    return owned


def _explained(refusal: ApiRefused, one: Mapping[str, Any]) -> Exception:
    return explain(refusal, one["kind"], one["metadata"]["name"], one["metadata"]["namespace"])
