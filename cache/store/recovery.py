"""What a directory holds after whatever happened to it: files and index compared, the difference settled in favour of the files.

In two parts, because a daemon that holds 100,000 files is to serve within a second. `take_stock` looks at names only: it says how much is
there, to the byte, and which files of an object there are. `identify` says of some of them which object they belong to, and may come
later, behind a daemon that serves. Nothing found is trusted: blocks come back as unverified, and are served only after their checksum was
seen.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.blocks import ExtentId, ObjectId, num_extents
from cache.errors import CorruptBlock
from cache.store.directory import CacheDirectory, parse_extent_name, split_extent_name
from cache.store.files import extent_files, read_identity
from cache.store.format import ExtentLabel
from cache.store.holding import HELD_SUFFIX, held_bytes, remove_if_let_go, retire_extent
from cache.store.index import Index, IndexRow, index_errors


class FoundFile(NamedTuple):
    """One extent file, by its name."""

    extent_idx: int
    generation: int
    file_bytes: int
    is_indexed: bool


class HeldFile(NamedTuple):
    """One that was evicted, or cannot be used, and that a reader of a former daemon still has open."""

    extent: ExtentId
    generation: int
    file_bytes: int


@dataclass
class Stock:
    """`files`: by content id, the object whose first file is the oldest first. `lost`: rows without a file. `num_adopted`: files that the
    index had lost; `num_discarded`: files that could not be used. `held`: files that
    are none of these and cannot go yet."""

    files: dict[str, list[FoundFile]] = field(default_factory=dict)
    lost: list[tuple[ExtentId, int]] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0
    last_generation: int = 0
    held: list[HeldFile] = field(default_factory=list)
    num_adopted: int = 0
    num_discarded: int = 0


def take_stock(directory: CacheDirectory, index: Index) -> Stock:
    """Which extent files there are. Touches nothing that is not an extent file of ours; reads none, and changes the index not at all.

    Of two files of one extent (a crash between making the new one and removing the old) the index knows which, else the younger stays.
    """
    stock = Stock()
    names = set(extent_files(directory))
    for name in [name for name in names if name.endswith(HELD_SUFFIX)]:
        names.remove(name)
        if (parsed := parse_extent_name(name.removesuffix(HELD_SUFFIX))) is not None:
            _look_at_held(directory, *parsed, stock)
    for content_id, extent_idx, generation, file_bytes in index.files():
        name = f"{content_id}.{extent_idx}.{generation}"
        if name in names:
            names.remove(name)
            stock.files.setdefault(content_id, []).append(FoundFile(extent_idx, generation, file_bytes, True))
        else:
            stock.lost.append((ExtentId(content_id, extent_idx), generation))
    if names:
        _add_unindexed(directory, names, stock)
    for files in stock.files.values():
        stock.num_files += len(files)
        for file in files:
            stock.num_bytes += file.file_bytes
            stock.last_generation = max(stock.last_generation, file.generation)
    return stock


def _look_at_held(directory: CacheDirectory, extent: ExtentId, generation: int, stock: Stock) -> None:
    """A former daemon evicted it while somebody had it open."""
    stock.last_generation = max(stock.last_generation, generation)
    is_gone = False  # What the disk refuses to remove counts as held.
    with contextlib.suppress(OSError):
        is_gone = remove_if_let_go(directory, extent, generation)
    if not is_gone:
        stock.held.append(HeldFile(extent, generation, held_bytes(directory, extent, generation)))


def _add_unindexed(directory: CacheDirectory, names: Iterable[str], stock: Stock) -> None:
    root = str(directory.extents_path)  # Path objects for 100,000 files would take longer than all the rest.
    parsed = [(*parts, name) for name in names if (parts := split_extent_name(name)) is not None]
    taken = {(content_id, file.extent_idx) for content_id, files in stock.files.items() for file in files}
    chosen = []
    for content_id, extent_idx, generation, name in sorted(parsed, key=lambda file: -file[2]):
        if (content_id, extent_idx) in taken:
            _discard(directory, ExtentId(content_id, extent_idx), generation, stock)
        else:
            taken.add((content_id, extent_idx))
            chosen.append((content_id, extent_idx, generation, name))
    for content_id, extent_idx, generation, name in reversed(chosen):
        with contextlib.suppress(OSError):
            size = os.stat(f"{root}/{name[:2]}/{name}").st_size
            stock.files.setdefault(content_id, []).append(FoundFile(extent_idx, generation, size, False))
            stock.num_adopted += 1


def _discard(directory: CacheDirectory, extent: ExtentId, generation: int, stock: Stock) -> None:
    stock.held += _retire(directory, extent, generation)
    stock.num_discarded += 1


def _retire(directory: CacheDirectory, extent: ExtentId, generation: int) -> list[HeldFile]:
    """Empty when it has gone."""
    is_left = True  # What the disk refuses to remove counts as held.
    with contextlib.suppress(OSError):
        is_left = retire_extent(directory, extent, generation)
    return [HeldFile(extent, generation, held_bytes(directory, extent, generation))] if is_left else []


def fits(object_id: ObjectId, file: FoundFile) -> bool:
    """Whether a file can be what its name says, if its object is this one."""
    if not 0 <= file.extent_idx < num_extents(object_id.size_bytes):
        return False
    return ExtentLabel(object_id, file.extent_idx).file_bytes == file.file_bytes


def identify(
    directory: CacheDirectory, index: Index, wanted: Sequence[tuple[str, list[FoundFile]]]
) -> list[tuple[str, ObjectId | None]]:
    """Whose files these are: by the index, else by what a file says of itself; None: no file of this id can be used."""
    known: dict[str, ObjectId] = {}
    with index_errors():
        known = index.objects([content_id for content_id, _ in wanted])
    return [
        (content_id, known.get(content_id) or _by_label(directory, content_id, files)) for content_id, files in wanted
    ]


def _by_label(directory: CacheDirectory, content_id: str, files: list[FoundFile]) -> ObjectId | None:
    for file in files:
        path = directory.extent_path(ExtentId(content_id, file.extent_idx), file.generation)
        with contextlib.suppress(CorruptBlock):
            label = read_identity(path)
            if (label.object_id.content_id, label.extent_idx) == (content_id, file.extent_idx):
                return label.object_id
    return None


def settle(
    directory: CacheDirectory, index: Index, adopted: list[IndexRow], bad: list[tuple[ExtentId, int]]
) -> list[HeldFile]:
    """Rows for files that the index did not know; files that cannot be used are removed, but for those that are returned."""
    held = [file for extent, generation in bad for file in _retire(directory, extent, generation)]
    with index_errors():
        index.adopt(adopted)
        index.remove(bad)
    return held


def forget(index: Index, lost: list[tuple[ExtentId, int]]) -> None:
    """Rows without a file go."""
    with index_errors():
        index.remove(lost)
