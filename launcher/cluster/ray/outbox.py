"""What one side has to tell and the other fetches, kept until it is known to have arrived.

The answer to a poll can be lost with the connection, after the node has handed it over; a lost RankExited would be a job that waits for
ever. So each poll says up to which number everything has arrived, and only that is forgotten.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """Items in order, numbered from 1. `max_bytes` bounds what is held; None: unbounded, `put` never blocks."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._held: deque[tuple[T, int]] = deque()
        self._num_forgotten = 0
        self._num_bytes = 0
        self._is_closed = False

    def put(self, item: T, num_bytes: int = 0) -> None:
        """Blocks while the box is full. Any thread."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._max_bytes is None or self._num_bytes < self._max_bytes or self._is_closed
            )
            self._held.append((item, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()

    def take(self, num_arrived: int, timeout_s: float) -> list[T]:
        """Forgets the first `num_arrived` items of all, and returns those after them; empty after `timeout_s`, or when closed."""
        with self._changed:
            while self._num_forgotten < num_arrived and self._held:
                _, num_bytes = self._held.popleft()
                self._num_bytes -= num_bytes
                self._num_forgotten += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._held or self._is_closed, timeout_s)
            return [item for item, _ in self._held]

    def close(self) -> None:
        """No more will come: nobody waits any longer, neither to put nor to take."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
