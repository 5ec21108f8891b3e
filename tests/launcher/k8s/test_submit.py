"""Submitting and following, against an API server over HTTP that refuses, forgets, cuts and answers late as real ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from launcher.cli import main
from launcher.k8s.client import Kube
from tests.fakes.apiserver import FakeApiServer

ROOT = Path(__file__).parents[3]
JOB = ["--name", "resnet", "--image", "reg.example/t:1", "--nnodes", "2", "--nproc-per-node", "8", "--gpus", "8"]
SUBMIT = ["submit", *JOB, "train.py"]
LINES = [f"2026-01-01T00:00:0{idx // 3}.{idx % 3}Z step {idx}" for idx in range(9)]
"""Three lines in each second, and two of one time: what the API server repeats after a cut."""
LINES[4] = LINES[3].split()[0] + " step 4"


def submitter_pod(
    server: FakeApiServer, name: str = "resnet-abc", job: str = "resnet", made: str = "2026-01-01T00:00:00Z"
) -> None:
    labels = {"batch.kubernetes.io/job-name": job}
    server.put(
        "pods",
        {
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": labels, "creationTimestamp": made},
        },
    )


def runs_and_ends(server: FakeApiServer, lines: list[str], **status: Any) -> None:
    """The job runs as soon as somebody watches it, writes its lines, and ends when its log is opened."""

    def run() -> None:
        submitter_pod(server)
        server.log("resnet-abc", *lines)
        server.set_status("resnet", jobDeploymentStatus="Running", jobStatus="RUNNING")

    def end() -> None:
        server.set_status("resnet", **{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", **status})
        server.log("resnet-abc", ended=True)

    server.when("GET", "rayjobs", "watch=true", then=run)
    server.when("GET", "/log", then=end)


def test_a_job_is_followed_to_its_end_and_its_output_shown(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_and_ends(server, LINES)
    assert main(SUBMIT) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"step {idx}" for idx in range(9)]
    assert "launcher: training\n" in said.err and said.err.endswith("launcher: resnet ended with 0\n")


def test_the_exit_code_is_the_ranks(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    message = "Job entrypoint command failed with exit code 137, last available logs …"
    runs_and_ends(server, [], jobDeploymentStatus="Failed", jobStatus="FAILED", message=message)
    assert main(SUBMIT) == 137
    assert "exit code 137" in capsys.readouterr().err


@pytest.mark.parametrize("cuts", [[5], [31, 62], [1, 2, 3], [29, 29, 29, 29]])
def test_no_line_is_lost_or_shown_twice_over_reconnects(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], cuts: list[int]
) -> None:
    """The API server repeats up to a second of lines; a cut falls in the middle of one."""
    server.log("resnet-abc", *LINES)
    server.logs["resnet-abc"].cut_after_bytes = list(cuts)

    def run() -> None:
        submitter_pod(server)
        server.set_status("resnet", jobDeploymentStatus="Running")

    def end() -> None:
        server.log("resnet-abc", ended=True)
        server.set_status("resnet", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    server.when("GET", "rayjobs", "watch=true", then=run)
    server.when("GET", "/log", count=len(cuts) + 1, then=end)
    # After each cut the follower watches again: something must happen there for it to go on at once.
    for count in range(2, len(cuts) + 2):
        server.when(
            "GET",
            "rayjobs",
            "watch=true",
            count=count,
            then=lambda: server.set_status("resnet", message="still running"),
        )
    assert main(SUBMIT) == 0
    assert capsys.readouterr().out.splitlines() == [f"step {idx}" for idx in range(9)]


@pytest.mark.parametrize("by_status", [False, True])
def test_a_watch_that_expired_is_begun_anew(server: FakeApiServer, by_status: bool) -> None:
    """410: the version is older than what the API server remembers."""
    server.expires_by_status = by_status
    server.when("GET", "rayjobs", "watch=true", then=server.compact)
    runs_and_ends(server, LINES)
    server.hooks[1].count = 2  # runs at the second watch
    assert main(SUBMIT) == 0
    assert sum("watch=true" in line for line in server.requests) >= 2


def test_a_bookmark_moves_the_watch_on(server: FakeApiServer) -> None:
    """Without it a quiet job's watch would fall behind what the API server remembers."""
    server.bookmarks_only = 1
    runs_and_ends(server, [])
    server.hooks[0].count = 2
    assert main(SUBMIT) == 0
    first, second = [
        line.split("resourceVersion=")[1].split("&")[0] for line in server.requests if "watch=true" in line
    ][:2]
    assert int(second) >= int(first)


