"""`python -m launcher render | submit | status | logs | stop | list`: reads argv, files and the environment; prints; holds no judgement.

Each takes argv without its own name and returns the exit code; mistakes are LauncherErrors, which `launcher.cli` prints.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_OK, EXIT_SIGNAL_BASE, SpecError
from launcher.k8s.fabric import recognise
from launcher.k8s.helptext import help_text, lookup_help
from launcher.k8s.manifest import Rendered, to_yaml
from launcher.k8s.manifest import render as render_job
from launcher.k8s.options import KubeJob
from launcher.k8s.pods import needed_secrets
from launcher.k8s.refusals import ApiRefused, explain
from launcher.k8s.request import Request, cut, located, to_job, with_job_file
from launcher.k8s.rules import check
from launcher.k8s.upload import Package, pack, upload
from launcher.options.parse import Given

_SUBMIT_FLAGS = {
    "dry-run": True,
    "detach": True,
    "wait-placed": True,
    "json": True,
    "context": False,
    "manifest": False,
    "owner-job-uid": False,
}
_LOOKUP_FLAGS = {"context": False, "json": True, "namespace": False}


def render(argv: Sequence[str]) -> int:
    """Prints the manifests of a job. Connects to nothing."""
    request = _with_file(cut(argv, {"output": False}))
    if request.wants_help:
        print(help_text("render"))
        return EXIT_OK
    text = to_yaml(_render(_packed(request)[0])[1])
    path = request.texts("output")
    if path:
        Path(path[-1].value).write_text(text)
    else:
        sys.stdout.write(text)
    return EXIT_OK


def submit(argv: Sequence[str]) -> int:
    """Submits a job and follows it to its end; the job's exit code."""
    request = _with_file(cut(argv, _SUBMIT_FLAGS))
    if request.wants_help:
        print(help_text("submit"))
        return EXIT_OK
    from launcher.k8s import submission
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Hopeless, Screen

    kube, screen = Kube(_text(request, "context")), Screen(as_json=request.has("json"))
    if not request.texts("namespace"):
        request = _with(request, "namespace", kube.namespace)
    if request.texts("manifest"):
        one = _manifest(request)
        rendered = Rendered((one,), needed_secrets=frozenset(needed_secrets(one)))
    else:
        request, package = _packed(_with_fabric(request, kube, screen.say))
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
        return _attached(
            namespace, name, screen.say, follower.until_placed if request.has("wait-placed") else follower.until_ended
        )
    except Hopeless:
        submission.withdraw(kube, found)
        raise


def logs(argv: Sequence[str]) -> int:
    """Follows a job that was submitted before; the job's exit code."""
    request, names = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("logs"))
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Screen

    kube, screen = Kube(_text(request, "context")), Screen(as_json=request.has("json"))
    namespace, name = _text(request, "namespace") or kube.namespace, _one(names, "logs")
    return _attached(namespace, name, screen.say, Follower(kube, namespace, name, screen).until_ended)


def status(argv: Sequence[str]) -> int:
    """Says where a job stands."""
    request, names = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("status"))
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Screen

    kube = Kube(_text(request, "context"))
    namespace, name = _text(request, "namespace") or kube.namespace, _one(names, "status")
    phase = Follower(kube, namespace, name, Screen(as_json=False)).phase()
    if request.has("json"):
        return _say(json.dumps({"name": name, "namespace": namespace, "phase": phase.name, "detail": phase.detail}))
    return _say(f"{namespace}/{name}  {phase}")


def stop(argv: Sequence[str]) -> int:
    """Deletes a job and all that belongs to it; its ranks get SIGTERM and the grace period."""
    request, names = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("stop"))
    from launcher.k8s.client import Kube

    kube = Kube(_text(request, "context"))
    namespace, name = _text(request, "namespace") or kube.namespace, _one(names, "stop")
    kinds = []
    for kind in ("RayJob", "CronJob", "RayCronJob"):
        try:
            if kube.delete(kind, namespace, name):
                kinds.append(kind)
        except ApiRefused as refusal:
            # Who may stop jobs need not have the right to schedules.
            if refusal.code != 403 or kind == "RayJob":
                raise explain(refusal, kind, name, namespace) from refusal
    return _say(f"{' and '.join(kinds)} {namespace}/{name} deleted" if kinds else f"{namespace}/{name} was not there")


