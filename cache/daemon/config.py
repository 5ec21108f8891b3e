"""The daemon's configuration: frozen, checked when built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cache.daemon.peerconfig import PeerConfig
from cache.errors import CacheConfigError

MAX_SOCKET_PATH_BYTES = 107
"""The kernel's limit for a Unix socket's address (sun_path, 108 bytes with its end mark)."""

MIN_CAPACITY_BYTES = 8 * 1024 * 1024

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Share:
    """A part of the disk: a number, or a ratio of the whole."""

    count: int = 0
    ratio: float = 0.0

    def of(self, total: int) -> int:
        return self.count + int(self.ratio * total)


AT_ONCE = 128
AT_ONCE_WITH_PEERS = 64
"""Each node fetches its share of the data, and what all of them ask at once the store and the other nodes have to hear: eight nodes with
128 each took each other for dead, and single samples waited twice as long (benchmarks/cluster.py on two cores)."""


@dataclass(frozen=True)
class DaemonConfig:
    dir: Path
    """Node-local directory that holds the cache. Made if missing; other files in it are left alone."""
    capacity_bytes: int
    """Hard bound on the bytes of the cache's files, those in flight and those that readers hold open after eviction included."""
    socket: Path
    """Unix socket for readers; made with mode 0600, so only this user (and root) can connect."""
    max_files: int = 1_000_000
    """Hard bound on the number of extent files (inodes). One per object up to 64 MiB, one more per further 64 MiB."""
    num_workers: int = 2
    """Fetch worker processes. Two saturate about 20 Gbit/s; more help beyond that."""
    max_in_flight: int | None = None
    """Fetches under way at once, at most: how many an origin is given is found out. None: `AT_ONCE`,
    in a cluster `AT_ONCE_WITH_PEERS`. Each costs a worker a thread and a buffer of 256 KiB.
    Where single blocks are needed first, a link of 200 MB/s at 100 ms holds 75 of them; raise it for faster or farther origins."""
    metadata_ttl_s: float = 10.0
    """For how long what HEAD said of an object is believed by further opens. Ranks of one job that start together share one HEAD; an
    object that is overwritten is noticed by whoever opens it later than this."""
    keep_free: Share = Share(ratio=0.01)
    """What the cache leaves to the other users of its disk, in bytes: it gives its own files up before the file system has less free.
    1 % by default: a full disk takes the node down, not only the cache."""
    keep_free_files: Share = Share(ratio=0.01)
    """The same in inodes, on file systems that count them."""
    scrub_bytes_per_s: int = 8 * 1024 * 1024
    """How fast blocks are read back and compared while readers need nothing: 8 MiB/s go through 680 GB a day and are a hundredth of what an
    NVMe disk reads. 0: never."""
    metrics: tuple[str, int] | None = None
    """Host and port for /metrics, /healthz and /status over HTTP; None: not offered."""
    peers: PeerConfig | None = None
    """The other daemons of a cluster, with which this one shares what it fetches; None: it is alone."""
    exit_with_parent: bool = False
    """Drain and exit when the process that started the daemon dies, by whatever signal."""

    @property
    def fetches_at_once(self) -> int:
        if self.max_in_flight is not None:
            return self.max_in_flight
        return AT_ONCE if self.peers is None else AT_ONCE_WITH_PEERS

    def __post_init__(self) -> None:
        if self.capacity_bytes < MIN_CAPACITY_BYTES:
            raise CacheConfigError(
                f"capacity of {self.capacity_bytes} bytes is too small",
                advice=f"--capacity must be at least {format_bytes(MIN_CAPACITY_BYTES)} (two requests); 64 MiB and more make sense",
            )
        length = len(os.fsencode(self.socket))
        if length > MAX_SOCKET_PATH_BYTES:
            raise CacheConfigError(
                f"the socket's path has {length} bytes, the kernel allows {MAX_SOCKET_PATH_BYTES}: {self.socket}",
                advice="choose a shorter one with --socket, for instance below /tmp or $XDG_RUNTIME_DIR",
            )
        for name in ("max_files", "num_workers", "max_in_flight"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise CacheConfigError(f"{name} is {value}; it must be at least 1")


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it. Raises CacheConfigError.

    >>> parse_bytes("200GB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (200000000000, 1610612736, 4096)
    """
    cleaned = text.strip().lower().replace("_", "")
    number = cleaned.rstrip("bikmgt ")
    unit = cleaned[len(number) :].strip()
    unit = unit[:-1] if unit.endswith("b") else unit
    try:
        value = float(number) * _UNITS[unit]
        if not 0 <= value < 2**62:
            raise ValueError
        return int(value)
    except (ValueError, KeyError):
        raise CacheConfigError(
            f"{text!r} is not a number of bytes", advice="write it like 200GB, 1.5TiB or 64MiB"
        ) from None


def parse_share(text: str) -> Share:
    """Bytes (or a plain number), or a percentage of the whole. Raises CacheConfigError.

    >>> parse_share("5%"), parse_share("1GiB")
    (Share(count=0, ratio=0.05), Share(count=1073741824, ratio=0.0))
    """
    if not text.strip().endswith("%"):
        return Share(count=parse_bytes(text))
    try:
        percent = float(text.strip()[:-1])
        if not 0 <= percent < 100:
            raise ValueError
    except ValueError:
        raise CacheConfigError(f"{text!r} is not a part of a disk", advice="write it like 5% or 20GB") from None
    return Share(ratio=percent / 100)


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(0), format_bytes(1536), format_bytes(200 * 2**30)
    ('0 B', '1.5 KiB', '200 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` (or `:port` for loopback, `[::1]:port`). Raises CacheConfigError."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CacheConfigError(f"{text!r} is not an address", advice="write host:port, for instance 127.0.0.1:9400")
    return host.strip("[]") or "127.0.0.1", int(port)
