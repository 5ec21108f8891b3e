"""Whatever is killed, by whatever signal, nothing that a rank has started outlives it: not even what made a session of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launcher.launched import Process, children_of, launch, wait_until

TREE = """
import os, subprocess, sys, time
rank = os.environ["RANK"]
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]

def note(kind, pid):
    with open(f"pid.{rank}.{kind}.tmp", "w") as file:
        file.write(str(pid))
    os.rename(f"pid.{rank}.{kind}.tmp", f"pid.{rank}.{kind}")

note("child", subprocess.Popen(sleeper).pid)
note("session", subprocess.Popen(sleeper, start_new_session=True).pid)
if os.fork() == 0:                       # a daemon: own session, parent gone, environment cleared
    os.setsid()
    if os.fork() == 0:
        note("daemon", os.getpid())
        os.execve(sleeper[0], sleeper, {})
    os._exit(0)
os.wait()
note("rank", os.getpid())
ENDING
"""
WAIT = TREE.replace("ENDING", "time.sleep(600)")
KINDS = ("child", "session", "daemon", "rank")


def tree_of(directory: Path, num_ranks: int = 2) -> dict[tuple[int, str], Process]:
    return {
        (rank, kind): Process.of(int((directory / f"pid.{rank}.{kind}").read_text()))
        for rank in range(num_ranks)
        for kind in KINDS
    }


def files(num_ranks: int = 2) -> list[str]:
    return [f"pid.{rank}.{kind}" for rank in range(num_ranks) for kind in KINDS]


@pytest.mark.parametrize("victim", ["launcher", "guardian", "rank", "store", "daemon of a rank", "fork server"])
def test_sigkill_of_anyone_leaves_nobody_alive(tmp_path: Path, victim: str) -> None:
    with launch(tmp_path, WAIT, "--nproc-per-node", "2", "--shutdown-timeout", "1") as launched:
        launched.wait_for_file(*files())
        tree = tree_of(tmp_path)
        everyone = {*launched.seen, *tree.values()}
        rank = tree[1, "rank"].pid
        store = next(p.pid for p in everyone if "store_host" in _command(p.pid) and "guardian" not in _command(p.pid))
        target = {
            "launcher": launched.process.pid,
            "guardian": _parent(rank),
            "rank": rank,
            "store": store,
            "daemon of a rank": tree[1, "daemon"].pid,
            "fork server": next(p.pid for p in everyone if _name(p.pid) == "railhead-forks"),
        }[victim]
        os.kill(target, signal.SIGKILL)
        if victim in ("daemon of a rank", "fork server"):  # harms nobody: the rank may not even need it
            wait_until(lambda: not any(p.pid == target and p.is_alive() for p in everyone), "it to be dead")
            assert tree[1, "rank"].is_alive()
            assert launched.process.poll() is None
            launched.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not any(p.is_alive() for p in everyone), f"everybody to be gone: {everyone}")
        code, _, err = launched.finish()
        expected = {
            "launcher": -9,
            "guardian": 137,
            "rank": 137,
            "store": 75,
            "daemon of a rank": 143,
            "fork server": 143,
        }
        assert code == expected[victim], err


def test_launcher_and_guardian_killed_together_leave_no_rank_alive(tmp_path: Path) -> None:
    with launch(tmp_path, WAIT, "--nproc-per-node", "2") as launched:
        launched.wait_for_file(*files())
        tree = tree_of(tmp_path)
        guardians = [_parent(tree[rank, "rank"].pid) for rank in range(2)]
        os.kill(launched.process.pid, signal.SIGKILL)
        for pid in guardians:
            os.kill(pid, signal.SIGKILL)
        ranks = [tree[rank, "rank"] for rank in range(2)]
        wait_until(lambda: not any(p.is_alive() for p in ranks), "both ranks to be gone")


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit(3)", "os.kill(os.getpid(), 11)"])
def test_what_a_rank_leaves_behind_is_ended_with_it(tmp_path: Path, ending: str) -> None:
    with launch(tmp_path, TREE.replace("ENDING", ending), "--nproc-per-node", "2") as launched:
        code, _, err = launched.finish()
        assert code == {"sys.exit(0)": 0, "sys.exit(3)": 3}.get(ending, 139), err
        left = [(tmp_path / name).read_text() for name in files() if (tmp_path / name).exists()]
        assert len(left) >= len(KINDS)
        assert not [pid for pid in left if os.path.exists(f"/proc/{pid}")]


def test_nothing_is_left_after_a_good_end_either(tmp_path: Path) -> None:
    with launch(tmp_path, "import time; open('ready', 'w'); time.sleep(0.3)") as launched:
        launched.wait_for_file("ready")
        assert launched.seen
        assert launched.finish()[0] == 0
        assert not [process for process in launched.seen if process.is_alive()]


def test_ranks_do_not_inherit_our_descriptors(tmp_path: Path) -> None:
    """A descriptor that leaks into a rank keeps a port, a pipe or a lock alive for as long as training runs."""
    script = """
import os
fds = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
# Its own progress page: memory that leads nowhere (until Python 3.13, a mapping keeps a descriptor).
print([link for link in links if "railhead-progress" not in link], file=open("fds", "w"))
"""
    with launch(tmp_path, script) as launched:
        assert launched.finish()[0] == 0
    assert (tmp_path / "fds").read_text() == "[]\n"


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_children_of_names_this_process_for_its_child() -> None:
    """The helper that these tests rely on."""
    assert os.getpid() in children_of(os.getppid())
