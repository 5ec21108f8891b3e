"""Whole launches on this machine: exit codes, restarts, a live store for each attempt, arguments, the cache child."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launcher.launched import Launched, launch

# --- exit codes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "exit_code", "cause"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, "exit code 7: sys.exit(7) at train.py:3 in <module>"),
        ("import sys; sys.exit('no data')", 1, "exit code 1: sys.exit('no data') at train.py:3 in <module>"),
        ("os._exit(4)", 4, "exit code 4: no exception and no sys.exit: os._exit, or a library that ended the process"),
        ("raise ValueError('it broke')", 1, "ValueError: it broke (exit code 1)"),
        ("import os; os.abort()", 134, "signal 6 (SIGABRT): in native code, called at {path}:3 in <module>"),
        ("os.kill(os.getpid(), 10)", 138, "signal 10 (SIGUSR1)"),
    ],
)
def test_the_exit_code_says_how_the_rank_ended(tmp_path: Path, script: str, exit_code: int, cause: str) -> None:
    with launch(
        tmp_path, f"import os\nif os.environ['RANK'] == '1':\n    {script}", "--nproc-per-node", "2"
    ) as launched:
        code, _, err = launched.finish()
        assert code == exit_code, err
        ended = launched.journal("JobEnded")
        assert [entry.fields["exit_code"] for entry in ended] == [exit_code]
    if exit_code:
        first = err.splitlines()[1]
        log = launched.run_dir.resolve() / "attempt_0" / "rank_1" / "stderr.log"
        assert (
            first
            == f"launcher: rank 1 on {os.uname().nodename} failed: {cause.format(path=tmp_path / 'train.py')}; log {log}"
        )


def test_the_last_words_of_a_rank_without_exception_are_shown(tmp_path: Path) -> None:
    script = "import sys\nprint('assertion failed in kernel', file=sys.stderr)\nimport os; os._exit(4)"
    with launch(tmp_path, script, "-r", "3") as launched:
        code, _, err = launched.finish()
    assert code == 4
    assert err.splitlines()[2] == "  assertion failed in kernel"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "import threading\nt = threading.Thread(target=lambda: 1 / 0, name='helper')\nt.start(); t.join()",
            "ZeroDivisionError: division by zero, in thread helper",
        ),
        ("import atexit\natexit.register(lambda: 1 / 0)", "ZeroDivisionError: division by zero, in an atexit callback"),
    ],
)
def test_an_exception_in_a_thread_that_ends_nothing_is_said_all_the_same(
    tmp_path: Path, script: str, words: str
) -> None:
    """The exit code stays 0, as under Python; the log of a rank that did well is read by nobody."""
    with launch(tmp_path, script, "--nproc-per-node", "2", "--show-ranks", "none") as launched:
        code, _, err = launched.finish()
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "ZeroDivisionError" in line]
    assert f"ended with exit code 0 all the same: {words}; log " in line


@pytest.mark.parametrize(
    ("text", "exit_code", "words"),
    [
        ("#!/bin/sh\nexit 5\n", 5, "exit code 5"),
        ("#!/no/such/interpreter\n", 127, "./program: No such file or directory"),
        ("no shebang, no program\n", 126, "./program: Exec format error"),
    ],
)
def test_a_program_that_cannot_be_executed_ends_as_in_a_shell(
    tmp_path: Path, text: str, exit_code: int, words: str
) -> None:
    (tmp_path / "program").write_text(text)
    (tmp_path / "program").chmod(0o755)
    with Launched(tmp_path, "--no-python", "./program") as launched:
        code, _, err = launched.finish()
    assert code == exit_code, err
    assert words in err


# --- arguments ----------------------------------------------------------------------------------------------------------------------------


def test_arguments_reach_the_program_untouched_but_for_local_rank(tmp_path: Path) -> None:
    args = ["a b", "--nproc-per-node", "7", "-m", "--", "$HOME", "${local_rank}", "*", "ü", ""]
    script = "import json, os, sys\njson.dump(sys.argv, open('argv.' + os.environ['RANK'], 'w'))"
    directory = tmp_path / "a directory with spaces"
    directory.mkdir()
    with launch(directory, script, "--nproc-per-node", "2", args=args) as launched:
        code, _, err = launched.finish()
    assert code == 0, err
    for rank in range(2):
        expected = [arg.replace("${local_rank}", str(rank)) for arg in args]
        assert json.loads((directory / f"argv.{rank}").read_text()) == ["train.py", *expected]


def test_standard_input_is_passed_on(tmp_path: Path) -> None:
    """A debugger in a rank reads what the user types."""
    with launch(tmp_path, "import sys; print('read', repr(sys.stdin.read()))") as launched:
        _, out, _ = launched.finish()
    assert out == "[rank0] read ''\n"


def test_the_environment_of_each_rank_is_written_down_with_reasons(tmp_path: Path) -> None:
    with launch(tmp_path, "pass", env={"MY_API_KEY": "secret-1", "MY_LR": "0.1"}) as launched:
        assert launched.finish()[0] == 0
        written = (launched.run_dir / "attempt_0" / "rank_0" / "environment.json").read_text()
    account = json.loads(written)
    assert account["inherited"]["MY_LR"] == "0.1"
    assert "secret-1" not in written
    assert {entry["name"] for entry in account["set"]} >= {"RANK", "MASTER_PORT", "RAILHEAD_RUN_DIR"}


# --- restarts and the store ---------------------------------------------------------------------------------------------------------------

COLLECTIVE = """
import os, sys, torch, torch.distributed as dist
attempt = int(os.environ["RAILHEAD_ATTEMPT"])
assert os.environ["TORCHELASTIC_RESTART_COUNT"] == str(attempt)
dist.init_process_group("gloo")
rank = dist.get_rank()
store = dist.distributed_c10d._get_default_store()
assert store.add("visits", 1) <= dist.get_world_size(), "keys of an older attempt"
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print("attempt", attempt, "sum", total.item(), "port", os.environ["MASTER_PORT"], flush=True)
if attempt == 0 and rank == 1:
    raise RuntimeError("first attempt fails")
