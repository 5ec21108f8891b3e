"""Files of this machine (and of mounted network file systems) as an origin.

Written by hand instead of over obstore's LocalStore, which hides or refuses names such as `a#1` (its staging names), sees mtime in
microseconds, and cannot look again after a read. The etag is inode, mtime in ns and size. What it cannot see: a file changed in place
twice within one tick of the kernel's clock (4 ms) and left at the same size. A file replaced by rename is always noticed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from cache.errors import AccessDenied, ObjectNotFound, OriginError, OriginMisconfigured, OriginUnavailable
from cache.origin import failures, urls
from cache.origin.ports import ObjectInfo, OnlyWhole

if TYPE_CHECKING:
    from typing_extensions import Buffer


class LocalOrigin(OnlyWhole):
    """file:// urls. Every call runs in asyncio's default thread pool, so a slow disk or NFS mount never blocks the event loop."""

    async def head(self, url: str) -> ObjectInfo:
        return await asyncio.to_thread(_head, url)

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        return await asyncio.to_thread(_read, url, etag, start, end)

    async def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        for info in await asyncio.to_thread(_list, prefix_url):
            yield info

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        return await asyncio.to_thread(_put, url, data)

    async def close(self) -> None:
        pass


def _path(url: str) -> str:
    return "/" + urls.parse(url).key


def _etag(status: os.stat_result) -> str:
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


def _head(url: str) -> ObjectInfo:
    try:
        status = os.stat(_path(url))
    except OSError as e:
        raise _error("stat", url, e) from e
    _require_file(url, status)
    return ObjectInfo(url, status.st_size, _etag(status))


def _read(url: str, etag: str, start: int, end: int) -> Buffer:
    try:
        fd = os.open(_path(url), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            _require_same(url, etag, status)
            if end > status.st_size:
                raise failures.beyond_end(url, start, end, status.st_size)
            data = _pread(fd, start, end)
            # Again after the last byte: a writer in place may have come between. This order is what makes a mixture visible.
            _require_same(url, etag, os.fstat(fd))
        finally:
            os.close(fd)
    except OSError as e:
        raise _error("read", url, e) from e
    if len(data) < end - start:
        raise failures.cut_short(url, start, end, len(data))
    return data


def _pread(fd: int, start: int, end: int) -> bytes:
    """The bytes [start, end), fewer only at the end of the file. One call does it but for ranges beyond 2 GiB; a buffer made first would be
    filled with zeros for nothing."""
    data = os.pread(fd, end - start, start)
    while data and len(data) < end - start and (more := os.pread(fd, end - start - len(data), start + len(data))):
        data += more
    return data


def _require_same(url: str, etag: str, status: os.stat_result) -> None:
    _require_file(url, status)
    if _etag(status) != etag:
        raise failures.changed(url, etag, _etag(status))


def _require_file(url: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ObjectNotFound(f"{url} is {kind}", url=url, advice="Name a file; to see what a directory holds, list it.")


def _list(prefix_url: str) -> list[ObjectInfo]:
    path = _path(prefix_url)
    try:
        if not os.path.isdir(path):
            return [_head(urls.canonical_url(prefix_url))]
        found = sorted(_walk(path, set()), key=lambda info: info.url)
    except OSError as e:
        raise _error("list", prefix_url, e) from e
    if not found:
        raise ObjectNotFound(
            f"list {prefix_url}: the directory holds no files", url=prefix_url, advice="Check the name."
        )
    return found


def _walk(directory: str, seen: set[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Every regular file below, through symbolic links, each directory once (a link to a parent must not loop)."""
    status = os.stat(directory)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(_STAGING):
                continue
            try:
                if entry.is_dir():
                    yield from _walk(entry.path, seen)
                elif entry.is_file():
                    status = entry.stat()
                    yield ObjectInfo("file://" + entry.path, status.st_size, _etag(status))
            except FileNotFoundError:
                continue  # deleted while we looked, or a dangling link: not there


_STAGING = ".railhead-put-"


def _put(url: str, data: Buffer) -> ObjectInfo:
    path = _path(url)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd, staging = tempfile.mkstemp(prefix=_STAGING, dir=os.path.dirname(path))
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                # mkstemp makes 0600; a shared directory wants what open() would have given.
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(staging, path)
        except BaseException:
            os.unlink(staging)
            raise
    except OSError as e:
        raise _error("write", url, e) from e
    return _head(url)


def _umask() -> int:
    """The process's umask, read without setting it (setting it, even for an instant, would reach other threads' files)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _error(operation: str, url: str, error: OSError) -> OriginError:
    text = f"{operation} {url}: {error.strerror or error} ({errno.errorcode.get(error.errno or 0, error.errno)})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        hint = " The url is taken literally: %20 is not a blank." if "%" in url else ""
        return ObjectNotFound(
            text, url=url, advice=f"Check the path, and that the file system is mounted on this machine.{hint}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(
            text,
            url=url,
            advice=f"The process runs as uid {os.getuid()}; it needs read permission on the file and its directories.",
        )
    if error.errno in (errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EROFS):
        return OriginMisconfigured(text, url=url, advice="Check the path.")
    return OriginUnavailable(text, url=url, advice="Check the disk or mount; trying again may help.")
