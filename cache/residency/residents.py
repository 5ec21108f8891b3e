"""What is on this node's disk, object by object: a table that the machine moves and others ask. No I/O, no decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cache.blocks import (
    BLOCK_BYTES,
    BLOCKS_PER_EXTENT,
    ExtentId,
    ObjectId,
    extent_of,
    extent_span,
    num_blocks,
    num_extents,
)
from cache.residency.blockstate import BlockMove, BlockState, moved
from cache.residency.policy import Uses
from cache.residency.slots import Slots

STATES = tuple(BlockState)
CODES = {state: code for code, state in enumerate(STATES)}
assert STATES[0] is BlockState.ABSENT, "a new extent is a row of zeros"


@dataclass(slots=True)
class KnownObject:
    """An object and its words; `clients` have it open, each so many times."""

    object_id: ObjectId
    base: int
    clients: dict[str, int] = field(default_factory=dict)
    is_pinned: bool = False
    """A person wants it to stay: evicted only if the bound cannot be kept otherwise."""

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.object_id.size_bytes)

    @property
    def num_extents(self) -> int:
        return num_extents(self.object_id.size_bytes)

    def word_of_block(self, block: int) -> int:
        return self.base + block

    def word_of_extent(self, extent_idx: int) -> int:
        return self.base + self.num_blocks + extent_idx


@dataclass(slots=True)
class Extent:
    """One extent file, from the decision to make it until its removal."""

    key: ExtentId
    owner: KnownObject
    generation: int
    size_bytes: int
    last_use_s: float
    uses: Uses
    codes: bytearray
    """Each block's state, as its place in STATES: a byte, for there are many."""
    is_open: bool = False
    """False while its file is being made, or while its table has not been read."""
    needs_table: bool = False
    """Found on disk, and nobody has needed to know yet which blocks it holds."""
    is_old: bool = False
    """Found on disk, or a reader that held it has died: somebody may hold it open of whom this daemon hears nothing."""
    holders: Counter[str] = field(default_factory=Counter)
    """Per reader, how many times it was given the file and has not let go of it."""
    backlog: dict[int, None] = field(default_factory=dict)
    """Blocks to start once the file is open, in the order in which they were asked for."""
    num_busy: int = 0
    """Fetches and checks of workers under way."""
    num_waiters: int = 0

    @property
    def is_evictable(self) -> bool:
        """Nobody works on it or waits for it. (A file whose table nobody has asked for is at rest, though not open.)"""
        is_at_rest = self.is_open or (self.needs_table and not self.backlog)
        return is_at_rest and self.num_busy == 0 and self.num_waiters == 0

    @property
    def block_indices(self) -> range:
        first = self.key.extent_idx * BLOCKS_PER_EXTENT
        return range(first, first + len(self.codes))

    def state(self, block: int) -> BlockState:
        return STATES[self.codes[block % BLOCKS_PER_EXTENT]]

    def move(self, block: int, move: BlockMove) -> None:
        slot = block % BLOCKS_PER_EXTENT
        self.codes[slot] = CODES[moved(STATES[self.codes[slot]], move, (self.key, block))]

    def count(self, states: Iterable[BlockState]) -> int:
        """Blocks in any of these states."""
        return sum(self.codes.count(CODES[state]) for state in states)


class Residents:
    """All known objects and extents of a node."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.objects: dict[str, KnownObject] = {}
        self.extents: dict[ExtentId, Extent] = {}
        self.pins: tuple[str, ...] = ()

    def pin(self, urls: tuple[str, ...]) -> None:
        """These, and what lies below them, are pinned from now on; nothing else is."""
        self.pins = urls
        for known in self.objects.values():
            known.is_pinned = is_below_any(known.object_id.url, urls)

    def learn(self, object_id: ObjectId) -> KnownObject:
        """The object, given its words if it is new. Raises CapacityError when the table of words is full."""
        known = self.objects.get(object_id.content_id)
        if known is None:
            size = object_id.size_bytes
            known = KnownObject(object_id, self._slots.take(num_blocks(size) + num_extents(size)))
            known.is_pinned = bool(self.pins) and is_below_any(object_id.url, self.pins)
            self.objects[object_id.content_id] = known
        return known

    def forget(self, known: KnownObject) -> None:
        """Gives the words of an object back; nothing of it may be here any more."""
        assert next(self.extents_of(known), None) is None, known
        del self.objects[known.object_id.content_id]
        self._slots.give_back(known.base, known.num_blocks + known.num_extents)

    def add_extent(
        self,
        known: KnownObject,
        extent_idx: int,
        generation: int,
        size_bytes: int,
        now: float,
        uses: Uses | None = None,
    ) -> Extent:
        start, end = extent_span(known.object_id.size_bytes, extent_idx)
        key = ExtentId(known.object_id.content_id, extent_idx)
        codes = bytearray(num_blocks(end - start))
        extent = self.extents[key] = Extent(key, known, generation, size_bytes, now, uses or Uses(0), codes)
        return extent

    def of_block(self, content_id: str, block: int) -> Extent | None:
        return self.extents.get(ExtentId(content_id, extent_of(block)))

    def current(self, key: ExtentId, generation: int) -> Extent | None:
        """The extent, if its file is still the one of this generation."""
        extent = self.extents.get(key)
        return extent if extent is not None and extent.generation == generation else None

    def extents_of(self, known: KnownObject) -> Iterator[Extent]:
        content_id = known.object_id.content_id
        for extent_idx in range(known.num_extents):
            extent = self.extents.get(ExtentId(content_id, extent_idx))
            if extent is not None:
                yield extent

    def on_disk_bytes(self, content_id: str) -> int:
        """Bytes of an object on disk, verified or not (of an extent whose table is unread: all of them)."""
        known = self.objects.get(content_id)
        if known is None:
            return 0
        there = (BlockState.UNVERIFIED, BlockState.VERIFYING, BlockState.RESIDENT, BlockState.CHECKING)
        total = 0
        for extent in self.extents_of(known):
            start, end = extent_span(known.object_id.size_bytes, extent.key.extent_idx)
            if extent.needs_table:
                total += end - start
                continue
            total += extent.count(there) * BLOCK_BYTES
            if extent.state(extent.block_indices[-1]) in there:
                total -= len(extent.codes) * BLOCK_BYTES - (end - start)  # the last block of an object is shorter
        return total

    def resident_blocks(self, content_id: str) -> int:
        known = self.objects.get(content_id)
        readable = [state for state in STATES if state.is_readable]
        return 0 if known is None else sum(extent.count(readable) for extent in self.extents_of(known))


def is_below_any(url: str, prefixes: Iterable[str]) -> bool:
    """Whether a url is one of these, or lies below one of them.

    >>> is_below_any("s3://b/train/0.tar", ["s3://b/train"]), is_below_any("s3://b/training/0.tar", ["s3://b/train"])
    (True, False)
    """
    return any(url == prefix or url.startswith(prefix if prefix.endswith("/") else f"{prefix}/") for prefix in prefixes)
