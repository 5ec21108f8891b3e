"""The job's memory: `journal.jsonl`, one JSON object per line, whole lines only, in the order in which things happened.

Every line has `v` (schema version), `wall_s`, `mono_s`, `kind` (the class name of an event, an action, or an entry below) and its fields.
Later tools read it with `read_journal`, which takes what it can of a file whose writer was killed or whose disk was full.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.cluster.ports import Clock

SCHEMA_VERSION = 1
"""Raised when a reader of the old version would misread a line; new kinds and new fields do not raise it."""


@dataclass(frozen=True)
class JobBegan:
    """The first line."""

    run_dir: str
    cluster: str
    argv: tuple[str, ...]
    pid: int
    hostname: str


@dataclass(frozen=True)
class JobEnded:
    """The last line of a journal whose writer was not killed."""

    exit_code: int
    reason: str
    num_attempts: int
    duration_s: float


@dataclass(frozen=True)
class Entry:
    """One line read back. `fields` as JSON gives them."""

    kind: str
    wall_s: float
    mono_s: float
    fields: Mapping[str, Any]


class FileJournal:
    """Appends to one file. Any thread may call `record`: a line is one write to a file opened for appending.

    on_trouble is called once, with a sentence, when writing fails; later lines are tried again (the disk may get room). on_entry is called
    with each entry, written or not, as a reader would find it.
    """

    def __init__(
        self,
        path: str,
        clock: Clock,
        on_trouble: Callable[[str], None],
        on_entry: Callable[[Entry], None] | None = None,
    ) -> None:
        self._on_entry = on_entry
        self._path = path
        self._clock = clock
        self._on_trouble = on_trouble
        self._has_complained = False
        self._is_torn = False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._fd = -1
            self._complain(error)

    def record(self, entry: object) -> None:
        fields = to_json(entry)
        kind, wall_s = type(entry).__name__, round(self._clock.wall_s(), 6)
        mono_s = round(self._clock.monotonic_s(), 6)
        if self._on_entry is not None:
            self._on_entry(Entry(kind, wall_s, mono_s, fields))
        if self._fd < 0:
            return
        line = {"v": SCHEMA_VERSION, "wall_s": wall_s, "mono_s": mono_s, "kind": kind, **fields}
        data = json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        if self._is_torn:
            data = b"\n" + data  # so that only the line that the full disk cut is lost
        try:
            self._is_torn = os.write(self._fd, data) < len(data)
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            self._on_trouble(
                f"the journal {self._path} cannot be written ({error.strerror}); the job goes on without it"
            )


def to_json(value: object) -> Any:
    """Dataclasses as objects, sets as sorted lists, enums by name, what JSON has no number for as text.

    >>> to_json(Entry("k", 0.5, float("inf"), {"a": (1, 2)}))
    {'kind': 'k', 'wall_s': 0.5, 'mono_s': 'inf', 'fields': {'a': [1, 2]}}
    """
    match value:
        case enum.Enum():
            return value.name
        case float() if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        case str() | int() | float() | None:
            return value
        case bytes():
            return value.decode("utf-8", "replace")
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(to_json(item) for item in value)
        case list() | tuple():
            return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata.get("journal", True)
        }
    return str(value)


def read_journal(path: str) -> Iterator[Entry]:
    """The entries in order. A torn line (a killed writer, a full disk) and a line of a newer schema are left out."""
    with open(path, "rb") as file:
        for line in file:
            entry = parse_line(line)
            if entry is not None:
                yield entry


def parse_line(line: bytes) -> Entry | None:
    """One line of a journal; None if it cannot be understood, whatever it holds."""
    try:
        data = json.loads(line)
        if data.pop("v") > SCHEMA_VERSION:
            return None
        entry = Entry(data.pop("kind"), data.pop("wall_s"), data.pop("mono_s"), data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    times = (entry.wall_s, entry.mono_s)
    is_whole = isinstance(entry.kind, str) and all(type(each) in (int, float) and abs(each) < 1e15 for each in times)
    return entry if is_whole else None
