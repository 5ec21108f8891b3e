"""Small files that readers keep beside the extents: the indices of data sets. Blocking; used by one disk thread.

    <dir>/indexes/<32 hex digits>.idx

The daemon does not know what is in them; who reads one verifies it. The longest unused goes when they are too many.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from cache.store.files import disk_error

_NAME = re.compile(r"([0-9a-f]{32})\.idx")
FILE_OVERHEAD_BYTES = 512


def is_shelf_key(key: str) -> bool:
    return _NAME.fullmatch(f"{key}.idx") is not None


class Shelf:
    def __init__(self, path: Path) -> None:
        self._path = path

    def sizes(self) -> dict[str, int]:
        """What is there, the longest unused first: key → bytes that it takes. Half-made files of a former daemon are removed."""
        found: list[tuple[float, str, int]] = []
        with contextlib.suppress(FileNotFoundError):
            for file in os.scandir(self._path):
                match = _NAME.fullmatch(file.name.removesuffix(".tmp"))
                if match is None or not file.is_file(follow_symlinks=False):
                    continue  # not made by us
                if file.name.endswith(".tmp"):
                    Path(file.path).unlink(missing_ok=True)
                    continue
                stat = file.stat()
                found.append((stat.st_mtime, match[1], stat.st_size + FILE_OVERHEAD_BYTES))
        return {key: size for _, key, size in sorted(found)}

    def put(self, key: str, data: bytes) -> None:
        """Whole or not at all; replaces what was there. Raises CapacityError when the disk refuses it."""
        temporary = self._path / f"{key}.idx.tmp"
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            temporary.write_bytes(data)
            temporary.chmod(0o600)
            temporary.replace(self._path / f"{key}.idx")
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise disk_error(error, f"cannot keep an index of {len(data)} bytes in {self._path}") from error

    def open(self, key: str) -> int:
        """A descriptor to read it; FileNotFoundError when it is not there. It counts as used now."""
        fd = os.open(self._path / f"{key}.idx", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            os.utime(fd)
        return fd

    def remove(self, key: str) -> None:
        """Raises DiskError when the disk refuses that: it is there still."""
        try:
            (self._path / f"{key}.idx").unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, f"cannot remove an index in {self._path}") from error
