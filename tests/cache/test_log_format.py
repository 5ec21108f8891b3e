"""Logs for collectors: one JSON object per line, whatever is said, with the traceback inside it."""

from __future__ import annotations

import json
import logging
import sys

from cache.cli import _JsonFormatter


def record(message: str, *args: object, failed: bool = False) -> logging.LogRecord:
    error = None
    if failed:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            error = sys.exc_info()
    return logging.LogRecord("railhead.cache", logging.WARNING, "f.py", 1, message, args, error)


def test_each_line_is_one_object_with_time_level_and_message() -> None:
    line = _JsonFormatter().format(record("the disk of %s is %s:\n%s", "/mnt", "read-only", 'a "quote" and ☃'))
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == 'the disk of /mnt is read-only:\na "quote" and ☃' and said["level"] == "warning"
    assert said["time"].endswith("Z") and said["logger"] == "railhead.cache" and "exception" not in said


def test_a_traceback_stays_within_its_line() -> None:
    line = _JsonFormatter().format(record("a task failed", failed=True))
    assert "\n" not in line and "ValueError: two\nlines" in json.loads(line)["exception"]
