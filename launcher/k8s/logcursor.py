"""Where we are in a pod's log, so that a reconnect neither loses a line nor shows one twice. Pure.

The API server gives each line its time to the nanosecond, and takes `sinceTime` to the second: after a cut it repeats up to a second of
lines. Several lines may share a time, so they are counted.
"""

from __future__ import annotations


class LogCursor:
    """Fed with each line as it comes; says which are new.

    >>> cursor = LogCursor()
    >>> [cursor.take(line) for line in ("2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.1Z b")]
    ['a', 'b']
    >>> cursor.reconnected()
    >>> [cursor.take(line) for line in ("2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.1Z b", "2026-01-01T00:00:00.1Z c")]
    [None, None, 'c']
    """

    def __init__(self) -> None:
        self._last = ""
        self._num_at_last = 0
        self._num_repeated = 0

    @property
    def since_time(self) -> str | None:
        """What to ask for at the next connection; None: everything."""
        return self._last or None

    def reconnected(self) -> None:
        """The next lines come from a new connection, opened with `since_time`."""
        self._num_repeated = 0

    def take(self, line: str) -> str | None:
        """The line without its time; None if it was shown before."""
        stamp, _, text = line.partition(" ")
        key = _sortable(stamp)
        last = _sortable(self._last)
        if key < last:
            return None
        if key == last:
            self._num_repeated += 1
            if self._num_repeated <= self._num_at_last:
                return None
            self._num_at_last = self._num_repeated
            return text
        self._last, self._num_at_last, self._num_repeated = stamp, 1, 1
        return text


def _sortable(stamp: str) -> str:
    """Go leaves trailing zeros of the fraction out, so texts of times do not compare as times do."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}" if stamp else ""
