"""Forked ranks are like executed ones in what an operating system gives a process; and an unfit fork server is found out."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.gang.world import NodeInfo, arrange
from launcher.node import strays
from launcher.node.forking import ForkServer
from launcher.node.forkservers import ForkServers, installed_modules, why_fresh
from launcher.node.rank_process import RankFiles, RankStarter
from launcher.spec import JobSpec, Program, ProgramKind, RestartBudget, StartMethod
from tests.launcher.forked import fork_and_wait, job_for, wait_for_end, wait_until_warm
from tests.launcher.launched import Process, launch, wait_until


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A server with torch in memory."""
    strays.adopt()
    directory = tmp_path_factory.mktemp("warm")
    server = ForkServer(str(directory), os.environ, ["torch"], log_path=str(directory / "log"))
    wait_until_warm(server)
    assert server.is_warm, (directory / "log").read_text()
    yield server
    server.close()


def run(server: ForkServer, directory: Path, text: str, *args: str, **job: object) -> str:
    (directory / "train.py").write_text(text)
    done = fork_and_wait(directory, os.environ, "script", "train.py", *args, server=server, **job)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_there_at_once_and_works_after_the_fork(warm: ForkServer, tmp_path: Path) -> None:
    """Threads of torch, data loaders of all kinds, and gradients, in a process whose parent had torch loaded."""
    text = """
import sys
was_there = "torch" in sys.modules
import torch
from torch.utils.data import DataLoader
def main():
    assert was_there
    torch.set_num_threads(2)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for context in ("fork", "spawn", "forkserver"):
        loader = DataLoader(torch.ones(8, 64), batch_size=4, num_workers=1, multiprocessing_context=context)
        for batch in loader:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    print("trained", (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item())
if __name__ == "__main__":
    main()
"""
    modules_file = tmp_path / "modules.json"
    out = run(warm, tmp_path, text, modules_file=str(modules_file))
    assert out == "trained 27000000.0\n"
    names = installed_modules(str(modules_file))
    assert "torch.optim.sgd" in names
    assert "__main__" not in names


def test_chance_differs_from_fork_to_fork(warm: ForkServer, tmp_path: Path) -> None:
    """A state inherited from one parent would give every rank the same augmentations."""
    text = """
import random, numpy, torch, uuid, tempfile, multiprocessing
print(random.random(), torch.initial_seed(), torch.rand(1).item(), numpy.random.rand(), uuid.uuid4(), next(tempfile._get_candidate_names()),
      bytes(multiprocessing.current_process().authkey).hex())
"""
    first, second = (run(warm, tmp_path, text).split() for _ in range(2))
    assert len(first) == 7
    assert not set(first) & set(second)


SEE_THE_SYSTEM = """
import os, resource, signal, sys, threading
print("group", os.getpid() == os.getsid(0) == os.getpgrp(), threading.active_count(), len(os.listdir("/proc/self/task")))
print("limits", oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))
handled = [number for number in sorted(signal.valid_signals()) if signal.getsignal(number) != signal.SIG_DFL]
print("signals", [(number, str(signal.getsignal(number))) for number in handled])
print("blocked", signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print("affinity", sorted(os.sched_getaffinity(0)), os.nice(0))
print("fds", [os.readlink(f"/proc/self/fd/{n}") for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{n}")])
print("name", open("/proc/self/comm").read().strip(), "stdin", os.readlink("/proc/self/fd/0"))
print("environment", sorted(os.environ.items()))
os.system("env -0 | sort -z | tr '\\\\0' '\\\\n' | grep -v -e ^_= -e ^SHLVL= -e ^PWD= -e ^OLDPWD=")
print("path", sys.path, sys.argv, sys.flags, sys.executable, sys.prefix)
print("data", open("data.txt").read())
"""


