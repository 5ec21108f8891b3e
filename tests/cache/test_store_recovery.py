"""What a directory holds after whatever happened to it; and a disk that is full or read-only."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cache.blocks import BLOCK_BYTES, EXTENT_BYTES, ExtentId, ObjectId, extent_span
from cache.errors import CacheConfigError, CapacityError, CorruptBlock
from cache.store.directory import CacheDirectory, ServingDaemon, serving_daemon
from cache.store.files import (
    create_extent,
    label_of,
    read_identity,
    read_label,
    sound_blocks,
    write_blocks,
)
from cache.store.format import FORMAT_VERSION, LABEL_BYTES, ExtentLabel
from cache.store.holding import retire_extent
from cache.store.index import Index, IndexRow
from cache.store.recovery import fits, forget, identify, settle, take_stock

SMALL = ObjectId("s3://b/small", '"1"', 1000)
LONG = ObjectId("s3://b/long", '"1"', EXTENT_BYTES + 7)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[CacheDirectory]:
    opened = CacheDirectory.open(tmp_path / "cache")
    assert isinstance(opened, CacheDirectory)
    yield opened
    opened.close()


@pytest.fixture
def index(directory: CacheDirectory) -> Iterator[Index]:
    opened = Index(directory.index_path)
    yield opened
    opened.close()


def make(directory: CacheDirectory, object_id: ObjectId, extent_idx: int, generation: int) -> IndexRow:
    label = ExtentLabel(object_id, extent_idx)
    create_extent(directory, label, generation)
    return IndexRow(object_id, extent_idx, generation, label.file_bytes)


@dataclass
class Recovered:
    rows: list[IndexRow]
    num_adopted: int
    num_discarded: int
    num_lost: int


def recover(directory: CacheDirectory, index: Index) -> Recovered:
    """Both parts of a recovery, one after the other, as a daemon does them in portions."""
    stock = take_stock(directory, index)
    rows, bad = [], []
    for content_id, object_id in identify(directory, index, list(stock.files.items())):
        for file in stock.files[content_id]:
            if object_id is not None and fits(object_id, file):
                rows.append(IndexRow(object_id, file.extent_idx, file.generation, file.file_bytes))
            else:
                bad.append((ExtentId(content_id, file.extent_idx), file.generation))
    known = {row.generation for row in index.rows()}
    forget(index, stock.lost)
    settle(directory, index, [row for row in rows if row.generation not in known], bad)
    return Recovered(rows, stock.num_adopted, stock.num_discarded + len(bad), len(stock.lost))


def test_a_new_file_is_whole_reserved_and_empty(directory: CacheDirectory) -> None:
    row = make(directory, LONG, 1, 7)
    path = directory.extent_path(row.extent, 7)
    assert read_label(path) == (ExtentLabel(LONG, 1), frozenset())
    start, end = extent_span(LONG.size_bytes, 1)
    assert path.stat().st_size == LABEL_BYTES + end - start and path.stat().st_blocks * 512 >= path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert retire_extent(directory, row.extent, 7) is False
    assert retire_extent(directory, row.extent, 7) is False
    assert not path.exists()


def test_a_block_is_sound_until_one_bit_of_it_changes(directory: CacheDirectory) -> None:
    row = make(directory, SMALL, 0, 1)
    path = directory.extent_path(row.extent, 1)
    label, data = ExtentLabel(SMALL, 0), os.urandom(1000)
    fd = os.open(path, os.O_RDWR)
    try:
        write_blocks(fd, label, 0, memoryview(data))
        assert sound_blocks(fd, label, 0, 1000) == [True]
        os.pwrite(fd, bytes([data[500] ^ 4]), 500)
        assert sound_blocks(fd, label, 0, 1000) == [False]
        os.pwrite(fd, data, 0)
        assert sound_blocks(fd, label, 0, 1000) == [False], (
            "its entry was cleared: it is fetched again, not believed again"
        )
    finally:
        os.close(fd)
    assert read_label(path)[1] == frozenset()


def test_files_and_index_that_agree_are_kept(directory: CacheDirectory, index: Index) -> None:
    rows = [make(directory, SMALL, 0, 1), make(directory, LONG, 0, 2), make(directory, LONG, 1, 3)]
    index.add(rows)
    result = recover(directory, index)
    assert sorted(result.rows, key=lambda row: row.generation) == rows
    assert (result.num_adopted, result.num_discarded, result.num_lost) == (0, 0, 0)


def test_what_the_index_lost_is_adopted_and_what_it_invented_is_forgotten(
    directory: CacheDirectory, index: Index
) -> None:
    kept, unindexed = make(directory, SMALL, 0, 1), make(directory, LONG, 1, 2)
    index.add([kept, IndexRow(LONG, 0, 9, LABEL_BYTES + EXTENT_BYTES)])
    result = recover(directory, index)
    assert {row.generation for row in result.rows} == {1, 2}
    assert (result.num_adopted, result.num_lost) == (1, 1)
    assert sorted(index.rows(), key=lambda row: row.generation) == [kept, unindexed]
    assert recover(directory, index).num_adopted == 0, "a second time there is nothing to settle"


def test_of_two_generations_of_an_extent_the_index_knows_which_else_the_younger_stays(
    directory: CacheDirectory, index: Index
) -> None:
    """A crash between making the new file and removing the old."""
    old, _ = make(directory, SMALL, 0, 4), make(directory, SMALL, 0, 8)
    assert [row.generation for row in recover(directory, index).rows] == [8]
    make(directory, SMALL, 0, 4)
    index.remove([(old.extent, 8)])
    index.add([old])
    assert [row.generation for row in recover(directory, index).rows] == [4]
    assert not directory.extent_path(old.extent, 8).exists()


def test_a_file_whose_label_says_something_else_is_discarded(directory: CacheDirectory, index: Index) -> None:
    row = make(directory, SMALL, 0, 1)
    wrong = directory.extent_path(ExtentId("ab" + "0" * 30, 0), 2)
    wrong.parent.mkdir(exist_ok=True)
    directory.extent_path(row.extent, 1).rename(wrong)
    truncated = directory.extent_path(make(directory, LONG, 1, 3).extent, 3)
    os.truncate(truncated, 100)
    result = recover(directory, index)
    assert result.rows == [] and result.num_discarded == 2
    assert not wrong.exists() and not truncated.exists()


def test_a_cut_file_that_ends_in_the_label_of_another_is_not_believed(directory: CacheDirectory) -> None:
    """The label lies at the end, so what a cut file ends in is bytes of the object; and an object may hold an extent file."""
    inner = directory.extent_path(make(directory, SMALL, 0, 1).extent, 1).read_bytes()
    outer = ObjectId("s3://b/backup-of-a-cache.tar", '"1"', 512 + len(inner) + 10_000)
    path = directory.extent_path(make(directory, outer, 0, 2).extent, 2)
    fd = os.open(path, os.O_RDWR)
    try:
        write_blocks(fd, ExtentLabel(outer, 0), 0, memoryview(bytes(512) + inner + bytes(10_000)))
        assert read_label(path)[1] == {0} and label_of(fd) == read_identity(path) == ExtentLabel(outer, 0)
        os.truncate(path, 512 + len(inner))
        for read in (read_label, read_identity):
            with pytest.raises(CorruptBlock, match="bytes instead of"):
                read(path)
        with pytest.raises(CorruptBlock, match="bytes instead of"):
            label_of(fd)
    finally:
        os.close(fd)


def test_half_made_files_go_and_what_is_not_ours_stays(directory: CacheDirectory, index: Index) -> None:
    """Never delete what we did not create: not even where it looks a little like ours."""
    row = make(directory, SMALL, 0, 1)
    folder = directory.extent_path(row.extent, 1).parent
    half_made = folder / f"{SMALL.content_id}.0.5.tmp"
    name = f"{SMALL.content_id}.0.9"
    foreign = [
        directory.path / "holiday.jpg",
        directory.extents_path / "notes.txt",
        folder / "other.tmp",
        folder / f"{SMALL.content_id}.0.0",
        folder / f"{SMALL.content_id}.00.7",
        folder / f"{SMALL.content_id}.0.9999999999999999999",
        directory.extents_path / "zz" / name,
    ]
    for path in [half_made, *foreign]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    (folder / f"{SMALL.content_id}.0.11").mkdir()
    (folder / f"{SMALL.content_id}.0.12").symlink_to(foreign[0])
    assert [found.generation for found in recover(directory, index).rows] == [1]
    assert not half_made.exists()
    assert all(path.read_bytes() == b"mine" for path in foreign)
    assert (folder / f"{SMALL.content_id}.0.12").is_symlink() and (folder / f"{SMALL.content_id}.0.11").is_dir()


def test_what_is_here_is_counted_to_the_byte_before_a_file_was_read(directory: CacheDirectory, index: Index) -> None:
    """The bound must hold from the first moment, and reading 100,000 headers first would take seconds."""
    rows = [make(directory, SMALL, 0, 4), make(directory, LONG, 0, 2), make(directory, LONG, 1, 3)]
    index.add(rows[:2])
    stock = take_stock(directory, index)
    assert (stock.num_bytes, stock.num_files) == (sum(row.file_bytes for row in rows), 3)
    assert (stock.last_generation, stock.num_adopted) == (4, 1)
    assert list(stock.files) == [LONG.content_id, SMALL.content_id], "the oldest first"
    assert index.rows() == sorted(rows[:2], key=lambda row: row.extent), "nothing was settled yet"
    assert take_stock(directory, Index(directory.path / "none.db")).num_bytes == stock.num_bytes


def test_an_adopted_file_does_not_displace_the_row_of_a_newer_one(directory: CacheDirectory, index: Index) -> None:
    """It may have been evicted, and its extent fetched again, before the index was told."""
    old, new = IndexRow(SMALL, 0, 3, 10), IndexRow(SMALL, 0, 8, 10)
    index.add([new])
    settle(directory, index, [old, IndexRow(LONG, 0, 4, 10)], [])
    assert new in index.rows() and old not in index.rows() and len(index.rows()) == 2


def test_an_index_that_fails_costs_reading_the_files_and_nothing_else(directory: CacheDirectory, index: Index) -> None:
    row = make(directory, SMALL, 0, 1)
    index.add([row])
    stock = take_stock(directory, index)
    index.close()
    assert identify(directory, index, list(stock.files.items())) == [(SMALL.content_id, SMALL)]
    settle(directory, index, [row], [])


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 500, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_index_is_replaced_by_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.db").write_bytes(content)
    index = Index(tmp_path / "index.db")
    assert index.rows() == [] and index.was_damaged == bool(content)
    index.add([IndexRow(SMALL, 0, 1, 10)])
    assert index.rows() == [IndexRow(SMALL, 0, 1, 10)]
    index.close()


def test_the_index_forgets_an_object_with_its_last_extent_and_adds_all_or_nothing(index: Index) -> None:
    rows = [IndexRow(LONG, 0, 1, 10), IndexRow(LONG, 1, 2, 10)]
    index.add(rows)
    index.remove([(rows[0].extent, 99)])
    assert len(index.rows()) == 2, "another generation is another file"
    index.remove([(rows[0].extent, 1)])
    assert index.rows() == [rows[1]]
    with pytest.raises(OverflowError):
        index.add([IndexRow(SMALL, 0, 3, 10), IndexRow(LONG, 0, 2**70, 10)])
    assert index.rows() == [rows[1]]


def test_one_daemon_at_a_time_has_the_directory(directory: CacheDirectory) -> None:
    assert CacheDirectory.open(directory.path) == ServingDaemon(0, "")
    directory.serve_at("/run/s")
    assert CacheDirectory.open(directory.path) == ServingDaemon(os.getpid(), "/run/s") == serving_daemon(directory.path)
    directory.close()
    again = CacheDirectory.open(directory.path)
    assert isinstance(again, CacheDirectory) and serving_daemon(directory.path) is None
    directory._lock_fd = again._lock_fd  # closed once, by the fixture


@pytest.mark.parametrize("marker", ['{"format": 99}', "nonsense", "[]", "{}"])
def test_a_directory_of_a_newer_or_unknown_format_is_left_alone(tmp_path: Path, marker: str) -> None:
    (tmp_path / "railhead-cache.json").write_text(marker)
    for _ in range(2):
        with pytest.raises(CacheConfigError, match="remove"):
            CacheDirectory.open(tmp_path)
    assert (tmp_path / "railhead-cache.json").read_text() == marker


def test_what_an_older_version_left_is_removed_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgrade must not leave a node's daemon refusing to start until somebody removes a directory; nor take what is not ours."""
    opened = CacheDirectory.open(tmp_path)
    assert isinstance(opened, CacheDirectory)
    old = opened.extent_path(make(opened, SMALL, 0, 1).extent, 1)
    foreign = [tmp_path / "holiday.jpg", old.parent / "notes", tmp_path / "indexes" / ("0" * 32 + ".idx")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "index.db").write_text("an old index")
    opened.close()
    (tmp_path / "railhead-cache.json").write_text(f'{{"format": {FORMAT_VERSION - 1}}}')
    again = CacheDirectory.open(tmp_path)
    assert isinstance(again, CacheDirectory)
    assert (
        not old.exists()
        and not (tmp_path / "index.db").exists()
        and all(path.read_text() == "mine" for path in foreign)
    )
    assert "1 files" in caplog.text and "fetched again" in caplog.text
    assert json.loads((tmp_path / "railhead-cache.json").read_text()) == {"format": FORMAT_VERSION}
    again.close()


