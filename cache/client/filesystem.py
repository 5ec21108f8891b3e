"""`nodecache::s3://bucket/key`: the cache for everything that speaks fsspec (pyarrow, pandas, Hugging Face datasets, webdataset).

Registered by entry point. Read-only: what is written goes to the origin by its own file system. Storage options:
`fsspec.open("nodecache::s3://b/k", nodecache={"socket": "/run/cache.sock"})`; by default RAILHEAD_CACHE_SOCKET is used. Credentials are
the daemon's (or, without one, this environment's); options meant for the wrapped file system are not used.
"""

from __future__ import annotations

import io
import os
from typing import Any

from fsspec.implementations.chained import ChainedFileSystem

from cache.client.client import Cache
from cache.client.object import CachedObject
from cache.client.seeking import SeekingFile
from cache.errors import AccessDenied, ObjectNotFound, OriginError
from cache.origin.ports import ObjectInfo

BUFFER_BYTES = 256 * 1024
"""Readers of text and of zip-like formats read a few bytes at a time: this much is copied per call into Python."""


class NodeCacheFileSystem(ChainedFileSystem):  # type: ignore[misc]
    protocol = "nodecache"
    root_marker = ""
    cachable = True
    async_impl = False

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        fo: str | None = None,
        socket: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`target_protocol`: scheme put before paths that have none (filled in by a chained url). `socket`: the daemon's; None: the
        environment's. `target_options` and `fo` are what fsspec passes along for a chained url."""
        super().__init__(**kwargs)
        self.target_protocol = target_protocol or "file"
        self.cache = Cache(socket)
        self._socket = socket

    @classmethod
    def _strip_protocol(cls, path: str | list[str]) -> str | list[str]:
        if isinstance(path, list):
            return [str(cls._strip_protocol(item)) for item in path]
        path = os.fspath(path)
        for prefix in ("nodecache::", "nodecache://"):
            path = path.removeprefix(prefix)
        return path.rstrip("/") if not path.endswith("://") else path

    def unstrip_protocol(self, name: str) -> str:
        return f"nodecache::{self._url(name)}"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The direct children of a prefix, as fsspec describes them; of an object itself that one. Raises FileNotFoundError."""
        path = str(self._strip_protocol(path))
        url = self._url(path)
        objects = self._translated(lambda: self.cache.list(url), path)
        prefix = _comparable(url)
        entries: dict[str, dict[str, Any]] = {}
        for info in objects:
            rest = _comparable(info.url)[len(prefix) :].lstrip("/")
            name, _, below = rest.partition("/")
            if not rest:
                entries[path] = self._entry(path, info)
            elif not below:
                child = f"{path}/{name}"
                entries[child] = self._entry(child, info)
            else:
                child = f"{path}/{name}"
                entries.setdefault(child, {"name": child, "size": 0, "type": "directory"})
        listed = [entries[name] for name in sorted(entries)]
        return listed if detail else [entry["name"] for entry in listed]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Size, type and etag of an object, or that the path is a directory. Raises FileNotFoundError, PermissionError, OSError."""
        path = str(self._strip_protocol(path))
        try:
            with self._translated(lambda: self.cache.open(self._url(path)), path) as obj:
                return self._entry(path, ObjectInfo(obj.url, obj.size, obj.etag))
        except FileNotFoundError:
            self.ls(path)
            return {"name": path, "size": 0, "type": "directory"}

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> io.BufferedReader:
        if mode != "rb":
            raise io.UnsupportedOperation(
                f"nodecache is read-only, mode {mode!r} is not; write to {self._url(path)} itself"
            )
        obj = self._translated(lambda: self.cache.open(self._url(str(self._strip_protocol(path)))), path)
        return io.BufferedReader(_RawObject(obj), BUFFER_BYTES)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        with self._translated(lambda: self.cache.open(self._url(str(self._strip_protocol(path)))), path) as obj:
            first = 0 if start is None else start + (obj.size if start < 0 else 0)
            last = obj.size if end is None else end + (obj.size if end < 0 else 0)
            return bytes(self._translated(lambda: obj.read(first, max(0, last - first)), path))

    def ukey(self, path: str) -> str:
        """Differs whenever the bytes differ: pyarrow and dask use it as a fingerprint."""
        return str(self.info(path)["etag"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.target_protocol, self._socket)

    def _url(self, path: str) -> str:
        path = str(self._strip_protocol(path))
        if "://" in path or path.startswith(("/", "~", ".")):
            return path
        return f"{self.target_protocol}://{path}"

    @staticmethod
    def _entry(name: str, info: ObjectInfo) -> dict[str, Any]:
        return {"name": name, "size": info.size_bytes, "type": "file", "etag": info.etag, "ETag": info.etag}

    @staticmethod
    def _translated(work: Any, path: str) -> Any:
        """Runs `work` with the cache's errors as those that fsspec's users expect."""
        try:
            return work()
        except ObjectNotFound as error:
            raise FileNotFoundError(f"{path}: {error}") from error
        except AccessDenied as error:
            raise PermissionError(f"{path}: {error}") from error
        except OriginError as error:
            raise OSError(f"{path}: {error}") from error


class _RawObject(SeekingFile):
    """An object as a raw file; `io.BufferedReader` around it makes it a file that everything accepts."""

    def __init__(self, obj: CachedObject) -> None:
        super().__init__(obj.size, obj.url)
        self._obj = obj

    def readinto(self, buffer: Any) -> int:
        count = NodeCacheFileSystem._translated(
            lambda: self._obj.readinto(min(self.position, self._obj.size), memoryview(buffer)), self._obj.url
        )
        self.position += count
        return int(count)

    def close(self) -> None:
        if not self.closed:
            self._obj.close()
        super().close()


def _make(target_protocol: str, socket: str | None) -> NodeCacheFileSystem:
    return NodeCacheFileSystem(target_protocol=target_protocol, socket=socket)


def _comparable(url: str) -> str:
    """A url as listings spell it, without a trailing slash, so that a prefix can be cut off."""
    from cache.origin.urls import canonical_url

    return canonical_url(url).rstrip("/")
