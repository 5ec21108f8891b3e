"""Every file system that fsspec knows, as an origin: hdfs, sftp, oss, github, a presigned http url, …

Weaker than the other origins, and this is where: fsspec has no conditional read, so after each range the object's token (etag,
checksum, or modification time and size) is asked for again and must be the pinned one. That makes one more request per range, and misses
an object that was changed and changed back in between. Whether `put` is atomic and whether a stalled read ends is the file system's
affair; here every call has a deadline.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import fsspec

from cache.errors import AccessDenied, ObjectNotFound, OriginError, OriginMisconfigured
from cache.origin import failures, urls
from cache.origin.failures import Failure
from cache.origin.options import OriginOptions
from cache.origin.ports import ObjectInfo, OnlyWhole

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cache.origin.urls import Location

# What file systems call that which changes with the bytes, best first.
_TAGS = (
    "ETag",
    "etag",
    "e_tag",
    "generation",
    "md5Hash",
    "Content-MD5",
    "content_md5",
    "Digest",
    "hexsha",
    "sha",
    "checksum",
)
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "modified", "modifiedTime", "updated", "created")


class FsspecOrigin(OnlyWhole):
    """One file system (and host or bucket), from the event loop it was made on. Blocking file systems run in threads."""

    def __init__(self, location: Location, options: OriginOptions) -> None:
        """Raises OriginMisconfigured when fsspec has no such file system or its package is missing."""
        self._timeout_s = options.request_timeout_s
        protocol = location.scheme
        try:
            kind = fsspec.get_filesystem_class(protocol)
            given = {**kind._get_kwargs_from_urls(f"{protocol}://{location.bucket}/"), **options.storage_options}
            if kind.async_impl:
                given |= {"asynchronous": True, "loop": asyncio.get_running_loop()}
            self._fs = kind(**given, skip_instance_cache=True, use_listings_cache=False)
        except (ValueError, ImportError, TypeError, OSError) as e:
            raise OriginMisconfigured(
                f"{location.root}: no file system for {protocol}:// ({e})",
                url=location.root,
                advice="s3, gs, az, http(s) and file are built in; for another scheme install its fsspec package.",
            ) from e

    async def head(self, url: str) -> ObjectInfo:
        info = await self._call("info", url, self._path(url))
        if info.get("type") == "directory":
            raise ObjectNotFound(f"{url} is a directory", url=url, advice="Name a file; to see what it holds, list it.")
        return _info_of(url, info)

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        if start == end:
            return b""
        data: bytes = await self._call("cat_file", url, self._path(url), start=start, end=end)
        # After the bytes, not before: equal to the pinned token now means unchanged all the time since it was pinned.
        now = await self.head(url)
        if now.etag != etag:
            raise failures.changed(url, etag, now.etag)
        if end > now.size_bytes:
            raise failures.beyond_end(url, start, end, now.size_bytes)
        if len(data) != end - start:
            too_long = len(data) > end - start
            raise failures.ignores_ranges("GET", url) if too_long else failures.cut_short(url, start, end, len(data))
        return data

    async def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        top = self._path(prefix_url).rstrip("/")
        found: Mapping[str, Mapping[str, Any]] = await self._call("find", prefix_url, top, detail=True)
        infos = [
            _info_of(prefix_url.rstrip("/") + name.rstrip("/")[len(top) :], info)
            for name, info in found.items()
            if name.rstrip("/") == top or urls.is_beneath(name, top)
        ]
        if not infos:
            raise failures.nothing_below(prefix_url)
        for info in sorted(infos, key=lambda info: info.url):
            yield info

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        path = self._path(url)
        await self._call("makedirs", url, self._fs._parent(path), exist_ok=True)
        await self._call("pipe_file", url, path, bytes(data))
        return await self.head(url)

    async def close(self) -> None:
        session = getattr(self._fs, "_session", None)
        if session is not None and hasattr(session, "close"):
            closed = session.close()
            if inspect.isawaitable(closed):
                await closed

    def _path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url.removeprefix(urls.VIA_FSSPEC)))

    async def _call(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._fs.async_impl:
                    return await getattr(self._fs, f"_{method}")(*args, **kwargs)
                return await asyncio.to_thread(getattr(self._fs, method), *args, **kwargs)
        except OriginError:
            raise
        except Exception as e:
            # Each of the hundred file systems has exceptions of its own; none may escape the tree.
            raise _error(method, url, e) from e


def _info_of(url: str, info: Mapping[str, Any]) -> ObjectInfo:
    size = info.get("size")
    if size is None:
        raise OriginMisconfigured(
            f"{url}: the server does not say how long the object is",
            url=url,
            advice="The cache needs the size; serve it with Content-Length.",
        )
    for name in _TAGS:
        if info.get(name):
            return ObjectInfo(url, int(size), f"{name}:{info[name]}")
    for name in _TIMES:
        if info.get(name):
            return ObjectInfo(url, int(size), f"{name}:{_timestamp(info[name])}-{size}")
    raise failures.no_version(url)


def _timestamp(time: object) -> str:
    """A time as text; file systems give floats here and datetimes there for the same moment."""
    if isinstance(time, datetime):
        time = time.timestamp()
    return f"{time:.6f}" if isinstance(time, float) else str(time)


def _error(operation: str, url: str, error: Exception) -> OriginError:
    detail = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    match error:
        case aiohttp.ClientResponseError():
            retry_after = error.headers.get("Retry-After", "") if error.headers else ""
            after_s = float(retry_after) if retry_after.isdigit() else None
            return failures.error_of(Failure(operation, url, detail, error.status, retry_after_s=after_s))
        case FileNotFoundError() | NotADirectoryError():
            return failures.error_of(Failure(operation, url, detail, 404))
        case IsADirectoryError():
            return ObjectNotFound(f"{url} is a directory", url=url, advice="Name a file.")
        case PermissionError():
            return AccessDenied(
                f"{operation} {url}: not allowed ({detail})",
                url=url,
                advice="Check the file system's credentials and storage_options.",
            )
        case TimeoutError():
            return failures.error_of(Failure(operation, url, "timed out"))
        case ImportError() | NotImplementedError() | ValueError() | TypeError():
            return OriginMisconfigured(
                f"{operation} {url}: {detail}", url=url, advice="Check the url and the file system's storage_options."
            )
        case _:
            return failures.error_of(Failure(operation, url, detail))
