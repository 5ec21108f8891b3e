"""A real pseudo-terminal and what a person would see on it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import threading
from typing import Any

import pyte


class Terminal:
    """`fd` is what a program writes to. Whatever is written there is read at once, as a terminal does."""

    def __init__(self, columns: int = 80, rows: int = 12) -> None:
        self._lock = threading.Lock()
        self._screen: Any = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream: Any = pyte.ByteStream(self._screen)
        self.written = b""
        self._master_fd, self.fd = os.openpty()
        self._stop_fd, self._stop_write_fd = os.pipe()
        self._set_size(columns, rows)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def resize(self, columns: int, rows: int) -> None:
        with self._lock:
            self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self._master_fd, self._stop_fd], [], [])
            if self._master_fd not in ready:
                return
            try:
                data = os.read(self._master_fd, 1 << 16)
            except OSError:
                return
            with self._lock:
                self.written += data
                self._stream.feed(data)

    def rows(self) -> list[str]:
        """What is on the screen, without what is empty at its end."""
        with self._lock:
            return _trimmed([line.rstrip() for line in self._screen.display])

    def everything(self) -> list[str]:
        """The same with what has scrolled out of it."""
        with self._lock:
            columns = self._screen.columns
            gone = ["".join(line[x].data for x in range(columns)).rstrip() for line in self._screen.history.top]
            return _trimmed([*gone, *(line.rstrip() for line in self._screen.display)])

    def close(self) -> None:
        """All that was written before has been read."""
        if self.fd >= 0:
            os.write(self._stop_write_fd, b"x")
            self._thread.join()
            for fd in (self.fd, self._master_fd, self._stop_fd, self._stop_write_fd):
                os.close(fd)
            self.fd = -1


def _trimmed(rows: list[str]) -> list[str]:
    while rows and not rows[-1]:
        rows.pop()
    return rows
