"""Why a rank failed, in one line, and which failures are only the consequence of another one. Pure.

When a rank dies, its peers fail a moment later with whole pages of gloo's or NCCL's words. They are true and say nothing: what the
peer died of is the news. Such a failure is *secondhand*: it is never the root while there is another.
"""

from __future__ import annotations

import enum
import re
import signal
from dataclasses import replace

from launcher.gang.events import ExceptionRecord, Failure, NodeFailed, NodeLost, RankExited, RankHung
from launcher.gang.sayings import some_ranks

_OUR_SIGNALS = (signal.SIGTERM, signal.SIGKILL)

_PEER_IS_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited|ncclRemoteError"
    r"|got 0 bytes|recvvalue failed|failed to recv|timed out waiting \d+ ?ms|wait timeout|socket timeout"
    r"|timed out after \d+ seconds waiting for clients|application timeout caused pair closure"
    r"|(peer|remote side|communicator was) (closed|aborted)|collective operation timeout|failed to pass monitoredBarrier"
    r"|read error \[|dump signal",
    re.IGNORECASE,
)
_OF_A_COLLECTIVE = re.compile(
    r"\bgloo\b|\w*nccl\w*|TCPStore|ProcessGroup|c10d|default_pg|monitoredBarrier", re.IGNORECASE
)
_SOURCE_OF_A_LIBRARY = re.compile(r"^\[/[^\]]+\.(?:cc|cpp|h|hpp):\d+\] ")
_MAX_WORDS_OF_A_LIBRARY = 160
"""gloo's and NCCL's first lines are essays."""
_FRAME = re.compile(r'^  File "([^"]+)", line \d+', re.MULTILINE)
_IN_WORKER = re.compile(
    r"^Caught (\w+) in ((?:DataLoader worker process|replica|pin memory thread)[^\n.]*)\.?\n.*?^([\w.]+: [^\n]*)\n*\Z",
    re.MULTILINE | re.DOTALL,
)


class Kind(enum.Enum):
    """What sort of failure it is, for programs that read `failure.json`."""

    EXCEPTION = "exception"
    EXIT_CODE = "exit code"
    SIGNAL = "signal"
    CRASH = "native crash"
    OUT_OF_MEMORY = "killed for memory"
    LOST_PEER = "lost its peer"
    STOPPED = "stopped by the launcher"
    HUNG = "hung"
    NODE_FAILED = "node failed"
    NODE_LOST = "node lost"


CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT})
"""What native code dies of by itself."""


def kind(failure: Failure) -> Kind:
    match failure:
        case RankHung():
            return Kind.HUNG
        case NodeFailed():
            return Kind.NODE_FAILED
        case NodeLost():
            return Kind.NODE_LOST
    if failure.out_of_memory:
        return Kind.OUT_OF_MEMORY
    if is_secondhand(failure):
        return Kind.LOST_PEER
    if failure.exception is not None:
        return Kind.EXCEPTION
    if failure.status.signum is None:
        return Kind.EXIT_CODE
    return Kind.CRASH if failure.status.signum in CRASHES else Kind.SIGNAL


def is_secondhand(failure: Failure) -> bool:
    """The rank lost its peer in a collective, or the gang's store: somebody else failed first."""
    if not isinstance(failure, RankExited) or failure.out_of_memory:
        return False
    exception = failure.exception
    if exception is None:
        # NCCL's watchdog aborts the process: no exception, its words are on standard error.
        words = failure.last_lines if failure.status.signum in (None, signal.SIGABRT) else ""
        return any(_PEER_IS_GONE.search(line) and _OF_A_COLLECTIVE.search(line) for line in words.splitlines())
    if not _PEER_IS_GONE.search(exception.message):
        return False
    frames = _FRAME.findall(exception.traceback)
    return bool(_OF_A_COLLECTIVE.search(exception.message)) or bool(frames and "torch/distributed" in frames[-1])


def died_of_us(failure: Failure, first: Failure) -> bool:
    """A signal that we send, after `first` made us stop. Not if it was dead before that (its peer's complaint may reach us sooner than
    the news of its death), nor if the kernel says that it did it."""
    if not isinstance(failure, RankExited) or failure is first or failure.status.signum not in _OUR_SIGNALS:
        return False
    if failure.exception is not None or failure.out_of_memory:
        return False
    return not (is_secondhand(first) and failure.at_s <= first.at_s)


