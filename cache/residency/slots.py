"""Which residency words belong to which object: an allocator of ranges within one fixed table. No I/O.

Word 0 counts evictions: a reader that sees it changed looks through the files that it holds. Word 1 is the daemon's heartbeat: a reader
that waits and sees it stand still knows that nobody is working for it. An object gets one word per block, followed by one per extent.
Generations are never used twice, so a word that a late reader of a former owner still looks at cannot equal the generation that it
remembers.
"""

from __future__ import annotations

from cache.errors import CapacityError

EVICTION_WORD = 0
HEARTBEAT_WORD = 1
_FIRST_FREE_WORD = 2


class Slots:
    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._end = _FIRST_FREE_WORD
        self._free: dict[int, list[int]] = {}

    def take(self, count: int) -> int:
        """First word of a free range of `count` words. Raises CapacityError when the table is full."""
        reusable = self._free.get(count)
        if reusable:
            return reusable.pop()
        if self._end + count > self._num_words:
            return self._take_from_rest(count)
        base, self._end = self._end, self._end + count
        return base

    def give_back(self, base: int, count: int) -> None:
        if count:
            self._free.setdefault(count, []).append(base)

    def _take_from_rest(self, count: int) -> int:
        """The table's end is reached: free neighbours are joined, since objects of other sizes lived there. First fit."""
        spans: list[tuple[int, int]] = []
        for base, size in sorted((base, size) for size, bases in self._free.items() for base in bases):
            if spans and sum(spans[-1]) == base:
                spans[-1] = (spans[-1][0], spans[-1][1] + size)
            else:
                spans.append((base, size))
        self._free = {}
        found = None
        for base, size in spans:
            taken = count if found is None and size >= count else 0
            found = base if taken else found
            self.give_back(base + taken, size - taken)
        if found is None:
            raise CapacityError(
                f"the table of {self._num_words} residency words is full: {count} more do not fit",
                advice="close objects that are no longer read",
            )
        return found