def test_a_watch_that_breaks_in_the_middle_of_an_event_is_taken_up_where_it_was(server: FakeApiServer) -> None:
    server.cut_watches = [40]
    runs_and_ends(server, LINES)
    assert main(SUBMIT) == 0


def test_a_list_whose_moment_is_forgotten_between_two_pages_is_read_again(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        assert main(["submit", "--name", name, *JOB[2:], "--detach", "train.py"]) == 0
    server.page_size, server.expired_pages = 1, 3
    assert main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["one", "three", "two"]
    server.expired_pages = 100
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_busy_server_is_asked_again(server: FakeApiServer) -> None:
    server.fail("POST", "rayjobs", code=429, times=2, Retry_After="1")
    server.fail("PATCH", code=503, times=1)
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 0
    assert server.names("rayjobs") == {"resnet"}


def test_a_submit_tried_again_follows_the_job_and_does_not_run_it_twice(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submitter that was killed after creating the job comes back with the same words."""
    detached = [*SUBMIT[:-1], "--detach", "--json", "train.py"]
    assert main(detached) == 0
    assert main(detached) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["is_new"] for one in said if one["event"] == "submitted"] == [True, False]
    assert sum(line.startswith("POST") and "dryRun" not in line and "rayjobs" in line for line in server.requests) == 2


def test_another_job_of_the_same_name_is_refused(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    """KubeRay would ignore the change, and the person would look at the wrong job."""
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 0
    assert main([*SUBMIT[:-1], "--detach", "other.py"]) == 69
    assert "exists with another specification" in capsys.readouterr().err


def test_what_belongs_to_the_job_goes_with_it(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT[:-1], "--detach", "--network-policy", "train.py"]) == 0
    assert server.names("serviceaccounts") == server.names("networkpolicies") == {"resnet"}
    assert main(["stop", "resnet"]) == 0
    assert not server.objects
    assert main(["stop", "resnet"]) == 0
    assert capsys.readouterr().out.endswith("was not there\n")


def asked_rights(server: FakeApiServer) -> set[tuple[str, str, str]]:
    """Group, resource and verb of every request, as Kubernetes' authorizer names them."""
    found = set()
    for line in server.requests:
        method, path = line.split()
        url = urlsplit(path)
        parts = url.path.strip("/").split("/")
        group = "" if parts[0] == "api" else parts[1]
        resource, *rest = parts[parts.index("namespaces") + 2 :]
        if rest[1:] == ["log"]:
            found.add((group, "pods/log", "get"))
        elif method == "GET" and not rest:
            found.add((group, resource, "watch" if "watch=true" in url.query else "list"))
        elif method == "PATCH":  # server-side apply of what may not be there yet
            found |= {(group, resource, "patch"), (group, resource, "create")}
        else:
            found.add((group, resource, {"GET": "get", "POST": "create", "DELETE": "delete"}[method]))
    return found


def test_the_role_for_users_has_every_right_that_the_commands_use(server: FakeApiServer) -> None:
    """And reads no Secret: the check for missing ones goes without when it is refused."""
    (role,) = yaml.safe_load_all((ROOT / "k8s" / "base" / "user-role.yaml").read_text())
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    all_of_it = [*SUBMIT[:-1], "--network-policy", "--pod-monitor", "--cache-capacity", "1TiB", "--cache-peers"]
    Path("train.py").write_text("print(1)\n")
    runs_and_ends(server, LINES)
    assert main([*all_of_it, "--ship", "train.py", "--secret-env", "A=s/k", "train.py"]) == 69
    server.fail("GET", "/secrets/", code=403)
    assert main([*all_of_it, "--ship", "train.py", "--secret-env", "A=s/k", "train.py"]) == 0
    nightly = [*SUBMIT[:2], "nightly", *SUBMIT[3:-1]]
    assert main([*nightly, "--schedule", "0 2 * * *", "train.py"]) == 0
    for command in (["status", "resnet"], ["logs", "resnet"], ["list"], ["stop", "resnet"], ["stop", "nightly"]):
        assert main(command) == 0
    assert asked_rights(server) - granted <= {("", "secrets", "get"), ("ray.io", "raycronjobs", "delete")}


def test_who_may_not_touch_schedules_can_stop_a_job(server: FakeApiServer) -> None:
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 0
    server.fail("DELETE", "cronjobs", code=403)
    assert main(["stop", "resnet"]) == 0
    assert not server.objects


def test_a_refusal_after_the_job_was_made_leaves_nothing_behind(server: FakeApiServer) -> None:
    """The dry run passed, and then a quota was used up by somebody else."""
    message = "exceeded quota: gpus, requested: count=1, used: count=4, limited: count=4"
    server.when(
        "POST",
        "/rayjobs?fieldValidation=Strict",
        count=2,
        then=lambda: server.fail("PATCH", code=403, reason="Forbidden", message=message),
    )
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 69
    assert not server.objects


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no permission": (
        {
            "code": 403,
            "message": 'User "me" cannot create resource "rayjobs" in API group "ray.io" in the namespace "default"',
        },
        69,
        "you may not create rayjobs.ray.io in namespace default",
    ),
    "quota": (
        {
            "code": 403,
            "message": "x is forbidden: exceeded quota: gpus, requested: count=1, used: count=4, limited: count=4",
        },
        69,
        "quota gpus: asked for count=1, used count=4, limit count=4",
    ),
    "an admission policy": (
        {"code": 403, "message": "admission webhook denied: no privileged pods"},
        69,
        "no privileged pods",
    ),
    "an invalid value": ({"code": 422, "message": "spec.backoffLimit: Invalid value: -1"}, 2, "Invalid value: -1"),
    "not logged in": ({"code": 401}, 69, "does not know you"),
    "a server that stays away": ({"code": 503, "times": 20}, 69, "503 again and again"),
}


