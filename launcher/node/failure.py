"""What a rank left to say why it ended: the exception that it recorded, or the end of its standard error."""

from __future__ import annotations

import json
import os
from typing import Any

from launcher.gang.events import ExceptionRecord

_TAIL_BYTES = 4096
_MAX_RECORD_BYTES = 1 << 20


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


def last_lines(path: str, num_lines: int = 10) -> str:
    """The last lines of a log file that hold anything, at most 4 KiB; empty if there are none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-num_lines:])
