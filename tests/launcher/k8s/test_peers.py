"""The caches of a job as peers: who finds whom, and a key that no manifest holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode
from launcher.k8s.manifest import render, to_yaml
from launcher.k8s.options import CacheSettings, KubeJob
from launcher.k8s.request import cut, with_job_file
from launcher.k8s.resolve import to_job
from tests.fakes.apiserver import FakeApiServer
from tests.launcher.k8s.jobs import group, head, job, ray_job, with_sidecar, worker
from tests.launcher.k8s.schemas import faults

K8S = Path(__file__).parents[3] / "k8s"
SUBMIT = [
    *(
        "submit",
        "--name",
        "resnet",
        "--image",
        "reg.example/t:1",
        "--nnodes",
        "2",
        "--gpus",
        "8",
        "--nproc-per-node",
        "8",
    ),
    *("--cache-capacity", "1TiB", "--cache-peers"),
]


def with_peers(**changes: Any) -> KubeJob:
    return with_sidecar(cache=CacheSettings(CacheMode.SIDECAR, peers=True, **changes))


def option(sidecar: dict[str, Any], flag: str) -> str:
    found: str = sidecar["args"][sidecar["args"].index(flag) + 1]
    return found


def test_the_service_that_the_sidecars_ask_for_is_made_and_finds_every_worker_and_nothing_else() -> None:
    rendered = render(with_peers())
    one = ray_job(rendered)
    (service,) = (found for found in rendered.objects if found["kind"] == "Service")
    (sidecar,) = worker(one)["initContainers"]
    port = next(found for found in sidecar["ports"] if found["name"] == service["spec"]["ports"][0]["targetPort"])
    assert option(sidecar, "--peers") == f"dns:{service['metadata']['name']}:{port['containerPort']}"
    assert option(sidecar, "--peer-listen") == f"0.0.0.0:{port['containerPort']}"
    assert service["metadata"]["namespace"] == one["metadata"]["namespace"]
    selector = service["spec"]["selector"].items()
    heads = one["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert selector <= group(one)["template"]["metadata"]["labels"].items() and not selector <= heads.items()


def test_peers_are_found_before_ray_is_up() -> None:
    """A preload runs before the pod is ready; without unready addresses every node would fetch everything itself."""
    (service,) = (found for found in render(with_peers()).objects if found["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True


def test_the_key_is_read_from_a_secret_and_is_in_no_manifest() -> None:
    rendered = render(with_peers())
    (sidecar,) = worker(ray_job(rendered))["initContainers"]
    (mount,) = (found for found in sidecar["volumeMounts"] if found["name"] == "cache-peer-key")
    (volume,) = (found for found in worker(ray_job(rendered))["volumes"] if found["name"] == "cache-peer-key")
    assert option(sidecar, "--peer-key-file") == f"{mount['mountPath']}/key" and mount["readOnly"]
    assert volume["secret"] == {"secretName": "resnet-peer-key", "defaultMode": 0o440}
    assert [one["metadata"]["name"] for one in rendered.own_secrets] == ["resnet-peer-key"]
    assert "Secret" not in {one["kind"] for one in rendered.objects}
    text = to_yaml(rendered)
    assert "kubectl create secret generic resnet-peer-key --namespace default" in text and "stringData" not in text
    for container in (*worker(ray_job(rendered))["containers"], *head(ray_job(rendered))["containers"]):
        assert "peer-key" not in str(container)


def test_a_named_secret_is_used_and_none_is_made() -> None:
    rendered = render(with_peers(peer_secret="shared", peer_tls_secret="tls"))
    assert rendered.own_secrets == () and {"shared", "tls"} <= rendered.needed_secrets
    (sidecar,) = worker(ray_job(rendered))["initContainers"]
    assert option(sidecar, "--peer-tls-ca") == "/railhead/peer-tls/ca.crt"
    assert "# Must be there: Secret shared, tls." in to_yaml(rendered)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (job(cache=CacheSettings(CacheMode.DAEMONSET, peers=True)), "k8s/cache-peers"),
        (job(cache=CacheSettings(peers=True)), "nothing to share"),
        (with_sidecar(cache=CacheSettings(CacheMode.SIDECAR, peer_secret="s")), "without --cache-peers"),
        (with_sidecar(cache=CacheSettings(CacheMode.SIDECAR, peer_tls_secret="s")), "without --cache-peers"),
    ],
)
def test_peers_without_a_daemon_of_the_jobs_own_are_refused(wrong: KubeJob, said: str) -> None:
    with pytest.raises(SpecError) as refusal:
        render(wrong)
    assert said in str(refusal.value)


def test_submit_makes_a_key_and_a_second_submit_leaves_it(server: FakeApiServer) -> None:
    """Pods that run have read it: with another one they would not believe each other."""
    assert main([*SUBMIT, "--detach", "train.py"]) == 0
    key = server.objects["secrets", "default", "resnet-peer-key"]["stringData"]["key"]
    assert len(bytes.fromhex(key)) == 32
    assert main([*SUBMIT, "--detach", "train.py"]) == 0
    assert server.objects["secrets", "default", "resnet-peer-key"]["stringData"]["key"] == key
    assert server.names("services") == {"resnet-cache-peers"}
    assert main(["stop", "resnet"]) == 0
    assert not server.objects


def test_the_key_is_not_shown(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--detach", "--json", "train.py"]) == 0
    said = capsys.readouterr()
    assert server.objects["secrets", "default", "resnet-peer-key"]["stringData"]["key"] not in said.out + said.err


def test_a_schedules_key_lasts_as_long_as_the_schedule(server: FakeApiServer) -> None:
    assert main([*SUBMIT, "--schedule", "0 2 * * *", "train.py"]) == 0
    (owner,) = server.objects["secrets", "default", "resnet-peer-key"]["metadata"]["ownerReferences"]
    assert owner["kind"] == "CronJob"


def test_a_secret_that_is_missing_is_refused_before_anything_is_created(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pods would wait for it in ContainerCreating, with their GPUs."""
    argv = [*SUBMIT, "--cache-peer-secret", "shared", "--secret-env", "K=s3/k", "--detach", "train.py"]
    server.put("secrets", {"kind": "Secret", "metadata": {"name": "s3", "namespace": "default"}})
    assert main(argv) == 69
    assert "there is no Secret shared in namespace default" in capsys.readouterr().err
    assert server.names("rayjobs") == set()
    server.put("secrets", {"kind": "Secret", "metadata": {"name": "shared", "namespace": "default"}})
    assert main(argv) == 0


