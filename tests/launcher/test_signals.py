"""Stopping from outside: the signal that the launcher is sent reaches every rank once, with grace; a second one does not wait."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launcher.launched import Launched, launch, wait_until

POLITE = """
import os, signal, sys, time
rank = os.environ["RANK"]
def leave(signum, frame):
    open(f"saved.{rank}", "w").write(signal.Signals(signum).name)
    sys.exit(0)
for name in ("SIGTERM", "SIGHUP", "SIGUSR1"): signal.signal(signal.Signals[name], leave)
open(f"ready.{rank}", "w").close()
time.sleep(600)
"""
STUBBORN = """
import os, signal, time
rank = os.environ["RANK"]
def stay(signum, frame):
    with open(f"heard.{rank}", "a") as file: file.write(signal.Signals(signum).name + " ")
    open(f"asked.{rank}", "w").close()
signal.signal(signal.SIGTERM, stay)
signal.signal(signal.SIGINT, stay)
open("ready." + os.environ["RANK"], "w").close()
while True: time.sleep(600)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ranks_get_the_signal_that_the_launcher_was_sent_and_time_to_save(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """As under torchrun: Slurm's `--signal=USR1@60` becomes a checkpoint in the script."""
    options = ["--nproc-per-node", "2", "--max-restarts", "3"]
    if signum == signal.SIGUSR1:
        options += ["--signals-to-handle", "SIGTERM,SIGUSR1"]
    with launch(tmp_path, POLITE, *options) as launched:
        launched.wait_for_file("ready.0", "ready.1")
        launched.process.send_signal(signum)
        code, _, err = launched.finish()
    assert code == 128 + signum
    assert [(tmp_path / f"saved.{rank}").read_text() for rank in range(2)] == [signum.name, signum.name]
    assert f"{signum.name}: stopping all ranks ({signum.name}, SIGKILL after 30 s" in err
    assert f"exit code {code}: stopped by {signum.name}" in err


def test_sigint_is_a_keyboard_interrupt_in_the_script(tmp_path: Path) -> None:
    """Scripts save in `except KeyboardInterrupt`; torchrun's users are used to it."""
    script = """
import os, time
rank = os.environ["RANK"]
try:
    open(f"ready.{rank}", "w").close()
    time.sleep(600)
except KeyboardInterrupt:
    open(f"saved.{rank}", "w").close()
    if rank == "1": raise
"""
    with launch(tmp_path, script, "--nproc-per-node", "2") as launched:
        launched.wait_for_file("ready.0", "ready.1")
        launched.process.send_signal(signal.SIGINT)
        code, _, err = launched.finish()
        ends = {entry.fields["rank"]: entry.fields["status"] for entry in launched.journal("RankExited")}
    assert code == 130
    assert (tmp_path / "saved.0").exists()
    assert (tmp_path / "saved.1").exists()
    assert ends == {0: {"code": 0, "signum": None}, 1: {"code": None, "signum": 2}}
    assert "failed" not in err, "whoever is told to stop has not failed"


def test_ctrl_c_on_a_terminal_reaches_ranks_from_us_alone(tmp_path: Path) -> None:
    """A terminal signals all of its foreground group. Ranks are not in it, or they would be interrupted twice: once in their clean-up.

    The sender is what tells: 0 is the kernel, for the terminal, and it would be the first.
    """
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
open("ready", "w").close()
print("from the guardian:", signal.sigwaitinfo([signal.SIGINT]).si_pid == os.getppid())
"""
    (tmp_path / "train.py").write_text(script)
    terminal_fd, tty_fd = os.openpty()
    # The leader of a session without a terminal gets the first one that it opens.
    on_terminal = f"""
import os, runpy
os.open({os.ttyname(tty_fd)!r}, os.O_RDWR)
runpy.run_module("launcher", run_name="__main__", alter_sys=True)
"""
    try:
        with Launched(tmp_path, "train.py", program=("-c", on_terminal)) as launched:
            launched.wait_for_file("ready")
            os.write(terminal_fd, b"\x03")
            code, out, _ = launched.finish()
    finally:
        os.close(terminal_fd)
        os.close(tty_fd)
    assert code == 130
    assert out == "[rank0] from the guardian: True\n"


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN, "--nproc-per-node", "2", "--shutdown-timeout", "3600") as launched:
        launched.wait_for_file("ready.0", "ready.1")
        launched.process.send_signal(signal.SIGINT)
        launched.wait_for_file("asked.0", "asked.1")
        launched.process.send_signal(signal.SIGINT)
        code, _, err = launched.finish()
    assert code == 130
    assert [(tmp_path / f"heard.{rank}").read_text() for rank in range(2)] == ["SIGINT ", "SIGINT "]
    assert "killing what is left at once" in err


def test_a_second_signal_reaches_the_ranks_where_that_is_asked_for(tmp_path: Path) -> None:
    """A warning first, the order later: both are the script's to answer, and the script ends by itself."""
    script = """
import os, signal, sys, time
def on_usr1(signum, frame): open("warned", "w").close()
def on_term(signum, frame): open("told", "w").close(); sys.exit(0)
signal.signal(signal.SIGUSR1, on_usr1)
signal.signal(signal.SIGTERM, on_term)
open("ready", "w").close()
while True: time.sleep(0.05)
"""
    options = ("--shutdown-timeout", "3600", "--second-signal", "forward", "--signals-to-handle", "SIGUSR1,SIGTERM")
    with launch(tmp_path, script, *options) as launched:
        launched.wait_for_file("ready")
        launched.process.send_signal(signal.SIGUSR1)
        launched.wait_for_file("warned")
        launched.process.send_signal(signal.SIGTERM)
        code, _, err = launched.finish()
    assert (tmp_path / "told").exists()
    assert code == 128 + signal.SIGUSR1
    assert "handed on to the ranks" in err


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN, "--shutdown-timeout", "1") as launched:
        launched.wait_for_file("ready.0")
        launched.process.send_signal(signal.SIGTERM)
        code, _, _ = launched.finish()
        assert code == 143
        assert (tmp_path / "asked.0").exists()
        assert [entry.fields["status"]["signum"] for entry in launched.journal("RankExited")] == [9]


def test_only_the_main_process_of_a_rank_gets_the_signal(tmp_path: Path) -> None:
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
