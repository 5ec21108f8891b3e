"""Who the peers are and how they believe each other: flags as a value, checked when built."""

from __future__ import annotations

import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path

from cache.daemon.peerauth import MIN_KEY_BYTES
from cache.errors import CacheConfigError


@dataclass(frozen=True)
class PeerConfig:
    listen: tuple[str, int]
    """Address and port for other daemons."""
    addresses: tuple[tuple[str, int], ...] = ()
    """Fixed list of peers; this daemon may be among them, and finds itself."""
    service: tuple[str, int] | None = None
    """Name that resolves to the addresses of all peers (a headless service), and their port; asked again and again."""
    key_file: Path | None = None
    """Shared by all peers: at least 16 random bytes, in whatever spelling; blanks at its ends do not count. None: on loopback only."""
    tls: tuple[Path, Path, Path] | None = None
    """Certificate, its key, and the CA that all peers' certificates are from; both sides show one. None: bytes travel in the clear."""
    file: Path | None = None
    """A list of addresses, HOST:PORT in each line, written anew (by rename) whenever nodes come and go. Missing: nobody yet."""

    def __post_init__(self) -> None:
        if not self.addresses and self.service is None and self.file is None:
            raise CacheConfigError("--peer-listen without --peers", advice="say who the others are with --peers")
        if self.key_file is None and not self.is_loopback:
            raise CacheConfigError(
                f"peers would be served at {self.listen[0]}:{self.listen[1]} without a key",
                advice="give --peer-key-file (the same on all nodes), or listen on 127.0.0.1",
            )

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.listen[0]).is_loopback
        except ValueError:
            return self.listen[0] == "localhost"

    def read_key(self) -> bytes:
        """Raises CacheConfigError."""
        if self.key_file is None:
            return b""
        try:
            key = self.key_file.read_bytes().strip()
            mode = self.key_file.stat().st_mode
        except OSError as error:
            raise CacheConfigError(f"cannot read the peers' key {self.key_file}: {error.strerror}") from error
        if mode & stat.S_IROTH:
            raise CacheConfigError(
                f"everybody on this machine can read the peers' key {self.key_file}", advice=f"chmod o= {self.key_file}"
            )
        if len(key) < MIN_KEY_BYTES:
            raise CacheConfigError(
                f"the peers' key {self.key_file} has {len(key)} bytes", advice="make one: openssl rand -hex 32"
            )
        return key


def peer_config(
    peers: str | None,
    listen: str | None,
    key_file: Path | None,
    tls: tuple[Path | None, Path | None, Path | None],
) -> PeerConfig | None:
    """From flags. None: no peers were asked for. Raises CacheConfigError."""
    if peers is None and listen is None:
        if key_file is not None or any(tls):
            raise CacheConfigError(
                "--peer-key-file or --peer-tls-… without --peers", advice="give --peers and --peer-listen"
            )
        return None
    if listen is None:
        raise CacheConfigError(
            "--peers without --peer-listen", advice="say where other daemons reach this one: --peer-listen ADDR:PORT"
        )
    cert, tls_key, ca = tls
    if any(tls) and not (cert and tls_key and ca):
        raise CacheConfigError("TLS between peers needs --peer-tls-cert, --peer-tls-key and --peer-tls-ca together")
    service, file, addresses = None, None, []
    for part in filter(None, (part.strip() for part in (peers or "").split(","))):
        if part.startswith("dns:"):
            service = parse_peer_address(part.removeprefix("dns:"), "--peers dns:SERVICE:PORT")
        elif part.startswith("file:"):
            file = Path(part.removeprefix("file:"))
        else:
            addresses.append(parse_peer_address(part, "--peers HOST:PORT"))
    return PeerConfig(
        listen=parse_peer_address(listen, "--peer-listen ADDR:PORT"),
        addresses=tuple(addresses),
        service=service,
        file=file,
        key_file=key_file,
        tls=(cert, tls_key, ca) if cert and tls_key and ca else None,
    )


def parse_peer_address(text: str, form: str) -> tuple[str, int]:
    """`form`: what should have been written. Raises CacheConfigError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 <= int(port) <= 65535:
        raise CacheConfigError(f"{text!r} is not an address with its port", advice=f"write {form}")
    return host, int(port)
