"""`status` and `report` as a person asks them: of a run that goes on, is done, was killed, or left half a journal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher import cli
from launcher.report.goodput import KINDS
from tests.launcher.launched import launch, wait_until
from tests.launcher.report.journals import Story


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAILHEAD_RUNS", raising=False)
    monkeypatch.setattr("launcher.report.find._fallback_base", lambda: tmp_path / "fallback")
    return tmp_path


def done_story() -> Story:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1, samples=16).steps(20, 0, 11, samples=176).fail(20, 0)
    return story.attempt(21, 1).steps(25, 1, 1, samples=16).steps(45, 1, 21, samples=336).end(45)


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert "Traceback (most recent call last)" not in out + err
    return code, out, err


def test_a_run_is_found_by_id_by_directory_and_as_the_last_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = here / "railhead-runs"
    directory = done_story().write(base)
    (base / "latest").symlink_to(directory.name)
    said = {ask(capsys, "report", *words)[1] for words in ((), ("latest",), (directory.name,), (str(directory),))}
    assert len(said) == 1
    assert said.pop().startswith(f"{directory}: done\n")


def test_runs_elsewhere_are_found_where_the_environment_says(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = done_story().write(here / "elsewhere")
    monkeypatch.setenv("RAILHEAD_RUNS", str(here / "elsewhere"))
    assert ask(capsys, "status", directory.name)[0] == 0


def test_the_report_says_where_the_time_went_and_why_an_attempt_ended(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = done_story().write(here)
    code, out, err = ask(capsys, "report", f"./{directory.name}")
    assert (code, err) == (0, "")
    assert "goodput 66.7 %" in out
    shares = [float(share) for share in re.findall(r"^  \w[\w ]{9} +([\d.]+) %", out, re.MULTILINE)]
    assert len(shares) == len(KINDS)
    assert abs(sum(shares) - 100) <= 1
    assert "rank 1 on host-0 failed: ValueError: broken (exit code 1)" in out
    assert "log /runs/x/attempt_0/rank_1/stderr.log" in out


def test_a_straggler_is_named_with_its_host_and_what_it_costs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one machine of 128 that should be taken out."""
    story = Story().begin().attempt(2, 0)
    story.tell(60, "Straggling", rank=1, own_s=0.52, others_s=0.31, step_s=0.6, is_data=True, has_ended=False)
    directory = story.steps(70, 0, 90, stragglers=[1]).write(here)
    words = "slow: rank 1 on host-0: 0.52 s of its own in each step, mostly waiting for data; the others 0.31 s"
    assert words in ask(capsys, "report", str(directory))[1]
    assert words in ask(capsys, "status", str(directory))[1]
    data = json.loads(ask(capsys, "report", str(directory), "--json")[1])
    assert data["attempts"][0]["stragglers"][0]["host"] == "host-0"
    ask(capsys, "report", str(directory), "--html", "page.html")
    assert words in (here / "page.html").read_text()


def test_the_pace_of_a_job_that_is_noted_once_a_minute_is_known(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1, samples=8)
    for minute in range(1, 4):
        story.steps(10 + 61 * minute, 0, 61 * minute, samples=8 * 61 * minute, total_steps=1000)
    out = ask(capsys, "status", str(story.write(here)))[1]
    assert "step 183 of 1,000 · 8.0 samples/s · 14 min left" in out


def test_json_has_a_versioned_schema_and_the_same_facts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = done_story().write(here)
    for command in ("status", "report"):
        data = json.loads(ask(capsys, command, str(directory), "--json")[1])
        assert data["schema"] == "railhead.report/1"
        assert data["exit_code"] == 0
        assert sum(data["goodput"]["shares"].values()) == pytest.approx(1, abs=0.01)
        assert data["attempts"][0]["failure"]["exception"] == "ValueError"
        assert data["progress"]["step"] == 21


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_carries_everything_itself_and_shows_what_programs_say_as_text(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is mailed around and opened on machines without a network; an exception's words must not become markup."""
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).steps(30, 0, 21)
    story.fail(31, 0, "<script>alert(1)</script>").end(32, 1)
    directory = story.write(here)
    assert ask(capsys, "report", str(directory), "--html", "page.html")[0] == 0
    html = (here / "page.html").read_text()
    links = _Links()
    links.feed(html)
    assert links.outside == []
    assert "script" not in links.tags and links.tags.count("svg") == 4
    assert not re.search(r"url\(|@import|https?://", html)
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize("num_bytes", [0, 1, 40, 200, 700, 1500, 2500])
def test_a_journal_that_was_cut_anywhere_is_reported_up_to_there(
    here: Path, capsys: pytest.CaptureFixture[str], num_bytes: int
) -> None:
    directory = done_story().write(here)
    journal = directory / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:num_bytes])
    for command in ("status", "report"):
        code, out, err = ask(capsys, command, str(directory))
        if num_bytes < 200:
            assert code == 2
            assert "nothing is known of this run" in err
        else:
            assert code == 0
            assert "seen last on elsewhere" in out
            assert "was not finished" in err


