"""Extent files read back without a daemon: is each what was written into it? Blocking; who calls holds the directory's lock.

Nothing is changed unless that is asked for. What is found bad is not served by a daemon either (it compares everything before), so a repair
only says now what a daemon would find later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_FETCH, ExtentId
from cache.errors import CorruptBlock, DiskError
from cache.store.directory import CacheDirectory, parse_extent_name
from cache.store.files import read_label, sound_blocks
from cache.store.format import ENTRY_BYTES, ExtentLabel, decode_entry, entry_offset


@dataclass(frozen=True)
class ExtentFile:
    path: Path
    extent: ExtentId
    size_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What was found in one file. `problem`: why all of it is bad; else `num_rotten` of its blocks are."""

    url: str
    """Empty when the file cannot even say what it is."""
    extent_idx: int
    path: Path
    sound_bytes: int = 0
    num_rotten: int = 0
    problem: str = ""

    @property
    def is_sound(self) -> bool:
        return not self.num_rotten and not self.problem

    def sentence(self) -> str:
        return f"extent {self.extent_idx}: {self.problem or f'{self.num_rotten} rotten'}"


def files_to_verify(directory: CacheDirectory) -> list[ExtentFile]:
    """All extent files, in the order of their names. Changes nothing: half-made files and such that are set aside are passed over."""
    found = []
    for path in sorted(directory.extents_path.glob("[0-9a-f][0-9a-f]/*")):
        parsed = parse_extent_name(path.name)
        if parsed is not None and path.parent.name == path.name[:2] and path.is_file() and not path.is_symlink():
            found.append(ExtentFile(path, parsed[0], path.stat().st_size))
    return found


def verify_file(file: ExtentFile, is_meant: Callable[[str], bool], *, repair: bool) -> Verdict | None:
    """Reads every block of a file back, past the page cache; None when `is_meant(url)` is false. `repair`: bad blocks are discarded, and a
    file that cannot say what it is is removed. A file that cannot be read is the disk's word, and as bad as one with other bytes."""
    try:
        label, _ = read_label(file.path)
        if ExtentId(label.object_id.content_id, label.extent_idx) != file.extent:
            raise CorruptBlock(f"it says that it is {label.object_id.url}, extent {label.extent_idx}")
    except CorruptBlock as error:
        if repair:
            with contextlib.suppress(OSError):
                file.path.unlink()
        return Verdict("", file.extent.extent_idx, file.path, problem=error.message)
    url = label.object_id.url
    if not is_meant(url):
        return None
    try:
        fd = os.open(file.path, (os.O_RDWR if repair else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        return Verdict(url, label.extent_idx, file.path, problem=f"cannot be opened: {error.strerror}")
    try:
        sound, num_rotten = _verify_blocks(fd, label, repair)
    finally:
        os.close(fd)
    return Verdict(url, label.extent_idx, file.path, sound, num_rotten)


def _verify_blocks(fd: int, label: ExtentLabel, repair: bool) -> tuple[int, int]:
    """Bytes that are sound, and how many blocks are not."""
    present, num_rotten = _table(fd, label, repair)
    sound_bytes = 0
    for run in _runs(present):
        end = min(run.stop * BLOCK_BYTES, label.payload_bytes)
        length = end - run.start * BLOCK_BYTES
        try:
            answers = sound_blocks(
                fd, label, run.start, length, from_device=True
            )  # a descriptor that may only read discards nothing
        except DiskError:
            num_rotten += len(run)
            continue
        for slot, is_sound in zip(run, answers, strict=True):
            num_rotten += not is_sound
            sound_bytes += is_sound * (min((slot + 1) * BLOCK_BYTES, label.payload_bytes) - slot * BLOCK_BYTES)
    return sound_bytes, num_rotten


def _table(fd: int, label: ExtentLabel, repair: bool) -> tuple[list[int], int]:
    """The slots whose blocks the table claims, and how many of its entries are neither sound nor empty."""
    num_slots = -(-label.payload_bytes // BLOCK_BYTES)
    page = os.pread(fd, entry_offset(num_slots - 1) + ENTRY_BYTES, label.payload_bytes)
    present, num_torn = [], 0
    for slot in range(num_slots):
        at = entry_offset(slot)
        if decode_entry(page, label.object_id.content_id, label.extent_idx, slot) is not None:
            present.append(slot)
        elif any(page[at : at + ENTRY_BYTES]):
            num_torn += 1
            if repair:
                os.pwrite(fd, bytes(ENTRY_BYTES), label.entry_at(slot))
    return present, num_torn


def _runs(slots: list[int]) -> Iterator[range]:
    """Neighbours together, at most as many as one fetch has."""
    start = 0
    for idx in range(1, len(slots) + 1):
        if idx == len(slots) or slots[idx] != slots[idx - 1] + 1 or idx - start == BLOCKS_PER_FETCH:
            yield range(slots[start], slots[idx - 1] + 1)
            start = idx