def test_who_may_not_look_at_secrets_submits_all_the_same(server: FakeApiServer) -> None:
    server.fail("GET", "/secrets/", code=403, message='User "me" cannot get resource "secrets" in API group ""')
    assert main([*SUBMIT, "--cache-peer-secret", "shared", "--detach", "train.py"]) == 0


def test_a_secret_that_may_not_be_made_ends_the_submit_with_nothing_left(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail(
        "POST",
        "/secrets?",
        code=403,
        message='User "me" cannot create resource "secrets" in API group "" in the namespace "default"',
    )
    assert main([*SUBMIT, "--detach", "train.py"]) == 69
    said = capsys.readouterr().err
    assert "you may not create secrets in namespace default" in said
    assert "--cache-peer-secret resnet-peer-key" in said and "--no-cache-peers" in said
    assert not server.objects


@pytest.mark.parametrize(
    ("flags", "has_peers"),
    [
        (["--nnodes", "2", "--cache-capacity", "1TiB"], True),
        (["--nnodes", "1:2", "--cache-capacity", "1TiB"], True),
        (["--nnodes", "1", "--spare-nodes", "1", "--cache-capacity", "1TiB"], True),
        (["--nnodes", "1", "--cache-capacity", "1TiB"], False),
        (["--nnodes", "2"], False),
        (["--nnodes", "2", "--cache", "daemonset"], False),
        (["--nnodes", "2", "--cache-capacity", "1TiB", "--no-cache-peers"], False),
        (["--nnodes", "1", "--cache-capacity", "1TiB", "--cache-peers"], True),
    ],
)
def test_where_several_nodes_have_a_cache_each_byte_leaves_the_object_store_once_unless_they_are_told_not_to(
    flags: list[str], has_peers: bool
) -> None:
    asked = cut(["--image", "reg.example/t:1", "--gpus", "8", "--nproc-per-node", "8", *flags, "train.py"])
    assert to_job(asked, {}, lambda _: "").kube.cache.peers == has_peers


def test_a_job_file_may_say_that_each_node_fetches_for_itself() -> None:
    text = (
        "image: a/b:1\ngpus: 8\nnnodes: 2\nnproc_per_node: 8\ncache_capacity: 1TiB\ncache_peers: false\nrun: train.py\n"
    )
    assert not to_job(with_job_file(cut([]), text, "job.yaml"), {}, lambda _: "").kube.cache.peers
    with pytest.raises(SpecError, match="contradict"):
        to_job(with_job_file(cut(["--no-cache-peers", "--cache-peers"]), text, "job.yaml"), {}, lambda _: "")


def patched_daemonset() -> dict[str, Any]:
    """k8s/base's DaemonSet with the patch of k8s/cache-peers, whose operations are all `add`."""
    (daemon,) = yaml.safe_load_all((K8S / "base" / "cache-daemonset.yaml").read_text())
    one: dict[str, Any] = copy.deepcopy(daemon)
    (patch,) = yaml.safe_load((K8S / "cache-peers" / "kustomization.yaml").read_text())["patches"]
    for operation in yaml.safe_load(patch["patch"]):
        assert operation["op"] == "add"
        *parents, last = operation["path"].strip("/").split("/")
        node: Any = one
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        if last == "-":
            node.append(operation["value"])
        else:
            node[last] = operation["value"]
    assert patch["target"] == {"kind": one["kind"], "name": one["metadata"]["name"]}
    return one


def test_the_nodes_daemons_become_peers_as_a_jobs_sidecars_do() -> None:
    daemon = patched_daemonset()
    assert faults(daemon) == []
    (container,) = daemon["spec"]["template"]["spec"]["containers"]
    (sidecar,) = worker(ray_job(render(with_peers())))["initContainers"]
    for flag in ("--peer-listen", "--peer-key-file"):
        assert option(container, flag) == option(sidecar, flag)
    (service,) = yaml.safe_load_all((K8S / "cache-peers" / "service.yaml").read_text())
    assert option(container, "--peers") == f"dns:{service['metadata']['name']}:9401"
    assert service["spec"]["selector"].items() <= daemon["spec"]["template"]["metadata"]["labels"].items()
    (policy,) = yaml.safe_load_all((K8S / "cache-peers" / "network-policy.yaml").read_text())
    assert policy["spec"]["podSelector"]["matchLabels"] == service["spec"]["selector"]
    ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert ports == {port["containerPort"] for port in container["ports"]}
    assert json.dumps(daemon)