def test_lines_that_mean_nothing_are_counted_and_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = done_story().write(here)
    journal = directory / "journal.jsonl"
    journal.write_bytes(b'\x00\xff\n{"v": 99, "kind": "New"}\n[1]\n' + journal.read_bytes())
    code, out, err = ask(capsys, "report", str(directory))
    assert code == 0 and ": done\n" in out
    assert "3 of the journal's lines cannot be read" in err


def test_what_is_no_run_is_said_with_what_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x").mkdir()
    for argv, words in (
        (("report",), "no run yet in"),
        (("status", "20261125-141615-ffff"), "no run 20261125-141615-ffff in"),
        (("status", "./nothing"), "no such run directory"),
        (("report", "./x"), "has no journal.jsonl"),
        (("report", "my-job"), "for a directory here write ./my-job"),
        (("report", "a", "b"), "wants one run"),
        (("status", "--html", "x"), "no such flag: --html"),
        (("report", "--html"), "--html needs a file"),
    ):
        code, _, err = ask(capsys, *argv)
        assert code == 2 and words in err, (argv, err)


def test_a_run_whose_launcher_is_gone_is_not_said_to_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process with the same number that began later is not it."""
    story = Story().begin(pid=os.getpid(), hostname=socket.gethostname()).attempt(2, 0).steps(10, 0, 1)
    directory = story.write(here)
    assert "is gone without a word" in ask(capsys, "status", str(directory))[1]


def test_status_of_any_other_name_is_about_kubernetes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided by the words alone: what lies on the disk, or is reachable, never changes what a command means."""
    asked: list[list[str]] = []
    monkeypatch.setattr("launcher.k8s.commands.COMMANDS", {"status": lambda argv: asked.append(argv) or 0})
    (here / "my-job").mkdir()
    (here / "my-job" / "journal.jsonl").write_bytes(done_story().lines)
    for argv in (["my-job"], ["my-job", "--json"], ["20261125-141615-d875", "-n", "team"], ["--context=c", "my-job"]):
        assert cli.main(["status", *argv]) == 0
        assert asked.pop() == argv
    assert cli.main(["status", "./my-job"]) == 0
    assert asked == []


TRAIN = """
import pathlib, sys, time, torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(80, 4)), batch_size=8)
for epoch in range(1000):
    for (batch,) in loader:
        model(batch).sum().backward()
        optimizer.step()
        time.sleep(0.01)
    pathlib.Path("trained").touch()
"""


def test_a_real_run_is_seen_while_it_runs_and_after_its_launcher_was_killed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps are in the journal as soon as they are made, so that SIGKILL leaves an account."""
    with launch(here, TRAIN, "--nproc-per-node", "2") as job:
        job.wait_for_file("trained")
        wait_until(lambda: any(e.fields["steps"] for e in job.journal("GangProgress")), "steps in the journal")
        code, out, _ = ask(capsys, "status")
        assert code == 0 and "attempt 0 runs, 2 ranks" in out and "step " in out
        data = json.loads(ask(capsys, "status", "--json")[1])
        assert data["state"] == "running" and data["progress"]["step"] > 0 and not data["is_over"]
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
        data = json.loads(ask(capsys, "report", "--json")[1])
        assert data["state"] == "lost" and data["exit_code"] is None
        assert data["goodput"]["seconds"]["start"] > 0
        assert sum(data["goodput"]["shares"].values()) == pytest.approx(1, abs=0.01)


def test_asking_imports_neither_torch_nor_ray_nor_kubernetes(here: Path) -> None:
    import subprocess

    done_story().write(here / "railhead-runs")
    code = (
        "import sys; from launcher.cli import main; main(['report', '20261125-141615-d875', '--json']);"
        "sys.exit(bool({'torch', 'ray', 'kubernetes'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=here, stdout=subprocess.DEVNULL).returncode == 0
