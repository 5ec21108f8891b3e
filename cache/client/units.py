"""Units that were unpacked: kept in memory, the longest unused go when they are too many.

A full shuffle over units that do not fit here unpacks one for nearly every sample. That is right and slow, so it is said once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from cache.client.formats.ports import Unit

log = logging.getLogger("railhead.cache.client")

DEFAULT_MAX_BYTES = 512 * 1024 * 1024

_LOOK_AFTER = 64
"""Units that must have been unpacked again before anything is said."""
_FEW_SAMPLES = 8
"""Fewer samples than this for each unpacking is too few."""

Key = tuple[int, int]


class Units:
    """Any thread may call. A forked child keeps what its parent had unpacked."""

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"room for {max_bytes} bytes of unpacked units; it must not be negative")
        self._max_bytes = max_bytes
        self._units: OrderedDict[Key, Unit] = OrderedDict()
        self._size_bytes = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._seen: set[Key] = set()
        self._num_again = self._num_asked = 0
        self._has_warned = False

    def get(self, key: Key, unpack: Callable[[], Unit]) -> Unit:
        """The unit of this key, unpacked now if it is not here. At least the one that was asked for last stays."""
        if self._pid != os.getpid():
            # The lock may have been held by a thread that the child does not have: it is replaced, not taken.
            self._pid, self._lock = os.getpid(), threading.Lock()
        with self._lock:
            self._num_asked += 1
            unit = self._units.get(key)
            if unit is not None:
                self._units.move_to_end(key)
                return unit
        unit = unpack()  # Two threads may do this for one unit: the second one's work is lost, nothing else.
        with self._lock:
            if key not in self._units:
                self._units[key] = unit
                self._size_bytes += unit.size_bytes
            while self._size_bytes > self._max_bytes and len(self._units) > 1:
                _, gone = self._units.popitem(last=False)
                self._size_bytes -= gone.size_bytes
            self._num_again += key in self._seen
            self._seen.add(key)
            self._maybe_warn()
        return unit

    def _maybe_warn(self) -> None:
        unpacked = len(self._seen) + self._num_again
        if not self._has_warned and self._num_again >= _LOOK_AFTER and self._num_asked < _FEW_SAMPLES * unpacked:
            self._has_warned = True
            log.warning(
                "%d samples took %d unpackings of %d row groups or compressed shards: they are shuffled over more than fits in %d MiB; "
                "use shuffle='windowed:W' with W of them fitting, or raise unpacked_bytes",
                self._num_asked,
                unpacked,
                len(self._seen),
                self._max_bytes // 2**20,
            )
