"""The known future of a node: what its readers have said they will read, merged.

Each stream (one per sampler) announces visits in the order of reading and later says how many are behind it. From that follow the next
block worth fetching (nearest first, over all streams) and, for an extent, how far away its next use is. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from cache.blocks import BLOCKS_PER_EXTENT, ExtentId, extent_of


@dataclass(frozen=True, slots=True)
class Visit:
    """One sample's bytes: the blocks [first, end) of one object."""

    content_id: str
    first: int
    end: int


@dataclass
class _Stream:
    visits: deque[Visit] = field(default_factory=deque)
    position: int = 0
    """Number of the first visit that is not behind the reader; `visits[0]` is this one."""
    cursor: int = 0
    """Visits before this number have been offered for fetching."""

    @property
    def end(self) -> int:
        return self.position + len(self.visits)


class Lookahead:
    """Visits of many streams. Not thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._uses: dict[ExtentId, dict[str, deque[int]]] = {}
        self._block_uses: dict[ExtentId, dict[int, int]] = {}
        """Per extent, how many visits each of its blocks has (by its place within the extent; small ints cost nothing)."""

    def announce(self, stream_id: str, visits: Iterable[Visit]) -> None:
        """Appends visits to a stream, which is made when it is new."""
        stream = self._streams.setdefault(stream_id, _Stream())
        for visit in visits:
            number = stream.end
            stream.visits.append(visit)
            for extent in _extents(visit):
                self._uses.setdefault(extent, {}).setdefault(stream_id, deque()).append(number)
            for extent, slot in _slots(visit):
                counts = self._block_uses.setdefault(extent, {})
                counts[slot] = counts.get(slot, 0) + 1

    def advance(self, stream_id: str, num_visits: int) -> set[str]:
        """The first `num_visits` visits since the stream began are behind its reader. Going back or beyond what is announced is ignored.
        Returns the objects of which an extent is announced by nobody now."""
        stream, passed = self._streams.get(stream_id), set[str]()
        if stream is None:
            return passed
        while stream.visits and stream.position < num_visits:
            visit = stream.visits.popleft()
            for extent in _extents(visit):
                if self._forget_use(extent, stream_id, stream.position):
                    passed.add(extent.content_id)
            for extent, slot in _slots(visit):
                self._forget_block(extent, slot)
            stream.position += 1
        stream.cursor = max(stream.cursor, stream.position)
        return passed

    def close(self, stream_id: str) -> set[str]:
        """As if all of it were behind its reader."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return set()
        passed = self.advance(stream_id, stream.end)
        del self._streams[stream_id]
        return passed

    def next_use(self, extent: ExtentId) -> float | None:
        """Visits until the nearest use of an extent by any stream; None when nobody announced one."""
        uses = self._uses.get(extent)
        if not uses:
            return None
        return min(numbers[0] - self._streams[stream_id].position for stream_id, numbers in uses.items())

    def progress(self, stream_id: str) -> tuple[int, int]:
        """How many visits of a stream are behind its reader, and how many were announced; (0, 0) for one that announced none."""
        stream = self._streams.get(stream_id)
        return (0, 0) if stream is None else (stream.position, stream.end)

    def next_candidate(self, is_needed: Callable[[str, int], bool]) -> tuple[Visit, int, float] | None:
        """The nearest visit with a block that `is_needed(content_id, block)`: the visit, the first such block, and the distance in
        visits; None when there is none.

        The same block is offered again until it is no longer needed.
        """
        while True:
            ahead = [(s.cursor - s.position, key) for key, s in self._streams.items() if s.cursor < s.end]
            if not ahead:
                return None
            distance, key = min(ahead)
            stream = self._streams[key]
            visit = stream.visits[distance]
            for block in range(visit.first, visit.end):
                if is_needed(visit.content_id, block):
                    return visit, block, float(distance)
            stream.cursor += 1

    def is_open(self, stream_id: str) -> bool:
        return stream_id in self._streams

    def sample(self, stream_id: str, num: int, within: int | None = None) -> list[Visit]:
        """So many of the visits (of the first `within`) that are not behind a stream's reader, spread evenly; all if there are fewer."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return []
        ahead = len(stream.visits) if within is None else min(within, len(stream.visits))
        return [stream.visits[place * ahead // min(num, ahead)] for place in range(min(num, ahead))]

    def next_visits(self, num: int) -> Iterator[Visit]:
        """Of each stream, the first `num` visits that are not behind its reader."""
        for stream in self._streams.values():
            yield from islice(stream.visits, num)

    def is_announced(self, content_id: str, block: int) -> bool:
        """Whether somebody will visit this very block."""
        counts = self._block_uses.get(ExtentId(content_id, extent_of(block)))
        return counts is not None and block % BLOCKS_PER_EXTENT in counts

    def offer_again(self, extent: ExtentId) -> None:
        """An extent left the disk, or can be written now: visits to it are to be offered again."""
        for stream_id, numbers in self._uses.get(extent, {}).items():
            stream = self._streams[stream_id]
            stream.cursor = min(stream.cursor, numbers[0])

    def content_ids(self) -> set[str]:
        """Objects that somebody has announced a use of."""
        return {extent.content_id for extent in self._uses}

    def uses_object(self, content_id: str, num_extents: int) -> bool:
        return any(ExtentId(content_id, idx) in self._uses for idx in range(num_extents))

    @property
    def num_announced(self) -> int:
        return sum(len(stream.visits) for stream in self._streams.values())

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def _forget_use(self, extent: ExtentId, stream_id: str, number: int) -> bool:
        """True when this was the last."""
        uses = self._uses[extent]
        numbers = uses[stream_id]
        popped = numbers.popleft()
        assert popped == number, (extent, stream_id, number, popped)
        if not numbers:
            del uses[stream_id]
            if not uses:
                del self._uses[extent]
                return True
        return False

    def _forget_block(self, extent: ExtentId, slot: int) -> None:
        counts = self._block_uses[extent]
        if counts[slot] > 1:
            counts[slot] -= 1
            return
        del counts[slot]
        if not counts:
            del self._block_uses[extent]


def _slots(visit: Visit) -> Iterator[tuple[ExtentId, int]]:
    for extent in _extents(visit):
        first = extent.extent_idx * BLOCKS_PER_EXTENT
        for block in range(max(visit.first, first), min(visit.end, first + BLOCKS_PER_EXTENT)):
            yield extent, block - first


def _extents(visit: Visit) -> Iterable[ExtentId]:
    if visit.end <= visit.first:
        return ()
    return (ExtentId(visit.content_id, idx) for idx in range(extent_of(visit.first), extent_of(visit.end - 1) + 1))
