"""Is the memory of the GPUs free again, now that the ranks are dead? The next attempt must not find it taken.

A dead process's GPU memory is freed by the driver, some time after the process is gone from the process table; a rank that starts sooner
runs out of memory for no reason that anybody can see. So a node with GPUs says that an attempt is over only when NVML has said so, or
when it has been asked for long enough: then the launcher says what is held, and goes on. The decision is pure; NVML may hang, so it is
asked in a thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 5.0
"""Less than the margin after which a node that has not ended its attempt is given up (gang/machine.py)."""
_ASK_AGAIN_S = 0.05
_SLACK_BYTES = 64 << 20
"""The driver's own use of a GPU moves by so much."""


@dataclass(frozen=True)
class GpuMemory:
    """What NVML says of one GPU."""

    index: int
    used_bytes: int
    pids: frozenset[int]
    """Processes that compute on it, as far as they are shown: in a container it may be none, or numbers of the host."""


def still_held(before: Sequence[GpuMemory], now: Sequence[GpuMemory], ours: Collection[int]) -> tuple[str, ...]:
    """What is not free yet, each in words; empty: all is. before: when none of our ranks ran.

    >>> idle = GpuMemory(0, 10 << 20, frozenset())
    >>> still_held([idle], [GpuMemory(0, 9 << 30, frozenset({71}))], {71})
    ('GPU 0: process 71 is dead and still holds memory (9 GiB used)',)
    >>> still_held([idle], [GpuMemory(0, 9 << 30, frozenset())], {71})
    ('GPU 0: 9 GiB are used, 0.00977 GiB before, and no process is shown that uses them',)
    >>> still_held([idle], [GpuMemory(0, 9 << 30, frozenset({5}))], {71})  # somebody else's
    ()
    """
    known = {gpu.index: gpu for gpu in before}
    found = []
    for gpu in now:
        held_by = sorted(gpu.pids & set(ours))
        if held_by:
            used = f"{gpu.used_bytes / 2**30:.3g} GiB used"
            found.append(f"GPU {gpu.index}: process {held_by[0]} is dead and still holds memory ({used})")
        elif not gpu.pids and gpu.index in known and gpu.used_bytes > known[gpu.index].used_bytes + _SLACK_BYTES:
            used, was = (f"{size / 2**30:.3g} GiB" for size in (gpu.used_bytes, known[gpu.index].used_bytes))
            found.append(f"GPU {gpu.index}: {used} are used, {was} before, and no process is shown that uses them")
    return tuple(found)


def read(nvml: Any = None) -> tuple[GpuMemory, ...]:
    """All GPUs that answer; none where there is no driver. `nvml`: the module to ask (a test passes another). May block."""
    if nvml is None:
        if not os.path.exists("/dev/nvidiactl"):
            return ()
        try:
            import pynvml
        except ImportError:
            return ()
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except Exception:  # NVML has an exception for each of its errors
        return ()
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                pids = frozenset(int(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
            except Exception:  # a GPU that has fallen off, or is partitioned: nothing can be proven of it
                continue
            found.append(GpuMemory(index, used, pids))
        return tuple(found)
    except Exception:
        return ()
    finally:
        nvml.nvmlShutdown()


class GpuProof:
    """Asks NVML for an agent. Begins at once with how things are before any rank runs; costs nothing on a node without GPUs."""

    def __init__(self, ask: Callable[[], tuple[GpuMemory, ...]] = read, patience_s: float = PATIENCE_S) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._before: tuple[GpuMemory, ...] = ()
        self._first = threading.Thread(target=self._look, name="gpu-memory", daemon=True)
        self._first.start()

    def _look(self) -> None:
        self._before = self._ask()

    @property
    def is_needed(self) -> bool:
        """There are GPUs, or it is not known yet."""
        return self._first.is_alive() or bool(self._before)

    def wait_until_free(self, ours: Collection[int], then: Callable[[str], None]) -> None:
        """Returns at once. Calls `then` once, from another thread: with nothing when the memory of dead processes `ours` is free, with
        what is held when that lasts too long."""
        answered = threading.Lock()

        def answer(words: str) -> None:
            if answered.acquire(blocking=False):
                then(words)

        worker = threading.Thread(target=self._watch, args=(ours, answer), name="gpu-memory", daemon=True)
        worker.start()

        def give_up() -> None:
            worker.join(self._patience_s + 1.0)
            answer("NVML does not answer")

        threading.Thread(target=give_up, name="gpu-memory-limit", daemon=True).start()

    def _watch(self, ours: Collection[int], answer: Callable[[str], None]) -> None:
        deadline_s = time.monotonic() + self._patience_s
        self._first.join(self._patience_s)
        while True:
            held = still_held(self._before, self._ask(), ours)
            if not held or time.monotonic() >= deadline_s:
                answer("; ".join(held))
                return
            time.sleep(_ASK_AGAIN_S)
