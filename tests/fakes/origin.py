"""Origins for tests: in memory, failing on a plan, and held back until the test lets go. Real implementations of the port."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache.errors import ObjectNotFound, OriginError
from cache.origin import failures, urls
from cache.origin.ports import ObjectInfo, OnlyWhole, Origin

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True)
class Request:
    """One call of an origin, as it came in."""

    operation: str
    url: str
    start: int = 0
    end: int = 0


class MemoryOrigin(OnlyWhole):
    """Objects in a dictionary, url → bytes. `requests` holds every call in order; the etag is made of the bytes."""

    def __init__(self, objects: Mapping[str, bytes] | None = None) -> None:
        self.objects: dict[str, bytes] = dict(objects or {})
        self.requests: list[Request] = []

    @property
    def bytes_served(self) -> int:
        return sum(r.end - r.start for r in self.requests if r.operation == "get_range")

    async def head(self, url: str) -> ObjectInfo:
        self.requests.append(Request("head", url))
        return self._info(url)

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        self.requests.append(Request("get_range", url, start, end))
        info = self._info(url)
        if info.etag != etag:
            raise failures.changed(url, etag, info.etag)
        if end > info.size_bytes:
            raise failures.beyond_end(url, start, end, info.size_bytes)
        return memoryview(self.objects[url])[start:end]

    async def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        self.requests.append(Request("list", prefix_url))
        found = sorted(url for url in self.objects if urls.is_beneath(url, prefix_url))
        if not found and prefix_url in self.objects:
            found = [prefix_url]
        if not found:
            raise failures.nothing_below(prefix_url)
        for url in found:
            yield self._info(url)

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        self.requests.append(Request("put", url))
        self.objects[url] = bytes(data)
        return self._info(url)

    async def close(self) -> None:
        pass

    def _info(self, url: str) -> ObjectInfo:
        if url not in self.objects:
            raise ObjectNotFound(f"{url}: no such object", url=url, advice="Put it first.")
        data = self.objects[url]
        return ObjectInfo(url, len(data), f'"{hashlib.blake2b(data, digest_size=8).hexdigest()}"')


class FailingOrigin(OnlyWhole):
    """Another origin whose calls fail when the plan says so.

    `plan(request, attempt)` is asked before every head and range; `attempt` counts from 0 the calls equal to this one. It returns
    the error to raise, or None to let the call through.
    """

    def __init__(self, inner: Origin, plan: Callable[[Request, int], OriginError | None]) -> None:
        self.inner = inner
        self.plan = plan
        self.failures: list[tuple[Request, OriginError]] = []
        self._attempts: dict[Request, int] = {}

    async def head(self, url: str) -> ObjectInfo:
        self._maybe_fail(Request("head", url))
        return await self.inner.head(url)

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        self._maybe_fail(Request("get_range", url, start, end))
        return await self.inner.get_range(url, etag, start, end)

    def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        return self.inner.list(prefix_url)

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        return await self.inner.put(url, data)

    async def close(self) -> None:
        await self.inner.close()

    def _maybe_fail(self, request: Request) -> None:
        attempt = self._attempts.get(request, 0)
        self._attempts[request] = attempt + 1
        error = self.plan(request, attempt)
        if error is not None:
            self.failures.append((request, error))
            raise error


class GatedOrigin(OnlyWhole):
    """Another origin whose ranges wait until the test opens the gate: a slow store without a clock.

    `waiting` are the ranges inside; `release(n)` lets the n oldest through, `open()` all of them, now and later.
    """

    def __init__(self, inner: Origin) -> None:
        self.inner = inner
        self.waiting: list[tuple[Request, asyncio.Event]] = []
        self._is_open = False

    async def head(self, url: str) -> ObjectInfo:
        return await self.inner.head(url)

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        if not self._is_open:
            entry = (Request("get_range", url, start, end), asyncio.Event())
            self.waiting.append(entry)
            try:
                await entry[1].wait()
            finally:
                if entry in self.waiting:
                    self.waiting.remove(entry)
        return await self.inner.get_range(url, etag, start, end)

    def release(self, count: int = 1) -> None:
        for _, event in self.waiting[:count]:
            event.set()
        del self.waiting[:count]

    def open(self) -> None:
        self._is_open = True
        self.release(len(self.waiting))

    def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        return self.inner.list(prefix_url)

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        return await self.inner.put(url, data)

    async def close(self) -> None:
        await self.inner.close()
