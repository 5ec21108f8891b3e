"""What is checked in under k8s/ is what `render` prints, and what the cluster takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache.daemon.metrics import COUNTERS, GAUGES, READERS
from launcher.cli import main
from launcher.k8s import client
from launcher.k8s.names import suggest_name
from launcher.k8s.options import DEFAULT_RAY_VERSION
from launcher.k8s.rules import check
from launcher.k8s.rules_pod import check_pod
from tests.launcher.k8s.schemas import faults

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
JOB_FILES = sorted((K8S / "samples").glob("*.job.yaml"))
MANIFESTS = sorted(
    path for path in K8S.glob("*/*.yaml") if not path.name.endswith(".job.yaml") and path.name != "kustomization.yaml"
)


def objects(path: Path) -> Iterator[dict[str, Any]]:
    yield from (one for one in yaml.safe_load_all(path.read_text()) if one is not None)


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name.removesuffix(".job.yaml"))
def test_a_sample_is_what_render_prints(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make them anew: for f in k8s/samples/*.job.yaml; do python -m launcher render --file $f --output ${f%.job.yaml}.yaml; done"""
    monkeypatch.chdir(ROOT)
    assert main(["render", "--file", str(path.relative_to(ROOT))]) == 0
    assert capsys.readouterr().out == path.with_name(path.name.replace(".job.yaml", ".yaml")).read_text()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_everything_in_k8s_is_what_the_api_server_takes(path: Path) -> None:
    found = [fault for one in objects(path) for fault in faults(one)]
    assert found == []
    assert [violation for violation in check(list(objects(path))) if violation.is_fatal] == []


def test_the_schemas_refuse_an_unknown_field() -> None:
    """So that the tests above can fail."""
    one = next(one for one in objects(K8S / "samples" / "smoke.yaml") if one["kind"] == "RayJob")
    one["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minimumReplicas"] = 1
    assert any("minimumReplicas" in fault for fault in faults(one))
    daemon = next(objects(K8S / "base" / "cache-daemonset.yaml"))
    daemon["spec"]["template"]["spec"]["containers"][0]["commando"] = []
    assert faults(daemon)


def test_each_kustomization_lists_all_files_beside_it() -> None:
    for path in K8S.glob("*/kustomization.yaml"):
        listed = {name for name in yaml.safe_load(path.read_text())["resources"] if not name.startswith("../")}
        assert listed == {other.name for other in path.parent.glob("*.yaml")} - {path.name}


def test_the_daemonset_obeys_the_rules_for_pods() -> None:
    (daemon,) = objects(K8S / "base" / "cache-daemonset.yaml")
    assert list(check_pod("DaemonSet", daemon["spec"]["template"])) == []


def test_a_daemonset_job_looks_for_the_socket_where_the_daemonset_makes_it() -> None:
    (daemon,) = objects(K8S / "base" / "cache-daemonset.yaml")
    args = daemon["spec"]["template"]["spec"]["containers"][0]["args"]
    (volume,) = daemon["spec"]["template"]["spec"]["volumes"]
    socket = args[args.index("--socket") + 1].replace("/host", volume["hostPath"]["path"])
    job = next(one for one in objects(K8S / "samples" / "daemonset.yaml") if one["kind"] == "RayJob")
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    folder = next(one for one in worker["volumes"] if one["name"] == "cache-run")["hostPath"]["path"]
    told = {entry["name"]: entry["value"] for entry in worker["containers"][0]["env"]}["RAILHEAD_CACHE_SOCKET"]
    assert f"{folder}/{Path(told).name}" == socket


def test_every_metric_that_an_alert_or_the_dashboard_asks_for_is_one_that_the_cache_has() -> None:
    """A misspelt one gives an empty graph, and an alert that never fires."""

    def seconds(name: str) -> str:
        return re.sub(r"_s$", "_seconds", name)

    known = {f"railhead_cache_{seconds(name)}" for name in GAUGES}
    known |= {f"railhead_cache_{seconds(name)}_total" for name in COUNTERS}
    known |= {f"railhead_cache_reader_{seconds(name)}_total" for name in READERS}
    dashboard = (K8S / "monitoring" / "dashboard.json").read_text()
    assert json.loads(dashboard)["panels"]
    asked = set(re.findall(r"railhead_cache_\w+", dashboard + (K8S / "monitoring" / "alerts.yaml").read_text()))
    assert asked and asked <= known


def test_the_ray_that_manifests_name_is_the_one_in_the_image() -> None:
    """KubeRay chooses its probes by rayVersion."""
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == DEFAULT_RAY_VERSION


def test_every_kind_that_is_rendered_can_be_sent() -> None:
    kinds = {
        one["kind"] for path in (K8S / "samples").glob("*.yaml") if ".job." not in path.name for one in objects(path)
    }
    assert kinds <= set(client.PLURALS)


def test_a_suggested_name_is_a_legal_one() -> None:
    assert suggest_name("50 Résnet_v2.py") == "job-50-r-snet-v2-py"
