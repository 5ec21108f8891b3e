"""One thread that waits for answers of Ray and for moments in time, for all nodes together: a thousand nodes had two thousand threads.

Whatever is waited for is a callable that is called in this thread, one after the other. It may block only what waits in the same Waiter.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Then = Callable[[], None]


class Waiter:
    """Any thread may call any method."""

    def __init__(self, name: str) -> None:
        self._news: queue.SimpleQueue[Then | None] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def when(self, ref: Any, then: Callable[[Future[Any]], None]) -> None:
        """Calls `then` with the answer, or the error, of a call of Ray once it is there."""
        ref.future().add_done_callback(lambda answer: self._news.put(lambda: then(answer)))

    def after(self, delay_s: float, then: Then) -> None:
        """Calls `then` after so long, and not before."""
        timer = (time.monotonic() + delay_s, next(self._numbers), then)
        self._news.put(lambda: heapq.heappush(self._timers, timer))

    def close(self, timeout_s: float = 2.0) -> None:
        """Nothing is called after this, but for what is being called now and does not return in time."""
        self._is_closed = True
        self._news.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_closed:
            news = self._next_news()
            if news is not None:
                news()
            while self._timers and self._timers[0][0] <= time.monotonic() and not self._is_closed:
                heapq.heappop(self._timers)[2]()

    def _next_news(self) -> Then | None:
        if not self._timers:
            return self._news.get()
        with contextlib.suppress(queue.Empty):
            return self._news.get(timeout=max(0.0, self._timers[0][0] - time.monotonic()))
        return None
