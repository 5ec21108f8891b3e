"""Follows the files that ranks write into and hands on what the terminal shows, to the last byte.

Files, not pipes: a rank never blocks on a slow terminal, and nothing is lost when the launcher dies. Back-pressure is simply not reading
on: `on_log` blocks, the file grows.

The traceback that ends a rank is held back for a moment: whoever reports the end of the rank tells it once, with its cause before it,
and says here that it need not be shown (`release`). If nobody does so within two seconds, it is shown like anything else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.gang.events import LogChunk, Output, OutputEnded
from launcher.node.lines import LineAssembler
from launcher.spec import Stream

_POLL_S = 0.05
"""How often files are looked at. Below what people notice; 20 preads a second and stream are nothing."""
_QUIET_S = 0.25
"""An unfinished line is shown after this silence: a prompt, a "loading… " without a newline."""
_READ_BYTES = 1 << 18
_HOLD_S = 2.0
"""How long a traceback is held back: a rank that has printed one is dead in milliseconds, or hangs in its clean-up."""


@dataclass(frozen=True)
class Source:
    """One stream of one rank, its file, and where else matching lines shall go."""

    rank: int
    local_rank: int
    stream: Stream
    path: str
    duplicate_filters: tuple[bytes, ...] = ()
    duplicate_path: str = ""
    duplicate_prefix: bytes = b""
    traceback_note: str = ""
    """A file that says where in `path` the last traceback begins and ends, if there is one."""


@dataclass(eq=False)
class _Followed:
    source: Source
    fd: int
    last_data_s: float
    lines: LineAssembler = field(default_factory=LineAssembler)
    duplicates: LineAssembler = field(default_factory=LineAssembler)
    is_finishing: bool = False
    offset: int = 0
    held_since_s: float | None = None
    """A traceback begins at `offset`."""
    is_released: bool = False
    """There is nothing to be held back any more."""
    is_over: bool = False
    """The rank has ended."""
    is_told: bool = False
    """Its traceback is told otherwise, and is not shown."""


class LogFollower:
    """A thread that follows any number of files. `follow`, `drain` and `finish` may be called from any thread."""

    def __init__(self, on_log: Callable[[Output], None]) -> None:
        self._on_log = on_log
        self._lock = threading.Condition()
        self._followed: list[_Followed] = []
        self._markers: list[tuple[OutputEnded, list[_Followed]]] = []
        self._urgent = False
        self._rounds = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="log-follower", daemon=True)
        self._thread.start()

    def follow(self, source: Source) -> None:
        """From the file's beginning. The file exists. Raises OSError."""
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            self._followed.append(_Followed(source, fd, time.monotonic()))
            self._hurry()

    def drain(self, timeout_s: float) -> None:
        """Waits until everything written before this call is handed on, at most `timeout_s` (a terminal may be stuck)."""
        with self._lock:
            if self._followed:
                target = self._rounds + 2  # the round that runs now may have passed our file already
                self._hurry()
                self._lock.wait_for(lambda: self._rounds >= target or self._is_closed, timeout_s)

    def release(self, path: str, *, is_told: bool) -> None:
        """The rank that writes into `path` has ended. `is_told`: its traceback need not be shown."""
        with self._lock:
            for followed in self._followed:
                if followed.source.path == path:
                    followed.is_told, followed.is_over = is_told, True
            self._hurry()

    def finish(self, marker: OutputEnded) -> None:
        """No one writes any more into the files followed so far: reads each to its end and forgets it; then hands on `marker`."""
        with self._lock:
            for followed in self._followed:
                followed.is_finishing = True
            self._markers.append((marker, list(self._followed)))
            self._hurry()

    def close(self) -> None:
        """Ends the thread without reading on; a terminal that blocks it is left behind."""
        with self._lock:
            self._is_closed = True
            self._hurry()
        self._thread.join(0.5)

    def _hurry(self) -> None:
        self._urgent = True
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._urgent or self._is_closed, _POLL_S if self._followed else None)
                if self._is_closed:
                    break
                self._urgent = False
                current = list(self._followed)
            ended = [followed for followed in current if self._read_on(followed)]
            with self._lock:
                self._rounds += 1
                self._followed = [followed for followed in self._followed if followed not in ended]
                due = [(m, files) for m, files in self._markers if not any(file in self._followed for file in files)]
                self._markers = [waiting for waiting in self._markers if waiting not in due]
                self._lock.notify_all()
            for marker, _ in due:
                self._on_log(marker)
        for followed in self._followed:
            with contextlib.suppress(OSError):
                os.close(followed.fd)

    def _read_on(self, followed: _Followed) -> bool:
        """Hands on what is new; True when this file is done with for good."""
        is_finishing = followed.is_finishing  # before reading: what is written after it was set does not exist
        while not self._is_closed:
            try:
                data = os.pread(followed.fd, _READ_BYTES, followed.offset)
            except OSError:  # a failing disk: nothing more can be shown of it, and the job must not wait for it
                is_finishing, data = True, b""
            before = followed.offset
            data = self._before_traceback(followed, data, is_finishing)
            if not data and followed.offset == before:
                break
            followed.offset += len(data)
            followed.last_data_s = time.monotonic()
            self._hand_on(followed, followed.lines.feed(data))
            self._duplicate(followed, followed.duplicates.feed(data) if followed.source.duplicate_path else b"")
        if is_finishing:
            self._hand_on(followed, followed.lines.flush())
            self._duplicate(followed, followed.duplicates.flush())
            os.close(followed.fd)
            return True
        if time.monotonic() - followed.last_data_s > _QUIET_S:
            self._hand_on(followed, followed.lines.flush(at_end=False))
        return False

    def _before_traceback(self, followed: _Followed, data: bytes, is_finishing: bool) -> bytes:
        """What of `data` may be shown now. A traceback's place is noted before it is written, so it is looked for after reading."""
        if followed.is_released or not data or not followed.source.traceback_note:
            return data
        begin, end = _read_note(followed.source.traceback_note)
        if begin is None:
            return data
        if begin > followed.offset:
            return data[: begin - followed.offset]
        now = time.monotonic()
        followed.held_since_s = followed.held_since_s or now
        if not (followed.is_over or is_finishing or now > followed.held_since_s + _HOLD_S):
            return b""
        followed.is_released = True
        if not followed.is_told or end is None or end < begin:
            return data
        self._duplicate(followed, followed.duplicates.feed(data[: end - begin]))
        followed.offset = end
        return data[end - begin :]

    def _hand_on(self, followed: _Followed, data: bytes) -> None:
        if data and not self._is_closed:
            source = followed.source
            self._on_log(LogChunk(source.rank, source.local_rank, source.stream, data))

    def _duplicate(self, followed: _Followed, data: bytes) -> None:
        """torchrun's --duplicate-…-filters: matching lines, with their prefix, into one file of the attempt."""
        source = followed.source
        matching = [
            source.duplicate_prefix + line.rstrip(b"\n") + b"\n"
            for line in data.splitlines(keepends=True)
            if any(needle in line for needle in source.duplicate_filters)
        ]
        if matching:
            with contextlib.suppress(OSError), open(source.duplicate_path, "ab") as file:
                file.write(b"".join(matching))


def _read_note(path: str) -> tuple[int | None, int | None]:
    """Where the traceback begins, and where it ends if that is known."""
    try:
        with open(path) as file:
            begin, *more = [int(word) for word in file.read(100).split()]
    except (OSError, ValueError):
        return None, None
    return begin, more[0] if more else None
