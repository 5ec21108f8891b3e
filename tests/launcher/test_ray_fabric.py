"""The doctor and the preflight on the nodes of a real Ray cluster (two raylets of one machine)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cluster.ray.topology import CLIQUE, arguments, in_order, with_label
from launcher.fabric.order import Packing
from launcher.gang.world import NodeInfo, World, arrange
from tests.launcher.launched import wait_until
from tests.raycluster import RayUnderTest, ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(300)]

DEADLINE_S = 120.0
"""Only what is broken ever takes so long."""


def run(cluster: RayUnderTest, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`python -m launcher`, there."""
    env = {**ray_environment(), "RAY_ADDRESS": cluster.address, "XDG_STATE_HOME": str(cwd / "state")}
    command = [sys.executable, "-m", "launcher", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=DEADLINE_S)


def probes() -> list[str]:
    """Command lines of the measuring processes that live on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "launcher.fabric.serve" in line or "launcher.fabric.collective" in line:
            found.append(line)
    return found


def test_the_doctor_looks_at_every_node_of_a_cluster_and_measures_between_them(
    ray_cluster: RayUnderTest, tmp_path: Path
) -> None:
    """One command shows all nodes as they are, without reserving anything, and proves that collectives pass between them."""
    done = run(ray_cluster, tmp_path, "doctor", "--address", ray_cluster.address, "--probe", "--json")
    page = json.loads(done.stdout)
    # Ray takes nodes that other tests have killed for alive for a while; that they say nothing is a finding.
    found = [finding for finding in page["findings"] if finding["id"] != "facts-unreadable"]
    assert done.returncode == (0 if len(found) == len(page["findings"]) else 2), done.stderr
    assert len(page["nodes"]) == 2
    assert {node["node_ip"] for node in page["nodes"]} == {ray_cluster.address.split(":")[0]}
    assert {finding["severity"] for finding in found} <= {"INFO"}
    assert {finding["id"] for finding in found} <= {"same-machine-twice", "node-address-loopback"}
    wait_until(lambda: not probes(), "what measured has ended")


def test_a_cluster_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", "--address", "127.0.0.1:1"],
        cwd=tmp_path,
        env=ray_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 69
    assert "no Ray cluster at " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_begins_after_its_nodes_were_measured_and_keeps_what_they_are(
    ray_cluster: RayUnderTest, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        "import os; open(f\"rank{os.environ['RANK']}.txt\", 'w').write(str(os.environ.get('GLOO_SOCKET_IFNAME')))"
    )
    done = run(ray_cluster, tmp_path, "--nnodes=2", "--preflight", "train.py")
    assert done.returncode == 0, done.stderr
    assert "preflight: 2 nodes are measured" in done.stderr
    assert "all-reduce" in done.stderr
    assert "fabric: " not in done.stderr, "two raylets on one machine are a trial, and nobody is accused"
    folder = tmp_path / "railhead-runs" / "latest" / "fabric"
    assert len(list(folder.glob("*.json"))) == 2
    assert "ALL-REDUCES over gloo" in (folder / "preflight.txt").read_text()
    assert "2 nodes" in (folder / "page.txt").read_text()
    assert {path.name for path in tmp_path.glob("rank*.txt")} == {"rank0.txt", "rank1.txt"}
    wait_until(lambda: not probes(), "what measured has ended")


NAMES_A_NODE = """
import dataclasses, sys
from launcher import cli
from launcher.fabric import conduct
from launcher.fabric.findings import Finding, Severity

def measured(peers, names, wishes, real=conduct.conduct):
    report = real(peers, names, wishes)
    if len(names) == 1:
        return report
    broken = Finding("probe-lost", Severity.ERROR, (names[1],), "its NIC fell off", "it would hang the job", "call")
    return dataclasses.replace(report, findings=(*report.findings, broken))

