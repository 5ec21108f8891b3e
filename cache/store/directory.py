"""The cache directory: who may use it, which format it holds, and where its parts lie.

    <dir>/railhead-cache.json      format version; made first
    <dir>/lock                     held (flock) by the daemon that serves this directory; its text says which
    <dir>/index.db                 SQLite index
    <dir>/extents/<xx>/<content id>.<extent>.<generation>
    <dir>/extents/<xx>/<…>.held    evicted while a reader had it open (holding.py)
    <dir>/indexes/<key>.idx        indices of data sets (shelf.py)
    <dir>/pins.json                what a person wants to stay (pins.py)

Nothing outside these names is ever touched: other files in the directory are somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.blocks import ExtentId
from cache.errors import CacheConfigError
from cache.store.format import FORMAT_VERSION

log = logging.getLogger("railhead.cache")

MARKER_NAME = "railhead-cache.json"
_EXTENT_NAME = re.compile(r"([0-9a-f]{32})\.(0|[1-9]\d{0,8})\.([1-9]\d{0,17})")


@dataclass(frozen=True)
class ServingDaemon:
    """Who serves a directory: written into its lock file."""

    pid: int
    socket: str


class CacheDirectory:
    """An open and locked cache directory. Use `CacheDirectory.open`; `close` gives the lock back."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> CacheDirectory | ServingDaemon:
        """Creates what is missing and takes the lock; the other daemon's description when one has it.

        Raises CacheConfigError: not a directory, not writable, or of another format.
        """
        try:
            (path / "extents").mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheConfigError(
                f"cannot use {path} as cache directory: {error.strerror}",
                advice="--dir must name a directory that this user can write to",
            ) from error
        return cls._locked(path, lock_fd, _check_format)

    @classmethod
    def open_existing(cls, path: Path) -> CacheDirectory | ServingDaemon:
        """As `open`, of a directory that holds a cache already; creates and removes nothing.

        Raises CacheConfigError: there is none, it cannot be read, or it is of another format.
        """
        try:
            _read_format(path / MARKER_NAME)
            lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise CacheConfigError(
                f"{path} holds no cache", advice="--dir must name what `serve --dir` was given"
            ) from error
        except OSError as error:
            raise CacheConfigError(
                f"cannot use {path} as cache directory: {error.strerror}",
                advice="run this as the user whose daemon it is",
            ) from error
        return cls._locked(path, lock_fd, _require_format)

    @classmethod
    def _locked(cls, path: Path, lock_fd: int, check: Callable[[Path], None]) -> CacheDirectory | ServingDaemon:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with os.fdopen(lock_fd, "rb") as file:
                return _parse_serving(file.read())
        except OSError as error:
            os.close(lock_fd)
            raise CacheConfigError(
                f"cannot lock {path}: {error.strerror}",
                advice="choose a local disk; some network file systems have no locks",
            ) from error
        try:
            check(path)
        except BaseException:
            os.close(lock_fd)
            raise
        return cls(path, lock_fd)

    def serve_at(self, socket: str) -> None:
        """Tells a second daemon on this directory who is serving it."""
        text = json.dumps(asdict(ServingDaemon(os.getpid(), socket))).encode()
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, text, 0)

    @property
    def index_path(self) -> Path:
        return self.path / "index.db"

    @property
    def extents_path(self) -> Path:
        return self.path / "extents"

    def extent_path(self, extent: ExtentId, generation: int) -> Path:
        name = f"{extent.content_id}.{extent.extent_idx}.{generation}"
        return self.extents_path / extent.content_id[:2] / name

    def assert_is_there(self) -> None:
        """Raises OSError (ENOENT) when the directory is not the one that was locked: removed, or its disk unmounted. What then lies at
        its path may be the machine's own disk, which is not ours to fill."""
        there, locked = os.stat(self.path / "lock"), os.fstat(self._lock_fd)
        if (there.st_dev, there.st_ino) != (locked.st_dev, locked.st_ino):
            raise FileNotFoundError(errno.ENOENT, "another directory lies at this path now", str(self.path))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock_fd, 0)
        os.close(self._lock_fd)


