"""A rank whose handler cannot run is not waited for; one whose handler does run has its whole grace."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.gang.observations import RankStack
from launcher.node.deafness import Hearing, Wait, catches, wait_of
from tests.launcher.launched import launch, wait_until

IN_A_COLLECTIVE = ("all_reduce (torch/distributed/distributed_c10d.py:3021)", "<module> (train.py:9)")
# A mutex that is locked twice: like a collective, a wait in C that no signal ends.
LOCKED = (
    "import ctypes; mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock\nlock(mutex)\n"
)
HANDLES = "import os, signal, time\ndef save(*_):\n    {}\nsignal.signal(signal.SIGTERM, save)\n"
PROGRAMS = {
    "its handler cannot run": HANDLES.format("os._exit(0)") + LOCKED + "print(flush=True); lock(mutex)",
    "its handler waits": LOCKED + HANDLES.format("lock(mutex)") + "print(flush=True); time.sleep(600)",
    "its handler sleeps": HANDLES.format("time.sleep(600)") + "print(flush=True); time.sleep(600)",
    "it has no handler": "import time; print(flush=True); time.sleep(600)",
}


@contextmanager
def waiting(program: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_until_it_waits(process.pid)
            yield process
        finally:
            process.kill()


def wait_until_it_waits(pid: int) -> None:
    """Seen often in a row in the same wait."""
    seen: list[Wait | None] = [None] * 10
    while None in seen or len(set(seen)) > 1:
        wait_until(lambda: wait_of(pid) is not None, "the process to wait")
        seen = [*seen[1:], wait_of(pid)]


@pytest.mark.parametrize("how", PROGRAMS)
def test_only_a_rank_that_nothing_has_happened_to_is_deaf(how: str) -> None:
    """Whoever runs its handler, however still it stands there, may be saving."""
    with waiting(PROGRAMS[how]) as process:
        hearing = Hearing({3: process.pid}, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        if how == "it has no handler":
            process.wait()
        else:
            wait_until(lambda: not _is_pending(process.pid), "the signal to be delivered")
            wait_until_it_waits(process.pid)
        is_deaf = how == "its handler cannot run"
        assert hearing.suspects() == ({3: process.pid} if is_deaf else {})
        assert hearing.deaf([RankStack(3, IN_A_COLLECTIVE)]) == ([3] if is_deaf else [])
        assert hearing.deaf([RankStack(3, ("read (train.py:3)",)), RankStack(4, IN_A_COLLECTIVE)]) == []


def _is_pending(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


def test_a_process_that_is_gone_is_nowhere() -> None:
    with subprocess.Popen(["/bin/true"]) as process:
        process.wait()
    assert wait_of(process.pid) is None
    assert not catches(process.pid, signal.SIGTERM)


STUCK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from pathlib import Path
dist.init_process_group("gloo")
rank = dist.get_rank()
one, other = dist.new_group([1, 2]), dist.new_group([1, 2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
Path(f"new.{rank}").write_text(str(os.getpid()))
os.rename(f"new.{rank}", f"pid.{rank}")
if rank:
    dist.all_reduce(torch.ones(4), group=one if rank == 1 else other)
def wakes(pid):
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return [line for line in status.splitlines() if line.startswith(("State", "voluntary"))]
for peer in (1, 2):
    while not os.path.exists(f"pid.{peer}"): time.sleep(0.02)
    pid, before = Path(f"pid.{peer}").read_text(), []
    while (now := wakes(pid)) != before or "S" not in now[0]:
        before = now
        time.sleep(0.5)
raise ValueError("rank 0 fails")
"""


def test_ranks_that_hang_in_a_collective_with_a_dead_rank_do_not_take_the_grace(tmp_path: Path) -> None:
    """Their handlers of SIGTERM never run there: the restart would wait for SIGKILL after the whole grace, here ten minutes."""
    with launch(tmp_path, STUCK, "--nproc-per-node", "3", "--shutdown-timeout", "600") as launched:
        code, _, err = launched.finish()
        ends = {entry.fields["rank"]: entry.fields["status"]["signum"] for entry in launched.journal("RankExited")}
    assert code == 1, err
    assert "ranks 1, 2 wait in a collective that a dead rank has left" in err
    assert ends == {0: None, 1: signal.SIGKILL, 2: signal.SIGKILL}
