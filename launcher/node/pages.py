"""The agent's side of the ranks' progress pages: makes them, reads them, and looks at the processes from outside."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace

from launcher.gang.observations import RankSample
from launcher.node import progress
from launcher.node.progress import W_DONE_STEPS, W_PAUSED_SINCE_NS, W_PID, W_TOTAL_STEPS

_SEEN = (progress.H_STEPS, progress.H_STEP_AT_S, progress.H_STEP_S, progress.H_SAMPLES)
_TOLD = (progress.H_TOLD_STEPS, progress.H_TOLD_AT_S, progress.H_TOLD_STEP_S, progress.H_TOLD_SAMPLES)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_QUIET_S = 4.0
"""From then on a rank's descendants are counted in, too: who trains is not looked at so closely."""


class RankPage:
    """One rank's page. Making it never fails: a rank without one is a rank of which only the process is seen."""

    def __init__(self, rank: int, directory: str) -> None:
        self._rank = rank
        self._began_s = time.monotonic()
        self._fd = -1
        self._page: progress.Page | None = None
        link = progress.page_link(directory)
        try:
            self._fd = progress.create()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(f"/proc/{os.getpid()}/fd/{self._fd}", link)
            self._page = progress.Page(self._fd, writable=False)
        except (OSError, ValueError):
            self.close()

    def sample(self, pid: int) -> RankSample:
        """How the rank is now. `pid`: its main process."""
        state, cpu_s, child_cpu_s = _stat(pid)
        io_bytes = _io_bytes(pid)
        now_ns = time.monotonic_ns()
        known = self._read(now_ns)
        sample = RankSample(
            self._rank,
            time.monotonic() - self._began_s,
            state=state,
            cpu_s=cpu_s,
            io_bytes=io_bytes,
            **known,  # type: ignore[arg-type]
        )
        if sample.quiet_s <= _QUIET_S:
            return sample
        child_io_bytes = 0
        for descendant in _descendants(pid):
            _, own_s, ended_s = _stat(descendant)
            child_cpu_s += own_s + ended_s
            child_io_bytes += _io_bytes(descendant)
        return replace(sample, child_cpu_s=child_cpu_s, child_io_bytes=child_io_bytes)

    def steps(self) -> int | None:
        """Optimizer steps so far, also of a rank that is dead."""
        if self._page is None:
            return None
        hot = self._page.hot
        return int(hot[progress.H_TOLD_STEPS] or hot[progress.H_STEPS]) or None

    def close(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, now_ns: int) -> dict[str, object]:
        return read_page(self._page, now_ns) if self._page is not None else {}


def read_page(page: progress.Page, now_ns: int) -> dict[str, object]:
    """Fields of a RankSample that a page knows; empty before the rank's runner has begun. `now_ns`: monotonic."""
    words = page.words
    if not words[W_PID]:
        return {}
    now_s = now_ns / 1e9
    hot = page.read_hot()
    steps, step_at_s, step_s, samples = (hot[idx] for idx in (_TOLD if hot[progress.H_TOLD_STEPS] else _SEEN))
    own_s, wait_began_s, wait_ended_s, waited_s, batches, batch_at_s = hot[progress.H_OWN_S : progress.H_BATCH_AT_S + 1]

    def age_s(at_s: float) -> float | None:
        return max(0.0, now_s - at_s) if at_s else None

    known: dict[str, object] = {
        "batches": int(batches),
        "batch_age_s": age_s(max(wait_ended_s, batch_at_s)),
        "waiting_s": age_s(wait_began_s) if wait_began_s > wait_ended_s else None,
        "paused_s": age_s(words[W_PAUSED_SINCE_NS] / 1e9),
        "total_steps": words[W_TOTAL_STEPS] or None,
        "done_steps": words[W_DONE_STEPS],
    }
    if steps:
        known |= {
            "steps": int(steps),
            "step_age_s": age_s(step_at_s),
            "step_s": step_s or None,
            "waited_s": waited_s,
            "samples": int(samples) or None,
            "own_s": own_s,
        }
    return known


def is_stopped(pid: int) -> bool:
    """Whether it hears no signal but SIGKILL and SIGCONT."""
    return _stat(pid)[0] == "T"


def _stat(pid: int) -> tuple[str, float, float]:
    """State, CPU seconds, and those of children that have ended; ("?", 0, 0) if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name in parentheses and may hold anything.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return "?", 0.0, 0.0
    own, ended = (sum(int(field) for field in fields[low : low + 2]) / _TICKS_PER_S for low in (11, 13))
    return fields[0].decode(), own, ended


def _io_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            return sum(int(line.split()[1]) for line in file.read().splitlines()[:2])
    except (OSError, ValueError, IndexError):
        return 0


def _descendants(pid: int) -> list[int]:
    """Children of all its threads, and theirs."""
    found = [pid]
    for parent in found:  # grows while it is walked
        with contextlib.suppress(OSError, ValueError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children", "rb") as file:
                    found.extend(int(child) for child in file.read().split())
    return found[1:]
