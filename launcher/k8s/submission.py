"""Sends a job to a cluster, exactly once. Shell: every decision is in `rules`, `refusals` and `phases`.

Order matters. First everything is asked for as a dry run, so a refusal leaves nothing behind. Then the RayJob is created: of two submitters
under one name the API server lets one win, and the other finds the job there and follows it. What belongs to the job comes after it, owned
by it, so whoever deletes the job, or dies half-way, leaves nothing lying about; pods that need it wait for the moment that it takes.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import LauncherError, RequestRefused
from launcher.k8s.admission import advice_if_final, may_not_ask, trial_pods
from launcher.k8s.client import Kube
from launcher.k8s.manifest import HASH_ANNOTATION, Rendered
from launcher.k8s.peers import KEY, how_to_make_key
from launcher.k8s.refusals import ApiRefused, explain
from launcher.k8s.rules import check_edit

SUBMISSION_ANNOTATION = "railhead.dev/submission"
"""Which call of `submit` made the object: a creation whose answer was lost is told from one by somebody else."""


@dataclass(frozen=True)
class Submitted:
    """The job's main object as the cluster has it now."""

    main: Mapping[str, Any]
    is_new: bool
    """False: an earlier submit had made it already."""
    notes: tuple[str, ...] = ()
    """What admission says that need not be the end."""


def dry_run(kube: Kube, rendered: Rendered) -> tuple[str, ...]:
    """Asks the API server, its admission and its schemas. Raises LauncherError for the first refusal; creates nothing. Returns notes."""
    *around, main = rendered.objects
    _check_secrets(kube, main["metadata"]["namespace"], rendered.needed_secrets)
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
    for one in rendered.own_secrets:
        _make_secret(kube, one, dry_run=True)
    return _try_pods(kube, main)


def submit(kube: Kube, rendered: Rendered) -> Submitted:
    """Creates the objects of a job, or finds them there. Raises LauncherError; then nothing new is left."""
    notes = dry_run(kube, rendered)
    *around, main = rendered.objects
    ours = secrets.token_hex(8)
    try:
        made, is_new = kube.create(_annotated(main, ours)), True
    except ApiRefused as refusal:
        if refusal.code != 409:
            raise _explained(refusal, main) from refusal
        made = _existing(kube, main)
        is_new = made["metadata"].get("annotations", {}).get(SUBMISSION_ANNOTATION) == ours
    try:
        for one in rendered.own_secrets:
            _make_secret(kube, _owned(one, made))
        for one in around:
            try:
                kube.apply(_owned(one, made))
            except ApiRefused as refusal:
                raise _explained(refusal, one) from refusal
    except LauncherError:
        if is_new:
            kube.delete(made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])
        raise
    return Submitted(made, is_new, notes)


def withdraw(kube: Kube, submitted: Submitted) -> None:
    """Deletes a job that can never start, with all that belongs to it."""
    metadata = submitted.main["metadata"]
    kube.delete(submitted.main["kind"], metadata["namespace"], metadata["name"])


def _annotated(main: Mapping[str, Any], submission: str) -> dict[str, Any]:
    annotations = {**main["metadata"].get("annotations", {}), SUBMISSION_ANNOTATION: submission}
    return {**main, "metadata": {**main["metadata"], "annotations": annotations}}


def _try_pods(kube: Kube, main: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    for pod in trial_pods(main):
        try:
            kube.create(pod, dry_run=True)
        except ApiRefused as refusal:
            name, advice = pod["metadata"]["name"], advice_if_final(refusal)
            if advice is not None:
                raise RequestRefused(
                    f"a pod like {name} may not be here: {refusal.message}", advice=advice
                ) from refusal
            if may_not_ask(refusal):
                break
            notes.append(f"a pod like {name} would be refused just now: {refusal.message}")
    return tuple(notes)


def _make_secret(kube: Kube, one: Mapping[str, Any], *, dry_run: bool = False) -> None:
    """With a key of its own. One that is there stays as it is: pods that run have read it."""
    try:
        kube.create({**one, "stringData": {KEY: secrets.token_hex(32)}}, dry_run=dry_run)
    except ApiRefused as refusal:
        if refusal.code == 403 and may_not_ask(refusal):
            name = one["metadata"]["name"]
            raise RequestRefused(
                f"{explain(refusal, 'Secret', name, one['metadata']['namespace']).message}; the caches of this job's nodes share a key",
                advice=f"have it made ({how_to_make_key(one)}) and give --cache-peer-secret {name}; "
                "or let each node fetch for itself: --no-cache-peers",
            ) from refusal
        if refusal.code != 409:
            raise _explained(refusal, one) from refusal


def _check_secrets(kube: Kube, namespace: str, names: frozenset[str]) -> None:
    """A pod waits for a missing Secret for ever, and says so in its events only. Who may not look at Secrets is not asked to."""
    for name in sorted(names):
        try:
            is_there = kube.exists("Secret", namespace, name)
        except ApiRefused as refusal:
            if refusal.code == 403:
                return
            raise explain(refusal, "Secret", name, namespace) from refusal
        if not is_there:
            raise RequestRefused(
                f"there is no Secret {name} in namespace {namespace}, and the pods would wait for it for ever",
                advice=f"make it, for example: kubectl create secret generic {name} --namespace {namespace} --from-env-file=FILE",
            )


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