dist.barrier()
dist.destroy_process_group()
"""


def test_a_restart_runs_all_ranks_again_with_a_fresh_store(tmp_path: Path) -> None:
    """torchrun keeps its store over restarts; ranks then read keys of dead ones and connect to dead ports."""
    with launch(tmp_path, COLLECTIVE, "--nproc-per-node", "2", "--max-restarts", "1") as launched:
        code, out, err = launched.finish()
        started = [entry.fields["attempt"] for entry in launched.journal("RanksStarted")]
    assert code == 0, err
    lines = out.splitlines()
    assert [line.rpartition(" port ")[0] for line in lines] == [
        "[rank0] attempt 0 sum 3.0",
        "[rank0] attempt 1 sum 3.0",
    ]
    assert len({line.rpartition(" ")[2] for line in lines}) == 2
    assert started == [0, 1]
    assert "RuntimeError: first attempt fails" in err
    assert "launcher: restart 1 of 1" in err
    assert "after 1 restart" in err.splitlines()[-1]


# --- the cache child ----------------------------------------------------------------------------------------------------------------------

FAKE_CACHE = """
import json, os, signal, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
open("cache.argv", "w").write(json.dumps(sys.argv[1:]))
mode = os.environ.get("FAKE_CACHE", "serve")
if mode == "refuse":
    print("capacity: not a size", file=sys.stderr)
    sys.exit(2)
if mode == "silent":
    time.sleep(600)
where = "/elsewhere.sock" if mode == "already" else options["--socket"]
line = {"event": "serving", "socket": where, "pid": os.getpid(), "already_running": mode == "already",
        "resident_bytes": 5, "capacity_bytes": 10}
print(json.dumps(line), flush=True)
if mode == "already":
    sys.exit(0)
