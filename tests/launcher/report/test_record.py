"""The record reads what the launcher writes: the very classes, through a real journal."""

from __future__ import annotations

from pathlib import Path

from launcher import journal
from launcher.controller import SystemClock
from launcher.gang import events, health, stragglers, tally
from launcher.gang.events import (
    ExceptionRecord,
    ExitStatus,
    NodeJoined,
    NodeLost,
    NodesReady,
    OpenStore,
    RankExited,
    RankHung,
    ReportFailure,
    StartRanks,
    StopAttempt,
    StoreAddress,
)
from launcher.gang.stragglers import Straggling
from launcher.gang.tally import GangProgress
from launcher.gang.world import NodeInfo, arrange
from launcher.journal import FileJournal, JobBegan, JobEnded, read_journal
from launcher.report.record import _TAKES, RunRecord

NODES = (NodeInfo("n0", "host-0", "10.0.0.1", 2), NodeInfo("n1", "host-1", "10.0.0.2", 2))


def recorded(directory: Path, *entries: object) -> RunRecord:
    path = str(directory / "journal.jsonl")
    heard: list[journal.Entry] = []
    file = FileJournal(path, SystemClock(), lambda text: None, heard.append)
    for entry in entries:
        file.record(entry)
    file.close()
    assert list(read_journal(path)) == heard, "who listens is told what a reader finds"
    return RunRecord(heard)


def test_every_kind_that_is_read_is_one_that_is_written() -> None:
    """A class that is renamed would silently be missing from every report."""
    modules = (events, health, stragglers, tally, journal)
    assert [kind for kind in _TAKES if not any(hasattr(module, kind) for module in modules)] == []


def test_a_jobs_life_is_read_back_from_the_entries_that_it_writes(tmp_path: Path) -> None:
    world = arrange(NODES, None, 2)
    died = RankExited(
        *(0, "n1", 3, 1, 77),
        ExitStatus(code=1),
        5.0,
        stderr_log="/x/stderr.log",
        exception=ExceptionRecord("ValueError", "broken\nmore", "Traceback …", 4.0),
        steps=9,
    )
    hung = RankHung(1, "n0", 1, "stays in one place", 6.0)
    run = recorded(
        tmp_path,
        JobBegan("/x", "Ray cluster", ("launcher", "train.py"), 12, "head"),
        NodesReady(NODES),
        OpenStore(0, "n0"),
        StartRanks(events.AttemptPlan(0, world, StoreAddress("10.0.0.1", 1))),
        GangProgress(0, 4, 4, 8, 0.5, 64, 100, 20, (3,), (), False, 0.25, 0.1),
        Straggling(3, 0.5, 0.2, 0.6, True),
        died,
        ReportFailure(0, died, ""),
        StopAttempt(0, "n0", 30.0, 15),
        NodeLost("n1", "the power failed", 5.0),
        NodeJoined(NodeInfo("n2", "host-2", "10.0.0.3", 2)),
        OpenStore(1, "n0"),
        hung,
        ReportFailure(1, hung, ""),
        JobEnded(1, "no restart left", 2, 9.0),
    )
    first, second = run.attempts
    assert (first.num_ranks, first.hosts, first.steps, first.done_steps) == (4, ("host-0", "host-1"), 9, 20)
    assert first.failure is not None and second.failure is not None
    assert str(first.failure) == "rank 3 on host-1 failed: ValueError: broken (exit code 1)"
    assert (first.failure.what, first.failure.log) == ("exception", "/x/stderr.log")
    assert str(first.stragglers[3]).startswith(
        "rank 3 on host-1: 0.5 s of its own in each step, mostly waiting for data"
    )
    assert str(second.failure) == "rank 1 on host-0 hangs: stays in one place"
    assert len(second.named_hangs) == 1
    assert [event.text for event in run.node_events] == ["node host-1 lost: the power failed", "node host-2 joined"]
    assert run.ending is not None and (run.ending.exit_code, run.num_restarts) == (1, 1)


def test_a_later_root_cause_replaces_the_first_one(tmp_path: Path) -> None:
    """The rank that complained first is often not the one that broke."""
    first = RankExited(0, "n0", 0, 0, 1, ExitStatus(signum=6), 5.0)
    root = RankExited(0, "n0", 1, 1, 2, ExitStatus(signum=9), 4.0, cause="killed for memory", out_of_memory=True)
    run = recorded(
        tmp_path,
        NodesReady(NODES),
        OpenStore(0, "n0"),
        ReportFailure(0, first, ""),
        events.ReportCollateral(0, root, True, (first,)),
    )
    assert run.attempt is not None and run.attempt.failure is not None
    assert str(run.attempt.failure) == "rank 1 on host-0 failed: signal 9 (SIGKILL): killed for memory"
    assert run.attempt.failure.what == "killed for memory"
