"""Bad input: each is one clear refusal with its exit code, before anything is created, and nothing half-made is left behind."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.errors import SpecError
from launcher.k8s.admission import trial_pods
from launcher.k8s.request import cut
from launcher.k8s.sources import read_manifest
from tests.fakes.apiserver import FakeApiServer
from tests.launcher.k8s.jobs import good, group, worker
from tests.launcher.k8s.schemas import faults
from tests.launcher.k8s.test_submit import SUBMIT

BASE = SUBMIT[:-1]
BY_FLAGS: dict[str, tuple[list[str], str]] = {
    "wrong quantity": (["--memory", "512GB"], "did you mean 512Gi"),
    "name too long": (["--name", "r" * 48], "48 characters, at most 47"),
    "replicas outside limits": (["--nnodes", "4:2"], "1 <= MIN <= MAX"),
    "more ranks than GPUs": (["--gpus", "3"], "cannot be shared out evenly"),
    "unknown fabric": (["--fabric", "infinband"], "did you mean"),
    "a fabric without its networks": (["--fabric", "roce"], "--fabric-networks"),
    "conflicting queue options": (["--scheduler", "kueue", "--queue", "q", "--autoscale"], "elastic slices"),
    "a queue of nobody's": (["--queue", "q"], "whose?"),
    "an old KubeRay": (
        ["--kuberay", "1.4.0", "--start-deadline", "1h"],
        "needs KubeRay 1.6.0, and the cluster has 1.4.0",
    ),
    "an image without bash": (["--image", "python:3.11-alpine"], "has no bash"),
    "a variable of KubeRay's": (["--env", "RAY_ADDRESS=x"], "set by KubeRay itself"),
    "a preload of nothing": (["--cache-capacity", "1TiB", "--preload", "before"], "--data"),
}


@pytest.mark.parametrize(("flags", "said"), BY_FLAGS.values(), ids=BY_FLAGS.keys())
def test_a_mistake_in_the_command_is_refused_without_asking_the_cluster(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main([*BASE, *flags, "train.py"]) == 2
    assert said in capsys.readouterr().err
    assert not server.objects and not [line for line in server.requests if not line.startswith("GET")]


BY_HAND: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "replicas outside limits": (lambda one: group(one).update(replicas=3), "outside minReplicas 2 to maxReplicas 2"),
    "GPUs in requests only": (
        lambda one: worker(one)["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu"),
        "nvidia.com/gpu in requests only",
    ),
    "a port clash with a sidecar": (
        lambda one: worker(one)["initContainers"][0].update(ports=[{"name": "cache-metrics", "containerPort": 8080}]),
        "listens at 8080, which is Ray's metrics",
    ),
    "a wrong quantity": (
        lambda one: worker(one)["containers"][0]["resources"]["limits"].update(memory="512 GB"),
        "512 GB; expected",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), BY_HAND.values(), ids=BY_HAND.keys())
def test_a_mistake_in_a_manifest_written_by_hand_is_refused_as_well(
    server: FakeApiServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    one = good()
    spoil(one)
    (tmp_path / "job.json").write_text(json.dumps(one))
    assert main(["submit", "--manifest", str(tmp_path / "job.json"), "--name", "byhand"]) == 2
    assert said in capsys.readouterr().err
    assert not server.objects


def paths(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every node below this one."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for key, child in children for path in [(*here, key), *paths(child, (*here, key))]]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_manifest_however_broken_ends_in_a_traceback(data: st.DataObject) -> None:
    """Any one node of a good one is taken out, or is something else."""
    one = good()
    *parents, last = data.draw(st.sampled_from(paths(one)))
    node: Any = one
    for key in parents:
        node = node[key]
    junk = data.draw(st.sampled_from([None, "", "x y", 0, -1, True, [], [None], {}, {"a": {"b": 1}}, "DEL"]))
    if junk == "DEL":
        del node[last]
    else:
        node[last] = junk
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(one, file)
        file.flush()
        with contextlib.suppress(SpecError):
            read_manifest(cut(["--manifest", file.name, "--namespace", "default"], {"manifest": False}))


ADMISSION = {
    "a privileged pod": (
        'pods "x" is forbidden: violates PodSecurity "baseline:latest": privileged',
        "Pod Security Standard",
    ),
    "a priority class that is not there": ("no PriorityClass with name high was found", "kubectl get priorityclasses"),
    "a limit range": ("maximum memory usage per Container is 256Gi, but limit is 512Gi", "LimitRange"),
}


@pytest.mark.parametrize(("message", "advice"), ADMISSION.values(), ids=ADMISSION.keys())
def test_what_admission_says_of_the_pods_is_asked_before_the_job_is_made(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], message: str, advice: str
) -> None:
    """The RayJob itself would be taken, and its pods be refused one by one, in events that nobody reads."""
    server.fail("POST", "/pods?", code=403, reason="Forbidden", message=message)
    assert main([*BASE, "--detach", "train.py"]) == 69
    printed = capsys.readouterr().err
    assert message in printed and advice in printed
    assert not server.objects


@pytest.mark.parametrize(
    ("message", "is_said"),
    [
        ('User "me" cannot create resource "pods" in API group ""', False),
        ('admission webhook "x" does not support dry run', False),
        ("admission webhook denied: bare pods are not wanted here", True),
        ("exceeded quota: gpus, requested: 8, used: 8, limited: 8", True),
    ],
)
def test_what_may_be_otherwise_for_kuberay_or_later_is_said_and_does_not_stop_the_job(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], message: str, is_said: bool
) -> None:
    server.fail("POST", "/pods?", code=403, message=message, times=2)
    assert main([*BASE, "--detach", "train.py"]) == 0
    assert (message in capsys.readouterr().err) == is_said


def test_the_pods_that_are_tried_are_the_jobs_own() -> None:
    head, workers = trial_pods(good())
    assert faults(head) == faults(workers) == []
    assert workers["spec"]["containers"] == worker(good())["containers"]


def broken_worker(server: FakeApiServer, message: str, reason: str = "CreateContainerError") -> None:
    labels = {"railhead.dev/job": "resnet", "railhead.dev/role": "worker"}
    status = {"name": "ray-worker", "image": "i", "state": {"waiting": {"reason": reason, "message": message}}}
    server.put(
        "pods",
        {
            "kind": "Pod",
            "metadata": {"name": "w", "namespace": "default", "labels": labels},
            "spec": {"nodeName": "n"},
            "status": {"containerStatuses": [status]},
        },
    )
    server.set_status("resnet", jobDeploymentStatus="Initializing")


def test_an_image_that_turns_out_to_have_no_bash_takes_the_job_away_again(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would hold its nodes for ever, and try again and again."""
    text = 'exec: "/bin/bash": stat /bin/bash: no such file or directory'
    server.when("GET", "rayjobs", "watch=true", then=lambda: broken_worker(server, text))
    assert main(SUBMIT) == 2
    printed = capsys.readouterr().err
    assert "the image has no bash" in printed and "the job was deleted" in printed
    assert server.names("rayjobs") == set()


