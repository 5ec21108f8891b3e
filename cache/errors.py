"""What can go wrong in the cache. The type says whose fault it is and whether trying again can help.

CacheError
├── CacheConfigError        the person who configured it: a bad option, URL or directory
├── DaemonUnavailable       platform: no daemon answers at the socket (clients go to the origin instead)
├── CapacityError           platform: the block cannot be kept locally (clients go to the origin instead)
│   └── DiskError           the local disk itself refused (`kind` says how: full, inodes, quota, read-only, gone, io, slow, other)
├── PeerError               another node's daemon could not lend a block (`reason` says how); the origin is read instead
├── FormatError             whoever wrote the shard: its bytes are not what the format says (`offset` says where)
├── CorruptBlock            platform: bytes on the local disk are not those that were fetched
└── OriginError             the object store; `is_retryable` says whether trying again can help
    ├── ObjectNotFound      no such object (or prefix)
    ├── ObjectChanged       the object is no longer the one whose etag was pinned
    ├── AccessDenied        credentials missing, expired or not allowed
    ├── OriginMisconfigured wrong region, unknown bucket or scheme, endpoint that is not an object store
    ├── OriginThrottled     503/429: asked to slow down (retryable; may carry `retry_after_s`)
    └── OriginUnavailable   refused, reset, timed out, 5xx, body cut short (retryable)

Every one survives pickling and the wire (`to_wire`, `from_wire`): the daemon's fetch workers raise them, readers in other
processes see them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CacheError(Exception):
    """Base of all. `message` says what happened with the values; `advice` what to do next (may be empty)."""

    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, advice: str = "", url: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.url = url

    def __str__(self) -> str:
        return f"{self.message}\n  {self.advice}" if self.advice else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (self.to_wire(),)

    def to_wire(self) -> dict[str, Any]:
        """This error as JSON-able data; `from_wire` is the inverse."""
        return {"type": type(self).__name__, "message": self.message, "advice": self.advice, "url": self.url}


class CacheConfigError(CacheError):
    pass


class DaemonUnavailable(CacheError):
    pass


class CapacityError(CacheError):
    pass


class DiskError(CapacityError):
    """The local disk refused. `kind`: full, inodes, quota, read-only, gone (the directory), lost (one file), io, slow or other."""

    def __init__(self, message: str, *, advice: str = "", url: str = "", kind: str = "other") -> None:
        super().__init__(message, advice=advice, url=url)
        self.kind = kind

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "kind": self.kind}


class PeerError(CacheError):
    """A peer could not lend. `reason`: dead, silent, slow, refused, not-owner, wrong-bytes or failed."""

    def __init__(self, message: str, *, advice: str = "", url: str = "", reason: str = "failed") -> None:
        super().__init__(message, advice=advice, url=url)
        self.reason = reason

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "reason": self.reason}


class FormatError(CacheError):
    """A shard is not what its format says. `offset` is the byte of the object at which that was seen."""

    def __init__(self, message: str, *, advice: str = "", url: str = "", offset: int = 0) -> None:
        super().__init__(message, advice=advice, url=url)
        self.offset = offset

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "offset": self.offset}


class CorruptBlock(CacheError):
    is_retryable = True


class OriginError(CacheError):
    pass


class ObjectNotFound(OriginError):
    pass


class ObjectChanged(OriginError):
    pass


class AccessDenied(OriginError):
    pass


class OriginMisconfigured(OriginError):
    pass


class OriginUnavailable(OriginError):
    is_retryable = True


class OriginThrottled(OriginError):
    """The origin asked to slow down. `retry_after_s` is what it asked for, None if it did not say."""

    is_retryable = True

    def __init__(self, message: str, *, advice: str = "", url: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, advice=advice, url=url)
        self.retry_after_s = retry_after_s

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "retry_after_s": self.retry_after_s}


_BY_NAME: dict[str, type[CacheError]] = {
    cls.__name__: cls
    for cls in (
        CacheError,
        CacheConfigError,
        DaemonUnavailable,
        CapacityError,
        DiskError,
        PeerError,
        FormatError,
        CorruptBlock,
        OriginError,
        ObjectNotFound,
        ObjectChanged,
        AccessDenied,
        OriginMisconfigured,
        OriginUnavailable,
        OriginThrottled,
    )
}


def from_wire(data: dict[str, Any]) -> CacheError:
    """The error that `to_wire` described; an unknown type (a newer daemon) becomes a plain CacheError."""
    fields = dict(data)
    cls = _BY_NAME.get(str(fields.pop("type", "")), CacheError)
    message = str(fields.pop("message", "unknown error"))
    own: dict[type[CacheError], set[str]] = {
        OriginThrottled: {"retry_after_s"},
        FormatError: {"offset"},
        DiskError: {"kind"},
        PeerError: {"reason"},
    }
    known = {"advice", "url"} | own.get(cls, set())
    return cls(message, **{key: value for key, value in fields.items() if key in known})
