"""What a former daemon left becomes known while readers are already served: nothing is fetched twice, and the bound holds meanwhile."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cache.blocks import EXTENT_BYTES, ExtentId, ObjectId
from cache.daemon.restoring import OBJECTS_AT_ONCE, Restoring
from cache.residency import messages as m
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, UNKNOWN_READERS, Budget
from cache.residency.machine import Residency
from cache.store.directory import CacheDirectory
from cache.store.files import create_extent
from cache.store.format import LABEL_BYTES, ExtentLabel
from cache.store.index import Index, IndexRow

T = TypeVar("T")
OBJECTS = [ObjectId(f"s3://b/{number}", '"1"', 100 + number) for number in range(OBJECTS_AT_ONCE + 40)]


class Node:
    """A directory with one file per object, and a machine that is to learn of them."""

    def __init__(self, path: Path, capacity_bytes: int = 1 << 40) -> None:
        directory = CacheDirectory.open(path)
        assert isinstance(directory, CacheDirectory)
        self.directory, self.index = directory, Index(directory.index_path)
        self.machine = Residency(Budget(capacity_bytes, 1000), rng=random.Random(0))
        self.actions: list[m.Action] = []
        self.remembered: list[ObjectId] = []
        self.before_work: Callable[[], None] = lambda: None
        """Called each time before the disk is asked for something."""
        self.held: list[tuple[ExtentId, int, int]] = []
        self.restoring = Restoring(
            self.on_disk, self.tell, self.remembered.append, lambda *file: self.held.append(file)
        )

    def make(self, object_id: ObjectId, generation: int, extent_idx: int = 0, *, is_indexed: bool = True) -> int:
        label = ExtentLabel(object_id, extent_idx)
        create_extent(self.directory, label, generation)
        if is_indexed:
            self.index.add([IndexRow(object_id, extent_idx, generation, label.file_bytes)])
        return label.file_bytes + INDEX_BYTES_PER_EXTENT

    def on_disk(self, work: Callable[[CacheDirectory, Index], T]) -> Awaitable[T]:
        async def do() -> T:
            self.before_work()
            return work(self.directory, self.index)

        return do()

    def tell(self, event: m.Event) -> None:
        if isinstance(event, m.ObjectOpened):
            self.restoring.learn(event.object_id)
        self.actions += self.machine.step(event, 0.0)

    def close(self) -> None:
        self.index.close()
        self.directory.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "cache")
    yield made
    made.close()
    gc.enable()
    gc.unfreeze()


def test_all_bytes_count_before_any_file_is_known(node: Node) -> None:
    """Else new files would be made beside those that nobody has counted yet, and the bound would be broken for seconds."""
    used = sum(node.make(object_id, number + 1) for number, object_id in enumerate(OBJECTS))
    asyncio.run(node.restoring.begin())
    assert (node.machine.num_extents, node.restoring.num_left) == (0, len(OBJECTS))
    assert (node.machine.budget.used_bytes, node.machine.budget.num_files) == (used, len(OBJECTS))
    asyncio.run(node.restoring.run())
    assert (node.machine.num_extents, node.restoring.num_left) == (len(OBJECTS), 0)
    assert (node.machine.budget.used_bytes, node.machine.budget.num_files) == (used, len(OBJECTS))
    assert sorted(node.remembered, key=str) == sorted(OBJECTS, key=str)


def test_what_a_reader_opens_first_is_known_to_be_here_and_is_not_fetched_again(node: Node) -> None:
    for number, object_id in enumerate(OBJECTS):
        node.make(object_id, number + 1)
    asyncio.run(node.restoring.begin())
    last = OBJECTS[-1]
    node.tell(m.ObjectOpened("a", last))
    node.tell(m.BlocksWanted(1, "a", last.content_id, 0, 1))
    assert node.actions == [m.ReadTable(ExtentId(last.content_id, 0), len(OBJECTS))], "read back, not fetched"
    assert node.restoring.num_left == len(OBJECTS) - 1


def test_an_object_that_is_opened_in_mid_learning_is_learned_once(node: Node) -> None:
    """Each of them, at each moment: the disk is asked who it is, and it is opened before the answer has come."""
    for number, object_id in enumerate(OBJECTS):
        node.make(object_id, number + 1)
    asyncio.run(node.restoring.begin())
    opened = iter(OBJECTS)
    node.before_work = lambda: (
        [node.tell(m.ObjectOpened("a", o)) for _, o in zip(range(50), opened, strict=False)] and None
    )
    asyncio.run(node.restoring.run())
    assert node.machine.num_extents == node.machine.budget.num_files == len(OBJECTS)


def test_new_files_never_take_the_generation_of_one_that_is_not_known_yet(node: Node) -> None:
    """A word equals the generation of the file that holds the block: two files with one generation would be mistaken for each other."""
    node.make(OBJECTS[0], 77)
    asyncio.run(node.restoring.begin())
    node.tell(m.ObjectOpened("a", OBJECTS[1]))
    node.tell(m.BlocksWanted(1, "a", OBJECTS[1].content_id, 0, 1))
    assert [a.generation for a in node.actions if isinstance(a, m.CreateExtent)] == [78]


@pytest.mark.parametrize("is_opened_first", [False, True])
def test_a_file_that_cannot_be_what_its_name_says_counts_until_it_is_gone(node: Node, is_opened_first: bool) -> None:
    two = ObjectId("s3://b/two", '"1"', EXTENT_BYTES + 5)
    good = node.make(two, 1, 0, is_indexed=False)
    node.make(two, 2, 1, is_indexed=False)
    short = node.directory.extent_path(ExtentId(two.content_id, 1), 2)
    with short.open("r+b") as file:
        file.truncate(LABEL_BYTES)
    asyncio.run(node.restoring.begin())
    if is_opened_first:
        node.tell(m.ObjectOpened("a", two))
        assert node.machine.budget.num_files == 2
    asyncio.run(node.restoring.run())
    assert not short.exists() and node.restoring.stock.num_discarded == 1
    assert (node.machine.budget.used_bytes, node.machine.budget.num_files) == (good, 1)
    assert [row.generation for row in node.index.rows()] == [1], "what the index had lost, it knows again"


def test_a_smaller_capacity_evicts_the_oldest_first(tmp_path: Path) -> None:
    node = Node(tmp_path / "cache", capacity_bytes=(LABEL_BYTES + 1000) * 100)
    for number, object_id in enumerate(OBJECTS):
        node.make(object_id, len(OBJECTS) - number)
    asyncio.run(node.restoring.begin())
    assert node.machine.budget.is_exceeded
    asyncio.run(node.restoring.run())
    removed = [a for a in node.actions if isinstance(a, m.RemoveExtent)]
    assert removed and sorted(a.generation for a in removed) == list(range(1, len(removed) + 1))
    assert node.machine.budget.is_exceeded, "readers of the former daemon may hold them"
    for action in removed:
        node.tell(m.ExtentReleased(UNKNOWN_READERS, action.extent, action.generation))
    assert not node.machine.budget.is_exceeded
    node.close()


def test_an_extent_takes_no_more_memory_than_is_stated() -> None:
    """docs/cache.md: 2 KiB each; with a terabyte in 16,000 extents that is 32 MiB of the control process, and payload is none."""
    machine = Residency(Budget(1 << 50, 1 << 30), rng=random.Random(0), num_words=1 << 26)
    count, size = 2000, EXTENT_BYTES
    tracemalloc.start()
    try:
        found = [
            m.ExtentFound(ObjectId(f"s3://bucket/train/shard-{n:06d}.tar", '"1"', size), 0, n + 1, size, None)
            for n in range(count)
        ]
        machine.step(m.StockTaken(count * size, count, count), 0.0)
        machine.step(m.StockFound(tuple(found)), 0.0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert machine.num_extents == count and taken / count < 2048, f"{taken / count:.0f} bytes each"
