"""What a pod gets for each fabric, and that the shell words in front of Ray do what they say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import SpecError
from launcher.k8s.fabric import FABRICS, recognise
from launcher.k8s.fabric_gke import TCPX_SETTINGS
from launcher.k8s.manifest import render
from tests.launcher.k8s.jobs import job, ray_job, worker

GKE = {"gke-rdma": 9, "gke-tcpxo": 8, "gke-tcpx": 4}


def pod(fabric: str, **changes: Any) -> dict[str, Any]:
    return worker(ray_job(render(job(fabric=fabric, **changes))))


def annotations(fabric: str, **changes: Any) -> dict[str, str]:
    one = ray_job(render(job(fabric=fabric, **changes)))
    found: dict[str, str] = one["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["metadata"]["annotations"]
    return found


def run(setup: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As KubeRay pastes it: `<user's> && ulimit …; ray start …`, here with something that prints the environment for Ray."""
    line = f"{setup} && ulimit -n 1024; env -0"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"PATH": os.environ["PATH"], **env})


def environment(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if "=" in pair)


@pytest.mark.parametrize(("fabric", "count"), GKE.items())
def test_each_nic_of_a_gke_node_has_its_network(fabric: str, count: int) -> None:
    listed = json.loads(annotations(fabric)["networking.gke.io/interfaces"])
    assert [one["interfaceName"] for one in listed] == [f"eth{idx}" for idx in range(count + 1)]
    assert listed[0]["network"] == "default" and len({one["network"] for one in listed}) == count + 1
    own = tuple(f"gpu-nic{idx}" for idx in range(count))
    listed = json.loads(annotations(fabric, fabric_networks=own)["networking.gke.io/interfaces"])
    assert tuple(one["network"] for one in listed[1:]) == own


@pytest.mark.parametrize(("fabric", "count"), GKE.items())
def test_too_few_networks_and_parts_of_a_node_are_refused(fabric: str, count: int) -> None:
    with pytest.raises(SpecError, match=f"has {count} networks"):
        pod(fabric, fabric_networks=("one",))
    with pytest.raises(SpecError, match="all 8 of its GPUs"):
        render(job({"nproc_per_node": 4}, fabric=fabric, gpus=4))


@pytest.mark.parametrize("fabric", ["gke-tcpx", "gke-tcpxo"])
def test_the_daemon_is_a_native_sidecar_that_sees_all_gpus_and_the_drivers_libraries(fabric: str) -> None:
    """As an ordinary container it would keep the pod from completing, and before Ray it would be taken for Ray."""
    one = pod(fabric)
    (daemon,) = one["initContainers"]
    assert daemon["restartPolicy"] == "Always" and "NET_ADMIN" in daemon["securityContext"]["capabilities"]["add"]
    devices = [
        each["path"] for each in yaml.safe_load(annotations(fabric)[f"devices.gke.io/container.{daemon['name']}"])
    ]
    assert devices[:8] == [f"/dev/nvidia{idx}" for idx in range(8)]
    assert ("/dev/dmabuf_import_helper" in devices) == (fabric == "gke-tcpxo")
    folders = [{m["mountPath"]: m["name"] for m in each["volumeMounts"]} for each in (daemon, one["containers"][0])]
    assert folders[0]["/usr/local/nvidia/lib64"] == folders[1]["/usr/local/nvidia/lib64"]
    assert pod(fabric, fabric_image="mirror/rxdm:1")["initContainers"][0]["image"] == "mirror/rxdm:1"


def test_tcpxos_startup_probe_reads_the_file_that_its_daemon_writes() -> None:
    (daemon,) = pod("gke-tcpxo")["initContainers"]
    written = {each["name"]: each["value"] for each in daemon["env"]}["HEALTH_CHECK_LOG_FILE"]
    assert daemon["startupProbe"]["exec"]["command"] == ["cat", written]
    assert "_" not in written  # the daemon's own limit


