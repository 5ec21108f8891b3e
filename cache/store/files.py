"""Extent files: made whole under a temporary name, found, read and unlinked. Blocking; used by one disk thread and by fetch workers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache.blocks import BLOCK_BYTES, ExtentId
from cache.errors import CapacityError, CorruptBlock, DiskError
from cache.store.directory import CacheDirectory, parse_extent_name
from cache.store.format import (
    ENTRY_BYTES,
    LABEL_BYTES,
    TABLE_OFFSET,
    BlockEntry,
    ExtentLabel,
    checksum,
    decode_entry,
    decode_identity,
    decode_label,
    encode_entry,
    encode_label,
)


def create_extent(directory: CacheDirectory, label: ExtentLabel, generation: int) -> None:
    """Makes the file of an extent, with all its space reserved and no block in it.

    The space is reserved before anything is fetched, so a full disk is met here. Raises DiskError (disk full, read-only, dying);
    CapacityError when the url is too long for a label.
    """
    extent = ExtentId(label.object_id.content_id, label.extent_idx)
    path = directory.extent_path(extent, generation)
    temporary = path.with_suffix(f".{generation}.tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, label.file_bytes)
            os.pwrite(fd, encode_label(label), label.payload_bytes)
        finally:
            os.close(fd)
        temporary.rename(path)
    except ValueError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CapacityError(f"{label.object_id.url} cannot be kept: {error}") from error
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        what = f"cannot make a file of {label.file_bytes} bytes in {directory.path}"
        raise disk_error(error, what, directory.path) from error


_KINDS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EIO: "io",
    errno.ENOENT: "gone",
    errno.ENOTDIR: "gone",
    errno.ESTALE: "gone",
}

_ADVICE = {
    "full": "the disk is full beside the cache: free space, lower --capacity, or raise --keep-free",
    "inodes": "the file system has no inodes left: remove small files, lower --max-files, or make the file system with more inodes",
    "quota": "the quota is used up: lower --capacity",
    "read-only": "the file system is read-only: look at the kernel log for disk errors",
    "io": "the disk reports errors: look at the kernel log",
    "gone": "the cache directory was removed or its disk unmounted: bring it back, or restart the daemon",
    "slow": "the disk is slower than an origin worth caching: look for what else uses it",
}


def disk_error(error: Exception, what: str, where: Path | None = None) -> DiskError:
    """The local disk failed: readers go to the origin; the message says why. `where`: a directory on it, to tell which resource ran out."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = _KINDS.get(getattr(error, "errno", 0) or 0, "other")
    if kind == "full" and where is not None and _is_out_of_inodes(where):
        kind, reason = "inodes", "no inodes left on the device"
    return DiskError(f"{what}: {reason}", advice=_ADVICE.get(kind, "readers go on with the origin"), kind=kind)


def slow_disk_error(what: str, seconds: float) -> DiskError:
    return DiskError(f"{what} took {seconds:.1f} s", advice=_ADVICE["slow"], kind="slow")


def _is_out_of_inodes(where: Path) -> bool:
    with contextlib.suppress(OSError):
        status = os.statvfs(where)
        return status.f_files > 0 and status.f_favail == 0
    return False


@dataclass(frozen=True)
class DiskSpace:
    """What the file system of the cache directory has left for us; None: it does not count inodes."""

    total_bytes: int
    free_bytes: int
    total_files: int | None
    free_files: int | None


def disk_space(where: Path) -> DiskSpace:
    """Raises DiskError."""
    try:
        status = os.statvfs(where)
    except OSError as error:
        raise disk_error(error, f"cannot ask how much is free at {where}") from error
    counts_files = status.f_files > 0
    return DiskSpace(
        status.f_blocks * status.f_frsize,
        status.f_bavail * status.f_frsize,
        status.f_files if counts_files else None,
        status.f_favail if counts_files else None,
    )


PROBE_NAME = "probe.tmp"
PROBE_BYTES = 1024 * 1024


def probe_disk(directory: CacheDirectory) -> None:
    """Writes a file beside the extents, syncs it, reads it back and removes it. Raises DiskError when any of it fails or differs."""
    path = directory.path / PROBE_NAME
    content = os.urandom(4096) * (PROBE_BYTES // 4096)
    try:
        directory.assert_is_there()
        directory.extents_path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            written = os.pwrite(fd, content, 0)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if written != len(content) or os.pread(fd, len(content), 0) != content:
                raise OSError(errno.EIO, "what was read back is not what was written")
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, f"the probe of the disk in {directory.path} failed", directory.path) from error


def write_blocks(fd: int, label: ExtentLabel, slot: int, data: memoryview) -> None:
    """Writes the payload of neighbouring blocks, the first of them the extent's number `slot`, and then their table entries.

    Raises DiskError.
    """
    content_id, extent_idx = label.object_id.content_id, label.extent_idx
    entries = b""
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        entry = BlockEntry(checksum(block), len(block))
        entries += encode_entry(entry, content_id, extent_idx, slot + start // BLOCK_BYTES)
    write_payload(fd, slot * BLOCK_BYTES, data)
    _write(fd, label.entry_at(slot), memoryview(entries))


def write_payload(fd: int, offset: int, data: memoryview) -> None:
    """Bytes at `offset` of the extent's payload; they belong to a block once its entry is written. Raises CapacityError."""
    _write(fd, offset, data)


def write_entry(fd: int, label: ExtentLabel, slot: int, crc: int, length: int) -> None:
    """The table entry of a block whose payload is written: from now on a restart finds it. Raises CapacityError."""
    entry = encode_entry(BlockEntry(crc, length), label.object_id.content_id, label.extent_idx, slot)
    _write(fd, label.entry_at(slot), memoryview(entry))


def _write(fd: int, at: int, data: memoryview) -> None:
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], at + written)
    except OSError as error:
        raise disk_error(error, f"cannot write {len(data)} bytes to the cache") from error


