"""What a rank leaves to say why it ended is understood, and never hides that it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.gang.events import ExceptionRecord, ExitStatus, NodeLost, RankExited
from launcher.gang.world import NodeInfo, World
from launcher.messages import collateral_report, failure_report
from launcher.node.failure import Left, Traces, last_lines, read_exception, what_was_left
from launcher.node.memory_kills import MemoryKills

WORLD = World((NodeInfo("a", "hosta", "10.0.0.1", 4),))


def test_torchs_record_is_dated_by_its_writing_not_by_its_whole_seconds(tmp_path: Path) -> None:
    """With @record two ranks that fail in the same second would be a tie."""
    path = tmp_path / "error.json"
    extra = {"py_callstack": "Traceback…\n", "timestamp": "1700000000"}
    path.write_text(json.dumps({"message": {"message": "KeyError: 'a: b'", "extraInfo": extra}}))
    os.utime(path, (1.0, 1700000000.75))
    assert read_exception(str(path)) == ExceptionRecord("KeyError", "'a: b'", "Traceback…\n", 1700000000.75)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"message": 3}', '{"message": {"extraInfo": {}}}', '{"other": 1}']
)
def test_a_record_that_is_torn_or_foreign_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "error.json"
    path.write_text(text)
    assert read_exception(str(path)) is None
    assert read_exception(str(tmp_path / "none")) is None


def test_the_last_lines_are_the_last_that_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "stderr.log"
    path.write_bytes(b"x" * 10_000 + b"\nfirst\n\n  \nsecond \xff\n\n")
    assert last_lines(str(path), 2) == "first\nsecond \ufffd"
    assert last_lines(str(tmp_path / "none")) == ""


CRASH = """Fatal Python error: Segmentation fault

Thread 0x01 (most recent call first):
  File "/usr/lib/threading.py", line 1 in wait

Current thread 0x02 (most recent call first):
  File "/usr/lib/ctypes/__init__.py", line 519 in string_at
  File "/job/train.py", line 11 in load
"""


def left(tmp_path: Path, status: ExitStatus, **files: str) -> Left:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    traces = Traces(*(str(tmp_path / name) for name in ("error", "exit", "crash", "stderr")))
    return what_was_left(status, traces, 1, MemoryKills(str(tmp_path)))


def test_a_crash_is_told_by_the_stack_of_the_thread_that_crashed(tmp_path: Path) -> None:
    found = left(tmp_path, ExitStatus(signum=11), crash=CRASH)
    assert found.cause == "in native code, called at /usr/lib/ctypes/__init__.py:519 in string_at"
    assert found.words.splitlines()[0].startswith("Current thread")
    assert "train.py" in found.words
    assert "threading.py" not in found.words


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("terminate called after throwing an instance of 'E'\n  what():  sizes differ\n", "sizes differ"),
        ("python: x.c:3: f: Assertion `n > 0' failed.\n", "python: x.c:3: f: Assertion `n > 0' failed."),
        ("free(): invalid pointer\n", "free(): invalid pointer"),
        ("*** stack smashing detected ***: terminated\n", "*** stack smashing detected ***: terminated"),
    ],
)
def test_an_abort_is_told_in_the_words_of_whoever_aborted(tmp_path: Path, said: str, cause: str) -> None:
    assert left(tmp_path, ExitStatus(signum=6), stderr=said).cause == cause


def test_an_abort_after_the_programs_end_is_told_as_that(tmp_path: Path) -> None:
    """torch does so now and then, when a thread of its own is not joined yet: no training is lost. torchrun calls it a failure, too."""
    said = "result 3.5\nterminate called without an active exception\n"
    found = left(tmp_path, ExitStatus(signum=6), stderr=said, exit='{"has_ended": true}')
    assert found.cause.startswith("the program had come to its end")
    assert found.cause.endswith(", terminate called without an active exception")


def test_a_refusal_of_an_argument_parser_is_told_in_its_words(tmp_path: Path) -> None:
    said = "usage: train.py [-h]\ntrain.py: error: unrecognized arguments: --foo\n"
    found = left(tmp_path, ExitStatus(code=2), stderr=said, exit='{"code": "2", "where": "train.py:5 in main"}')
    assert found.cause == "train.py: error: unrecognized arguments: --foo; sys.exit(2) at train.py:5 in main"


def failed(rank: int, at_s: float, message: str = "it broke") -> RankExited:
    record = ExceptionRecord("ValueError", message, f"Traceback…\nValueError: {message}\n", at_s)
    return RankExited(0, "a", rank, rank, 1, ExitStatus(code=1), at_s, "/o", f"/run/rank_{rank}/stderr.log", record)


def test_a_report_leads_with_rank_host_cause_and_log() -> None:
    report = failure_report(failed(2, 5.0, "line one\nline two"), WORLD).splitlines()
    assert report[0] == "rank 2 on hosta failed: ValueError: line one (exit code 1); log /run/rank_2/stderr.log"
    assert report[1:] == ["  Traceback…", "  ValueError: line one", "  line two"]


def test_consequences_are_listed_in_order_of_time_shortened_and_counted() -> None:
    others = tuple(failed(rank, 5.0 + rank, "x" * 1000) for rank in (3, 1, 2))
    lines = collateral_report(failed(0, 5.0), False, others, WORLD).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "3"]
    assert all(len(line) < 300 for line in lines)
    assert lines[1].endswith("… (exit code 1); log /run/rank_1/stderr.log (+1.00 s)")
    many = tuple(failed(rank, 6.0) for rank in range(100))
    assert collateral_report(failed(0, 5.0), False, many, WORLD).splitlines()[-1].startswith("  … and 92 more")


def test_an_earlier_failure_that_is_learnt_of_late_is_told_as_the_root() -> None:
    lines = collateral_report(failed(3, 4.0), True, (failed(0, 5.0),), WORLD).splitlines()
    assert lines[0].startswith("the root cause is an earlier failure: rank 3 on hosta failed")


def test_nothing_is_said_when_there_is_nothing_to_add() -> None:
    assert collateral_report(failed(0, 5.0), False, (), WORLD) == ""


def test_a_lost_node_is_called_by_its_host_name() -> None:
    assert failure_report(NodeLost("a", "no answer for 10 s", 1.0), WORLD) == "node hosta lost: no answer for 10 s"
