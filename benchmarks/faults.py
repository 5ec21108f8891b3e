"""Is the cause of a failure named, whatever it is, and how soon?

    python -m benchmarks.faults            # all faults; prints a table, writes benchmarks/results/
    python -m benchmarks.faults --quick    # prints only

Every fault of `fault_catalogue.py` is a script, run for real on two ranks. They share one launcher, hence one fork server: each is an
attempt of one job, and the script is changed between attempts. Looked at is what a user has: the lines on standard error and
`failure.json`. `named after` is the time from just before the fault until the launcher's line was decided (its journal).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_catalogue import CATALOGUE, Fault
from benchmarks.machine import hardware, versions

RESULT = Path(__file__).parent / "results" / "faults_2cores_202611.md"
TIMEOUT_S = 300.0
LIMIT_S = 2.0

DRIVER = '''
"""The launcher over a cluster that puts the next script in place before each attempt."""
import json, sys
from launcher.cluster.local import LocalCluster
from launcher.controller import run
from launcher.gang import patience, policy
from launcher.spec import JobSpec, Program, ProgramKind, RestartBudget

policy._FIRST_DELAY_S = 0.0  # attempts that fail at once are the point here
patience.LIMITS = patience.Limits(quick_s=1.0, give_up_s=1.0)  # of ten seconds and five minutes
scripts = json.load(open("scripts.json"))


class Handle:
    def __init__(self, agent):
        self._agent = agent

    def __getattr__(self, name):
        return getattr(self._agent, name)

    def open_store(self, attempt):
        with open("train.py", "w") as file:
            file.write(scripts[attempt])
        self._agent.open_store(attempt)


class Cluster(LocalCluster):
    def node(self, node_id):
        return Handle(super().node(node_id))


budget = RestartBudget(max_restarts=len(scripts) - 1, crash_loop=0)
spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), nproc_per_node=2, restarts=budget, shutdown_timeout_s=1.0)
sys.exit(run(spec, Cluster()))
'''


@dataclass(frozen=True)
class Finding:
    """What the launcher said of one fault."""

    fault: Fault
    line: str
    """On the terminal; empty if there was none."""
    rank: int | None
    kind: str
    exit_code: int | None
    after_s: float | None

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is not as it should be."""
        fault, found = self.fault, []
        found += [f"{word!r} is not said" for word in fault.words if word not in self.line]
        if fault.rank is not None and self.rank != fault.rank:
            found.append(f"rank {self.rank} is named")
        if self.kind != fault.kind:
            found.append(f"kind {self.kind}")
        if self.exit_code != fault.exit_code:
            found.append(f"exit code {self.exit_code}")
        told = "hangs: " if fault.kind == "hung" else "failed: .*; log /"
        if not re.match(rf"launcher: rank \d+ on {re.escape(socket.gethostname())} {told}", self.line):
            found.append("the line has not rank, host, cause and log")
        return tuple(found)


def run(directory: Path, faults: Sequence[Fault] = CATALOGUE) -> list[Finding]:
    """Runs all in one job below `directory`."""
    (directory / "drive.py").write_text(DRIVER)
    (directory / "scripts.json").write_text(json.dumps([fault.script for fault in faults]))
    (directory / "train.py").write_text(
        "import torch, torch.distributed\n"
    )  # what the fork server shall have in memory
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "RAILHEAD_"))}
    job = subprocess.run(
        [sys.executable, "drive.py"],
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    run_dir = directory / "railhead-runs" / "latest"
    data = json.loads((run_dir / "failure.json").read_text())
    roots = {entry["attempt"]: entry["root"] for entry in data["attempts"]}
    told_at = _told_at(run_dir / "journal.jsonl")
    lines = [
        line for line in job.stderr.splitlines() if re.match(r"launcher: (rank|node) .* (failed|lost|hangs): ", line)
    ]
    told = dict(zip(sorted(told_at), lines, strict=True))
    return [
        _finding(fault, roots.get(idx, {}), told.get(idx, ""), told_at.get(idx), directory / f"fault_at.{idx}")
        for idx, fault in enumerate(faults)
    ]


def _told_at(journal: Path) -> dict[int, float]:
    """When the failure of each attempt was reported."""
    found: dict[int, float] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "ReportFailure":
            found.setdefault(entry["attempt"], entry["wall_s"])
    return found


def _finding(fault: Fault, root: dict[str, Any], line: str, told_s: float | None, note: Path) -> Finding:
    after_s = told_s - float(note.read_text()) if told_s is not None and note.exists() else None
    return Finding(fault, line, root.get("rank"), root.get("kind", ""), root.get("exit_code"), after_s)


def table(findings: Sequence[Finding]) -> str:
    rows = ["| fault | said on the terminal | exit code | named after (s) | right |", "|---|---|---|---|---|"]
    for found in findings:
        cause = re.sub(r"^launcher: |; log /.*$", "", found.line).replace("|", "\\|")
        cause = re.sub(r"/tmp/[^ ]*/|/[^ ]*/lib/python[^/]*/", "…/", cause)
        shown = cause if len(cause) <= 170 else f"{cause[:169]}…"
        after = "–" if found.after_s is None else f"{found.after_s:.2f}"
        verdict = "yes" if not found.wrong else f"no: {'; '.join(found.wrong)}"
        rows.append(f"| {found.fault.name} | {shown} | {found.exit_code} | {after} | {verdict} |")
    return "\n".join(rows)


def summary(findings: Sequence[Finding]) -> str:
    times = sorted(found.after_s for found in findings if found.after_s is not None)
    right = sum(not found.wrong for found in findings)
    in_time = sum(after_s <= LIMIT_S for after_s in times)
    return (
        f"{right} of {len(findings)} are named rightly. From just before the fault until its line: "
        f"median {statistics.median(times):.2f} s, longest {times[-1]:.2f} s; {in_time} of {len(times)} within {LIMIT_S:g} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="print only")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        findings = run(Path(directory))
    print(table(findings))
    print(f"\n{summary(findings)}")
    if not options.quick:
        RESULT.write_text(page(findings, load_before))


def page(findings: Sequence[Finding], load_before: float) -> str:
    return f"""# Faults and what is said of them

Question: of the faults of the catalogue (benchmarks/fault_catalogue.py), each run for real on two ranks, how many are named with the right
rank, cause, kind and exit code in the first line, and how soon?

- Hardware: {hardware()}; load average before and after: {load_before:.1f}, {os.getloadavg()[0]:.1f}
- Versions: {versions(("torch", "railhead"))}
- Command: `python -m benchmarks.faults`; one run, all faults as attempts of one job

{summary(findings)}

{table(findings)}

## What it says, and what it does not

- The words are those of one line; the traceback, or the stack of a crash, follows it on the terminal.
- `named after` holds what the interpreter needs to die: printing a traceback, atexit callbacks, and two ranks on two cores. The loss of a
  peer that nothing explains is told a second late on purpose (docs/decisions/0031-root-causes.md), and a monitored barrier waits for its
  own second. The deadlocked import is run with limits of one second, for ten until it is named and 300 until it is given up, and its stacks
  are waited for.
- Kills for memory, lost nodes, agents, actors and heads need a cgroup or a Ray cluster; they are tests, in tests/launcher:
  test_memory_kills.py, test_ray_elastic.py, test_ray_faults.py, test_orphans.py.
"""


if __name__ == "__main__":
    main()
