"""The terminal: ranks' output with its prefixes, and the launcher's own sentences. One thread writes, so that nobody else waits for it.

Ranks' standard output goes to standard output, their standard error and our own words to standard error. Output of ranks is bounded
(`log` blocks: back-pressure); our own words never block the caller. If the terminal goes away (`| head`), the job goes on and the files
have everything.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import select
import threading
from collections.abc import Callable, Sequence

from launcher import bottomline
from launcher.gang.events import LogChunk
from launcher.node.lines import LineAssembler
from launcher.spec import Stream

_MAX_QUEUED_BYTES = 1 << 20
_MAX_LINE_BYTES = 8 << 20
"""Where output goes to a file or a pipe, lines up to this length stay whole, whoever else writes meanwhile."""
_PIECES = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
OWN_PREFIX = "launcher: "


class _EndOfOutput:
    """In the queue: no rank writes any more."""


_Source = tuple[int, Stream]


class Console:
    """prefix(rank, local_rank) is what stands before a line. Any thread may call any method."""

    def __init__(
        self, prefix: Callable[[int, int], str], stdout_fd: int = 1, stderr_fd: int = 2, *, is_coloured: bool = False
    ) -> None:
        self._queue: collections.deque[LogChunk | str | _EndOfOutput] = collections.deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._is_writing = False
        self._is_closed = False
        self._paper = _Paper(prefix, stdout_fd, stderr_fd, is_coloured)
        self._line: tuple[str, ...] = ()
        self._shown: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def log(self, chunk: LogChunk) -> None:
        """Blocks while a mebibyte is waiting for the terminal."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued_bytes < _MAX_QUEUED_BYTES or self._is_closed)
            self._queue.append(chunk)
            self._queued_bytes += len(chunk.data)
            self._changed.notify_all()

    def say(self, text: str) -> None:
        """Our own words, one or more lines; the first is marked as ours. Never blocks."""
        self._enqueue(f"{OWN_PREFIX}{text.rstrip()}\n")

    def show_line(self, parts: Sequence[str]) -> None:
        """Keeps one line below everything on the terminal, of these parts as far as there is room; without any: none. Never blocks."""
        with self._changed:
            self._line = () if self._is_closed else tuple(parts)
            self._changed.notify_all()

    def end_output(self) -> None:
        """No rank writes any more: what is held of unfinished lines is due."""
        self._enqueue(_EndOfOutput())

    def flush(self, timeout_s: float | None = None) -> bool:
        """Waits until all that was given is written; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._is_writing, timeout_s)

    def close(self, timeout_s: float | None = 1.0) -> None:
        """After it nothing is written any more."""
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._line = ()
            self._changed.notify_all()
        self._thread.join(0.5)

    def _enqueue(self, item: str | _EndOfOutput) -> None:
        with self._changed:
            self._queue.append(item)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._is_closed or self._line != self._shown)
                line, self._shown = self._line, self._line
                if not self._queue and self._is_closed and not self._paper.has_line:
                    return
                item = self._queue.popleft() if self._queue else None
                self._is_writing = item is not None
            match item:
                case None:
                    self._paper.keep_line(line)
                case str():
                    self._paper.write_words(item)
                case LogChunk():
                    self._paper.write_chunk(item)
                    with self._changed:
                        self._queued_bytes -= len(item.data)
                case _EndOfOutput():
                    self._paper.end_output()
            if item is not None and not self._queue:
                self._paper.keep_line(line)


class _Paper:
    """What has been written so far: whose line is open, which descriptors are dead. Only the console's thread touches it.

    On a terminal unfinished lines are shown as they come (progress bars, prompts); when someone else writes in between, the line is
    broken and begun again with its prefix. In a file or a pipe they are held until they end.
    """

    def __init__(self, prefix: Callable[[int, int], str], stdout_fd: int, stderr_fd: int, is_coloured: bool) -> None:
        self._prefix = prefix
        self._is_coloured = is_coloured
        self.has_line = False
        """Whether our own line stands at the bottom of the terminal of standard error."""
        self._is_mid_line = False
        """What was written last to that terminal has not ended its line."""
        self._fds = {Stream.STDOUT: stdout_fd, Stream.STDERR: stderr_fd}
        self._is_terminal = {stream: os.isatty(fd) for stream, fd in self._fds.items()}
        self._local_ranks: dict[int, int] = {}
        self._held: dict[_Source, LineAssembler] = {}
        self._open: dict[tuple[int, int], _Source] = {}
        """Whose line has not ended, for each file that is written to. Both descriptors may be one terminal: then it is one entry."""
        self._returned: set[tuple[int, int]] = set()
        """Of these, where the cursor is back at the beginning of that line (a progress bar): what comes next has a prefix again."""
        self._dead_fds: set[int] = set()

    def write_words(self, text: str) -> None:
        fd = self._fds[Stream.STDERR]
        self._close_line_of_another(fd, None)
        self._write(fd, text.encode("utf-8", "backslashreplace"))

    def write_chunk(self, chunk: LogChunk) -> None:
        source = (chunk.rank, chunk.stream)
        self._local_ranks[chunk.rank] = chunk.local_rank
        data = chunk.data
        if not self._is_terminal[chunk.stream]:
            data = self._held.setdefault(source, LineAssembler(_MAX_LINE_BYTES)).feed(data)
        self._show(source, data)

    def end_output(self) -> None:
        for source, lines in self._held.items():
            self._show(source, lines.flush())

    def _show(self, source: _Source, data: bytes) -> None:
        if not data:
            return
        fd = self._fds[source[1]]
        self._close_line_of_another(fd, source)
        prefix = self._prefix(source[0], self._local_ranks[source[0]]).encode()
        pieces, is_open = [], _file(fd) in self._open and _file(fd) not in self._returned
        for piece in _PIECES.findall(data):
            if not is_open:
                pieces.append(prefix)
            pieces.append(piece)
            is_open = not piece.endswith((b"\n", b"\r"))
        self._returned.discard(_file(fd))
        is_terminal = self._is_terminal[source[1]]
        if pieces[-1].endswith(b"\n") or not (is_open or is_terminal):
            self._open.pop(_file(fd), None)
        else:
            self._open[_file(fd)] = source
            if not is_open:
                self._returned.add(_file(fd))
        self._write(fd, b"".join(pieces))

    def keep_line(self, parts: Sequence[str]) -> None:
        """Our line below what has been written so far; without parts, or where there is no room for it, none."""
        fd = self._fds[Stream.STDERR]
        data = bottomline.hide(is_open=self._is_mid_line) if self.has_line else b""
        line = bottomline.fit(list(parts), _columns_for_line(fd)) if parts and self._is_terminal[Stream.STDERR] else ""
        if line:
            data += bottomline.show(line, is_open=self._is_mid_line, is_coloured=self._is_coloured)
        self.has_line = bool(line)
        self._write_through(fd, data)

    def _close_line_of_another(self, fd: int, source: _Source | None) -> None:
        """A new line where someone else's words are about to follow an open line in the same file."""
        if self._open.get(_file(fd), source) != source:
            self._write(fd, b"\n")
            del self._open[_file(fd)]
            self._returned.discard(_file(fd))

    def _write(self, fd: int, data: bytes) -> None:
        """What is to stay, above our line."""
        if data and self._is_terminal[Stream.STDERR] and _file(fd) == _file(self._fds[Stream.STDERR]):
            if self.has_line:
                data = bottomline.hide(is_open=self._is_mid_line) + data
                self.has_line = False
            self._is_mid_line = not data.endswith(b"\n")
        self._write_through(fd, data)

    def _write_through(self, fd: int, data: bytes) -> None:
        """To the last byte; a descriptor that fails (the reader went away) is left alone from then on."""
        while data and fd not in self._dead_fds:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                select.select([], [fd], [])
            except OSError:
                self._dead_fds.add(fd)


def _columns_for_line(fd: int) -> int:
    """0 where our line should not be: too small a terminal, or a job in the background of somebody's shell."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 0
    with contextlib.suppress(OSError):  # not our controlling terminal: nobody else's either
        if os.tcgetpgrp(fd) != os.getpgrp():
            return 0
    return columns if bottomline.has_room(columns, rows) else 0


def _file(fd: int) -> tuple[int, int]:
    """What the descriptor leads to: two descriptors of one terminal are the same."""
    try:
        status = os.fstat(fd)
    except OSError:
        return (-1, fd)
    return (status.st_dev, status.st_ino)
