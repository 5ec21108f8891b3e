"""What made an attempt end, from the journal, in the words that the launcher used when it happened. Pure."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.gang import causes
from launcher.gang.events import ExceptionRecord, ExitStatus, RankExited
from launcher.report.fields import integer, text


@dataclass(frozen=True)
class FailureFacts:
    """What made an attempt end."""

    kind: str
    """`rank`, `node` or `hang`."""
    cause: str
    """In a line: `ValueError: broken (exit code 1)`."""
    host: str = ""
    rank: int | None = None
    exit_code: int | None = None
    signum: int | None = None
    exception: str = ""
    """Its type; empty if it left none."""
    log: str = ""
    traceback: str = ""
    at_s: float = 0.0
    what: str = ""
    """Of a rank: which sort of failure (`gang.causes.Kind`), such as `exception` or `killed for memory`."""

    def __str__(self) -> str:
        if self.kind == "node":
            return f"node {self.host} failed: {self.cause}"
        who = f"rank {self.rank} on {self.host}" if self.rank is not None else "the job"
        return f"{who} {'hangs' if self.kind == 'hang' else 'failed'}: {self.cause}"


def failure_facts(failure: Any, host_of: Callable[[str], str], at_s: float) -> FailureFacts | None:
    """`failure` as a journal has it; None if that is nothing of the kind."""
    if not isinstance(failure, dict):
        return None
    host = host_of(text(failure, "node_id"))
    if "status" in failure:
        return _of_rank(failure, host, at_s)
    kind = "hang" if "may_restart" in failure else "node"
    return FailureFacts(kind, text(failure, "reason"), host, integer(failure, "rank"), at_s=at_s)


def _of_rank(failure: Mapping[str, Any], host: str, at_s: float) -> FailureFacts:
    """In the words that the launcher used when it happened."""
    status, exception = failure.get("status"), failure.get("exception")
    code = integer(status, "code") if isinstance(status, dict) else None
    signum = integer(status, "signum") if isinstance(status, dict) else None
    rank, log = integer(failure, "rank"), text(failure, "stderr_log")
    if (code is None) == (signum is None):
        return FailureFacts("rank", "it is not known how", host, rank, log=log, at_s=at_s)
    record = None
    if isinstance(exception, dict):
        name, message, trace = (text(exception, key) for key in ("type_name", "message", "traceback"))
        record = ExceptionRecord(name, message, trace, 0.0)
    exited = RankExited(
        *(0, "", rank or 0, 0, 0),
        ExitStatus(code, signum),
        0.0,
        exception=record,
        last_lines=text(failure, "last_lines"),
        cause=text(failure, "cause"),
        out_of_memory=failure.get("out_of_memory") is True,
    )
    name, trace = (record.type_name, record.traceback) if record else ("", exited.last_lines)
    what = causes.kind(exited).value
    return FailureFacts("rank", causes.cause(exited), host, rank, code, signum, name, log, trace, at_s, what)


def signal_name(signum: int | None) -> str:
    """
    >>> signal_name(9), signal_name(None), signal_name(200)
    ('SIGKILL', 'a signal', 'signal 200')
    """
    try:
        return signal.Signals(signum or 0).name
    except ValueError:
        return f"signal {signum}" if signum else "a signal"