def list_jobs(argv: Sequence[str]) -> int:
    """One line for each job of the namespace that this launcher submitted."""
    request, _ = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("list"))
    from launcher.k8s.client import Kube
    from launcher.k8s.phases import phase_of
    from launcher.k8s.pods import JOB_LABEL

    kube = Kube(_text(request, "context"))
    namespace = _text(request, "namespace") or kube.namespace
    try:
        jobs = kube.list("RayJob", namespace, labelSelector=JOB_LABEL)["items"]
        pods = kube.list("Pod", namespace, labelSelector=JOB_LABEL)["items"]
    except ApiRefused as refusal:
        raise explain(refusal, "RayJob", "", namespace) from refusal
    rows = []
    for job in jobs:
        label = job["metadata"]["labels"][JOB_LABEL]
        own = [pod for pod in pods if pod["metadata"].get("labels", {}).get(JOB_LABEL) == label]
        rows.append(
            (job["metadata"]["name"], job["metadata"].get("creationTimestamp", ""), phase_of(job, own, [], 0.0))
        )
    if request.has("json"):
        return _say(
            json.dumps(
                [
                    {"name": name, "created": made, "phase": phase.name, "detail": phase.detail}
                    for name, made, phase in rows
                ]
            )
        )
    return _say("\n".join(f"{name:<48} {made:<21} {phase}" for name, made, phase in rows) or f"no jobs in {namespace}")


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


def _attached(namespace: str, name: str, say: Callable[..., None], follow: Callable[[], Any]) -> int:
    """Follows; Ctrl-C detaches and leaves the job alone."""
    try:
        end = follow()
    except KeyboardInterrupt:
        say(
            "detached",
            f"detached; the job goes on. To follow it again: python -m launcher logs {name} --namespace {namespace}",
        )
        return EXIT_SIGNAL_BASE + 2
    if end is None:
        return EXIT_OK
    say("ended", f"{name} {end.sentence}", exit_code=end.exit_code)
    return int(end.exit_code)


def _render(request: Request) -> tuple[KubeJob, Rendered]:
    job = to_job(request, os.environ, _Reader(request))
    try:
        return job, render_job(job)
    except SpecError as error:
        raise located(error, request) from error


def _packed(request: Request) -> tuple[Request, Package | None]:
    """`--working-dir DIR --upload-to URL` as the zip that it becomes. Nothing is sent yet."""
    folder, target = _text(request, "working-dir"), _text(request, "upload-to")
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
    return _with(request, "working-dir", package.uri), package


def _with_fabric(request: Request, kube: Any, say: Callable[..., None]) -> Request:
    """`--fabric auto`: what the cluster's GPU nodes show."""
    if _text(request, "fabric") != "auto":
        return request
    nodes = kube.list("Node", "")["items"]
    found = recognise(nodes, _text(request, "gpu-resource") or "nvidia.com/gpu")
    say("fabric", f"fabric {found.fabric}: {found.evidence}", fabric=found.fabric)
    request = _with(request, "fabric", found.fabric)
    if found.instance_type and not request.texts("instance-type"):
        request = _with(request, "instance-type", found.instance_type)
    if found.resource and not request.texts("fabric-resource"):
        request = _with(request, "fabric-resource", found.resource)
    return request


def _manifest(request: Request) -> dict[str, Any]:
    """A RayJob from a file, under the name that is given, checked like one of our own."""
    import yaml

    path = _text(request, "manifest") or ""
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
    metadata["name"] = _text(request, "name") or metadata.get("name", "")
    metadata.setdefault("namespace", _text(request, "namespace"))
    owner = _text(request, "owner-job-uid")
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


def _lookup(argv: Sequence[str]) -> tuple[Request, list[str]]:
    """Flags and names of a command that looks a job up."""
    kube: dict[str, tuple[Given, ...]] = {}
    names: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        written, equals, value = ("--namespace", "", "") if token == "-n" else token.partition("=")
        flag = written.removeprefix("--").replace("_", "-")
        if token in ("-h", "--help"):
            return Request(wants_help=True), []
        if not token.startswith("-"):
            names.append(token)
        elif flag not in _LOOKUP_FLAGS:
            raise SpecError(
                f"no such flag: {token}", advice=f"there are {', '.join(f'--{name}' for name in _LOOKUP_FLAGS)}"
            )
        elif _LOOKUP_FLAGS[flag]:
            kube[flag] = (Given("true", written),)
        elif not equals and not rest:
            raise SpecError(f"{written} needs a value", advice=f"write {written} VALUE")
        else:
            kube[flag] = (Given(value if equals else rest.pop(0), written),)
    return Request(kube), names


def _one(names: Sequence[str], command: str) -> str:
    if len(names) != 1:
        raise SpecError(
            f"{command} wants the name of one job, and {len(names)} are given",
            advice="python -m launcher list shows the names",
        )
    return names[0]


def _text(request: Request, name: str) -> str | None:
    given = request.texts(name)
    return given[-1].value if given else None


def _with(request: Request, name: str, value: str) -> Request:
    return replace(request, kube={**request.kube, name: (Given(value, f"--{name}"),)})


def _say(text: str) -> int:
    print(text)
    return EXIT_OK


def _with_file(request: Request) -> Request:
    path = request.texts("file")
    if not path:
        return request
    return with_job_file(request, _read_text(path[-1].value), path[-1].value)


class _Reader:
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
