"""Evicted files that are still open somewhere: who holds one is known to the kernel, whatever has died meanwhile. Blocking.

Each file that a reader is given carries a shared flock. That belongs to the open file: descriptors, memory maps and what a fork inherits
of them keep it, and it ends with the last of them, by `close`, by `munmap` or by death. So an evicted file on which nobody has such a lock
is unlinked; one that is held is set aside as `<its name>.held`, for its bytes are on the disk until it is let go of, and a daemon that
takes the place of one that was killed must find them and count them (decisions/0090).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from cache.blocks import ExtentId
from cache.store.directory import CacheDirectory

HELD_SUFFIX = ".held"


def mark_held(fd: int) -> None:
    """Who has this open file, however it came to them, holds it from now on. Never blocks; a file system without locks has none."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def retire_extent(directory: CacheDirectory, extent: ExtentId, generation: int) -> bool:
    """An evicted file goes, or is set aside if somebody holds it (True). Raises OSError."""
    path = directory.extent_path(extent, generation)
    if not _is_held(path):
        path.unlink(missing_ok=True)
        return False
    path.rename(_aside(path))
    return True


def remove_if_let_go(directory: CacheDirectory, extent: ExtentId, generation: int) -> bool:
    """What was set aside goes, or what the disk refused to remove, if nobody holds it any more (True). Raises OSError."""
    path = directory.extent_path(extent, generation)
    for left in (_aside(path), path):
        if _is_held(left):
            return False
        left.unlink(missing_ok=True)
    return True


def held_bytes(directory: CacheDirectory, extent: ExtentId, generation: int) -> int:
    """What an evicted file still takes on the disk, set aside or not removed; 0 when it is not there."""
    path = directory.extent_path(extent, generation)
    for left in (_aside(path), path):
        with contextlib.suppress(OSError):
            return left.stat().st_size
    return 0


def _aside(path: Path) -> Path:
    return path.with_name(path.name + HELD_SUFFIX)


def _is_held(path: Path) -> bool:
    """Nobody takes a new hold of an evicted file, so what is not held now never is again."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # No locks here: nothing can be known.
    finally:
        os.close(fd)
    return False
