"""TLS between daemons: both sides show a certificate of the same CA. Names in it are not compared: peers are found by address, and the
shared key says who belongs together."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from cache.errors import CacheConfigError


def server_context(files: Sequence[str] | None) -> ssl.SSLContext | None:
    """`files`: certificate, key, CA; None: no TLS. Raises CacheConfigError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, files) if files else None


def client_context(files: Sequence[str] | None) -> ssl.SSLContext | None:
    return _context(ssl.PROTOCOL_TLS_CLIENT, files) if files else None


def _context(protocol: int, files: Sequence[str]) -> ssl.SSLContext:
    cert, key, ca = files
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise CacheConfigError(
            f"cannot use the peers' certificate {cert}, key {key} or CA {ca}: {error}",
            advice="they must be PEM files that belong together and that the daemon may read",
        ) from error
    return context