def sound_blocks(fd: int, label: ExtentLabel, slot: int, length: int, *, from_device: bool = False) -> list[bool]:
    """Reads neighbouring blocks (`length` bytes, the first of them number `slot`) back and compares each with its table entry; clears the
    entries of those that differ. `from_device`: past the page cache, where the file system can do that: what readers are served from
    memory may have rotted on the disk meanwhile. Raises DiskError when the disk cannot read them (their entries are cleared, too)."""
    content_id, extent_idx = label.object_id.content_id, label.extent_idx
    num_blocks = -(-length // BLOCK_BYTES)
    failure: OSError | None = None
    try:
        page = os.pread(fd, LABEL_BYTES, label.payload_bytes)
        data = memoryview(_read_run(fd, slot * BLOCK_BYTES, length, from_device))
    except OSError as error:
        failure, page, data = error, b"", memoryview(b"")
    sound = []
    for idx in range(num_blocks):
        entry = decode_entry(page, content_id, extent_idx, slot + idx) if len(page) == LABEL_BYTES else None
        block = data[idx * BLOCK_BYTES : (idx + 1) * BLOCK_BYTES]
        is_whole = entry is not None and entry.length == min(BLOCK_BYTES, length - idx * BLOCK_BYTES) == len(block)
        sound.append(is_whole and entry is not None and checksum(block) == entry.crc)
        if not sound[-1]:
            with contextlib.suppress(OSError):
                os.pwrite(fd, bytes(ENTRY_BYTES), label.entry_at(slot + idx))
    if failure is not None:
        raise disk_error(failure, f"cannot read blocks of {label.object_id.url} back") from failure
    return sound


def _read_run(fd: int, offset: int, length: int, from_device: bool) -> bytes | memoryview:
    if from_device:
        with contextlib.suppress(_NoDirectReads):
            return _read_past_the_page_cache(fd, offset, length)
    return os.pread(fd, length, offset)


class _NoDirectReads(Exception):
    pass


def _read_past_the_page_cache(fd: int, offset: int, length: int) -> memoryview:
    """O_DIRECT wants an aligned buffer (a map of our own), and offsets that are multiples of the sector size (ours are of 4096)."""
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise _NoDirectReads from error
    try:
        buffer = mmap.mmap(-1, -(-length // 4096) * 4096)
        count = os.preadv(direct, [buffer], offset)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _NoDirectReads from error
        raise
    finally:
        os.close(direct)
    if count < length:  # the end of a file that is too short, or a read that the kernel cut
        raise _NoDirectReads
    return memoryview(buffer)[:length]


def read_label(path: Path) -> tuple[ExtentLabel, frozenset[int]]:
    """Header and the slots whose blocks the file claims to hold. Raises CorruptBlock (also for a file that cannot be read)."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            page = os.pread(file.fileno(), LABEL_BYTES, max(0, size - LABEL_BYTES))
    except OSError as error:
        raise CorruptBlock(f"cannot read {path}: {error.strerror}") from error
    label, entries = decode_label(page)
    _check_size(label, size)
    return label, frozenset(slot for slot, entry in enumerate(entries) if entry is not None)


def read_identity(path: Path) -> ExtentLabel:
    """What a file says of itself, without its table: 15 µs instead of 800. Raises CorruptBlock (also for a file that cannot be read)."""
    try:
        with path.open("rb", buffering=0) as file:
            return label_of(file.fileno())
    except OSError as error:
        raise CorruptBlock(f"cannot read {path}: {error.strerror}") from error


def label_of(fd: int) -> ExtentLabel:
    """What an open file says of itself, without its table. Raises CorruptBlock, also for one that was cut; OSError."""
    size = os.fstat(fd).st_size
    label = decode_identity(os.pread(fd, TABLE_OFFSET, max(0, size - LABEL_BYTES)))
    _check_size(label, size)
    return label


def _check_size(label: ExtentLabel, size: int) -> None:
    """A cut file whose payload ends in what looks like a label (an object that is itself an extent file) is not believed either."""
    if size != label.file_bytes:
        raise CorruptBlock(f"the extent file has {size} bytes instead of {label.file_bytes}")


def extent_files(directory: CacheDirectory) -> Iterator[str]:
    """The names of all extent files; half-made ones of a former daemon are removed on the way."""
    for folder in os.scandir(directory.extents_path):
        if not folder.is_dir(follow_symlinks=False):
            continue
        for file in os.scandir(folder.path):
            name = file.name
            is_ours = name[:2] == folder.name and file.is_file(follow_symlinks=False)
            if is_ours and not name.endswith(".tmp"):
                yield name  # whether it is one is told by its name: parse_extent_name
            elif is_ours and parse_extent_name(name.removesuffix(".tmp")) is not None:
                Path(file.path).unlink(missing_ok=True)
