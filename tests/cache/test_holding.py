"""Evicted files that are open somewhere: the kernel says so, whoever has died."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cache.blocks import ExtentId, ObjectId
from cache.daemon.fetches import _open_run
from cache.daemon.hands import Hands
from cache.daemon.holds import Holds
from cache.daemon.worker import _opened
from cache.residency import messages as m
from cache.residency.budget import UNKNOWN_READERS
from cache.store.directory import CacheDirectory
from cache.store.files import create_extent
from cache.store.format import ExtentLabel
from cache.store.holding import held_bytes, mark_held, remove_if_let_go, retire_extent
from cache.store.index import Index
from cache.store.recovery import take_stock

T = TypeVar("T")
OBJECT = ObjectId("s3://b/o", '"1"', 1000)
EXTENT = ExtentId(OBJECT.content_id, 0)
BYTES = ExtentLabel(OBJECT, 0).file_bytes
RELEASED = m.ExtentReleased(UNKNOWN_READERS, EXTENT, 7)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[CacheDirectory]:
    opened = CacheDirectory.open(tmp_path / "cache")
    assert isinstance(opened, CacheDirectory)
    create_extent(opened, ExtentLabel(OBJECT, 0), 7)
    yield opened
    opened.close()


def handed_over(directory: CacheDirectory) -> int:
    """A descriptor as a reader is given it."""
    fd = os.open(directory.extent_path(EXTENT, 7), os.O_RDONLY)
    mark_held(fd)
    return fd


def names(directory: CacheDirectory) -> list[str]:
    return [path.name for path in directory.extents_path.glob("*/*")]


def test_what_nobody_holds_is_unlinked_and_what_somebody_holds_is_set_aside(directory: CacheDirectory) -> None:
    fd = handed_over(directory)
    assert retire_extent(directory, EXTENT, 7) and names(directory) == [f"{EXTENT.content_id}.0.7.held"]
    assert not remove_if_let_go(directory, EXTENT, 7) and held_bytes(directory, EXTENT, 7) == BYTES
    os.close(fd)
    assert remove_if_let_go(directory, EXTENT, 7) and names(directory) == []
    assert remove_if_let_go(directory, EXTENT, 7) and held_bytes(directory, EXTENT, 7) == 0, "once more changes nothing"


def test_a_map_holds_its_file_after_its_descriptor_was_closed(directory: CacheDirectory) -> None:
    fd = handed_over(directory)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    assert retire_extent(directory, EXTENT, 7)
    mapped.close()
    assert remove_if_let_go(directory, EXTENT, 7)


def test_a_child_holds_what_its_parent_held_and_a_dead_one_holds_nothing(directory: CacheDirectory) -> None:
    fd = handed_over(directory)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    os.close(fd)
    assert retire_extent(directory, EXTENT, 7), "the child has it open"
    os.close(write)
    os.waitpid(child, 0)
    assert remove_if_let_go(directory, EXTENT, 7)


def test_a_worker_that_is_killed_at_its_work_holds_the_file_until_the_kernel_has_closed_it(
    directory: CacheDirectory,
) -> None:
    """The daemon sees its socket close before that, and may evict what it had in hand."""
    request = {"path": str(directory.extent_path(EXTENT, 7)), "slot": 0, "start": 0, "end": 1000}
    run = _open_run(request)
    assert retire_extent(directory, EXTENT, 7)
    run.close()
    assert remove_if_let_go(directory, EXTENT, 7)
    create_extent(directory, ExtentLabel(OBJECT, 0), 7)
    with _opened(request["path"]):
        assert retire_extent(directory, EXTENT, 7)
    assert remove_if_let_go(directory, EXTENT, 7)


def test_what_the_disk_refuses_to_remove_when_a_daemon_starts_counts(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    index = Index(directory.index_path)
    create_extent(directory, ExtentLabel(OBJECT, 0), 8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert take_stock(directory, index).held == [(EXTENT, 7, BYTES)], "the older of two files of one extent"
    assert take_stock(directory, index).held == [] and len(names(directory)) == 1
    index.close()


def test_a_later_daemon_finds_what_is_still_held_and_removes_what_is_not(directory: CacheDirectory) -> None:
    index = Index(directory.index_path)
    fd = handed_over(directory)
    retire_extent(directory, EXTENT, 7)
    stock = take_stock(directory, index)
    assert (stock.held, stock.num_files, stock.last_generation) == ([(EXTENT, 7, BYTES)], 0, 7)
    os.close(fd)
    assert take_stock(directory, index).held == [] and names(directory) == []
    index.close()


class Told:
    """`Holds` over a real directory, and what it told the machine."""

    def __init__(self, directory: CacheDirectory) -> None:
        self.directory = directory
        self.events: list[m.Event] = []
        self.holds = Holds(self._on_disk, self.events.append)

    def _on_disk(self, work: Callable[[CacheDirectory, Index], T]) -> Awaitable[T]:
        async def do() -> T:
            return work(self.directory, None)  # type: ignore[arg-type]

        return do()

    def evict(self, *, is_held: bool = False, is_old: bool = False) -> None:
        is_open = retire_extent(self.directory, EXTENT, 7)
        self.holds.was_evicted(
            m.RemoveExtent(EXTENT, 7, is_held, is_old), is_open, held_bytes(self.directory, EXTENT, 7)
        )

    def let_go(self) -> None:
        hands = Hands.__new__(Hands)
        hands.directory, hands.holds = self.directory, self.holds
        self.holds.was_let_go(m.RemoveHeld(EXTENT, 7), not hands._remove_held_on_disk(m.RemoveHeld(EXTENT, 7)))

    def look(self) -> list[m.Event]:
        self.events.clear()
        asyncio.run(self.holds.look())
        return list(self.events)


def test_the_machine_is_told_when_the_last_reader_of_a_former_daemon_lets_go(directory: CacheDirectory) -> None:
    fd, told = handed_over(directory), Told(directory)
    told.evict(is_old=True)
    assert told.events == [] and told.look() == [] == told.look()
    os.close(fd)
    assert told.look() == [RELEASED] and told.look() == []


def test_an_old_file_that_nobody_holds_is_given_back_at_once(directory: CacheDirectory) -> None:
    told = Told(directory)
    told.evict(is_old=True)
    assert told.events == [RELEASED]


def test_what_a_child_keeps_when_all_have_let_go_counts_from_the_moment_of_its_eviction(
    directory: CacheDirectory,
) -> None:
    fd, told = handed_over(directory), Told(directory)
    told.evict()
    assert told.events == [m.HeldFound(EXTENT, 7, BYTES)] and told.look() == []
    os.close(fd)
    assert told.look() == [RELEASED] and names(directory) == []


def test_what_connected_readers_hold_is_theirs_to_let_go_of(directory: CacheDirectory) -> None:
    fd, told = handed_over(directory), Told(directory)
    told.evict(is_held=True)
    assert told.look() == [] and len(names(directory)) == 1, "RemoveHeld comes"
    os.close(fd)
    told.let_go()
    assert told.events == [RELEASED] and names(directory) == []


def test_who_closes_his_files_a_moment_after_his_socket_counts_until_then(directory: CacheDirectory) -> None:
    """The machine was told that a killed reader is gone while its files were open still, gave their bytes back for half a second, and the
    disk was full with what no book knew of."""
    fd, told = handed_over(directory), Told(directory)
    told.evict(is_held=True)
    told.let_go()
    assert told.events == [] and told.look() == []
    os.close(fd)
    assert told.look() == [RELEASED] and names(directory) == []


def test_what_the_disk_refuses_to_remove_counts_until_it_does(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted read-only by the kernel, say, and mended later: the file is there all the while."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    fd, told = handed_over(directory), Told(directory)
    told.evict(is_held=True)
    os.close(fd)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        told.let_go()
        assert told.events == [] and told.look() == []
    assert told.look() == [RELEASED] and names(directory) == []
