"""What processes use, read from /proc: CPU time to the nanosecond, and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Of one process, or of several together."""

    num_processes: int
    cpu_percent: float
    """Of one core."""
    rss_mib: float
    pss_mib: float
    """Memory that is shared counts in parts."""


def watch(groups: Mapping[str, Sequence[int]], seconds: float) -> dict[str, Usage]:
    """What each group of processes uses meanwhile; all must live."""
    before, began = {pid: _cpu_s(pid) for pids in groups.values() for pid in pids}, time.monotonic()
    time.sleep(seconds)
    lasted = time.monotonic() - began
    used = {pid: _cpu_s(pid) - cpu_s for pid, cpu_s in before.items()}
    return {name: _account(pids, used, lasted) for name, pids in groups.items()}


def _account(pids: Sequence[int], used: dict[int, float], lasted: float) -> Usage:
    rss, pss = 0, 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
        rss, pss = rss + kib["Rss"], pss + kib["Pss"]
    return Usage(len(pids), 100 * sum(used[pid] for pid in pids) / lasted, rss / 1024, pss / 1024)


def _cpu_s(pid: int) -> float:
    """Of all its threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