def test_a_job_that_was_there_before_is_not_taken_away(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who follows somebody's job must not end it."""
    assert main([*BASE, "--detach", "train.py"]) == 0
    broken_worker(server, 'exec: "/bin/bash": no such file')
    server.when(
        "GET",
        "rayjobs",
        "watch=true",
        then=lambda: server.set_status("resnet", jobDeploymentStatus="Failed", reason="x"),
    )
    assert main(SUBMIT) != 0
    assert server.names("rayjobs") == {"resnet"}


def test_a_job_whose_creation_was_not_answered_is_known_as_our_own(server: FakeApiServer) -> None:
    """The connection breaks after the API server has made it: what follows then fails, and the job goes again."""
    server.cut_answers("POST", "/rayjobs?fieldValidation=Strict", skip=1)
    server.fail("PATCH", code=403, message="no", times=1, skip=2)
    assert main([*BASE, "--detach", "train.py"]) == 69
    assert server.names("rayjobs") == set()
    assert sum(line.startswith("POST") and "/rayjobs" in line and "dryRun" not in line for line in server.requests) == 2


def test_in_sidecar_mode_the_output_is_that_of_the_container_in_the_head(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        labels = {"railhead.dev/job": "resnet", "railhead.dev/role": "head"}
        containers = [{"name": "ray-head"}, {"name": "ray-job-submitter"}]
        server.put(
            "pods",
            {
                "kind": "Pod",
                "metadata": {"name": "head-x", "namespace": "default", "labels": labels},
                "spec": {"containers": containers},
            },
        )
        server.log("head-x", "2026-01-01T00:00:00Z hello", ended=True)
        server.set_status("resnet", jobDeploymentStatus="Running")

    server.when("GET", "rayjobs", "watch=true", then=run)
    server.when(
        "GET", "/log", then=lambda: server.set_status("resnet", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    )
    assert main([*BASE, "--submission", "sidecar", "train.py"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert any("/log" in line and "container=ray-job-submitter" in line for line in server.requests)
