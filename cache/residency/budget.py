"""Capacity as a hard bound: what is on disk, what is being made, and what readers still hold open after its eviction. No I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cache.blocks import ExtentId

INDEX_BYTES_PER_EXTENT = 512
"""What one extent may cost in the index (a row, its key and its share of free pages; measured about 200 bytes), counted like payload."""

STALE_HOLD_S = 2.0
"""A reader at work lets go of an evicted file at its next read. One that has not after this long is idle; its bytes are no longer
expected back soon."""

UNKNOWN_READERS = ""
"""Holds an evicted file until the disk has said that nobody has it open. Somebody may have of whom no message comes: a reader of the daemon
before this one, a child of one that has gone, or one that died and whose files the kernel is still closing (store/holding.py)."""

UNBOUNDED = 1 << 62


@dataclass
class Ghost:
    """An evicted file that readers still hold open: its bytes are on the disk until the last of them lets go."""

    size_bytes: int
    holders: Counter[str]
    """Per reader, how many times it was given the file and has not let go of it."""
    since_s: float


@dataclass
class Floor:
    """What is left to the other users of the disk: the cache gives way before the file system has less than this free."""

    keep_bytes: int = 0
    keep_files: int = 0
    bound_bytes: int = UNBOUNDED
    """What the cache's files may take so that the floor is kept; by the last look at the disk."""
    bound_files: int = UNBOUNDED

    def seen(self, used_bytes: int, free_bytes: int, num_files: int, free_files: int | None) -> None:
        """Both sides take from the same disk: what we may have is what we have and what is free above the floor (less than we have, if
        the others went below it). Our own growth between two looks changes nothing in that sum."""
        self.bound_bytes = max(0, used_bytes + free_bytes - self.keep_bytes) if self.keep_bytes else UNBOUNDED
        no_bound = free_files is None or not self.keep_files
        self.bound_files = UNBOUNDED if no_bound else max(0, num_files + (free_files or 0) - self.keep_files)


@dataclass
class Budget:
    """`capacity_bytes` and `max_files` bound the files of the cache, evicted ones that are still held included."""

    capacity_bytes: int
    max_files: int
    used_bytes: int = 0
    num_files: int = 0
    keep_free: Floor = field(default_factory=Floor)
    ghosts: dict[tuple[ExtentId, int], Ghost] = field(default_factory=dict)

    @property
    def bound_bytes(self) -> int:
        """The capacity, or less while others need the disk."""
        return min(self.capacity_bytes, self.keep_free.bound_bytes)

    @property
    def bound_files(self) -> int:
        return min(self.max_files, self.keep_free.bound_files)

    @property
    def free_bytes(self) -> int:
        """Negative when the bound was made smaller than what is there."""
        return self.bound_bytes - self.used_bytes

    @property
    def free_files(self) -> int:
        return self.bound_files - self.num_files

    @property
    def is_exceeded(self) -> bool:
        """The bound was made smaller than what is there."""
        return self.free_bytes < 0 or self.free_files < 0

    @property
    def held_bytes(self) -> int:
        return sum(ghost.size_bytes for ghost in self.ghosts.values())

    def take(self, size_bytes: int) -> None:
        assert size_bytes <= self.free_bytes and self.free_files > 0, (size_bytes, self)
        self.adopt(size_bytes)

    def adopt(self, size_bytes: int, num_files: int = 1) -> None:
        """Counts files that are there already, even beyond the capacity."""
        self.used_bytes += size_bytes
        self.num_files += num_files

    def give_back(self, size_bytes: int) -> None:
        assert self.used_bytes >= size_bytes and self.num_files > 0, (size_bytes, self)
        self.used_bytes -= size_bytes
        self.num_files -= 1

    def haunt(self, extent: ExtentId, generation: int, size_bytes: int, holders: Counter[str], now: float) -> None:
        """The file was unlinked but is held open: its bytes go on counting."""
        self.ghosts[extent, generation] = Ghost(size_bytes, holders, now)

    def let_go(self, extent: ExtentId, generation: int, client_id: str) -> bool:
        """A reader closed an evicted file once. Its bytes are free when nobody is left, the unknown ones included. True when only those
        are: now the disk can be asked."""
        ghost = self.ghosts.get((extent, generation))
        if ghost is None or client_id not in ghost.holders:
            return False
        release(ghost.holders, client_id)
        if not ghost.holders:
            del self.ghosts[extent, generation]
            self.give_back(ghost.size_bytes)
        return ghost.holders.keys() == {UNKNOWN_READERS}

    def forget_client(self, client_id: str) -> list[tuple[ExtentId, int]]:
        """A reader is gone, and with it every file that it held; those of which the disk can be asked now."""
        doubtful = []
        for (extent, generation), ghost in list(self.ghosts.items()):
            if client_id in ghost.holders:
                ghost.holders[client_id] = 1
                if self.let_go(extent, generation, client_id):
                    doubtful.append((extent, generation))
        return doubtful

    def expected_back(self, now: float) -> tuple[int, int]:
        """Bytes and files that readers at work will let go of in a moment."""
        fresh = [ghost.size_bytes for ghost in self.ghosts.values() if now - ghost.since_s < STALE_HOLD_S]
        return sum(fresh), len(fresh)


def release(holders: Counter[str], client_id: str) -> None:
    """One hold less; a release that no hold stands against is ignored."""
    if holders[client_id] > 1:
        holders[client_id] -= 1
    else:
        del holders[client_id]
