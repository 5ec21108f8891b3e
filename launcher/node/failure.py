"""What a rank left to say why it ended: the exception that it recorded, where it called sys.exit, the stack of a crash, or the end of its
standard error."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.gang.causes import CRASHES, exception_in_words
from launcher.gang.events import ExceptionRecord, ExitStatus
from launcher.node.memory_kills import MemoryKills

_TAIL_BYTES = 4096
_MAX_RECORD_BYTES = 8 << 20
_SHOWN_FRAMES = 12
_OUR_FRAMES = tuple(f'  File "{Path(__file__).with_name(name)}"' for name in ("runner.py", "forkserver.py"))
_A_CHILD_WAS_KILLED = re.compile(
    r"killed by signal: Killed|exited unexpectedly|terminated abruptly|died with <Signals.SIGKILL|worker .* died", re.I
)
"""How libraries say that a process of theirs has gone: torch's data loaders, concurrent.futures, subprocess."""
_WORKER_SIGNAL = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)")
"""Of torch: in the message, or in that of the exception that led to it."""


@dataclass(frozen=True)
class Left:
    """What is known of a rank that ended badly."""

    exception: ExceptionRecord | None = None
    words: str = ""
    """To be shown below the cause."""
    cause: str = ""
    out_of_memory: bool = False


@dataclass(frozen=True)
class Traces:
    """Where a rank leaves them."""

    error_file: str
    exit_file: str
    crash_file: str
    stderr_log: str


def what_was_left(
    status: ExitStatus,
    traces: Traces,
    pid: int,
    memory_kills: MemoryKills,
    *,
    is_stopping: bool = False,
    is_python: bool = True,
) -> Left:
    """The exception's record, else the stack of a crash, else where it called `sys.exit`, else the last words on standard error; and
    whether the kernel ran out of memory. is_stopping: we may have killed it ourselves."""
    exception = read_exception(traces.error_file)
    if exception is not None:
        return _of_exception(exception, traces.crash_file, memory_kills)
    words = last_lines(traces.stderr_log)
    if status.signum == signal.SIGKILL:
        why = memory_kills.explain([pid])
        return Left(
            words=words, cause=why or ("" if is_stopping else memory_kills.what_else()), out_of_memory=bool(why)
        )
    if status.signum in CRASHES:
        return _of_crash(traces.crash_file, words, has_ended=_has_ended(traces.exit_file))
    cause = _of_exit(traces.exit_file, words) or exception_in_words(last_lines(traces.stderr_log, 60))
    if not cause and status.signum is None and is_python:
        cause = "no exception and no sys.exit: os._exit, or a library that ended the process"
    return Left(words=words, cause=cause)


def _of_exception(exception: ExceptionRecord, crash_file: str, memory_kills: MemoryKills) -> Left:
    """A process of its own that was killed or has crashed is an exception in its parent, which may only have a guess of how."""
    if not _A_CHILD_WAS_KILLED.search(exception.message):
        return Left(exception)
    signals = _WORKER_SIGNAL.findall(f"{exception.message}\n{exception.traceback}")
    pids = [int(pid) for pid, _ in signals] + [int(pid) for pid in re.findall(r"\d{2,}", exception.message)]
    why = memory_kills.explain(pids)
    if why:
        return Left(exception, cause=why, out_of_memory=True)
    how = f"killed by signal: {signals[0][1]}" if signals else ""
    more = memory_kills.what_else() if how.endswith("Killed") else _of_crash(crash_file).cause
    return Left(exception, cause=", ".join(part for part in (how, more) if part))


_SAID_BY_NATIVE_CODE = re.compile(
    r"^\s*what\(\): +(.*)$"
    r"|^(terminate called without an active exception)$"
    r"|^(.*Assertion `.*' failed\.?.*)$"
    r"|^((?:free|malloc|munmap_chunk|realloc|corrupted|double free).*)$"
    r"|^(\*\*\* .* \*\*\*.*)$",
    re.MULTILINE,
)
"""C++'s terminate, assert, and glibc's checks of the heap and of the stack."""