def test_a_forked_rank_has_what_an_executed_one_has(tmp_path: Path) -> None:
    """Session, signals, limits, affinity, descriptors, environment, relative paths: asked under the launcher in both ways."""
    (tmp_path / "data.txt").write_text("mine")
    seen = {}
    before = os.umask(0o027), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (777, before[1][1]))
    try:
        for way in ("spawn", "forkserver"):
            options = ("--start-method", way, "--rdzv-id", "same", "--master-port", "29871")
            with launch(tmp_path, SEE_THE_SYSTEM, *options, args=["a b"]) as launched:
                code, seen[way], err = launched.finish()
                assert code == 0, err
            started = json.loads((launched.run_dir / "attempt_0/rank_0/environment.json").read_text())["started"]
            assert started.startswith({"spawn": "executed", "forkserver": "forked"}[way])
            seen[way] = seen[way].replace(os.path.basename(os.path.realpath(launched.run_dir)), "RUN")
    finally:
        os.umask(before[0])
        resource.setrlimit(resource.RLIMIT_NOFILE, before[1])
    assert seen["forkserver"].splitlines() == seen["spawn"].splitlines()
    assert "group True 1 1" in seen["spawn"]


def test_people_find_a_forked_rank_by_its_command_line(tmp_path: Path) -> None:
    """ps, pgrep -f and py-spy would show our fork server's otherwise."""
    with launch(
        tmp_path, "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)", args=["--lr", "1"]
    ) as launched:
        launched.wait_for_file("pid")
        wait_until(lambda: (tmp_path / "pid").read_text(), "the pid")
        shown = Path(f"/proc/{(tmp_path / 'pid').read_text()}/cmdline").read_text()
    assert shown.strip("\0") == f"{sys.executable} -u train.py --lr 1"


def test_a_module_of_the_programs_own_is_not_hidden_by_one_in_memory(warm: ForkServer, tmp_path: Path) -> None:
    """Someone's numpy.py, or torch/ beside the script, is what a fresh interpreter would import: so it gets one."""
    (tmp_path / "queue.py").write_text("mine = True")
    out = run(warm, tmp_path, "import queue, sys; print(queue.mine, 'torch' in sys.modules)", own_modules=str(tmp_path))
    assert out == "True False\n"
    assert "queue.py would be imported as queue" in (tmp_path / "how_started.txt").read_text()


MISDEEDS = {
    "it leaves a thread running": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "it leaves a file open": "file = open(__file__)",
    "it leaves a process running": "import subprocess; child = subprocess.Popen(['sleep', '1'])",
    "it reads LOCAL_RANK from the environment": "import os; rank = os.environ.get('LOCAL_RANK', 0)",
    "it reads * from the environment": "import os; everything = dict(os.environ)",
    "it prints": "print('loaded')",
}


@pytest.mark.parametrize("reason", MISDEEDS)
def test_a_module_that_makes_the_server_unfit_is_named_and_ends_it(tmp_path: Path, reason: str) -> None:
    """Such a module, imported once for all ranks, would break them in ways that nobody could explain."""
    strays.adopt()
    (tmp_path / "fine_one.py").write_text("import os\nos.environ.get('HOME'); os.environ['SET_BY_IMPORT'] = '1'")
    (tmp_path / "bad_one.py").write_text(MISDEEDS[reason])
    (tmp_path / "names.json").write_text(json.dumps(["fine_one", "no_such_module", "bad_one"]))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    server = ForkServer(str(tmp_path), env, [], str(tmp_path / "names.json"), log_path=str(tmp_path / "log"))
    wait_until_warm(server)
    assert server.unfit is not None
    assert server.unfit[0] == "bad_one"
    assert server.unfit[1].startswith(reason)
    server.close()
    server = ForkServer(str(tmp_path), env, [], str(tmp_path / "names.json"), ["bad_one"])
    wait_until_warm(server)
    assert server.is_warm
    assert (
        run(server, tmp_path, "import sys, os; print('fine_one' in sys.modules, os.environ['SET_BY_IMPORT'])")
        == "True 1\n"
    )
    server.close()


def test_a_server_that_dies_before_it_forks_says_so(tmp_path: Path) -> None:
    strays.adopt()
    server = ForkServer(str(tmp_path), os.environ, [])
    os.kill(server.pid, signal.SIGSTOP)
    with open(os.devnull, "w") as null:
        process = server.fork(
            job_for(tmp_path, "script", "x.py"), os.environ, str(tmp_path), null.fileno(), null.fileno()
        )
        os.kill(server.pid, signal.SIGKILL)
        assert wait_for_end(process) is None
        server.read()
        wait_until_warm(server)
        assert server.is_dead
        with pytest.raises(OSError):
            server.fork(job_for(tmp_path, "script", "x.py"), os.environ, str(tmp_path), null.fileno(), null.fileno())
    server.close()