def test_tcpxs_sockets_are_where_nccl_is_told_they_are_and_not_over_rays_folder() -> None:
    one = pod("gke-tcpx")
    (daemon,), (ray,) = one["initContainers"], one["containers"]
    mounts = [{m["name"]: m["mountPath"] for m in each["volumeMounts"]}["tcpx-sockets"] for each in (daemon, ray)]
    assert mounts == ["/run/tcpx", "/run/tcpx"] and "/run/tcpx" in daemon["args"]
    env = environment(run(ray["command"][0], NCCL_ALGO="Tree"))
    assert env["NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX"] == "/run/tcpx"
    assert {**TCPX_SETTINGS, "NCCL_ALGO": "Tree"}.items() <= env.items(), "and the user's word stands"


@pytest.mark.parametrize(
    ("fabric", "script"),
    [
        ("gke-rdma", "/usr/local/gib/scripts/set_nccl_env.sh"),
        ("gke-tcpxo", "/usr/local/nvidia/lib64/nccl-env-profile.sh"),
    ],
)
def test_the_plugins_settings_reach_ray_but_where_the_user_set_one(fabric: str, script: str, tmp_path: Path) -> None:
    (setup,) = pod(fabric)["containers"][0]["command"]
    (tmp_path / "profile.sh").write_text('export NCCL_CROSS_NIC=0 NCCL_DEBUG=WARN\nNCCL_ALGO="Ring,Tree"\n')
    here = setup.replace(script, str(tmp_path / "profile.sh"))
    assert here != setup
    env = environment(run(here, NCCL_DEBUG="INFO", LD_LIBRARY_PATH="/opt/x"))
    assert (env["NCCL_CROSS_NIC"], env["NCCL_ALGO"], env["NCCL_DEBUG"]) == ("0", "Ring,Tree", "INFO")
    assert env["LD_LIBRARY_PATH"].startswith("/usr/local/nvidia/lib64:") and env["LD_LIBRARY_PATH"].endswith(":/opt/x")


@pytest.mark.parametrize("fabric", ["gke-rdma", "gke-tcpxo"])
def test_without_the_plugin_ray_does_not_start(fabric: str) -> None:
    """NCCL would fall back to TCP without a word, at a tenth of the speed."""
    done = run(pod(fabric)["containers"][0]["command"][0])
    assert done.returncode == 1 and done.stdout == ""
    assert "is the NCCL plugin installed there?" in done.stderr


def node(kind: str = "", labels: dict[str, str] | None = None, **devices: str) -> dict[str, Any]:
    found = {"nvidia.com/gpu": "8", **{name.replace("__", "/"): count for name, count in devices.items()}}
    kinds = {"node.kubernetes.io/instance-type": kind} if kind else {}
    return {"metadata": {"labels": {**kinds, **(labels or {})}}, "status": {"allocatable": found}}


SEEN = {
    "gke-tcpxo": node("a3-megagpu-8g"),
    "gke-tcpx": node("a3-highgpu-8g"),
    "gke-rdma": node("a4-highgpu-8g"),
    "efa": node("p5en.48xlarge", **{"vpc.amazonaws.com__efa": "16"}),
    "coreweave": node(labels={"ib.coreweave.cloud/speed": "400G"}, rdma__ib="1"),
    "oci": node(labels={"oci.oraclecloud.com/rdma.cluster_id": "c"}),
    "azure": node("Standard_ND96isr_H100_v5", rdma__ib="8"),
    "ib": node(rdma__hca_shared_devices_a="1"),
    "none": node("g6.xlarge"),
}


@pytest.mark.parametrize(("fabric", "seen"), SEEN.items())
def test_a_fabric_is_recognised_by_what_its_nodes_show(fabric: str, seen: dict[str, Any]) -> None:
    cpu_only = {"metadata": {"labels": {}}, "status": {"allocatable": {"cpu": "8"}}}
    found = recognise([cpu_only, seen], "nvidia.com/gpu")
    assert found.fabric == fabric and found.fabric in FABRICS
    assert found.evidence
