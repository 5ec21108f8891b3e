"""The port to object stores: what the cache needs of one, and nothing more.

Implementations live beside this file (obstore where it has a store, fsspec for the rest) and in tests/fakes/ (in memory, failing, slow).
All pass one contract suite, tests/contracts/test_origin_contract.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cache.origin.plain_http import PlainTarget


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object. `etag` is opaque, never empty, and differs whenever the bytes differ."""

    url: str
    size_bytes: int
    etag: str


class Origin(Protocol):
    """One object store (one bucket, account or file system), used from one event loop. Every error is a cache.errors.OriginError.

    No method retries: policy (retries, back-off, hedging) belongs to the caller, who sees every failure once.
    """

    async def head(self, url: str) -> ObjectInfo:
        """Raises ObjectNotFound, AccessDenied, OriginMisconfigured, OriginThrottled or OriginUnavailable."""
        ...

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        """Exactly the bytes [start, end) of the object at `etag`, or an error: ObjectChanged when the etag no longer matches;
        OriginUnavailable when the body was cut short. Never fewer, never other bytes."""
        ...

    async def plain_target(self, url: str) -> PlainTarget | None:
        """Where a plain GET of this object goes, for whoever reads ranges by himself (plain_http); None: only `get_range` can read it."""
        ...

    def forget_signature(self, url: str) -> None:
        """A plain request was not accepted: the next one is to be signed anew."""
        ...

    def is_not_plain(self) -> None:
        """`get_range` could read what a plain request could not: plain_target says None for a while."""
        ...

    def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        """All objects below a prefix (a "directory": `s3://b/train` lists `s3://b/train/…`, not `s3://b/train2`), or the object
        itself if the url names one; sorted by url. Raises ObjectNotFound when there is nothing."""
        ...

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        """Writes a whole object, atomically. Used by preparation scripts and tests, never by the daemon."""
        ...

    async def close(self) -> None: ...


class OnlyWhole:
    """An origin that is read through its own client alone: what all but the obstore origin say to the plain way."""

    async def plain_target(self, url: str) -> PlainTarget | None:
        return None

    def forget_signature(self, url: str) -> None:
        """There is none."""

    def is_not_plain(self) -> None:
        """We know."""
