"""The node agent when things go wrong within it or around it. (What it does when all is well: the cluster contract.)"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from launcher.cluster.local import LocalCluster
from launcher.gang.events import (
    AttemptEnded,
    AttemptPlan,
    CacheFailed,
    ExitStatus,
    ModulesLearnt,
    NodeFailed,
    NodeLost,
    NodesReady,
    Notice,
    OutputEnded,
    RankExited,
    RanksStarted,
    StoreAddress,
    StoreOpened,
)
from launcher.gang.world import NodeInfo, World, arrange
from launcher.node import agent, cache_child
from launcher.node.agent import NodeAgent
from launcher.node.node_attempt import NodeAttempt
from launcher.spec import CacheOptions, JobSpec, Program, ProgramKind
from tests.contracts.cluster_contract import House, Recorder
from tests.launcher.launched import Process, children_of, wait_until


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(lambda: LocalCluster(1), tmp_path, 1)
    yield house
    house.cluster.close()


def test_a_fault_in_the_agent_loses_the_node_and_leaves_nobody_alive(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that died in silence would let the job hang for ever."""
    world = house.begin("wait")
    house.start(world)

    def guarded() -> list[int]:
        guardians = [pid for pid in children_of(os.getpid()) if _name(pid) == "railhead-guard"]
        return [child for guardian in guardians for child in children_of(guardian)]

    wait_until(lambda: len(guarded()) == 3, "two ranks and the store's host to run")
    ranks = [Process.of(pid) for pid in guarded()]
    monkeypatch.setattr(NodeAttempt, "stop", lambda *args: 1 // 0)
    house.stop(world)
    lost = house.sink.wait_for(NodeLost)[0]
    assert "ZeroDivisionError" in lost.reason
    wait_until(lambda: not any(rank.is_alive() for rank in ranks), "all ranks to be gone")


def test_an_attempt_that_begins_while_another_is_alive_is_refused(house: House) -> None:
    world = house.begin("wait")
    house.start(world)
    house.cluster.node(world.nodes[0].node_id).open_store(1)
    failed = house.sink.wait_for(NodeFailed)[0]
    assert failed.attempt == 1
    assert "while attempt 0 is still alive" in failed.reason
    assert not house.sink.of(RankExited)


def test_commands_that_come_after_an_attempt_was_ended_start_nothing(house: House) -> None:
    """Stop overtakes start when a signal comes while nodes are told to begin."""
    world = house.begin("wait")
    node = house.cluster.node(world.nodes[0].node_id)
    node.stop_attempt(0, 0.0, signal.SIGKILL)
    node.open_store(0)
    node.stop_attempt(0, 0.0, signal.SIGKILL)
    house.sink.wait_for(OutputEnded)
    assert [type(event) for event in house.sink.events[1:]] == [AttemptEnded]


def test_an_attempt_that_is_stopped_before_its_ranks_are_born_ends_when_the_fork_server_dies(house: House) -> None:
    """What is started in their place would never hear of the stop: the node held the gang up until it was given up (found by chaos)."""
    house.begin("wait")
    node = house.cluster.node(os.uname().nodename)

    def servers() -> list[int]:
        found = []
        for pid in children_of(os.getpid()):
            with contextlib.suppress(OSError):
                found += [pid] if b"forkserver.py" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
        return found

    wait_until(lambda: len(servers()) == 1, "the fork server to be started")
    os.kill(servers()[0], signal.SIGSTOP)
    frozen = Process.of(servers()[0])
    node.open_store(0)
    plan = AttemptPlan(
        0, arrange(house.sink.wait_for(NodesReady)[0].nodes), house.sink.wait_for(StoreOpened)[0].address
    )
    node.start_ranks(plan)
    node.stop_attempt(0, 600.0, signal.SIGTERM)
    node.open_store(1)
    house.sink.wait_for(NodeFailed)  # commands are carried out in their order: the stop has been
    os.kill(frozen.pid, signal.SIGKILL)
    house.sink.wait_for(AttemptEnded)
    assert not house.sink.of(RanksStarted)


def test_a_port_that_is_taken_fails_the_attempt_with_its_reason(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        spec = replace(house.spec("succeed"), master_port=taken.getsockname()[1])
        house.cluster.open(spec, str(house.run_dir), house.sink)
        house.cluster.acquire(())
        house.cluster.node(os.uname().nodename).open_store(0)
        assert "cannot listen at 127.0.0.1" in house.sink.wait_for(NodeFailed)[0].reason


def test_a_cache_that_does_not_announce_itself_in_time_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_child, "ANNOUNCE_TIMEOUT_S", 0.2)
    silent = (sys.executable, "-S", "-c", "import time; time.sleep(600)")
    spec = replace(house.spec("succeed"), cache=CacheOptions("cache", "1GiB", silent))
    house.cluster.open(spec, str(house.run_dir), house.sink)
    house.cluster.acquire(())
    assert "did not say within 0.2 s that it serves" in house.sink.wait_for(CacheFailed)[0].reason


def test_a_socket_directory_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared /tmp anybody can make the usual directory first, and would own the socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    usual = tmp_path / f"railhead-{os.getuid()}"
    assert Path(cache_child.socket_path("/c")).parent == usual
    assert usual.stat().st_mode & 0o777 == 0o700
    usual.chmod(0o755)
    other = Path(cache_child.socket_path("/c")).parent
    assert other != usual
    other.rmdir()


def test_a_full_disk_is_noticed_while_ranks_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_DISK_CHECK_S", 0.05)
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 100, 50, 50, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    world = house.begin("wait")
    house.start(world)
    notices = house.sink.wait_for(Notice)
    house.stop(world, grace_s=0)
    house.sink.wait_for(AttemptEnded)
    assert len(notices) == 1
    assert "is full" in notices[0].text


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_machine_whose_agent_was_lost_gets_a_new_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a restart would wait for a store that nobody opens."""
    world = house.begin("succeed")
    with monkeypatch.context() as patch:
        patch.setattr(NodeAttempt, "open_store", lambda self: 1 // 0)
        house.cluster.node(world.nodes[0].node_id).open_store(0)
        house.sink.wait_for(NodeLost)
    house.cluster.acquire(())
    house.start(world)
    house.sink.wait_for(RankExited, 2)


def test_ranks_below_a_parent_that_blocks_sigint_are_interrupted_all_the_same(tmp_path: Path) -> None:
    """Ray blocks SIGINT in its workers. Inherited, that would make a Ctrl-C wait for the whole grace."""
    house = House(lambda: LocalCluster(1), tmp_path, 1)
    node = NodeInfo("n", "n", "127.0.0.1", 2)
    ours, theirs = socket.socketpair()
    outputs, their_outputs = socket.socketpair()
    fds = (theirs.fileno(), their_outputs.fileno())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        command = [sys.executable, "-P", "-m", "launcher.node.agent_host", *map(str, fds)]
        host = subprocess.Popen(command, pass_fds=fds, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        their_outputs.close()
    with Connection(ours.detach()) as control, outputs:
        control.send(("begin", (node, house.spec("wait"), str(house.run_dir), dict(os.environ))))
        control.send(("start_ranks", (AttemptPlan(0, arrange([node]), StoreAddress("127.0.0.1", 1)),)))
        ready = [house.run_dir / "attempt_0" / f"rank_{rank}" / "stdout.log" for rank in range(2)]
        wait_until(lambda: all(log.exists() and log.read_text() == "ready\n" for log in ready), "both ranks to run")
        control.send(("stop_attempt", (0, 3600.0, int(signal.SIGINT))))
        events = []
        while not (events and isinstance(events[-1], AttemptEnded)):
            assert control.poll(30), events
            events.append(control.recv())
        control.send(("close", ()))
        host.wait(30)
    ends = [event.status for event in events if isinstance(event, RankExited)]
    assert ends == [ExitStatus(signum=signal.SIGINT)] * 2


@pytest.mark.parametrize(("first_line", "was_told"), [("", True), ("import launcher.preemption", False)])
def test_a_zero_after_a_word_to_save_says_that_it_was_told_unless_the_script_has_another_word(
    house: House, tmp_path: Path, first_line: str, was_told: bool
) -> None:
    """Without launcher.preemption nobody can tell a rank that has saved from one that is done, but by what it was told."""
    house.begin("wait")
    (tmp_path / "program.py").write_text(
        f"{first_line}\nimport signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    world = arrange(house.sink.wait_for(NodesReady)[0].nodes)
    house.start(world)
    house.sink.wait_for_output(b"ready\n", 2)
    house.cluster.node(world.nodes[0].node_id).stop_attempt(0, 600.0, signal.SIGTERM, can_save=True)
    house.sink.wait_for(AttemptEnded)
    ends = [(event.status, event.was_told) for event in house.sink.of(RankExited)]
    assert ends == [(ExitStatus(code=0), was_told)] * 2


def test_what_ranks_import_is_told_and_a_spare_node_takes_it_into_memory(tmp_path: Path) -> None:
    """A spare has had no rank that could tell, and would import everything only when a lost node's ranks start there."""
    (tmp_path / "train.py").write_text("import tomllib")
    spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), cwd=str(tmp_path), spare_nodes=1)
    nodes = [NodeInfo(name, name, "127.0.0.1", 1) for name in ("gang", "spare")]
    sink = Recorder()
    agents = []
    for node in nodes:
        (tmp_path / node.node_id).mkdir()
        agents.append(NodeAgent(node, spec, str(tmp_path / node.node_id), os.environ, sink.put, sink.put_log))
    try:
        agents[0].open_store(0)
        opened = sink.wait_for(StoreOpened)[0]
        agents[0].start_ranks(AttemptPlan(0, World((nodes[0],)), opened.address))
        learnt = sink.wait_for(ModulesLearnt)[0]
        assert "tomllib" in learnt.names
        agents[1].share_imports(learnt.names)
        wait_until(lambda: bool(list((tmp_path / "spare").glob("fork_modules_*.json"))), "the spare to take it")
    finally:
        for agent in agents:
            agent.close()