conduct.conduct = measured
sys.exit(cli.main())
"""


def test_a_node_that_the_preflight_finds_broken_is_left_out_and_remembered(
    ray_cluster: RayUnderTest, tmp_path: Path
) -> None:
    """Real nodes and agents; only the verdict on one of them is made up, for both are this machine."""
    (tmp_path / "train.py").write_text("import os; open('world', 'a').write(os.environ['WORLD_SIZE'])")
    memory = tmp_path / "excluded.json"
    env = {**ray_environment(), "RAY_ADDRESS": ray_cluster.address}
    job = ["--nnodes=1:2", "--preflight", f"--exclude-file={memory}", "train.py"]
    command = [sys.executable, "-c", NAMES_A_NODE, *job]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "left out after the preflight: " in done.stderr
    assert "its NIC fell off" in done.stderr
    assert (tmp_path / "world").read_text() == "1"
    assert "its NIC fell off" in memory.read_text(), "the next job knows of it"


RACK = "topology.kubernetes.io/rack"


def test_a_gang_that_fits_into_one_rack_is_placed_there(ray_cluster: RayUnderTest, tmp_path: Path) -> None:
    """Of three nodes that have what is asked for, two share a rack: Ray alone would take any two."""
    raylets = [ray_cluster.add_node("racked", rack) for rack in ("left", "right", "right")]
    try:
        (tmp_path / "train.py").write_text("")
        done = run(ray_cluster, tmp_path, "--nnodes=2", "--resources=racked=1", "train.py")
        assert done.returncode == 0, done.stderr
        journal = tmp_path / "railhead-runs" / "latest" / "journal.jsonl"
        (ready,) = [json.loads(line) for line in journal.read_text().splitlines() if '"NodesReady"' in line]
        assert [dict(node["labels"]) for node in ready["nodes"]] == [{RACK: "right"}] * 2
    finally:
        for pid in raylets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_ranks_go_rack_by_rack_and_keep_that_order() -> None:
    """A ring over racks that alternate crosses between them at every step."""
    nodes = [
        NodeInfo(f"n{idx}", f"n{idx}", "", 8, ((RACK, rack),) if rack else ())
        for idx, rack in enumerate(["a", "b", "a", "", "b", "a"])
    ]
    ordered = in_order(nodes)
    assert [node.node_id for node in ordered] == ["n0", "n2", "n5", "n1", "n4", "n3"]
    assert in_order(nodes) == ordered
    # After a loss survivors keep their places, whatever the labels of those that come instead.
    left = [node for node in ordered if node.node_id not in ("n1", "n2")]
    assert arrange(in_order(nodes[:1] + nodes[3:]), World(ordered)).nodes == tuple(left)
    plain = [NodeInfo(f"n{idx}", f"n{idx}", "", 8) for idx in range(3)]
    assert in_order(plain) == tuple(plain), "without labels the order by name stays"


def test_the_drivers_word_on_its_nvlink_domain_counts_where_no_label_names_one() -> None:
    """Bare Ray on GB200 racks has no labels; the gang would alternate between two NVLink domains."""
    nodes = [
        with_label(NodeInfo(f"n{idx}", f"n{idx}", "", 4), {"r3": {CLIQUE: "a.1"}}, f"r{idx}", domain)
        for idx, domain in enumerate(["a.1", "b.1", "a.1", "wrong", None])
    ]
    assert [dict(node.labels).get(CLIQUE) for node in nodes] == ["a.1", "b.1", "a.1", "a.1", None]
    assert [node.node_id for node in in_order(nodes)] == ["n0", "n2", "n3", "n1", "n4"]


def test_a_gang_that_no_rack_holds_is_placed_as_before() -> None:
    assert arguments(None) == {"strategy": "STRICT_SPREAD"}
    assert arguments(Packing(None, "no label")) == {"strategy": "STRICT_SPREAD"}
    assert arguments(Packing(RACK, "fits")) == {
        "topology_strategy": {"ray.io/node-id": "STRICT_SPREAD", RACK: "STRICT_PACK"}
    }