@pytest.mark.parametrize(("fault", "code", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_one_sentence_and_nothing_is_created(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], code: int, said: str
) -> None:
    server.fail("POST", "rayjobs", **fault)
    assert main(SUBMIT) == code
    assert said in capsys.readouterr().err
    assert not server.objects


@pytest.mark.parametrize(
    ("resource", "argv"),
    [("nodes", [*SUBMIT[:-1], "--fabric", "auto", "train.py"]), ("pods", SUBMIT), ("pods", ["list"])],
)
def test_a_missing_right_to_look_is_a_sentence_and_no_traceback(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], resource: str, argv: list[str]
) -> None:
    server.fail(
        "GET",
        f"/{resource}",
        code=403,
        message=f'User "me" cannot list resource "{resource}" in API group "" at the cluster scope',
    )
    assert main(argv) == 69
    assert f"you may not list {resource}\n" in capsys.readouterr().err


def test_a_cluster_without_the_operator_is_told_apart(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.missing_kinds = {"rayjobs"}
    assert main(SUBMIT) == 69
    assert "KubeRay is not installed" in capsys.readouterr().err


def test_a_missing_namespace_is_told_apart(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT[:-1], "--namespace", "nowhere", "train.py"]) == 69
    assert "there is no namespace nowhere" in capsys.readouterr().err