def cause(failure: Failure, max_length: int = 2000) -> str:
    """Why it failed, in one line; an exception's words up to `max_length` characters."""
    if not isinstance(failure, RankExited):
        return failure.reason
    if failure.exception is None:
        return f"{failure.status}: {failure.cause}" if failure.cause else str(failure.status)
    if is_secondhand(failure):
        max_length = min(max_length, _MAX_WORDS_OF_A_LIBRARY)
    words = [exception_line(failure.exception, max_length), failure.cause]
    while_ending = " while it ended" if failure.status.signum in _OUR_SIGNALS else ""
    return f"{'; '.join(word for word in words if word)} ({failure.status}{while_ending})"


def exception_line(exception: ExceptionRecord, max_length: int) -> str:
    """`ValueError: it broke`, the first line of it, cut to a length. What a data loader's worker raised is told as the worker's.

    >>> worker = "Caught ValueError in DataLoader worker process 0.\\nOriginal Traceback …\\nValueError: bad sample 7\\n"
    >>> exception_line(ExceptionRecord("ValueError", worker, "", 0.0), 100)
    'ValueError: bad sample 7, in DataLoader worker process 0'
    >>> exception_line(ExceptionRecord("RuntimeError", "[/w/gloo/pair.cc:553] Connection closed by peer", "", 0.0), 100)
    'RuntimeError: Connection closed by peer'
    """
    in_worker = _IN_WORKER.search(exception.message)
    if in_worker:
        line = f"{in_worker[3]}, in {in_worker[2]}"
    else:
        first = _SOURCE_OF_A_LIBRARY.sub("", exception.message.strip().partition("\n")[0].strip())
        line = ": ".join(part for part in (exception.type_name, first) if part)
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def with_who_left_early(failure: Failure, good: int) -> Failure:
    """The loss of a peer, with the ranks (as bits) that had ended well and left the others waiting: that may be why."""
    if not good or not isinstance(failure, RankExited):
        return failure
    ranks = [rank for rank in range(good.bit_length()) if good >> rank & 1]
    left = f"{some_ranks(ranks)} had ended with exit code 0 before that"
    return replace(failure, cause="; ".join(part for part in (failure.cause, left) if part))


def why_collateral(failure: Failure, first: Failure) -> str:
    """Why this one is only a consequence, where that can be said; else empty. `first`: what made us stop the gang."""
    if is_secondhand(failure):
        return Kind.LOST_PEER.value
    if died_of_us(failure, first):
        assert isinstance(failure, RankExited)
        return f"{Kind.STOPPED.value}, {failure.status}"
    return ""


# --- words on standard error ----------------------------------------------------------------------------------------------------------

_LAST_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration|Full|Empty|Timeout)(?::.*)?)$"
)
_PLACES = (
    (re.compile(r"Exception in thread (.*):$"), "in thread {}"),
    (re.compile(r"Exception ignored in atexit callback"), "in an atexit callback"),
    (re.compile(r"Process (\S+):$"), "in process {}"),
    (re.compile(r"Exception ignored in: (.*)$"), "in {}"),
)
_WITHIN = re.compile(r"^(?: |\t|$|\[rank\d+\]:|Traceback|During handling|The above exception)")


def exception_in_words(text: str) -> str:
    """The last exception that the end of standard error shows, with where it happened if that is said; empty if there is none.

    For ranks that end by a code of their own after a thread, a callback or a child has printed a traceback.

    >>> exception_in_words("Exception in thread Thread-1 (work):\\nTraceback (most recent call last):\\n  …\\nValueError: boom")
    'ValueError: boom, in thread Thread-1 (work)'
    >>> exception_in_words("all is well")
    ''
    """
    lines = text.splitlines()
    for idx in range(len(lines) - 1, -1, -1):
        found = _LAST_EXCEPTION.match(lines[idx])
        if found and idx and any(line.strip().endswith("(most recent call last):") for line in lines[:idx]):
            place = _place(lines[:idx])
            return f"{found[1].strip()}, {place}" if place else found[1].strip()
    return ""


def unheard_exception(text: str) -> str:
    """An exception in a thread, in an atexit callback or in a child process, for a rank that ended with 0 all the same: the interpreter
    prints it, and nobody looks into the log of a rank that did well. Empty if there is none.

    >>> unheard_exception("Exception ignored in atexit callback: <function f>\\nTraceback (most recent call last):\\n  …\\nOSError: full")
    'OSError: full, in an atexit callback'
    """
    words = exception_in_words(text)
    return words if re.search(r", in (?:thread |an atexit callback$|process )", words) else ""


def _place(before: list[str]) -> str:
    for line in reversed(before):
        for pattern, words in _PLACES:
            found = pattern.match(line)
            if found:
                return words.format(*found.groups())
        if not _WITHIN.match(line):
            return ""
    return ""
