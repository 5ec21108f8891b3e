"""The worker's side of borrowing: a request to another node, and what must be true of its answer before a byte of it is kept. Pure."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from cache.blocks import BLOCK_BYTES
from cache.daemon.blockfetch import BlockFetch
from cache.daemon.peerauth import Ask, authorization, is_proven
from cache.errors import CorruptBlock, ObjectChanged, OriginThrottled, OriginUnavailable, PeerError
from cache.origin.plain_http import Head, NotPlain, PlainTarget


def peer_target(
    key: bytes, ask: Ask, address: tuple[str, int], about: dict[str, Any], now_s: float, *, tls: ssl.SSLContext | None
) -> tuple[PlainTarget, str]:
    """Where the request goes, signed, and its nonce. `about`: url, etag and size_bytes of the object."""
    nonce = secrets.token_hex(16)
    headers: list[tuple[str, str]] = [("Authorization", authorization(key, ask, nonce, now_s))]
    if about:
        headers += [
            ("X-Railhead-Url", quote(about["url"], safe=":/")),
            ("X-Railhead-Etag", quote(about["etag"], safe="")),
            ("X-Railhead-Size", str(about["size_bytes"])),
        ]
    return PlainTarget(address[0], address[1], tls is not None, ask.target, tuple(headers), tls), nonce


def answer_check(key: bytes, ask: Ask, nonce: str, run: BlockFetch) -> Callable[[Head], None]:
    """Called with the answer's head: refusals become PeerErrors, and the blocks' checksums are what the bytes are held to."""

    def check(head: Head) -> None:
        if head.status != 206:
            reason = "not-owner" if head.status == 421 else "refused"
            said = head.headers.get("x-railhead-reason", "")
            raise PeerError(f"peer {ask.audience} answered {head.status} {said}".strip(), reason=reason)
        checksums = head.headers.get("x-railhead-checksums", "")
        if not is_proven(key, ask, nonce, checksums, head.headers.get("x-railhead-proof", "")):
            raise PeerError(f"peer {ask.audience} gave no proof that it has the key", reason="wrong-bytes")
        try:
            expected = [int(text, 16) for text in checksums.split(",")]
        except ValueError:
            expected = []
        if len(expected) != -(-run.length // BLOCK_BYTES):
            raise PeerError(f"peer {ask.audience} gave {len(expected)} checksums", reason="wrong-bytes")
        run.expected, run.silence_s = expected, head.silence_s

    return check


def as_peer_error(node: str, error: BaseException) -> PeerError:
    """Whatever went wrong with a peer, by what it says of the peer."""
    if isinstance(error, PeerError):
        return error
    reason = "failed"
    if isinstance(error, CorruptBlock | ObjectChanged):
        reason = "wrong-bytes"
    elif isinstance(error, OriginUnavailable):
        reason = "silent" if "no byte for" in error.message else "dead"
    elif isinstance(error, NotPlain | OriginThrottled):
        reason = "refused"
    text = error.message if hasattr(error, "message") else str(error)
    return PeerError(f"peer {node}: {text}", reason=reason)
