"""Stopping from outside: SIGINT and SIGTERM to the launcher reach every rank once, with grace; a second one does not wait."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.launcher.launched import launch, wait_until

POLITE = """
import os, signal, sys, time
rank = os.environ["RANK"]
def leave(signum, frame):
    open(f"saved.{rank}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open(f"ready.{rank}", "w").close()
time.sleep(600)
"""
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: open("asked." + os.environ["RANK"], "w").close())
open("ready." + os.environ["RANK"], "w").close()
while True: time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_get_sigterm_and_time_to_save(tmp_path: Path, signum: signal.Signals) -> None:
    with launch(tmp_path, POLITE, "--nproc-per-node", "2", "--max-restarts", "3") as launched:
        launched.wait_for_file("ready.0", "ready.1")
        launched.process.send_signal(signum)
        code, _, err = launched.finish()
    assert code == 128 + signum
    assert (tmp_path / "saved.0").exists()
    assert (tmp_path / "saved.1").exists()
    assert f"{signum.name}: stopping all ranks (SIGTERM, SIGKILL after 30 s" in err
    assert f"exit code {code}: stopped by {signum.name}" in err


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN, "--nproc-per-node", "2", "--shutdown-timeout", "3600") as launched:
        launched.wait_for_file("ready.0", "ready.1")
        launched.process.send_signal(signal.SIGINT)
        launched.wait_for_file("asked.0", "asked.1")
        launched.process.send_signal(signal.SIGINT)
        code, _, err = launched.finish()
    assert code == 130
    assert "killing what is left at once" in err


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN, "--shutdown-timeout", "1") as launched:
        launched.wait_for_file("ready.0")
        launched.process.send_signal(signal.SIGTERM)
        code, _, _ = launched.finish()
        assert code == 143
        assert (tmp_path / "asked.0").exists()
        assert [entry.fields["status"]["signum"] for entry in launched.journal("RankExited")] == [9]


def test_only_the_main_process_of_a_rank_gets_sigterm(tmp_path: Path) -> None:
    """Data loaders that die of our SIGTERM take the emergency checkpoint with them."""
    script = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
def leave(signum, frame):
    time.sleep(0.3)
    print("child", "alive" if child.poll() is None else "dead", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open("ready", "w").close()
time.sleep(600)
"""
    with launch(tmp_path, script) as launched:
        launched.wait_for_file("ready")
        launched.process.send_signal(signal.SIGTERM)
        _, out, _ = launched.finish()
    assert out == "[rank0] child alive\n"


def test_a_launcher_that_was_told_to_ignore_sighup_goes_on(tmp_path: Path) -> None:
    """nohup: what was ignored when we started stays ignored."""
    script = 'import os, time\nopen("ready", "w").close()\nwhile not os.path.exists("go"): time.sleep(0.02)'
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launched = launch(tmp_path, script)
    finally:
        signal.signal(signal.SIGHUP, before)
    with launched:
        launched.wait_for_file("ready")
        launched.process.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        assert launched.finish()[0] == 0


def test_a_rank_is_born_with_the_signals_of_a_fresh_process(tmp_path: Path) -> None:
    """A rank that ignored SIGPIPE or blocked SIGTERM because we do would hang where it used to end."""
    script = """
for line in open("/proc/self/status"):
    if line.startswith(("SigBlk", "SigIgn")): print(line.strip())
"""
    command = ["--no-python", "sh", "-c", "grep -E 'SigBlk|SigIgn' /proc/self/status"]
    with launch(tmp_path, script) as launched:
        _, python_out, _ = launched.finish()
    from tests.launcher.launched import Launched

    with Launched(tmp_path, *command) as launched:
        _, shell_out, _ = launched.finish()
    assert "SigBlk:\t0000000000000000" in python_out
    assert "SigBlk:\t0000000000000000" in shell_out
    assert "SigIgn:\t0000000000000000" in shell_out


def test_the_job_ends_while_its_terminal_is_stuck_when_told_twice(tmp_path: Path) -> None:
    """Ctrl-S, or a pager nobody scrolls: output waits, stopping does not."""
    script = 'print("x" * 1000, flush=True)\nopen("ready", "w").close()\nwhile True: print("y" * 1000)'
    with launch(tmp_path, script, "--shutdown-timeout", "1") as launched:
        launched.wait_for_file("ready")  # and nobody reads the launcher's standard output: its pipe fills up
        launched.process.send_signal(signal.SIGTERM)
        wait_until(lambda: launched.journal("AttemptEnded"), "the rank to be stopped")
        launched.process.send_signal(signal.SIGTERM)
        launched.process.wait(60)
        assert launched.process.returncode == 143