def test_what_is_no_directory_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheConfigError, match="--dir must name a directory"):
        CacheDirectory.open(tmp_path / "file")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_met_before_anything_is_fetched(small_disk: Path) -> None:
    directory = CacheDirectory.open(small_disk)
    assert isinstance(directory, CacheDirectory)
    big = ObjectId("s3://b/big", '"1"', 64 * BLOCK_BYTES)
    with pytest.raises(CapacityError, match="No space left") as caught:
        make(directory, big, 0, 1)
    assert "free space" in caught.value.advice
    assert [path for path in small_disk.rglob("*") if path.name.startswith(big.content_id)] == [], (
        "nothing half-made is left"
    )
    make(directory, SMALL, 0, 2)
    directory.close()


def test_a_read_only_disk_is_said_to_be_one(small_disk: Path) -> None:
    directory = CacheDirectory.open(small_disk)
    assert isinstance(directory, CacheDirectory)
    directory.close()  # its lock is open for writing, which keeps the disk from becoming read-only
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CapacityError, match="Read-only") as caught:
        make(directory, SMALL, 0, 1)
    assert "kernel log" in caught.value.advice
    with pytest.raises(CacheConfigError, match="Read-only"):
        CacheDirectory.open(small_disk)


def test_a_disk_that_is_full_from_the_start_is_a_configuration_error(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(9 * 2**20))
    with pytest.raises(CacheConfigError, match=r"free space|--dir"):
        CacheDirectory.open(small_disk)
    assert json.dumps(sorted(path.name for path in small_disk.glob("*.tmp"))) == "[]"
