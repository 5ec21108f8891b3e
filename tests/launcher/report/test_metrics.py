"""Metrics of a job: what is in the table is what is served, in a form that Prometheus takes, and only where it is asked for."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher import cli
from launcher.errors import SpecError
from launcher.gang.tally import GangProgress
from launcher.report.exporter import Exporter
from launcher.report.metrics import COUNTERS, GAUGES, LABELS, PREFIX
from tests.launcher.launched import ROOT, launch, wait_until
from tests.launcher.report.journals import MONO_S, Story

RUN_DIR = "/runs/20261125-141615-d875"


def exported(story: Story, file: Path, progress: GangProgress | None = None, at_s: float = 0.0) -> dict[str, float]:
    """Sample names with their labels (but `run`) → values."""
    exporter = Exporter(RUN_DIR, None, str(file), lambda text: None)
    for entry in story.entries:
        exporter.entry(entry)
    if progress is not None:
        exporter.progress(progress, MONO_S + at_s)
    exporter.close()
    return read(file.read_text())


def read(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            labels = {key: value for key, value in sample.labels.items() if key != "run"}
            name = sample.name.removeprefix(PREFIX) + "".join(f"{{{value}}}" for value in labels.values())
            found[name] = sample.value
    return found


def a_story() -> Story:
    story = Story().begin().attempt(2, 0).steps(10, 0, 1).steps(20, 0, 11).fail(20, 0)
    story.tell(20.5, "NodeLost", node_id="n0", reason="the power failed")
    return story.attempt(21, 1).steps(25, 1, 1, samples=16)


PROGRESS = GangProgress(1, 2, 2, 21, 4.0, 336, 100, 11, (1,), (), False, 1.0, 0.25)


def test_what_is_served_says_what_the_report_says(tmp_path: Path) -> None:
    found = exported(a_story(), tmp_path / "job.prom", PROGRESS, at_s=45.25)
    expected = {
        "state{running}": 1,
        "state{done}": 0,
        "restarts_total": 1,
        "failures_total{rank}": 1,
        "failures_total{hang}": 0,
        "node_events_total{lost}": 1,
        "attempt": 1,
        "ranks": 2,
        "ranks_alive": 2,
        "step": 32,
        "expected_steps": 100,
        "samples_per_second": 16,
        "step_age_seconds": 0.25,
        "data_wait_ratio": 0.2,
        "remaining_seconds": 68,
        "straggling_ranks": 1,
        "steps_total": 32,
        "time_seconds{start}": 10,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    kinds = [value for name, value in found.items() if name.startswith("time_seconds")]
    assert sum(kinds) == pytest.approx(45.25)


def test_what_is_not_known_is_left_out_and_never_zero(tmp_path: Path) -> None:
    found = exported(Story().begin().attempt(2, 0), tmp_path / "job.prom")
    assert "step" not in found and "samples_per_second" not in found and "expected_steps" not in found


def test_the_manuals_table_is_what_there_is(tmp_path: Path) -> None:
    """A metric without a word in the manual, or a word without its metric, is a dashboard that stays empty."""
    section = (ROOT / "docs" / "launcher.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = {name.partition("{")[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == {*GAUGES, *(f"{name}_total" for name in COUNTERS)}
    found = exported(a_story(), tmp_path / "job.prom", PROGRESS, at_s=45.25)
    assert {name.partition("{")[0] for name in found} == named, "each is served where all is known"
    assert set(LABELS) <= {*GAUGES, *COUNTERS}


def test_they_are_served_while_a_job_runs_and_its_port_is_free_afterwards(tmp_path: Path) -> None:
    script = "import pathlib, time\nwhile not pathlib.Path('enough').exists(): time.sleep(0.05)\n"
    with launch(tmp_path, script, "--metrics", "127.0.0.1:0", "--metrics-file", "job.prom") as job:
        said = b""
        assert job.process.stderr is not None
        while b"/metrics\n" not in said:
            line = job.process.stderr.readline()
            assert line, said
            said += line
        url = re.search(rb"metrics at (http://127\.0\.0\.1:(\d+)/metrics)", said)
        assert url is not None

        def served() -> dict[str, float]:
            with urllib.request.urlopen(url[1].decode(), timeout=30) as answer:
                return read(answer.read().decode())

        wait_until(lambda: served().get("state{running}") == 1, "the job to be seen running")
        (tmp_path / "enough").touch()
        assert job.finish()[0] == 0
    assert read((tmp_path / "job.prom").read_text())["state{done}"] == 1, "the file has the last word"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past may linger
        probe.bind(("127.0.0.1", int(url[2])))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metrics", "9400"], "--metrics 9400: not an address"),
        (["--metrics-file", "no/such/dir/job.prom"], "--metrics-file no/such/dir/job.prom: No such file"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("open('started', 'w')")
    assert cli.main([*flags, "train.py"]) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SpecError, match="Address already in use"):
            Exporter(RUN_DIR, taken.getsockname(), None, lambda text: None)


def test_a_launcher_without_metrics_does_not_import_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    code = (
        "import sys; from launcher.cli import main; code = main(['train.py']);"
        "sys.exit(code or bool({'prometheus_client', 'http.server'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