def names_file(directory: Path, *names: str) -> str:
    (directory / "names.json").write_text(json.dumps(names))
    return str(directory / "names.json")


def test_a_server_that_is_forked_from_another_has_its_modules_and_more(warm: ForkServer, tmp_path: Path) -> None:
    """A second import of torch would be most of what a restart soon after the first step waits for."""
    server = ForkServer(str(tmp_path), warm.env, ["torch"], names_file(tmp_path, "tomllib"), parent=warm)
    wait_until_warm(server)
    assert server.is_warm
    text = "import os, sys; print('torch' in sys.modules, 'tomllib' in sys.modules, os.getsid(0) == os.getpid())"
    assert run(server, tmp_path, text) == "True True True\n"
    assert run(warm, tmp_path, "import sys; print('torch' in sys.modules, 'tomllib' in sys.modules)") == "True False\n"
    pid = server.pid
    server.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_forked_server_that_is_unfit_takes_nothing_from_the_one_that_it_came_from(
    warm: ForkServer, tmp_path: Path
) -> None:
    server = ForkServer(str(tmp_path), warm.env, ["torch"], names_file(tmp_path, "this"), parent=warm)
    wait_until_warm(server)
    assert server.unfit == ("this", "it prints")
    server.close()
    assert run(warm, tmp_path, "import sys; print('torch' in sys.modules, 'this' in sys.modules)") == "True False\n"


def test_a_server_that_shall_be_forked_from_a_dead_one_says_so(tmp_path: Path) -> None:
    """And nothing of it is left to be collected."""
    strays.adopt()
    parent = ForkServer(str(tmp_path), os.environ, [])
    os.kill(parent.pid, signal.SIGSTOP)
    server = ForkServer(str(tmp_path), os.environ, [], parent=parent)
    parent.close()
    wait_until_warm(server)
    assert server.is_dead
    assert server.pid == 0
    server.close()


def test_a_server_that_retires_carries_out_what_it_was_asked_for(tmp_path: Path) -> None:
    """The store's host of a restart may have been asked of the old server a moment before the better one was ready."""
    strays.adopt()
    server = ForkServer(str(tmp_path), os.environ, [])
    (tmp_path / "train.py").write_text("")
    os.kill(server.pid, signal.SIGSTOP)
    with open(os.devnull, "w") as null:
        fds = null.fileno(), null.fileno()
        process = server.fork(job_for(tmp_path, "script", "train.py"), os.environ, str(tmp_path), *fds)
    server.retire()
    os.kill(server.pid, signal.SIGCONT)
    assert wait_for_end(process) == 0
    while not server.is_dead:
        wait_until_warm(server)
        server.is_warm = False
    server.close()


def test_ranks_that_waited_for_a_server_that_proves_unfit_are_forked_from_the_other(tmp_path: Path) -> None:
    """A restart relies upon the better server before it is known to be one."""
    script = """
import os, sys
if os.environ["RAILHEAD_ATTEMPT"] == "0":
    import this
    sys.exit(3)
print("this" in sys.modules)
"""
    with launch(tmp_path, script, "--max-restarts", "1") as launched:
        code, out, err = launched.finish()
        assert code == 0, err
        assert out.endswith("False\n")
        started = json.loads((launched.run_dir / "attempt_1/rank_0/environment.json").read_text())["started"]
        assert started.startswith("forked"), started
        assert "this: it prints" in (launched.run_dir / "fork_server.log").read_text()