def _of_crash(crash_file: str, said: str = "", *, has_ended: bool = False) -> Left:
    """`said`: the end of standard error, where C++ and glibc say why they abort. has_ended: the program had."""
    stack = crash_stack(last_lines(crash_file, 400, 1 << 16))
    frames = [line.strip() for line in stack.splitlines() if line.startswith("  File ")]
    found = list(_SAID_BY_NATIVE_CODE.finditer(said))
    why = next((group.strip() for group in found[-1].groups() if group), "") if found else ""
    where = f"in native code, called at {_place(frames[0])}" if frames else ""
    when = "the program had come to its end, and the process died while it cleaned up" if has_ended else ""
    cause = ", ".join(part for part in (when, why, where) if part)
    return Left(words="\n".join(part for part in (said, stack) if part), cause=cause)


def crash_stack(text: str) -> str:
    """Of what `faulthandler` has written, the stack of the thread that crashed; innermost call first."""
    lines = text.splitlines()
    starts = [idx for idx, line in enumerate(lines) if line.startswith("Fatal Python error")]
    if not starts:
        return ""
    of_crash = lines[starts[-1] :]
    current = next((idx for idx, line in enumerate(of_crash) if line.startswith("Current thread")), 0)
    frames = []
    for line in of_crash[current + 1 :]:
        if not line.startswith("  "):
            break
        if not line.startswith(_OUR_FRAMES):
            frames.append(line)
    more = [f"  … {len(frames) - _SHOWN_FRAMES} more"] if len(frames) > _SHOWN_FRAMES else []
    return "\n".join([*of_crash[current : current + 1], *frames[:_SHOWN_FRAMES], *more])


def _place(frame: str) -> str:
    """
    >>> _place('File "train.py", line 3 in load')
    'train.py:3 in load'
    """
    found = re.match(r'File "(.+)", line (\d+) in (.+)', frame)
    return f"{found[1]}:{found[2]} in {found[3]}" if found else frame


def _has_ended(exit_file: str) -> bool:
    """Whether the runner has seen the program's end."""
    try:
        with open(exit_file, "rb") as file:
            return bool(json.loads(file.read(_MAX_RECORD_BYTES)).get("has_ended"))
    except (OSError, ValueError, AttributeError):
        return False


def _of_exit(exit_file: str, said: str) -> str:
    """Where `sys.exit` was called, and what for: an argument parser says that on standard error."""
    complaint = next((line.strip() for line in reversed(said.splitlines()) if re.search(r"\berror: ", line)), "")
    try:
        with open(exit_file, "rb") as file:
            data = json.loads(file.read(_MAX_RECORD_BYTES))
        code, where = str(data["code"]), str(data["where"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    call = f"sys.exit({code})" + (f" at {where}" if where else "")
    return f"{complaint}; {call}" if complaint else call


def read_exception(path: str) -> ExceptionRecord | None:
    """The record at `path` (TORCHELASTIC_ERROR_FILE), written by our runner or by torch's `@record`; None if there is none to be read."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(_MAX_RECORD_BYTES))
            return _understand(data, os.fstat(file.fileno()).st_mtime)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a torn or foreign file must not hide the failure itself


def _understand(data: dict[str, Any], written_s: float) -> ExceptionRecord:
    """torch writes {"message": {"message": "ValueError: x", "extraInfo": {"py_callstack": …, "timestamp": "…"}}}; so does `runner.py`.

    torch's timestamp is in whole seconds, too coarse to say which of two ranks was first; the time of writing is not.
    """
    message = data["message"]
    if isinstance(message, str):
        return ExceptionRecord("", message, "", written_s)
    extra = message.get("extraInfo", {})
    type_name, _, text = str(message["message"]).partition(": ")
    return ExceptionRecord(
        type_name, text, str(extra.get("py_callstack", "")), float(extra.get("timestamp_s", written_s))
    )


def last_lines(path: str, num_lines: int = 10, num_bytes: int = _TAIL_BYTES) -> str:
    """The last lines of a log file that hold anything, at most so many bytes; empty if there are none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-num_lines:])
