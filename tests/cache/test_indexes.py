"""Indices of data sets on the node's disk: their bytes are counted for as long as they are there."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from cache.daemon.indexes import Indexes
from cache.errors import DiskError
from cache.residency import messages as m
from cache.store.shelf import FILE_OVERHEAD_BYTES

KEYS = ("0" * 32, "1" * 32)
SIZE = 100 + FILE_OVERHEAD_BYTES


class Books:
    """What the machine would count, and what happened in which order."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        path.mkdir()
        self.path, self.used_bytes = path, 0
        self.happened: list[str] = []
        self.indexes = Indexes(path, lambda: capacity_bytes, self._ask, self._tell, itertools.count(1), self._evicted)

    async def _ask(self, event: m.SpaceAsked) -> m.Answer:
        self.used_bytes += event.size_bytes
        self.happened.append("space given")
        return m.Answer(event.request_id)

    def _tell(self, event: m.Event) -> None:
        assert isinstance(event, m.SpaceReturned)
        self.used_bytes -= event.size_bytes

    async def _evicted(self) -> None:
        self.happened.append(f"evicted, with {len(self.on_disk())} indices here")

    def on_disk(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "indexes").glob("*"))


def test_an_index_is_written_only_after_what_makes_room_for_it_has_left_the_disk(tmp_path: Path) -> None:
    """Extents are removed by another thread, which may be behind: the disk held both for a moment."""
    books = Books(tmp_path / "cache", 16 * SIZE)
    asyncio.run(books.indexes.keep(KEYS[0], bytes(100)))
    assert books.happened == ["space given", "evicted, with 0 indices here"] and books.on_disk() == [KEYS[0]]


def test_an_index_that_the_disk_refuses_to_remove_goes_on_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books(tmp_path / "cache", 16 * SIZE)
    asyncio.run(books.indexes.keep(KEYS[0], bytes(100)))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(DiskError, match="cannot remove an index"):
            asyncio.run(books.indexes.keep(KEYS[1], bytes(100)))
        assert (books.used_bytes, books.on_disk()) == (SIZE, [KEYS[0]])
    asyncio.run(books.indexes.keep(KEYS[1], bytes(100)))
    assert (books.used_bytes, books.on_disk()) == (SIZE, [KEYS[1]])