def test_a_killed_fork_server_costs_a_job_nothing(tmp_path: Path) -> None:
    """The rank runs on, and the next attempt is forked from another."""
    script = """
import os, sys, time
attempt = os.environ["RAILHEAD_ATTEMPT"]
open(f"ready.{attempt}", "w").close()
while not os.path.exists(f"go.{attempt}"): time.sleep(0.02)
sys.exit(3 if attempt == "0" else 0)
"""
    with launch(tmp_path, script, "--max-restarts", "1") as launched:
        launched.wait_for_file("ready.0")
        servers = [p for p in launched.seen if Path(f"/proc/{p.pid}/comm").read_text() == "railhead-forks\n"]
        os.kill(servers[0].pid, signal.SIGKILL)
        wait_until(lambda: not servers[0].is_alive(), "the server to be dead")
        (tmp_path / "go.0").touch()
        launched.wait_for_file("ready.1")
        (tmp_path / "go.1").touch()
        code, _, err = launched.finish()
        assert code == 0, err
        assert not [process for process in launched.seen if Process.is_alive(process)]


def test_a_rank_whose_environment_the_server_cannot_have_is_executed(tmp_path: Path) -> None:
    """What glibc, Python or OpenMP read at their start cannot be changed in a process that runs."""
    strays.adopt()
    server = ForkServer(str(tmp_path), {**os.environ, "OMP_NUM_THREADS": "1"}, [])
    (tmp_path / "train.py").write_text("")
    member = arrange([NodeInfo("n", "n", "127.0.0.1", 1)]).members[0]
    starter = RankStarter(Program(ProgramKind.SCRIPT, "train.py"), str(tmp_path), server, "")
    files = RankFiles(str(tmp_path))
    for changed, expected in (
        ({"OMP_NUM_THREADS": "4"}, "executed: OMP_NUM_THREADS differ"),
        ({"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "3"}, "executed: PYTHONHASHSEED differ"),
        ({"OMP_NUM_THREADS": "1", "RANK": "7", "NCCL_DEBUG": "INFO"}, "forked"),
    ):
        process, how = starter.start(member, {**os.environ, **changed}, files)
        assert how.startswith(expected)
        assert wait_for_end(process) == 0
    server.close()


@pytest.mark.parametrize(
    ("program", "method", "reason"),
    [
        (Program(ProgramKind.SCRIPT, "t.py"), StartMethod.FORK_SERVER, ""),
        (Program(ProgramKind.SCRIPT, "t.py", python=sys.executable), StartMethod.FORK_SERVER, ""),
        (Program(ProgramKind.MODULE, "t"), StartMethod.SPAWN, "--start-method spawn"),
        (Program(ProgramKind.EXECUTABLE, "t"), StartMethod.FORK_SERVER, "not a Python program"),
        (Program(ProgramKind.SCRIPT, "t.py", python="/bin/sh"), StartMethod.FORK_SERVER, "another interpreter"),
    ],
)
def test_only_python_programs_of_our_interpreter_are_forked(program: Program, method: StartMethod, reason: str) -> None:
    found = why_fresh(JobSpec(program, start_method=method))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_what_a_rank_imported_is_in_memory_at_the_next_attempt(tmp_path: Path) -> None:
    """And the program's own modules are not: they may be mended between two attempts."""
    strays.adopt()
    import select

    (tmp_path / "train.py").write_text("import tomllib, mine")
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                ["tomllib", os.path.join(os.path.dirname(os.__file__), "tomllib/__init__.py")],
                ["mine", str(tmp_path / "mine.py")],
            ]
        )
    )
    spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), cwd=str(tmp_path), restarts=RestartBudget(1))
    handlers = {}

    def on_socket(channel: object, handler: object) -> None:
        handlers.pop(channel, None)
        if handler is not None:
            handlers[channel] = handler

    servers = ForkServers(spec, 1, str(tmp_path), os.environ, on_socket)  # type: ignore[arg-type]

    def until(claim: object) -> None:
        while not claim():  # type: ignore[operator]
            ready, _, _ = select.select(list(handlers), [], [], 30)
            assert ready
            for channel in ready:
                if channel in handlers:
                    handlers[channel]()

    servers.start()
    first = servers.current
    assert first is not None
    until(lambda: first.is_warm)
    servers.learn(str(tmp_path / "modules.json"))
    assert servers.for_ranks() not in (first, None), "a restart waits for the better one"
    until(lambda: servers.current is not first)
    assert servers.current is not None
    assert (
        run(servers.current, tmp_path, "import sys; print('tomllib' in sys.modules, 'mine' in sys.modules)")
        == "True False\n"
    )
    servers.close()
