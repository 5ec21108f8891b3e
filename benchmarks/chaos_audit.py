"""What a run of `chaos_train` must have done, held against what it wrote down; and what it must not have left behind."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_train import batch_of, states
from benchmarks.raynodes import RayNodes, environment

Line = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """What the ranks of one attempt wrote down, by rank. A rank that died early may have written nothing."""

    number: int
    lines: dict[int, list[Line]]

    @property
    def size(self) -> int:
        """Ranks of its world; 0 where none has begun."""
        return next((int(line["size"]) for lines in self.lines.values() for line in lines), 0)

    def steps_done(self) -> int:
        """One more than the last step that a rank has done; 0: none."""
        done = [line["step"] + 1 for lines in self.lines.values() for line in lines if line["what"] == "done"]
        return max(done, default=0)

    def num_done(self) -> int:
        """Steps that every rank of it has done."""
        if len(self.lines) < self.size or not self.lines:
            return 0
        return min(sum(line["what"] == "done" for line in lines) for lines in self.lines.values())


def read(directory: Path) -> list[Attempt]:
    """All attempts, in order. The last line of a rank that was killed may be torn."""
    found: dict[int, dict[int, list[Line]]] = {}
    for file in sorted((directory / "log").iterdir()):
        attempt, _, rank = file.name.partition(".")
        lines = []
        for text in file.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        found.setdefault(int(attempt), {})[int(rank)] = lines
    return [Attempt(number, lines) for number, lines in sorted(found.items())]


def faults_of(attempts: list[Attempt]) -> list[str]:
    """What is wrong with the training, in sentences; empty if nothing is."""
    expected = states(max((attempt.steps_done() for attempt in attempts), default=0))
    faults: list[str] = []
    saved = 0
    for attempt in attempts:
        for rank, lines in attempt.lines.items():
            for line in lines:
                faults += _faults_of_line(attempt.number, rank, line, expected, saved)
        saves = [line["step"] for lines in attempt.lines.values() for line in lines if line["what"] == "saved"]
        saved = max([saved, *saves])
    return faults + _faults_of_samples(attempts)


def _faults_of_line(attempt: int, rank: int, line: Line, expected: list[int], saved: int) -> list[str]:
    where = f"attempt {attempt}, rank {rank}, step {line['step']}"
    match line["what"]:
        case "wrong":
            return [f"{where}: ranks have begun from different states"]
        case "begin" if line["step"] < saved:
            return [f"{where}: begins before what was saved, {saved}"]
        case "begin" if line["step"] < len(expected) and line["state"] != expected[line["step"]]:
            return [f"{where}: begins with a wrong state"]
        case "done" if line["state"] != expected[line["step"] + 1]:
            return [f"{where}: ends with a wrong state"]
    return []


def _faults_of_samples(attempts: list[Attempt]) -> list[str]:
    """For each step, what its last attempt took must be its batch, each sample once."""
    last: dict[int, Attempt] = {}
    for attempt in attempts:
        for lines in attempt.lines.values():
            for line in lines:
                if line["what"] == "done":
                    last[line["step"]] = attempt
    faults = [f"step {step} was never done" for step in range(max(last, default=-1) + 1) if step not in last]
    taken: dict[tuple[int, int], list[int]] = {}
    for attempt in attempts:
        for lines in attempt.lines.values():
            for line in lines:
                if line["what"] == "take":
                    taken.setdefault((attempt.number, line["step"]), []).extend(line["samples"])
    for step, attempt in sorted(last.items()):
        if sorted(taken[attempt.number, step]) != sorted(batch_of(step)):
            faults.append(f"step {step}, last done in attempt {attempt.number}: its samples are not its batch")
    return faults


def processes_left(token: str) -> list[str]:
    """Processes of the launcher or of ranks that carry this token in their environment: agents, guardians, fork servers, stores, ranks and
    all that these have started. (Ray's own carry it as well: they stay.)"""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environ = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if token.encode() not in environ or not command:
            continue
        is_ranks = b"\0RAILHEAD_ATTEMPT=" in environ
        if is_ranks or "launcher/node/" in command or "launcher.node" in command or "ray::AgentActor" in command:
            found.append(f"{entry.name}: {command[:120]}")
    return found


def files_left(directory: Path) -> list[str]:
    """Sockets, pipes and temporary files below a directory in which nothing must be left."""
    found = []
    for root, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(root, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            found.append(f"{path}{' (a socket)' if kind == stat.S_IFSOCK else ''}")
    return found


_RAY_PATIENCE_S = 90.0
_HELD = """
import logging, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
from ray.util import placement_group_table
from ray._private.state import actors as actor_table
from ray._private.state import state
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
alive = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"] and node["NodeID"] in sys.argv[2:]}
free = state.available_resources_per_node()
held = [node_id for node_id, cpus in alive.items() if node_id in free and free[node_id].get("CPU", 0) < cpus]
actors = [actor for actor in actor_table().values() if actor["State"] != "DEAD"] if held else []
if groups or held:
    print(groups, [(node_id, free[node_id], alive[node_id]) for node_id in held], actors)
"""


def held_in_ray(cluster: RayNodes) -> str:
    """What a job still holds in the cluster; empty: nothing."""
    # Of a node behind a cut, Ray believes for a long time that it holds what it held.
    alive = [node.node_id for node in cluster.running()]
    command = cluster.inside(0, sys.executable, "-c", _HELD, cluster.address, *alive)
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_RAY_PATIENCE_S)
    return told.stdout.strip() if told.returncode == 0 else f"Ray does not say: {told.stderr[-500:]}"
