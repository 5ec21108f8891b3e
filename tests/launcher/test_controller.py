"""The controller on a fake cluster: what it asks for, in which order, what it says, what it writes down, how it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.console import Console
from launcher.controller import Controller, SystemClock, run
from launcher.errors import EXIT_INTERNAL, EXIT_NODE_LOST, LauncherError, RequestRefused
from launcher.gang.events import (
    CacheFailed,
    CacheServing,
    ExceptionRecord,
    ExitStatus,
    PlacementWaiting,
    RankExited,
    StopRequested,
)
from launcher.gang.world import Member
from launcher.journal import Entry, FileJournal, read_journal
from launcher.spec import JobSpec, LogOptions, Program, ProgramKind, RestartBudget
from tests.fakes.cluster import FakeCluster


class Job:
    """One job on a fake cluster, with its terminal in two files."""

    def __init__(
        self,
        directory: Path,
        behave: Callable[[int, Member], str],
        num_nodes: int = 2,
        max_restarts: int = 0,
        shutdown_timeout_s: float = 30.0,
    ) -> None:
        self.directory = directory
        program = Program(ProgramKind.SCRIPT, "train.py")
        self.spec = JobSpec(
            program,
            num_nodes,
            num_nodes,
            nproc_per_node=2,
            restarts=RestartBudget(max_restarts),
            logs=LogOptions(show_all=True),
            shutdown_timeout_s=shutdown_timeout_s,
        )
        self.cluster = FakeCluster(num_nodes, behave)
        self.out, self.err = directory / "out", directory / "err"
        self._fds = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in (self.out, self.err)]
        self.console = Console(self.spec.line_prefix, *self._fds)
        clock = SystemClock()
        self.journal = FileJournal(str(directory / "journal.jsonl"), clock, self.console.say)
        self.controller = Controller(self.spec, self.cluster, str(directory), self.journal, self.console, clock)

    def run(self) -> int:
        try:
            return self.controller.run()
        finally:
            self.cluster.close()
            self.journal.close()
            self.console.close()
            for fd in self._fds:
                os.close(fd)

    def said(self) -> list[str]:
        return self.err.read_text().splitlines()

    def entries(self) -> list[Entry]:
        return list(read_journal(str(self.directory / "journal.jsonl")))


def always(word: str) -> Callable[[int, Member], str]:
    return lambda attempt, member: word


def test_a_job_whose_ranks_all_succeed_says_little_and_ends_with_zero(tmp_path: Path) -> None:
    job = Job(tmp_path, always("succeed"))
    assert job.run() == 0
    began, done = job.said()
    assert began == f"launcher: 4 ranks (2 nodes of 2) on a fake cluster; run directory {tmp_path}"
    assert done.startswith("launcher: done in ")


def test_all_nodes_are_told_to_start_before_any_has_failed(tmp_path: Path) -> None:
    """All or nothing: the first node's failure may not keep the second from being part of the attempt."""
    job = Job(tmp_path, lambda attempt, member: "unstartable" if member.node_rank == 0 else "wait")
    assert job.run() == EXIT_NODE_LOST
    for node in job.cluster.nodes.values():
        assert "start_ranks 0" in node.commands
        assert node.commands[-1] == "stop_attempt 0 30 SIGTERM"
        assert not node.alive_ranks


def test_the_first_line_after_a_failure_names_rank_host_cause_and_log(tmp_path: Path) -> None:
    job = Job(tmp_path, lambda attempt, member: "fail 3" if member.rank == 3 else "wait")
    assert job.run() == 3
    said = job.said()
    assert said[1].startswith("launcher: rank 3 on host-node1 failed: exit code 3; log /run/rank_3/")
    assert said[2] == "launcher: stopping the other 3 ranks (SIGTERM, SIGKILL after 30 s)"
    assert said[-1].startswith("launcher: exit code 3: no restart: --max-restarts is 0; 1 attempt, ")
    assert str(tmp_path) in said[-1]


