"""How many bytes a link holds: what an origin must be sending at once so that it never pauses. Pure; `now` is an argument.

The number of requests (concurrency.py) is found out with large ones, of which few are enough. Near its reader a fetch brings single
blocks, and of a distant, fast origin most of them are still on the way to their first byte: 100 ms of 200 MB/s are 20 MB, fifty requests
of 400 KiB. What came per second, times the shortest time to a first byte, is what was on the way; half as much again is asked for. So it
grows for as long as nothing queues, and stops by itself when requests begin to wait for each other. Source: Cardwell et al., "BBR:
Congestion-Based Congestion Control", 2016.
"""

from __future__ import annotations

from collections import OrderedDict, deque

GAIN = 1.5
WINDOW_S = 0.2
"""Requests that began together land together: a rate over less than some round trips is noise."""

NUM_WINDOWS = 8
"""The best of so many counts: a pause of the reader says nothing about the link."""

MEMORY_S = 10
"""For so long the shortest time to a first byte is believed: while much queues, every one of them is longer."""


class Pipe:
    """Of one origin."""

    def __init__(self) -> None:
        self._window_began_s = 0.0
        self._window_bytes = 0
        self._rates: deque[float] = deque(maxlen=NUM_WINDOWS)
        self._shortest: OrderedDict[int, float] = OrderedDict()
        """Per second in which something came, the shortest time to a first byte."""

    def landed(self, num_bytes: int, first_byte_s: float, now: float) -> None:
        """A request brought its bytes, the first of them after `first_byte_s`."""
        second = int(now)
        self._shortest[second] = min(first_byte_s, self._shortest.get(second, first_byte_s))
        if len(self._shortest) > MEMORY_S:
            self._shortest.popitem(last=False)
        if now - self._window_began_s > 2 * WINDOW_S:
            self._window_began_s, self._window_bytes = (
                now,
                0,
            )  # A pause; what landed first after it was asked for in it.
            return
        self._window_bytes += num_bytes
        if now - self._window_began_s >= WINDOW_S:
            self._rates.append(self._window_bytes / (now - self._window_began_s))
            self._window_began_s, self._window_bytes = now, 0

    @property
    def num_bytes(self) -> float:
        """What may be on its way at once, at least; 0 while nothing is known."""
        if not self._rates:
            return 0.0
        return GAIN * max(self._rates) * min(self._shortest.values())
