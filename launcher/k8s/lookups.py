"""`python -m launcher status | logs | stop | list`: commands that look a job up by its name. Shell."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from launcher.errors import EXIT_OK, EXIT_SIGNAL_BASE, SpecError
from launcher.k8s.helptext import lookup_help
from launcher.k8s.refusals import ApiRefused, explain
from launcher.k8s.request import Request
from launcher.options.parse import Given

LOOKUP_FLAGS = {"context": False, "json": True, "namespace": False}


def logs(argv: Sequence[str]) -> int:
    """Follows a job that was submitted before; the job's exit code."""
    request, names = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("logs"))
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Screen

    kube, screen = Kube(request.text("context")), Screen(as_json=request.has("json"))
    namespace, name = request.text("namespace") or kube.namespace, _one(names, "logs")
    return attached(namespace, name, screen.say, Follower(kube, namespace, name, screen).until_ended)


def status(argv: Sequence[str]) -> int:
    """Says where a job stands."""
    request, names = _lookup(argv)
    if request.wants_help:
        return _say(lookup_help("status"))
    from launcher.k8s.client import Kube
    from launcher.k8s.follow import Follower, Screen

    kube = Kube(request.text("context"))
    namespace, name = request.text("namespace") or kube.namespace, _one(names, "status")
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

    kube = Kube(request.text("context"))
    namespace, name = request.text("namespace") or kube.namespace, _one(names, "stop")
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

    kube = Kube(request.text("context"))
    namespace = request.text("namespace") or kube.namespace
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


def attached(namespace: str, name: str, say: Callable[..., None], follow: Callable[[], Any]) -> int:
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
        elif flag not in LOOKUP_FLAGS:
            raise SpecError(
                f"no such flag: {token}", advice=f"there are {', '.join(f'--{name}' for name in LOOKUP_FLAGS)}"
            )
        elif LOOKUP_FLAGS[flag]:
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


def _say(text: str) -> int:
    print(text)
    return EXIT_OK
