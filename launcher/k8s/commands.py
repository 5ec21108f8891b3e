"""`python -m launcher render | submit | status | logs | stop | list`: reads argv, files and the environment; prints; holds no judgement.

Each takes argv without its own name and returns the exit code; mistakes are LauncherErrors, which `launcher.cli` prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, SpecError
from launcher.k8s.helptext import help_text
from launcher.k8s.lookups import attached, list_jobs, logs, status, stop
from launcher.k8s.manifest import Rendered, to_yaml
from launcher.k8s.manifest import render as render_job
from launcher.k8s.options import KubeJob
from launcher.k8s.pods import needed_secrets
from launcher.k8s.refusals import ApiRefused, explain
from launcher.k8s.request import Request, cut, located
from launcher.k8s.resolve import to_job
from launcher.k8s.sources import ShippedFiles, packed, read_manifest, with_fabric, with_file
from launcher.k8s.upload import upload

SUBMIT_FLAGS = {
    "dry-run": True,
    "detach": True,
    "wait-placed": True,
    "json": True,
    "context": False,
    "manifest": False,
    "owner-job-uid": False,
}


def render(argv: Sequence[str]) -> int:
    """Prints the manifests of a job. Connects to nothing."""
    request = with_file(cut(argv, {"output": False}))
    if request.wants_help:
        print(help_text("render"))
        return EXIT_OK
    text = to_yaml(_render(packed(request)[0])[1])
    path = request.texts("output")
    if path:
        Path(path[-1].value).write_text(text)
    else:
        sys.stdout.write(text)
    return EXIT_OK


def submit(argv: Sequence[str]) -> int:
    """Submits a job and follows it to its end; the job's exit code."""
    request = with_file(cut(argv, SUBMIT_FLAGS))
    if request.wants_help:
        print(help_text("submit"))
        return EXIT_OK
    from launcher.k8s import submission
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Hopeless, Screen

    kube, screen = Kube(request.text("context")), Screen(as_json=request.has("json"))
    if not request.texts("namespace"):
        request = request.with_value("namespace", kube.namespace)
    if request.texts("manifest"):
        one = read_manifest(request)
        rendered = Rendered((one,), needed_secrets=frozenset(needed_secrets(one)))
    else:
        request, package = packed(with_fabric(request, kube, screen.say))
        rendered = _render(request)[1]
        for note in rendered.notes:
            screen.say("note", note)
        if package is not None and not request.has("dry-run"):
            verb = "put" if upload(package) else "already"
            screen.say("code", f"code {verb} at {package.uri} ({len(package.data)} bytes)", uri=package.uri)
    main = rendered.main
    name, namespace = main["metadata"]["name"], main["metadata"]["namespace"]
    if request.has("dry-run"):
        for note in submission.dry_run(kube, rendered):
            screen.say("note", note)
        num_objects = len(rendered.objects) + len(rendered.own_secrets)
        screen.say("dry-run", f"the cluster would take {num_objects} objects; nothing was created")
        return EXIT_OK
    found = submission.submit(kube, rendered)
    for note in found.notes:
        screen.say("note", note)
    verb = "submitted" if found.is_new else "found, submitted before"
    screen.say(
        "submitted", f"{main['kind']} {namespace}/{name} {verb}", name=name, namespace=namespace, is_new=found.is_new
    )
    if request.has("detach") or main["kind"] != "RayJob":
        return EXIT_OK
    follower = Follower(kube, namespace, name, screen, gives_up=found.is_new)
    try:
        return attached(
            namespace, name, screen.say, follower.until_placed if request.has("wait-placed") else follower.until_ended
        )
    except Hopeless:
        submission.withdraw(kube, found)
        raise


def _explained(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Refusals that no closer hand has put into words: a right to see pods or nodes that is missing, a server that went away."""

    def run(argv: Sequence[str]) -> int:
        try:
            return command(argv)
        except ApiRefused as refusal:
            raise explain(refusal, "the cluster", "", "of the job") from refusal

    return run


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "render": render,
    "submit": _explained(submit),
    "status": _explained(status),
    "logs": _explained(logs),
    "stop": _explained(stop),
    "list": _explained(list_jobs),
}


def _render(request: Request) -> tuple[KubeJob, Rendered]:
    job = to_job(request, os.environ, ShippedFiles(request))
    try:
        return job, render_job(job)
    except SpecError as error:
        raise located(error, request) from error