def test_an_old_crd_that_would_drop_a_field_is_refused_with_the_release(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.dropped_fields = ["preRunningDeadlineSeconds"]
    assert main([*SUBMIT[:-1], "--start-deadline", "1h", "train.py"]) == 2
    assert "preRunningDeadlineSeconds needs KubeRay 1.6.0" in capsys.readouterr().err
    assert not server.objects


def test_a_dry_run_creates_nothing(server: FakeApiServer) -> None:
    assert main([*SUBMIT[:-1], "--dry-run", "train.py"]) == 0
    assert not server.objects
    assert any("dryRun=All" in line for line in server.requests)


def test_a_refused_job_is_not_waited_for(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    """ValidationFailed is final: nothing follows it."""
    server.when(
        "GET",
        "rayjobs",
        "watch=true",
        then=lambda: server.set_status("resnet", jobDeploymentStatus="ValidationFailed", message="replicas"),
    )
    assert main(SUBMIT) == 2
    assert "KubeRay refuses the job: replicas" in capsys.readouterr().err


def test_a_job_that_somebody_deletes_ends_the_follower(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.when("GET", "rayjobs", "watch=true", then=lambda: server._delete(("rayjobs", "default", "resnet")))
    assert main(SUBMIT) == 69
    assert "is not there (any more)" in capsys.readouterr().err


def test_ctrl_c_detaches_and_says_how_to_come_back(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Kube, "watch", interrupt)
    assert main(SUBMIT) == 130
    assert "python -m launcher logs resnet --namespace default" in capsys.readouterr().err
    assert server.names("rayjobs") == {"resnet"}


def test_logs_comes_back_to_a_job_and_gives_its_code(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 0
    submitter_pod(server)
    server.log("resnet-abc", *LINES, ended=True)
    server.set_status("resnet", jobDeploymentStatus="Failed", jobStatus="FAILED", message="failed with exit code 7")
    assert main(["logs", "resnet"]) == 7
    assert capsys.readouterr().out.splitlines()[-1] == "step 8"


def test_status_and_list_say_the_phase(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT[:-1], "--detach", "train.py"]) == 0
    server.set_status("resnet", jobDeploymentStatus="Running")
    server.page_size = 1
    assert main(["status", "resnet"]) == 0
    assert main(["list", "--json"]) == 0
    status, listed = capsys.readouterr().out.splitlines()
    assert status == "default/resnet  training"
    assert json.loads(listed)[0]["phase"] == "training"


def test_wait_placed_comes_back_when_the_pods_run(server: FakeApiServer) -> None:
    server.when("GET", "rayjobs", "watch=true", then=lambda: server.set_status("resnet", jobDeploymentStatus="Running"))
    assert main([*SUBMIT[:-1], "--wait-placed", "train.py"]) == 0


def test_fabric_auto_looks_at_the_nodes(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    allocatable = {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    labels = {"node.kubernetes.io/instance-type": "p5.48xlarge"}
    server.put(
        "nodes", {"kind": "Node", "metadata": {"name": "n1", "labels": labels}, "status": {"allocatable": allocatable}}
    )
    assert main([*SUBMIT[:-1], "--fabric", "auto", "--detach", "train.py"]) == 0
    assert "fabric efa: nodes of type p5.48xlarge with 32 EFA devices" in capsys.readouterr().err
    group = server.objects["rayjobs", "default", "resnet"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == "32"


def test_a_scheduled_run_is_submitted_once_under_the_jobs_name(server: FakeApiServer, tmp_path: Path) -> None:
    """As the CronJob's pod does it, twice."""
    from tests.launcher.k8s.jobs import good

    path = tmp_path / "job.json"
    path.write_text(json.dumps(good()))
    again = ["submit", "--manifest", str(path), "--name", "resnet-29387", "--owner-job-uid", "u1", "--detach"]
    assert main(again) == main(again) == 0
    job = server.objects["rayjobs", "default", "resnet-29387"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert server.names("rayjobs") == {"resnet-29387"}


def test_no_kubeconfig_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main(["list"]) == 69
    assert "no cluster to talk to" in capsys.readouterr().err
