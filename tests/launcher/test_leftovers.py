"""Whoever is killed, nothing of the job stays on the machine: no shared memory, no temporary directory, no socket, no port."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.node.runtime_dir import RuntimeDir, sweep
from tests.launcher.launched import Launched, Process, launch, wait_until

SCRIPT = """
import json, os, sys, time
from multiprocessing import connection, shared_memory, util
shm = shared_memory.SharedMemory(create=True, size=1 << 16)      # removed by multiprocessing's resource tracker
listener = connection.Listener(family="AF_UNIX")                 # what each data loader's worker has
left = ["/dev/shm/" + shm.name.lstrip("/"), listener.address, util.get_temp_dir()]
if WITH_TORCH:
    import torch, torch.multiprocessing as mp
    mp.set_sharing_strategy("file_system")                       # removed by nobody
    tensor = torch.ones(100_000).share_memory_()
    left += ["/dev/shm/" + name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]
    assert len(left) == 4
rank = os.environ["RANK"]
found = {"left": left, "port": int(os.environ["MASTER_PORT"]), "pid": os.getpid()}
with open(f"left.{rank}.tmp", "w") as file:
    json.dump(found, file)
os.rename(f"left.{rank}.tmp", f"left.{rank}")
time.sleep(600)
"""


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Socket paths are short, and pytest's directories are not."""
    path = Path(tempfile.mkdtemp(prefix="rh-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    "victim",
    ["rank", "rank with torch", "launcher with torch", "guardian with torch", "launcher and guardian", "nobody"],
)
def test_nothing_is_left_whoever_is_killed(tmp_path: Path, runtime: Path, victim: str) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime)}
    script = SCRIPT.replace("WITH_TORCH", str("torch" in victim))
    with launch(tmp_path, script, "--nproc-per-node", "2", "--shutdown-timeout", "1", env=env) as launched:
        launched.wait_for_file("left.0", "left.1")
        found = [_read(tmp_path / f"left.{rank}") for rank in range(2)]
        left = [Path(path) for one in found for path in one["left"]]
        assert all(path.exists() for path in left)
        assert all(runtime in path.parents or path.parts[1] == "dev" for path in left), "nothing is in /tmp"
        everyone = {*launched.seen, *(Process.of(one["pid"]) for one in found)}
        if victim == "nobody":
            launched.process.send_signal(signal.SIGTERM)
        for pid in _victims(victim, launched, found[1]["pid"]):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(p.is_alive() for p in everyone), f"everybody to be gone: {everyone}")
        launched.finish()
    if "launcher" in victim:  # a dead launcher removes no directories; whoever comes next does
        with launch(tmp_path, "pass", env=env) as following:
            assert following.finish()[0] == 0
    wait_until(lambda: not [path for path in left if path.exists()], f"all of it to be gone: {left}")
    assert [path.name for path in runtime.iterdir()] == [f"railhead-{os.getuid()}"]
    assert not list((runtime / f"railhead-{os.getuid()}").iterdir())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", found[0]["port"])) != 0, "the store's port is free"


def _victims(victim: str, launched: Launched, rank_pid: int) -> list[int]:
    guardian = int(Path(f"/proc/{rank_pid}/stat").read_text().rpartition(")")[2].split()[1])
    pids = {"launcher": launched.process.pid, "guardian": guardian, "rank": rank_pid}
    return [pid for name, pid in pids.items() if name in victim]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_only_what_dead_agents_and_daemons_have_left_is_swept(runtime: Path) -> None:
    """Other jobs of the same user have theirs beside ours, and containers may share the directory."""
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    here, zeros = f"{os.stat('/proc/self/ns/pid').st_ino:x}", "0" * 16
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    stay = [
        f"agent-{here}-{os.getpid()}-{ticks}-aa",
        f"agent-abc-{dead.pid}-77-aa",  # of another container
        "somebody-elses",
        f"{zeros}-{os.getpid()}.sock",
        "agent-1-notes",
    ]
    go = [f"agent-{here}-{dead.pid}-77-aa", f"agent-{here}-{os.getpid()}-{ticks + 1}-aa", f"{zeros}-{dead.pid}.sock"]
    for name in (*stay, *go):
        if name.endswith(".sock"):
            (runtime / name).touch()
        else:
            (runtime / name / "1").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as elsewhere:  # its process has no number here, and it answers
        stay.append(f"{'1' * 16}-{dead.pid}.sock")
        elsewhere.bind(str(runtime / stay[-1]))
        elsewhere.listen()
        sweep(str(runtime))
    assert sorted(path.name for path in runtime.iterdir()) == sorted(stay)


def test_a_runtime_directory_that_would_be_too_deep_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiprocessing would fail there with "AF_UNIX path too long", and works in /tmp."""
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    directory = RuntimeDir()
    assert directory.make_for_rank(str(tmp_path)) == ""
    directory.close()
