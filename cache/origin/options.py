"""How origins are spoken to: timeouts, connections, and which library does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache.errors import CacheConfigError


@dataclass(frozen=True)
class OriginOptions:
    """Settings of all origins of one process. Hashable by identity only where `storage_options` is used; build it once."""

    connect_timeout_s: float = 5.0
    """Seconds until a connection must stand. Within a region it takes milliseconds; 5 s outlives one lost SYN and its two repeats."""

    read_timeout_s: float = 15.0
    """Seconds without a single byte after which a request is given up as OriginUnavailable. Object stores under pressure answer the first
    byte after a second or two; a connection silent for 15 s is dead, and hedging will have replaced it long before."""

    request_timeout_s: float = 120.0
    """Seconds for a whole request with its body: catches the connection that trickles, which no read timeout sees."""

    max_idle_connections: int = 64
    """Connections per host kept open between requests; one for each range in flight, so that none pays for TLS again."""

    idle_timeout_s: float = 20.0
    """Seconds after which an idle connection is closed by us. S3 closes after 20 s or more, and a request sent into a closing connection
    fails; ours must be first."""

    prefer_s3fs: bool = False
    """Read s3:// urls through s3fs instead of obstore (three times the CPU per byte; for set-ups that only botocore can authenticate)."""

    storage_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Passed to the fsspec file system (`fsspec.filesystem(protocol, **storage_options)`); obstore's stores ignore it."""

    def __post_init__(self) -> None:
        for name in (
            "connect_timeout_s",
            "read_timeout_s",
            "request_timeout_s",
            "idle_timeout_s",
            "max_idle_connections",
        ):
            value = getattr(self, name)
            if value <= 0:
                raise CacheConfigError(f"{name} is {value!r}", advice=f"{name} must be greater than 0.")
