"""Extent files: made whole under a temporary name, found, read and unlinked. Blocking; used by one disk thread and by fetch workers."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cache.blocks import BLOCK_BYTES, ExtentId
from cache.errors import CapacityError, CorruptBlock
from cache.store.directory import CacheDirectory, parse_extent_name
from cache.store.format import (
    ENTRY_BYTES,
    HEADER_BYTES,
    BlockEntry,
    ExtentHeader,
    checksum,
    decode_entry,
    decode_header,
    encode_entry,
    encode_header,
    entry_offset,
)


def create_extent(directory: CacheDirectory, header: ExtentHeader, generation: int) -> None:
    """Makes the file of an extent, with all its space reserved and no block in it.

    The space is reserved before anything is fetched, so a full disk is met here. Raises CapacityError (disk full, read-only, dying).
    """
    extent = ExtentId(header.object_id.content_id, header.extent_idx)
    path = directory.extent_path(extent, generation)
    temporary = path.with_suffix(f".{generation}.tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, header.file_bytes)
            os.pwrite(fd, encode_header(header), 0)
        finally:
            os.close(fd)
        temporary.rename(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, f"cannot make a file of {header.file_bytes} bytes in {directory.path}") from error


def disk_error(error: Exception, what: str) -> CapacityError:
    """The local disk failed: readers go to the origin; the message says why."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = {
        errno.ENOSPC: "the disk is full beside the cache: free space, or lower --capacity",
        errno.EDQUOT: "the quota is used up: lower --capacity",
        errno.EROFS: "the file system is read-only: look at the kernel log for disk errors",
        errno.EIO: "the disk reports errors: look at the kernel log",
    }.get(getattr(error, "errno", 0) or 0, "readers go on with the origin")
    return CapacityError(f"{what}: {reason}", advice=advice)


def write_blocks(fd: int, header: ExtentHeader, slot: int, data: memoryview) -> None:
    """Writes the payload of neighbouring blocks, the first of them the extent's number `slot`, and then their table entries.

    Raises CapacityError.
    """
    content_id, extent_idx = header.object_id.content_id, header.extent_idx
    offset, entries = HEADER_BYTES + slot * BLOCK_BYTES, b""
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        entry = BlockEntry(checksum(block), len(block))
        entries += encode_entry(entry, content_id, extent_idx, slot + start // BLOCK_BYTES)
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], offset + written)
        os.pwrite(fd, entries, entry_offset(slot))
    except OSError as error:
        raise disk_error(error, f"cannot write {len(data)} bytes to the cache") from error


def sound_blocks(fd: int, header: ExtentHeader, slot: int, length: int) -> list[bool]:
    """Reads neighbouring blocks (`length` bytes, the first of them number `slot`) back from the disk and compares each with its table
    entry; clears the entries of those that differ."""
    content_id, extent_idx = header.object_id.content_id, header.extent_idx
    num_blocks = -(-length // BLOCK_BYTES)
    try:
        page = os.pread(fd, HEADER_BYTES, 0)
        data = memoryview(os.pread(fd, length, HEADER_BYTES + slot * BLOCK_BYTES))
    except OSError:
        return [False] * num_blocks
    sound = []
    for idx in range(num_blocks):
        entry = decode_entry(page, content_id, extent_idx, slot + idx) if len(page) == HEADER_BYTES else None
        block = data[idx * BLOCK_BYTES : (idx + 1) * BLOCK_BYTES]
        is_whole = entry is not None and entry.length == min(BLOCK_BYTES, length - idx * BLOCK_BYTES) == len(block)
        sound.append(is_whole and entry is not None and checksum(block) == entry.crc)
        if not sound[-1]:
            with contextlib.suppress(OSError):
                os.pwrite(fd, bytes(ENTRY_BYTES), entry_offset(slot + idx))
    return sound


def read_header(path: Path) -> tuple[ExtentHeader, frozenset[int]]:
    """Header and the slots whose blocks the file claims to hold. Raises CorruptBlock (also for a file that cannot be read)."""
    try:
        with path.open("rb") as file:
            page = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptBlock(f"cannot read {path}: {error.strerror}") from error
    header, entries = decode_header(page)
    if size != header.file_bytes:
        raise CorruptBlock(f"{path} has {size} bytes instead of {header.file_bytes}")
    return header, frozenset(slot for slot, entry in enumerate(entries) if entry is not None)


def remove_extent(directory: CacheDirectory, extent: ExtentId, generation: int) -> None:
    directory.extent_path(extent, generation).unlink(missing_ok=True)


def found_extents(directory: CacheDirectory) -> Iterator[tuple[ExtentId, int, Path]]:
    """All extent files by their names; half-made ones of a former daemon are removed on the way."""
    for folder in os.scandir(directory.extents_path):
        if not folder.is_dir(follow_symlinks=False):
            continue
        for file in os.scandir(folder.path):
            parsed = parse_extent_name(file.name.removesuffix(".tmp"))
            if parsed is None or parsed[0].content_id[:2] != folder.name or not file.is_file(follow_symlinks=False):
                continue  # not made by us
            if not file.name.endswith(".tmp"):
                yield *parsed, Path(file.path)
            else:
                Path(file.path).unlink(missing_ok=True)
