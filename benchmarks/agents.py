"""What does the launcher use on each node of a Ray cluster, while ranks train?

    python -m benchmarks.agents               # writes benchmarks/results/, about two minutes
    python -m benchmarks.agents --quick       # one run, prints only

A cluster of a head and three nodes on this machine; a job of two nodes with a spare, two ranks on each, which train slowly. When every
node's fork server is ready for the next attempt, CPU time and memory of everything that is not a rank are read from /proc for a while: the
launcher's own process, and on each node the actor in a worker process of Ray, the agent's process below it, its fork server, the guardians,
and on the node of rank 0 the store's host. Beside it what Ray itself uses on such a node.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.overhead import IDLE_SCRIPT
from benchmarks.processes import Usage, watch
from benchmarks.raynodes import RayNode, RayNodes, environment, ray_nodes
from launcher.node.guardian import descendants_of, parents

RESULT = Path(__file__).parent / "results" / "agents_2cores_202611.md"
NUM_RANKS = 4
PATIENCE_S = 120.0
SETTLE_S = 10.0
"""Ranks have told what they have imported, and the second fork server has begun."""
PER_NODE = ("actor", "agent", "fork server", "guardians")


def told(pid: int, what: str) -> str:
    """What /proc says of the process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parts_of(node: RayNode, ranks: set[int]) -> dict[str, list[int]]:
    """The processes of a node, by what they are to us. Without the ranks and what these have started."""
    hidden = ranks.union(*(descendants_of(pid) for pid in ranks))
    everyone = [pid for pid in descendants_of(node.keeper.pid) if pid not in hidden]
    actors = [pid for pid in everyone if "ray::AgentActor" in told(pid, "cmdline")]
    ours = {pid for actor in actors for pid in descendants_of(actor)} - hidden
    agents = [pid for pid in ours if "launcher.node.agent_host" in told(pid, "cmdline")]
    guardians = [pid for pid in ours if told(pid, "comm") == "railhead-guard"]
    above = parents()
    return {
        "actor": actors,
        "agent": agents,
        "fork server": [pid for pid in ours if told(pid, "comm") == "railhead-forks"],
        "guardians": guardians,
        "store": [pid for pid in ours if above.get(pid) in guardians],
        "ray": [pid for pid in everyone if pid not in ours and pid not in actors],
    }


def wait_until(claim: Callable[[], bool], what: str, printed: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{what}: {printed.read_text()[-3000:]}")
        time.sleep(0.1)


def measure(cluster: RayNodes, seconds: float) -> dict[str, Usage]:
    """One job. By name of the row."""
    with tempfile.TemporaryDirectory(prefix="rhagents-") as name:
        directory, printed = Path(name), Path(name, "printed")
        (directory / "train.py").write_text(IDLE_SCRIPT)
        flags = ("--nnodes=2", "--spare-nodes=1", f"--nproc-per-node={NUM_RANKS // 2}", "--max-restarts=3")
        command = cluster.inside(
            0, sys.executable, "-m", "launcher", f"--address={cluster.address}", *flags, "train.py"
        )
        with open(printed, "w") as output:
            job = subprocess.Popen(command, cwd=directory, env=environment(), stdout=output, stderr=output)
        try:
            ready = [directory / f"ready.{rank}" for rank in range(NUM_RANKS)]
            wait_until(lambda: all(path.exists() for path in ready), "nobody trains", printed)
            wait_until(lambda: "is ready" in printed.read_text(), "there is no spare", printed)
            ranks = {int(path.read_text()) for path in ready}
            time.sleep(SETTLE_S)
            nodes: list[dict[str, list[int]]] = []

            def is_settled() -> bool:
                nodes[:] = [parts_of(node, ranks) for node in cluster.running()]
                has_one_store = sum(bool(node["store"]) for node in nodes) == 1
                has_one_spare = sum(not node["guardians"] for node in nodes) == 1
                return has_one_store and has_one_spare and all(len(node["fork server"]) == 1 for node in nodes)

            wait_until(is_settled, "no fork server takes the place of the first", printed)
            return watch(groups_of(job.pid, nodes), seconds)
        finally:
            job.send_signal(signal.SIGTERM)
            job.wait(60)


def groups_of(launcher: int, nodes: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Sequence[int]]:
    """The rows: the node of rank 0 is the one with the store, the spare the one without guardians."""
    (first,) = [node for node in nodes if node["store"]]
    (spare,) = [node for node in nodes if not node["guardians"]]
    (second,) = [node for node in nodes if node is not first and node is not spare]
    groups: dict[str, Sequence[int]] = {"the launcher": [launcher]}
    groups |= {f"a node: its {part}": second[part] for part in PER_NODE}
    groups["a node, all of that"] = [pid for part in PER_NODE for pid in second[part]]
    groups["the store's host, on the node of rank 0"] = first["store"]
    groups["a spare, all of it"] = [pid for part in PER_NODE for pid in spare[part]]
    groups["Ray's own on a node"] = second["ray"]
    return groups


def page(runs: Sequence[Mapping[str, Usage]], seconds: float, command: str, load: str) -> str:
    """The report in Markdown."""
    rows = []
    for name in runs[0]:
        cpu, rss, pss = ([getattr(run[name], what) for run in runs] for what in ("cpu_percent", "rss_mib", "pss_mib"))
        spread = f"{statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
        numbers = f"{statistics.median(rss):.0f} | {statistics.median(pss):.0f} ({min(pss):.0f} to {max(pss):.0f})"
        rows.append(f"| {name} | {runs[0][name].num_processes} | {spread} | {numbers} |")
    return (
        "# What the launcher uses on each node of a Ray cluster\n\n"
        "Question: CPU and memory of the launcher and of its agents, while ranks train.\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'ray', 'railhead'))}\n"
        f"- Command: `{command}`; {len(runs)} runs of {seconds:g} s, medians, and least to most. Two nodes of {NUM_RANKS // 2} ranks and a "
        "spare, all raylets on this machine.\n"
        "- PSS: memory that is shared counts in parts; what all Python processes of this machine share (also those of other nodes, which "
        "would be elsewhere) makes it smaller than on a machine of its own, RSS is the upper bound.\n\n"
        "| what | processes | CPU (% of a core) | RSS (MiB) | PSS (MiB) |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        "The actor is a worker process of Ray; the fork server holds torch and what the ranks have imported for the next attempt, and "
        "shares most of it with them. Ray's own: raylet, its agents, and the workers that it keeps ready.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run; the result is printed, not written")
    options = parser.parse_args()
    seconds, num_runs = (4.0, 1) if options.quick else (12.0, 3)
    before = os.getloadavg()[0]
    with ray_nodes(3) as cluster:
        runs = [measure(cluster, seconds) for _ in range(num_runs)]
    text = page(runs, seconds, "python -m benchmarks.agents", f"{before:.1f}, {os.getloadavg()[0]:.1f}")
    print(text)
    if not options.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
