"""A kill for memory is told from a plain SIGKILL, by the kernel's own books: its log, its cgroup's counter, or the machine's."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.gang.events import ExceptionRecord, ExitStatus
from launcher.node.failure import Traces, what_was_left
from launcher.node.memory_kills import MemoryKills
from tests.launcher.launched import launch


def machine(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


V2 = {
    "proc/self/cgroup": "0::/job\n",
    "sys/fs/cgroup/job/memory.events": "low 0\noom_kill 2\n",
    "sys/fs/cgroup/job/memory.max": f"{2 << 30}\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/job\n3:cpu:/\n",
    "sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 2\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 << 30}\n",
}
IN_CONTAINER = {
    "proc/self/cgroup": "0::/kubepods/pod7/c1\n",
    "sys/fs/cgroup/memory.events": "oom_kill 2\n",
    "sys/fs/cgroup/memory.max": f"{2 << 30}\n",
}


@pytest.mark.parametrize("files", [V2, V1, IN_CONTAINER], ids=["v2", "v1", "container"])
def test_a_kill_that_the_cgroup_counts_is_told_with_the_limit_and_only_once(
    tmp_path: Path, files: dict[str, str]
) -> None:
    kills = MemoryKills(machine(tmp_path, files))
    assert kills.explain([7]) == ""
    assert "the kernel counts no kill for memory" in kills.what_else()
    counter = next(name for name, text in files.items() if "oom_kill" in text)
    (tmp_path / counter).write_text(files[counter].replace("oom_kill 2", "oom_kill 3"))
    assert kills.explain([7]).endswith("the kernel killed a process in it (limit 2 GiB)")
    assert kills.explain([8]) == "", "one kill, one rank"


def test_the_kernels_log_names_the_process(tmp_path: Path) -> None:
    kills = MemoryKills(machine(tmp_path, {**V2, "dev/kmsg": ""}))
    log = "6,1,2,-;Out of memory: Killed process 71 (python) total-vm:9kB, anon-rss:1kB\n"
    (tmp_path / "dev/kmsg").write_text(log)
    assert kills.explain([7]) == ""
    assert kills.explain([71]).startswith("the machine ran out of memory")


def test_where_no_cgroup_counts_the_machine_does(tmp_path: Path) -> None:
    kills = MemoryKills(machine(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/vmstat": "oom_kill 0\n"}))
    (tmp_path / "proc/vmstat").write_text("oom_kill 1\n")
    assert "probably this one" in kills.explain([7])


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path: Path) -> None:
    kills = MemoryKills(str(tmp_path))
    assert (kills.explain([7]), kills.what_else()) == ("", "")


def test_a_data_loaders_worker_that_was_killed_for_memory_is_the_ranks_cause(tmp_path: Path) -> None:
    kills = MemoryKills(machine(tmp_path, V2))
    (tmp_path / "error.json").write_text(
        '{"message": {"message": "RuntimeError: DataLoader worker (pid 71) is killed by signal: Killed. ", "extraInfo": {}}}'
    )
    traces = Traces(str(tmp_path / "error.json"), "", "", "")
    assert not what_was_left(ExitStatus(code=1), traces, 70, kills).out_of_memory
    (tmp_path / "sys/fs/cgroup/job/memory.events").write_text("oom_kill 3\n")
    left = what_was_left(ExitStatus(code=1), traces, 70, kills)
    assert isinstance(left.exception, ExceptionRecord)
    assert left.out_of_memory


GREEDY = """
import os
if os.environ["RANK"] == "1":
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1 << 20)) * 8)
import time
time.sleep(600)
"""


def test_a_rank_that_outgrows_its_cgroup_is_told_so(tmp_path: Path) -> None:
    """The real kernel, the real limit."""
    group = _make_cgroup(f"railhead-test-{os.getpid()}", 600 << 20)
    if group is None:
        pytest.skip("no memory cgroup can be made here (needs root and a writable /sys/fs/cgroup)")
    try:
        script = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nimport sys, runpy\n"
        (tmp_path / "inside.py").write_text(
            script + "sys.argv = sys.argv[1:]\nrunpy.run_module('launcher', run_name='__main__', alter_sys=True)\n"
        )
        with launch(tmp_path, GREEDY, "--nproc-per-node", "2", program=["inside.py", "launcher"]) as launched:
            code, _, err = launched.finish()
        assert code == 128 + signal.SIGKILL, err
        line = next(line for line in err.splitlines() if " failed: " in line)
        assert "rank 1" in line
        assert "ran out of memory" in line
        assert "(limit 0.586 GiB)" in line
    finally:
        subprocess.run(["rmdir", str(group)], check=False)


def _make_cgroup(name: str, limit_bytes: int) -> Path | None:
    for base, limit, count in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
    ):
        group = base / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(limit_bytes))
            if "oom_kill " in (group / count).read_text():
                return group
        except OSError:
            pass
        group.rmdir()
    return None
