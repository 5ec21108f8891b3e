"""Which blocks are read back next while nobody is in a hurry: every block once per round, in an order that differs from round to round,
no faster than a rate. No I/O; `now` is an argument.

Why: what rots on a disk while the daemon runs would be served until somebody verifies it; a hit is a plain read.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_FETCH, ExtentId

IDLE_WAIT_S = 1.0
"""How long to wait when there is nothing to read back, or somebody else needs the disk."""


class Scrubber:
    """`rate_bytes_per_s`: 0 turns it off."""

    def __init__(self, rate_bytes_per_s: int, rng: random.Random) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self.num_rounds = 0
        """How many times everything was gone through."""
        self._rng = rng
        self._todo: deque[ExtentId] = deque()
        self._runs: list[tuple[ExtentId, range]] = []
        self._next_s = 0.0

    def is_due(self, now: float) -> bool:
        return self.rate_bytes_per_s > 0 and now >= self._next_s

    def postpone(self, now: float) -> None:
        """Not now: readers need the disk, or it needs rest."""
        self._next_s = now + IDLE_WAIT_S

    def next_s(self) -> float:
        return self._next_s

    def take(
        self, extents: Callable[[], Iterable[ExtentId]], blocks_of: Callable[[ExtentId], list[int] | None], now: float
    ) -> tuple[ExtentId, range | None] | None:
        """The next neighbouring blocks to read back. `extents()`: all that are here, asked for at the start of a round.

        `blocks_of(extent)`: those of its blocks that can be read back now; None: which they are must be read first (the extent is
        returned without blocks, and comes again later in the round). None: there is nothing.
        """
        is_new_round = False
        while True:
            if self._runs:
                extent, run = self._runs.pop()
                if set(run) <= set(blocks_of(extent) or []):
                    self._next_s = now + len(run) * BLOCK_BYTES / self.rate_bytes_per_s
                    return extent, run
                continue
            if not self._todo:
                listed = [] if is_new_round else list(extents())
                if not listed:
                    self.postpone(now)
                    return None
                self._rng.shuffle(listed)
                self._todo = deque(listed)
                self.num_rounds += 1
                is_new_round = True
            extent = self._todo.pop()
            blocks = blocks_of(extent)
            if blocks is None:
                self._todo.appendleft(extent)
                self._next_s = now + BLOCK_BYTES / self.rate_bytes_per_s
                return extent, None
            self._runs = [(extent, run) for run in neighbours(blocks)]


def neighbours(blocks: list[int]) -> list[range]:
    """Runs of consecutive blocks, none longer than one fetch.

    >>> neighbours([1, 2, 3, 7])
    [range(1, 4), range(7, 8)]
    """
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block and len(runs[-1]) < BLOCKS_PER_FETCH:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs
