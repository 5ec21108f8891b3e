"""Jobs from Python: the same words as on the command line, typed errors, facts, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from launcher.errors import RequestRefused, SpecError
from tests.launcher.launched import ROOT, Launched, Process, children_of, wait_until

GOOD = 'import os; print("rank", os.environ["RANK"], "größer", flush=True)\n'
BAD = 'import os\nif os.environ["RANK"] == "1": raise ValueError("broken")\nimport time\ntime.sleep(600)\n'
WAITS = """
import os, pathlib, time
pathlib.Path("ready." + os.environ["RANK"]).touch()
try:
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path("interrupted." + os.environ["RANK"]).touch()
    raise
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("PET_", "RAY_ADDRESS", "RAILHEAD_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def descendants(pid: int) -> set[Process]:
    found, todo = set(), [pid]
    while todo:
        for child in children_of(todo.pop()):
            try:
                found.add(Process.of(child))
            except OSError:
                continue
            todo.append(child)
    return found


def none_is_left(processes: set[Process]) -> bool:
    return not any(process.is_alive() for process in processes)


def test_a_job_runs_to_its_end_and_prints_where_python_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook that is the cell, not the terminal of whoever started the kernel."""
    (here / "train.py").write_text(GOOD)
    result = launcher.run(["--nproc-per-node", "2", "train.py"])
    assert (result.exit_code, result.num_attempts, result.failures) == (0, 1, ())
    assert result.run_dir is not None and Path(result.run_dir, "journal.jsonl").exists()
    assert result.goodput is not None and sum(result.goodput.shares.values()) == pytest.approx(1)
    out, err = capsys.readouterr()
    assert out == "[rank0] rank 0 größer\n"
    assert err.startswith("launcher: 2 ranks on this machine") and "launcher: done in" in err


def test_a_spec_runs_as_its_words_would(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "train.py").write_text(GOOD)
    program = launcher.Program(launcher.ProgramKind.SCRIPT, "train.py")
    assert launcher.run(launcher.JobSpec(program, nproc_per_node=2), show=False).is_success
    assert capsys.readouterr() == ("", "")


def test_a_failed_job_is_an_error_with_the_facts_of_its_failure(here: Path) -> None:
    (here / "train.py").write_text(BAD)
    with pytest.raises(launcher.JobFailed, match=r"rank 1 on .* failed: ValueError: broken") as caught:
        launcher.run("--nproc-per-node 2 train.py", show=False)
    failure = caught.value.result.failure
    assert (caught.value.result.exit_code, failure.rank, failure.exception) == (1, 1, "ValueError")
    assert "ValueError: broken" in failure.traceback and Path(failure.log).exists()
    assert pickle.loads(pickle.dumps(caught.value)).result == caught.value.result


@pytest.mark.parametrize(
    "words", [["tran.py"], ["--nprocs", "2", "train.py"], ["--nproc-per-node", "0", "train.py"], []]
)
def test_what_the_command_refuses_is_refused_at_once_in_the_same_words(here: Path, words: list[str]) -> None:
    (here / "train.py").write_text(GOOD)
    with pytest.raises(SpecError) as caught:
        launcher.Job(words)
    command = subprocess.run([sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False)
    assert command.stderr == f"launcher: {caught.value}\n"


def test_what_cannot_be_had_is_an_error_of_its_own_type(here: Path) -> None:
    (here / "train.py").write_text(GOOD)
    spec = launcher.JobSpec(launcher.Program(launcher.ProgramKind.SCRIPT, "train.py"), min_nodes=2, max_nodes=2)
    with launcher.Job(spec, show=False) as job, pytest.raises(RequestRefused, match="there is only this machine"):
        job.wait()


def test_a_job_is_watched_and_ended_and_leaves_nothing(here: Path) -> None:
    (here / "train.py").write_text(WAITS)
    with launcher.Job("--nproc-per-node 2 train.py", show=False) as job:
        wait_until(lambda: (here / "ready.0").exists() and (here / "ready.1").exists(), "both ranks")
        wait_until(lambda: job.status.state == "running", "it to be said")
        assert not job.status.is_over
        with pytest.raises(TimeoutError, match="it goes on"):
            job.wait(timeout_s=0.01)
        report = job.report()
        assert report is not None and report["state"] == "running"
        processes = descendants(job.pid) | {Process.of(job.pid)}
        assert len(processes) > 4
    assert none_is_left(processes)
    assert job.wait().exit_code == 143
    assert job.status.state == "failed" and job.status.is_over
    stopped = job.stop()
    assert stopped is not None and stopped.exit_code == 143, "stopping what is over does nothing"


NOTEBOOK = """
import launcher, os, pathlib, sys
try:
    launcher.run("--nproc-per-node 2 train.py", show=False)
except KeyboardInterrupt:
    pathlib.Path("cell interrupted").touch()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_kernel_that_is_interrupted_or_killed_leaves_no_process(here: Path, signum: signal.Signals) -> None:
    (here / "train.py").write_text(WAITS)
    with Launched(here, program=("-c", NOTEBOOK)) as kernel:
        kernel.wait_for_file("ready.0", "ready.1")
        assert len(kernel.seen) > 4
        kernel.process.send_signal(signum)
        kernel.process.wait(60)
        if signum == signal.SIGINT:
            assert (here / "cell interrupted").exists()
            assert none_is_left(kernel.seen), "run returns when all has ended"
            assert (here / "interrupted.0").exists() and (here / "interrupted.1").exists()
        wait_until(lambda: none_is_left(kernel.seen), "all to be gone")


def test_a_launcher_that_is_killed_is_a_failed_job(here: Path) -> None:
    (here / "train.py").write_text(WAITS)
    with launcher.Job("train.py", show=False) as job:
        wait_until(lambda: (here / "ready.0").exists(), "the rank")
        os.kill(job.pid, signal.SIGKILL)
        result = job.wait()
    assert (result.exit_code, result.reason) == (137, "its launcher ended without a word")
    assert job.status.state == "lost"


def test_the_manuals_example_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands in docs/launcher.md, with a script that fails for one learning rate."""
    (here / "train.py").write_text(
        'import os, sys\nif sys.argv[-1] == "nan" and os.environ["RANK"] == "1": raise FloatingPointError("loss is nan")\n'
    )
    section = (ROOT / "docs" / "launcher.md").read_text().partition("## From Python")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "docs/launcher.md", "exec"), {})
    assert re.search(r"^1 1 \S+ FloatingPointError /.*stderr\.log$", capsys.readouterr().out, re.MULTILINE)


def test_importing_the_package_stays_light() -> None:
    """Training scripts import it for `pause_watch`."""
    code = (
        "import launcher, sys; launcher.pause_watch;"
        "sys.exit(bool({'launcher.job', 'launcher.cli', 'torch', 'ray', 'subprocess'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(launcher.__all__) <= {name for name in launcher.__all__ if hasattr(launcher, name)}