def test_output_stands_before_the_summary(tmp_path: Path) -> None:
    job = Job(tmp_path, always("print hello"))
    assert job.run() == 0
    assert sorted(job.out.read_text().splitlines()) == [f"[rank{rank}] hello" for rank in range(4)]


def test_a_failed_attempt_is_followed_by_a_good_one(tmp_path: Path) -> None:
    job = Job(
        tmp_path, lambda attempt, member: "fail 1" if attempt == 0 and member.rank == 1 else "wait", max_restarts=1
    )
    timer = threading.Timer(0.5, job.controller.events.put, [StopRequested(15)])
    timer.start()
    assert job.run() == 143
    timer.join()
    assert "launcher: restart 1 of 1" in job.said()
    opened = [entry.fields["address"]["port"] for entry in job.entries() if entry.kind == "StoreOpened"]
    assert len(set(opened)) == 2, "each attempt has a store of its own"
    first = job.cluster.nodes["node0"].commands
    assert first[:4] == ["open_store 0", "start_ranks 0", "stop_attempt 0 30 SIGTERM", "open_store 1"]


def test_a_lost_node_ends_the_attempt_and_a_new_one_takes_its_place(tmp_path: Path) -> None:
    job = Job(tmp_path, lambda attempt, member: "wait" if attempt == 0 else "succeed", max_restarts=1)
    timer = threading.Timer(0.3, lambda: job.cluster.lose("node0"))
    timer.start()
    assert job.run() == 0
    timer.join()
    assert set(job.cluster.nodes) == {"node1", "node2"}
    plans = [entry.fields["plan"] for entry in job.entries() if entry.kind == "StartRanks"]
    ids = [[node["node_id"] for node in plan["world"]["nodes"]] for plan in plans]
    assert ids == [["node0", "node1"], ["node2", "node1"]], "the survivor keeps its ranks"
    assert any("node host-node0 lost: the power failed" in line for line in job.said())


def test_the_output_of_a_node_that_was_lost_is_not_waited_for(tmp_path: Path) -> None:
    """Its ranks had ended, their last output was on its way, then the node went: the job, though done, waited for it for ever."""

    def behave(attempt: int, member: Member) -> str:
        return ("fail 1" if member.rank == 0 else "wait", "wait", "succeed")[attempt]

    job = Job(tmp_path, behave, max_restarts=2)
    job.cluster.keep_output = {"node1"}
    timer = threading.Timer(0.3, lambda: job.cluster.lose("node1"))
    timer.start()
    assert job.run() == 0
    timer.join()
    assert [entry.fields["attempt"] for entry in job.entries() if entry.kind == "AttemptEnded"].count(0) == 2


