"""An open connection to each agent's process, which carries nothing: its end is the news that the process is dead.

The kernel of the other machine sends it in milliseconds, whatever killed the process (Ray needs one to some ten seconds for its own
verdict on an actor, longer for a node). It can only say that somebody died: a cut link or a machine without power says nothing, and
silence is the heartbeat's business. Nor is a connection that cannot be made any news.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
from collections.abc import Callable


class Lifelines:
    """One thread for all nodes. Any thread may call any method."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._lines: dict[str, socket.socket] = {}
        self._is_closed = False
        self._wake_fd, self._wake_write_fd = os.pipe()
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="lifelines", daemon=True)
        self._thread.start()

    def connect(self, node_id: str, addr: str, port: int, on_end: Callable[[], None]) -> None:
        """Calls `on_end` once, from our thread, when the process at the other end is dead. Does not block."""
        line = socket.socket(socket.AF_INET6 if ":" in addr else socket.AF_INET)
        line.setblocking(False)
        if line.connect_ex((addr, port)) not in (0, errno.EINPROGRESS):
            line.close()
            return
        with self._lock:
            if self._is_closed:
                line.close()
                return
            self._lines[node_id] = line
            # It can be written to once it is connected, or has failed to.
            self._selector.register(line, selectors.EVENT_WRITE, (node_id, on_end))
        self._wake()

    def forget(self, node_id: str) -> None:
        """The node is no longer ours."""
        with self._lock:
            line = self._lines.pop(node_id, None)
            if line is not None:
                with contextlib.suppress(KeyError, ValueError, RuntimeError):  # the thread has closed it
                    self._selector.unregister(line)
                line.close()

    def close(self) -> None:
        """Nothing is called after this."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)
        for node_id in list(self._lines):
            self.forget(node_id)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write_fd, b"x")

    def _run(self) -> None:
        while not self._is_closed:
            for key, mask in self._selector.select():
                if key.data is None:
                    os.read(self._wake_fd, 4096)
                    continue
                node_id, on_end = key.data
                if mask & selectors.EVENT_WRITE:
                    self._settle(key.fileobj, key.data)
                elif self._has_ended(key.fileobj):
                    self.forget(node_id)
                    on_end()
        self._selector.close()
        os.close(self._wake_fd)
        os.close(self._wake_write_fd)

    def _settle(self, line: object, data: tuple[str, Callable[[], None]]) -> None:
        """The connection is made, or cannot be."""
        assert isinstance(line, socket.socket)
        if line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.forget(data[0])
            return
        with self._lock, contextlib.suppress(KeyError, ValueError, RuntimeError):  # it was forgotten meanwhile
            self._selector.modify(line, selectors.EVENT_READ, data)

    @staticmethod
    def _has_ended(line: object) -> bool:
        assert isinstance(line, socket.socket)
        try:
            return line.recv(4096) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
