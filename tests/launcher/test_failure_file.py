"""`failure.json` says what the terminal says, for programs, in the schema that docs/launcher.md gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

from launcher.failure_file import VERSION, FailureFile, describe
from launcher.gang.causes import Kind
from launcher.gang.events import ExceptionRecord, ExitStatus, NodeLost, RankExited, RankHung
from launcher.gang.world import NodeInfo, World
from tests.launcher.launched import ROOT, launch

WORLD = World((NodeInfo("a", "hosta", "10.0.0.1", 4),))
BROKE = ExceptionRecord("ValueError", "it broke", "Traceback…\nValueError: it broke\n", 5.0)
GLOO = ExceptionRecord("RuntimeError", "[/w/gloo/pair.cc:1] Connection closed by peer", "…", 5.1)


def failed(rank: int, at_s: float, exception: ExceptionRecord | None, status: ExitStatus | None = None) -> RankExited:
    return RankExited(0, "a", rank, rank, 7, status or ExitStatus(code=1), at_s, "/o", "/e", exception)


def test_there_is_no_file_while_nothing_has_failed(tmp_path: Path) -> None:
    file = FailureFile(str(tmp_path), print)
    file.ended(0, "every rank ended with 0")
    assert not (tmp_path / "failure.json").exists()


def test_a_failure_is_on_disk_when_it_is_told_and_completed_later(tmp_path: Path) -> None:
    """Whoever watches the file knows the cause while the ranks are still being stopped."""
    file = FailureFile(str(tmp_path), print)
    root, others = failed(1, 5.0, BROKE), (failed(0, 5.2, GLOO), failed(2, 5.3, None, ExitStatus(signum=15)))
    file.told(0, root, "stopping the other 2 ranks", WORLD)
    data = json.loads((tmp_path / "failure.json").read_text())
    assert (data["version"], data["exit_code"]) == (VERSION, None)
    assert data["attempts"][0]["root"]["cause"] == "ValueError: it broke (exit code 1)"
    file.concluded(0, root, others, WORLD)
    file.ended(1, "no restart")
    data = json.loads((tmp_path / "failure.json").read_text())
    assert (data["exit_code"], data["reason"]) == (1, "no restart")
    assert [(other["rank"], other["kind"]) for other in data["attempts"][0]["others"]] == [
        (0, "lost its peer"),
        (2, "stopped by the launcher"),
    ]
    assert not (tmp_path / "failure.json.tmp").exists()


def test_a_disk_that_cannot_be_written_is_said_once_and_costs_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    file = FailureFile(str(tmp_path / "none"), said.append)
    file.told(0, failed(1, 5.0, BROKE), "", WORLD)
    file.ended(1, "no restart")
    assert len(said) == 1


def test_a_hang_has_its_rank_and_its_kind() -> None:
    found = describe(RankHung(0, "a", 3, "left the common step", 1.0), WORLD)
    assert (found["rank"], found["kind"], found["cause"]) == (3, "hung", "left the common step")


def test_the_manual_names_every_field_and_no_other() -> None:
    """The schema is a promise to other programs."""
    page = (ROOT / "docs" / "launcher.md").read_text()
    table = page.partition("### failure.json")[2].partition("\n## ")[0]
    kinds = re.search(r"^\| `kind` \|(.*)$", table, re.MULTILINE)
    assert kinds
    assert {kind.value for kind in Kind} == set(re.findall("`(.*?)`", kinds[1]))
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    fields = {"version", "run_dir", "exit_code", "reason", "attempts"}
    fields |= {"attempt", "root", "others", "num_others", "consequence"}
    fields |= set(describe(failed(0, 1.0, BROKE), WORLD, failed(1, 0.5, BROKE)))
    fields |= set(describe(NodeLost("a", "no answer", 1.0), WORLD))
    assert named == fields


NOISY = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    raise ValueError("it broke")
dist.all_reduce(torch.ones(4))
"""


def test_a_value_error_on_one_rank_is_told_on_the_first_line_and_once_in_few_lines(tmp_path: Path) -> None:
    """torchrun: line 10 of 63. The shown rank's own pages about its lost peer are folded into one line; its log has them."""
    with launch(tmp_path, NOISY, "--nproc-per-node", "2") as launched:
        code, out, err = launched.finish()
        data = json.loads((launched.run_dir / "failure.json").read_text())
        log = (launched.run_dir / "attempt_0" / "rank_0" / "stderr.log").read_text()
    # On a crowded machine an interpreter may take seconds to end, which is said.
    lines = [line for line in (*out.splitlines(), *err.splitlines()) if "has not ended yet" not in line]
    assert code == 1
    assert "rank 1 on" in lines[1], err
    assert "ValueError: it broke" in lines[1]
    assert len(lines) <= 25, err
    assert err.count("Traceback (most recent call last)") == 1, err
    assert (data["exit_code"], data["attempts"][0]["root"]["rank"]) == (1, 1)
    if data["attempts"][0]["others"][0]["exception"]:  # it may have been stopped before it noticed
        assert "rank 0 on" in err
        assert "lost its peer" in err
        # Our SIGTERM may come between its telling and its printing; then the traceback is in failure.json alone.
        assert "Traceback" in log or "while it ended" in data["attempts"][0]["others"][0]["cause"]


def test_a_shown_ranks_own_traceback_stands_once_and_below_its_cause(tmp_path: Path) -> None:
    script = "import sys\nprint('words before', file=sys.stderr)\nraise ValueError('it broke')"
    with launch(tmp_path, script, "--tee", "2") as launched:
        _, _, err = launched.finish()
        log = (launched.run_dir / "attempt_0" / "rank_0" / "stderr.log").read_text()
    lines = err.splitlines()
    assert lines[1].endswith("words before")
    assert any("failed: ValueError: it broke" in line for line in lines[2:4])
    assert err.count("Traceback") == 1
    assert log.count("Traceback") == 1, "the file has everything"


def test_a_traceback_of_a_rank_that_does_not_end_is_shown_after_a_moment(tmp_path: Path) -> None:
    """A hook that waits (a debugger), a clean-up that hangs: nobody reports an end, so the words themselves must be seen."""
    script = (
        "import os, sys, threading, time\n"
        "def wait():\n"
        "    while not os.path.exists('go'): time.sleep(0.02)\n"
        "threading.Thread(target=wait).start()\n"
        "raise ValueError('it broke')"
    )
    with launch(tmp_path, script) as launched:
        assert launched.process.stderr
        seen = b""
        while b"ValueError" not in seen:
            line = launched.process.stderr.readline()
            assert line, seen
            seen += line
        assert b"[rank0] Traceback" in seen or b"has raised ValueError: it broke" in seen
        while b"[rank0] ValueError: it broke" not in seen or b"has raised ValueError: it broke" not in seen:
            line = launched.process.stderr.readline()
            assert line, seen
            seen += line
        (tmp_path / "go").touch()
        assert launched.finish()[0] == 1


def test_what_goes_wrong_while_ranks_save_is_shown_by_its_own_traceback(tmp_path: Path) -> None:
    """A signal to the launcher ends the job whatever ranks do then, so nothing else would tell."""
    script = (
        "import signal, time\n"
        "def save(*_): raise OSError('disk full')\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(600)"
    )
    with launch(tmp_path, script) as launched:
        launched.wait_for_file("ready")
        launched.process.terminate()
        _, _, err = launched.finish()
    assert "[rank0] OSError: disk full" in err