def test_the_output_of_a_node_that_left_the_gang_is_waited_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drained node is given back once its ranks have saved; nothing says that it is lost, and its output may never come."""
    monkeypatch.setattr("launcher.controller.DEPARTED_OUTPUT_S", 0.1)
    job = Job(tmp_path, always("succeed"))
    job.controller._ended.add((0, "a node that was drained"))
    assert job.run() == 0
    assert job.said()[-1].startswith("launcher: done")


def test_a_request_that_cannot_be_met_starts_nothing_and_is_journalled(tmp_path: Path) -> None:
    job = Job(tmp_path, always("succeed"))
    job.cluster._num_nodes = 1
    with pytest.raises(RequestRefused, match="2 nodes asked for, 1 there"):
        job.run()
    assert [entry.kind for entry in job.entries()] == ["JobBegan", "JobEnded"]


def test_notices_are_said_and_do_not_move_the_gang(tmp_path: Path) -> None:
    job = Job(tmp_path, always("succeed"))
    job.controller.events.put(PlacementWaiting("2 GPUs are taken", 60.0))
    job.controller.events.put(CacheServing("node0", "/s", 1, False, 2**30, 2**31))
    job.controller.events.put(CacheFailed("node1", "no such directory"))
    assert job.run() == 0
    said = "\n".join(job.said())
    assert "waiting for nodes: 2 GPUs are taken (giving up in 1 min 0 s)" in said
    assert "cache serves on node0: 1 GiB of 2 GiB filled" in said
    assert "no cache on node1, its ranks read the origin directly: no such directory" in said


def test_the_traceback_follows_the_failure_line(tmp_path: Path) -> None:
    job = Job(tmp_path, always("wait"))

    def fail() -> None:
        record = ExceptionRecord("ValueError", "it broke", 'Traceback:\n  File "train.py"\nValueError: it broke\n', 1.0)
        event = RankExited(0, "node0", 1, 1, 1001, ExitStatus(code=1), 2.0, "/o", "/e", record)
        job.cluster.nodes["node0"]._alive.pop(1)
        job.controller.events.put(event)

    timer = threading.Timer(0.3, fail)
    timer.start()
    assert job.run() == 1
    timer.join()
    said = job.said()
    assert said[1:5] == [
        "launcher: rank 1 on host-node0 failed: ValueError: it broke (exit code 1); log /e",
        "  Traceback:",
        '    File "train.py"',
        "  ValueError: it broke",
    ]


def test_the_journal_has_every_event_and_action_in_order(tmp_path: Path) -> None:
    job = Job(tmp_path, always("succeed"), num_nodes=1)
    job.run()
    kinds = [entry.kind for entry in job.entries()]
    assert kinds[:5] == ["JobBegan", "AcquireNodes", "NodesReady", "OpenStore", "StoreOpened"]
    assert kinds[-4:] == ["StopAttempt", "AttemptEnded", "Finish", "JobEnded"]
    times = [entry.mono_s for entry in job.entries()]
    assert times == sorted(times)


def test_a_journal_that_was_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    """kill -9 and full disks cut lines; whoever reads the journal afterwards is told of everything else."""
    job = Job(tmp_path, always("succeed"), num_nodes=1)
    job.run()
    path = tmp_path / "journal.jsonl"
    whole, entries = path.read_bytes(), job.entries()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        num_lines = whole[:cut].count(b"\n")
        assert job.entries()[:num_lines] == entries[:num_lines]
        assert len(job.entries()) - num_lines in (0, 1)
    newer = b'{"v": 99, "wall_s": 1, "mono_s": 1, "kind": "Strange"}\n[1]\nnull\n'
    path.write_bytes(newer + whole[5:])
    assert job.entries() == entries[1:]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_journal_on_a_full_disk_complains_once() -> None:
    complaints: list[str] = []
    journal = FileJournal("/dev/full", SystemClock(), complaints.append)
    for _ in range(3):
        journal.record(StopRequested(2))
    journal.close()
    assert len(complaints) == 1
    assert "the job goes on without it" in complaints[0]


def test_the_run_directory_is_new_each_time_and_latest_points_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAILHEAD_RUNS", raising=False)
    spec = JobSpec(Program(ProgramKind.SCRIPT, "succeed"), env={"WANDB_API_KEY": "12345", "LR": "1"})
    for _ in range(3):
        assert run(spec, FakeCluster(1)) == 0
    runs = [path for path in (tmp_path / "railhead-runs").iterdir() if path.name[0].isdigit()]
    assert len(runs) == 3
    assert (tmp_path / "railhead-runs" / "latest").resolve() in runs
    assert (tmp_path / "railhead-runs" / ".gitignore").read_text() == "*\n"
    written = (runs[0] / "spec.json").read_text()
    assert '"WANDB_API_KEY": "***"' in written
    assert "12345" not in written
    assert "run directory railhead-runs/" in capfd.readouterr().err


def test_a_fault_of_ours_still_closes_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = FakeCluster(1)
    monkeypatch.setattr(cluster, "acquire", lambda keep: 1 // 0)
    with pytest.raises(LauncherError, match="a fault in the launcher itself") as caught:
        run(JobSpec(Program(ProgramKind.SCRIPT, "succeed")), cluster)
    assert caught.value.exit_code == EXIT_INTERNAL
    assert "ZeroDivisionError" in caught.value.message
    assert cluster.is_closed
