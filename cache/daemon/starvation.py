"""How long this process could not run though it wanted to, because others had the processors or Python's lock: not to be blamed on a disk.

A write of a quarter of a mebibyte takes what the disk needs and what its thread waits to go on afterwards. On a machine with many times
more to do than processors the second is seconds, and a daemon that took that for a slow disk stopped using it. The event loop of the same
process waits as its threads do, and knows when it wanted to run: how late its own ticks are is what others lost meanwhile, as well as one
can say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

TICK_S = 0.05


class Starvation:
    """Of the process whose event loop this is. Ticks only while somebody watches."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._due_s = 0.0
        self._num_watching = 0
        self._ticking: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """From the event loop."""
        self._num_watching += 1
        if self._ticking is None:
            self._due_s = time.monotonic() + TICK_S
            self._ticking = asyncio.create_task(self._tick())
        try:
            yield Watch(self)
        finally:
            self._num_watching -= 1
            if self._num_watching == 0:
                self._ticking.cancel()
                self._ticking = None

    def lost_s(self) -> float:
        """In all, until now; what the tick that is due has lost already is counted."""
        return self._lost_s + max(0.0, time.monotonic() - self._due_s)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._due_s - time.monotonic()))
            now_s = time.monotonic()
            self._lost_s += max(0.0, now_s - self._due_s)
            self._due_s = now_s + TICK_S


class Watch:
    def __init__(self, starvation: Starvation) -> None:
        self._starvation, self._before_s = starvation, starvation.lost_s()

    def without(self, seconds: float) -> float:
        """What is left of so many seconds without what was lost since."""
        return max(0.0, seconds - (self._starvation.lost_s() - self._before_s))