def serving_daemon(path: Path) -> ServingDaemon | None:
    """The daemon that said it serves this directory; whether it still lives is for its socket to say."""
    try:
        serving = _parse_serving((path / "lock").read_bytes())
    except OSError:
        return None
    return serving if serving.socket else None


def parse_extent_name(name: str) -> tuple[ExtentId, int] | None:
    """Extent and generation of a file of ours; None for any other name.

    >>> parse_extent_name("0" * 32 + ".3.17")[1]
    17
    >>> parse_extent_name("holiday.jpg")
    """
    parts = split_extent_name(name)
    return None if parts is None else (ExtentId(parts[0], parts[1]), parts[2])


def split_extent_name(name: str) -> tuple[str, int, int] | None:
    """The same as plain values: content id, extent_idx, generation. For when there are 100,000."""
    match = _EXTENT_NAME.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


def _parse_serving(text: bytes) -> ServingDaemon:
    try:
        data = json.loads(text)
        return ServingDaemon(int(data["pid"]), str(data["socket"]))
    except (ValueError, KeyError, TypeError):
        # It holds the lock but does not serve yet (or is going away): there is no address to name.
        return ServingDaemon(0, "")


def _write_marker(marker: Path) -> None:
    temporary = marker.with_name(f"{marker.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"format": FORMAT_VERSION}) + "\n")
        temporary.replace(marker)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CacheConfigError(
            f"cannot write to {marker.parent}: {error.strerror}",
            advice="free space on this disk, or choose another --dir",
        ) from error


def _read_format(marker: Path) -> object:
    """Raises FileNotFoundError when there is none, CacheConfigError when it cannot be read."""
    try:
        return json.loads(marker.read_text())["format"]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CacheConfigError(
            f"{marker} cannot be read: {error}", advice="remove the cache directory; what it held is fetched again"
        ) from error


def _require_format(path: Path) -> None:
    version = _read_format(path / MARKER_NAME)
    if version != FORMAT_VERSION:
        raise CacheConfigError(
            f"{path} holds a cache of format {version}; this version reads format {FORMAT_VERSION}",
            advice="run the version that made it",
        )


def _check_format(path: Path) -> None:
    marker = path / MARKER_NAME
    try:
        version = _read_format(marker)
    except FileNotFoundError:
        _write_marker(marker)
        return
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CacheConfigError(
            f"{path} holds a cache of format {version}; this daemon writes format {FORMAT_VERSION}",
            advice="run the version that made it, give --dir another directory, or remove this one; what it held is fetched again",
        )
    if version < FORMAT_VERSION:
        _drop_older(path, version)
        _write_marker(marker)


def _drop_older(path: Path, version: int) -> None:
    """Removes what an older version of the cache left: nobody can read it any more, and it can be fetched again. Nothing that is not ours
    goes. Interrupted, it is gone on with at the next start, for the marker is written last. Raises CacheConfigError."""
    count = size = 0
    try:
        for folder in os.scandir(path / "extents"):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder.path):
                name = file.name.removesuffix(".tmp").removesuffix(".held")
                if name[:2] == folder.name and split_extent_name(name) and file.is_file(follow_symlinks=False):
                    count, size = count + 1, size + file.stat(follow_symlinks=False).st_size
                    os.unlink(file.path)
        for suffix in ("", "-wal", "-shm"):
            (path / f"index.db{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise CacheConfigError(
            f"{path} holds a cache of format {version}, which cannot be removed: {error.strerror}",
            advice=f"this daemon writes format {FORMAT_VERSION}: give --dir another directory, or remove this one",
        ) from error
    log.warning(
        "%s held a cache of format %d; this version writes format %d: its %d files (%d MiB) were removed, to be fetched again",
        path,
        version,
        FORMAT_VERSION,
        count,
        size >> 20,
    )
