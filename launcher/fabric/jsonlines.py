"""A child process that is asked and answers in JSON lines; one question at a time, each with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

END_GRACE_S = 1.5
"""Nothing that a launcher has started outlives it by more than 2 s."""

END_S = 10.0
"""What a process needs that has lost its input; then it is killed."""


def questions() -> Iterator[Any]:
    """The other side: the questions that come on standard input, one at a time, until it ends.

    A thread reads, so that the end of the input (whoever asked is dead) ends this process within END_GRACE_S, whatever it is doing.
    """
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            arrived.put(line)
        arrived.put(None)
        time.sleep(END_GRACE_S)
        os._exit(0)

    threading.Thread(target=read, name="questions", daemon=True).start()
    while (line := arrived.get()) is not None:
        yield json.loads(line)


class Lost(ConnectionError):
    """The process ended, or did not answer in time (it is killed then: a late answer would be taken for the next one's)."""


class JsonLines:
    """`command` starts it: directly, through `ip netns exec`, ssh. Not thread-safe. It sees the end of its input when we die."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, *, is_quiet: bool = False) -> None:
        """`is_quiet`: what it writes on standard error is dropped."""
        errors = subprocess.DEVNULL if is_quiet else None
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._received = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        """The answer. Raises Lost."""
        try:
            self._input.write(json.dumps(question).encode() + b"\n")
            self._input.flush()
        except (OSError, ValueError) as error:
            raise Lost(self._why_ended()) from error
        return self.read(timeout_s)

    def read(self, timeout_s: float) -> Any:
        """The next line. Raises Lost."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._output], [], [], left_s)[0]:
                self._process.kill()
                raise Lost(f"process {self.pid} has not answered within {timeout_s:g} s")
            data = self._output.read(1 << 16)
            if not data:
                raise Lost(self._why_ended())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            self._process.kill()
            raise Lost(f"process {self.pid} said {line[:80]!r}, which is no answer") from error

    def kill(self) -> None:
        """From any thread: a question under way is Lost."""
        self._process.kill()

    def close(self) -> int:
        """Closes its input, which ends it; its exit code."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._output.close()
        return code

    def _why_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return f"process {self.pid} has ended (exit code {self._process.poll()})"
