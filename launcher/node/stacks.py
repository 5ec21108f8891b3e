"""Where a rank's threads stand, read from outside: by py-spy, without stopping it; else written by the rank itself (faulthandler).

py-spy reads the memory of a process, also of a stopped one; it needs the right to trace (root, CAP_SYS_PTRACE, or kernel.yama.ptrace_scope
0). faulthandler needs none, but the rank must be able to handle a signal: it cannot when it is stopped. Only a rank that has said in
its page that it listens is sent that signal, for whoever does not would die of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.gang.observations import RankStack
from launcher.gang.work import is_import_locked, known_work
from launcher.node import strays
from launcher.node.instrument import HOOKS_FILE, STACK_FILE, STACK_SIGNAL

_PY_SPY_S = 8.0
"""It takes a tenth of a second, but this may be a crowded machine."""
_NATIVE_S = 20.0
"""Reading the symbols of torch takes its time; the Python stacks are on disk long before."""
_FAULTHANDLER_S = 0.5
_PY_SPY_FRAME = re.compile(r"^    (.+) \((.+):(\d+)\)$")
_PROCESS = re.compile(r"^Process (\d+):", re.MULTILINE)
_FAULT_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
Frames = tuple[str, ...]
_OURS = (
    "launcher/node/runner.py",
    "launcher/node/instrument.py",
    "launcher/node/forkserver.py",
    os.path.basename(HOOKS_FILE),
)
"""py-spy shortens a path that lies below none of the program's to its last part."""


def take(
    pids: Mapping[int, int], attempt_directory: str, is_final: bool, then: Callable[[tuple[RankStack, ...]], None]
) -> None:
    """Stacks of these ranks (rank → pid), all at once, in a thread; `then` is called from it. Files go to `stacks/` of the attempt;
    `is_final` adds native frames, where tracing is permitted, in files of their own that may come later."""

    def work() -> None:
        then(_each(_take_one, pids, attempt_directory))
        if is_final:
            _each(_take_native, pids, attempt_directory)

    threading.Thread(target=work, name="stacks", daemon=True).start()


