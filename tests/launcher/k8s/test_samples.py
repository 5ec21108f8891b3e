"""What is checked in under k8s/ is what `render` prints, and what the cluster takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from cache.daemon.metrics import COUNTERS, FORECAST, GAUGES, _DaemonCollector
from cache.residency.health import Health
from launcher.cli import main
from launcher.k8s import client
from launcher.k8s.names import suggest_name
from launcher.k8s.options import DEFAULT_RAY_VERSION
from launcher.k8s.rules import check
from launcher.k8s.rules_pod import check_pod
from launcher.report import metrics as job_metrics
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


class AnyDaemon:
    """A daemon that has counted nothing yet."""

    def status(self) -> dict[str, Any]:
        disk = {"disk": {"state": Health.OK.value}, "forecast": dict.fromkeys(FORECAST, 0.5)}
        return {**dict.fromkeys(GAUGES, 0), **disk, "counters": dict.fromkeys(COUNTERS, 0), "readers": {}}


def exported() -> dict[str, set[str]]:
    """Every metric that a cache exports, as Prometheus sees it, and the values of its label `state`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_DaemonCollector(AnyDaemon()))
    found: dict[str, set[str]] = {}
    for name, state in re.findall(r'^(\w+)(?:\{state="(.*)"\})? ', generate_latest(registry).decode(), re.MULTILINE):
        found.setdefault(name, set()).update({state} - {""})
    return found


def asked() -> str:
    names = ("dashboard.json", "dashboard-jobs.json", "alerts.yaml")
    return "".join((K8S / "monitoring" / name).read_text().replace('\\"', '"') for name in names)


def test_every_metric_that_an_alert_or_the_dashboard_asks_for_is_one_that_the_cache_has() -> None:
    """A misspelt one gives an empty graph, and an alert that never fires."""
    assert json.loads((K8S / "monitoring" / "dashboard.json").read_text())["panels"]
    names = set(re.findall(r"railhead_cache_\w+", asked()))
    assert names and names <= exported().keys()


def test_every_metric_of_a_job_that_is_asked_for_is_one_that_the_launcher_has() -> None:
    assert json.loads((K8S / "monitoring" / "dashboard-jobs.json").read_text())["panels"]
    names = set(re.findall(r"railhead_job_(\w+)", asked()))
    assert names and names <= {*job_metrics.GAUGES, *(f"{name}_total" for name in job_metrics.COUNTERS)}
    labels = set(re.findall(r"by \((?:run, )?(\w+)\) \(railhead_job", asked()))
    assert labels <= {"run", *job_metrics.LABELS.values()}


def test_every_state_of_the_disk_that_an_alert_names_is_one_and_each_but_ok_has_an_alert() -> None:
    known = exported()["railhead_cache_disk_state"]
    named = {
        state
        for found in re.findall(
            r'railhead_cache_disk_state\{state=~?"([^"]+)"', (K8S / "monitoring" / "alerts.yaml").read_text()
        )
        for state in found.split("|")
    }
    assert named == known - {"ok"}


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