def leave(*_):
    open("cache.drained", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
if mode == "dies" or (mode == "dies once" and not os.path.exists("died")):
    open("died", "w").close()
    os.kill(os.getpid(), 9)
while True: time.sleep(600)
"""
RANK = """
import os, time
socket = os.environ["RAILHEAD_CACHE_SOCKET"]
open("socket", "w").write(socket)
deadline = time.monotonic() + 30
while not WAIT and time.monotonic() < deadline: time.sleep(0.02)
print("link", os.path.islink(socket) and os.readlink(socket))
"""


def with_fake_cache(directory: Path, mode: str, wait: str) -> Launched:
    """The launcher with a JobSpec whose cache program is the fake one."""
    (directory / "fake_cache.py").write_text(FAKE_CACHE)
    (directory / "train.py").write_text(RANK.replace("WAIT", wait))
    (directory / "drive.py").write_text(
        "import sys\n"
        "from launcher.cluster.local import LocalCluster\n"
        "from launcher.controller import run\n"
        "from launcher.spec import CacheOptions, JobSpec, Program, ProgramKind\n"
        "cache = CacheOptions('data cache', '1GiB', (sys.executable, 'fake_cache.py'))\n"
        "sys.exit(run(JobSpec(Program(ProgramKind.SCRIPT, 'train.py'), cache=cache), LocalCluster()))\n"
    )
    return Launched(directory, env={"FAKE_CACHE": mode}, program=["drive.py"])


def told(kind: str) -> str:
    """For the rank: true once the journal has such an event."""
    return f"'{kind}' in open(os.environ['RAILHEAD_RUN_DIR'] + '/journal.jsonl').read()"


def test_the_cache_daemon_is_started_told_of_and_drained(tmp_path: Path) -> None:
    with with_fake_cache(tmp_path, "serve", told("CacheServing")) as launched:
        code, _, err = launched.finish()
    assert code == 0, err
    socket = (tmp_path / "socket").read_text()
    assert json.loads((tmp_path / "cache.argv").read_text()) == [
        *("serve", "--dir", str(tmp_path / "data cache"), "--capacity", "1GiB", "--socket", socket),
        *("--announce", "--exit-with-parent"),
    ]
    assert "cache serves on" in err
    assert (tmp_path / "cache.drained").exists(), "SIGTERM, so that it can write down what it holds"
    assert len(socket.encode()) < 100, "Unix socket paths are short"
    assert not os.path.lexists(socket)


def test_a_daemon_that_was_there_before_is_reached_through_our_path_and_left_alone(tmp_path: Path) -> None:
    with with_fake_cache(tmp_path, "already", "os.path.islink(socket)") as launched:
        code, out, err = launched.finish()
    assert code == 0, err
    assert "link /elsewhere.sock" in out
    assert "cache was already running on" in err
    assert not (tmp_path / "cache.drained").exists()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuse", "the cache daemon ended with exit code 2: capacity: not a size"),
        ("dies", "the cache daemon ended with signal 9 (SIGKILL)"),
    ],
)
def test_a_failing_cache_is_said_loudly_and_training_goes_on(tmp_path: Path, mode: str, reason: str) -> None:
    with with_fake_cache(tmp_path, mode, told("CacheFailed")) as launched:
        code, _, err = launched.finish()
    assert code == 0, err
    assert reason in err
    assert "its ranks read the origin directly" in err


def test_a_daemon_that_worked_and_died_is_started_again_at_the_same_socket(tmp_path: Path) -> None:
    """In a job of days one out-of-memory kill must not mean no cache to the end; its readers look for it where it was."""
    journal = "open(os.environ['RAILHEAD_RUN_DIR'] + '/journal.jsonl').read()"
    with with_fake_cache(tmp_path, "dies once", f"{journal}.count('CacheServing') == 2") as launched:
        code, _, err = launched.finish()
    assert code == 0, err
    assert "the cache daemon ended with signal 9 (SIGKILL)" in err
    assert "the cache daemon is started again in 1 s" in err
    sockets = [json.loads(line)["socket"] for line in _journal_lines(tmp_path) if '"CacheServing"' in line]
    assert sockets[0] == sockets[1] == (tmp_path / "socket").read_text()
    assert (tmp_path / "cache.drained").exists()


def _journal_lines(directory: Path) -> list[str]:
    (journal,) = [path for path in directory.glob("**/journal.jsonl") if not path.parent.is_symlink()]
    return journal.read_text().splitlines()


def test_a_cache_that_says_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with with_fake_cache(tmp_path, "silent", "True") as launched:
        code, _, err = launched.finish()
    assert code == 0, err


def test_the_launcher_itself_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    """Importing them is most of the time that other launchers take to start."""
    (tmp_path / "train.py").write_text("pass")
    (tmp_path / "drive.py").write_text(
        "import sys\n"
        "from launcher.cli import main\n"
        "code = main(['train.py'])\n"
        "heavy = {'torch', 'ray', 'numpy', 'cache'} & set(sys.modules)\n"
        "sys.exit(code or f'imported: {heavy}' if heavy else code)\n"
    )
    with Launched(tmp_path, program=["drive.py"]) as launched:
        code, _, err = launched.finish()
    assert code == 0, err