def _each(
    take_one: Callable[[int, int, str], RankStack], pids: Mapping[int, int], attempt_directory: str
) -> tuple[RankStack, ...]:
    found: dict[int, RankStack] = {}

    def do(rank: int, pid: int) -> None:
        found[rank] = take_one(rank, pid, attempt_directory)

    threads = [threading.Thread(target=do, args=item, daemon=True) for item in pids.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tuple(found[rank] for rank in sorted(found))


def _take_one(rank: int, pid: int, attempt_directory: str) -> RankStack:
    path = _path(attempt_directory, f"rank_{rank}.txt")
    text, trouble = _py_spy(pid, ["--nonblocking"], _PY_SPY_S)
    if text:
        _write(path, text)
        return _stack(rank, *frames_of_py_spy(text), "py-spy", path)
    text = _faulthandler(pid, os.path.join(attempt_directory, f"rank_{rank}"))
    if text:
        _write(path, text)
        return _stack(rank, *frames_of_faulthandler(text), "faulthandler", path)
    return RankStack(rank, (), trouble)


def _stack(rank: int, main: Frames, others: list[Frames], how: str, path: str) -> RankStack:
    return RankStack(rank, main, how, path, known_work(main, others), is_import_locked(main, others))


def _take_native(rank: int, pid: int, attempt_directory: str) -> RankStack:
    text, trouble = _py_spy(pid, ["--native"], _NATIVE_S)
    path = _path(attempt_directory, f"rank_{rank}.native.txt")
    if text:
        _write(path, text)
    return RankStack(rank, (), trouble, path if text else "")


def frames_of_py_spy(text: str) -> tuple[Frames, list[Frames]]:
    """Of the main thread and of the others, innermost first, without what is ours.

    >>> frames_of_py_spy('Process 7: python t.py\\n\\nThread 7 (active+gil)\\n    spin (t.py:5)\\n    <module> (t.py:7)')
    (('spin (t.py:5)', '<module> (t.py:7)'), [])
    """
    main: Frames = ()
    others: list[Frames] = []
    process = _PROCESS.search(text)
    first = f"Thread {process[1]} " if process else ""  # threads have names only once `threading` is imported
    for part in re.split(r"^(?=Thread )", text, flags=re.MULTILINE):
        found = [_PY_SPY_FRAME.match(line) for line in part.splitlines()]
        frames = tuple(f"{m[1]} ({m[2]}:{m[3]})" for m in found if m and not m[2].endswith(_OURS))
        if '"MainThread"' in part.partition("\n")[0] or (first and part.startswith(first)):
            main = frames
        elif frames:
            others.append(frames)
    return main, others


def frames_of_faulthandler(text: str) -> tuple[Frames, list[Frames]]:
    """The same from faulthandler's page: the thread that handled the signal is the main one.

    >>> frames_of_faulthandler('Current thread 0x1 (most recent call first):\\n  File "/a/b/t.py", line 5 in spin\\n')
    (('spin (b/t.py:5)',), [])
    """
    main: Frames = ()
    others: list[Frames] = []
    for part in re.split(r"^(?=(?:Current thread|Thread) )", text, flags=re.MULTILINE):
        found = [_FAULT_FRAME.match(line) for line in part.splitlines()]
        frames = tuple(
            f"{m[3]} ({_short(m[1])}:{m[2]})" for m in found if m and not m[1].endswith(_OURS) and "runpy" not in m[1]
        )
        if part.startswith("Current thread "):
            main = frames
        elif frames:
            others.append(frames)
    return main, others


def _short(path: str) -> str:
    """As py-spy shortens it: what stands below a directory of packages."""
    below = path.rpartition("-packages/")[2]
    return below if below != path else "/".join(Path(path).parts[-2:])


def _py_spy(pid: int, options: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """Its page, or an empty one and why."""
    beside = os.path.join(os.path.dirname(sys.executable), "py-spy")
    program = beside if os.access(beside, os.X_OK) else shutil.which("py-spy")
    if program is None:
        return "", "py-spy is not installed"
    try:
        process = subprocess.Popen(
            [program, "dump", *options, "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={},
            cwd="/",
        )
    except OSError as error:
        return "", f"py-spy: {error.strerror}"
    strays.is_ours(process.pid)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"py-spy took longer than {timeout_s:g} s"
    finally:
        strays.is_no_longer_ours(process.pid)
    if process.returncode == 0 and "Thread " in out:
        return out, ""
    return "", "py-spy: " + (err.strip().splitlines() or ["it printed nothing"])[-1]


def _faulthandler(pid: int, rank_directory: str) -> str:
    path = os.path.join(rank_directory, STACK_FILE)
    try:
        before = os.path.getsize(path)
        if not _listens(pid):
            return ""
        os.kill(pid, STACK_SIGNAL)
        text, deadline_s = "", time.monotonic() + _FAULTHANDLER_S
        while time.monotonic() < deadline_s:
            time.sleep(0.05)
            with open(path, errors="replace") as file:
                file.seek(before)
                newer = file.read()
            if newer and newer == text:  # it writes no more
                break
            text = newer
    except OSError:
        return ""
    return text


def _listens(pid: int) -> bool:
    """Whether it has a handler for our signal; its default is death."""
    with open(f"/proc/{pid}/status") as file:
        caught = next((int(line.split()[1], 16) for line in file if line.startswith("SigCgt:")), 0)
    return bool(caught >> (STACK_SIGNAL - 1) & 1)


def _path(attempt_directory: str, name: str) -> str:
    return os.path.join(attempt_directory, "stacks", name)


def _write(path: str, text: str) -> None:
    """Whole or not at all; a full disk costs the file, not the news."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}")
        os.replace(f"{path}.new", path)
    except OSError:
        return
