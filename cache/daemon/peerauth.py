"""How daemons believe each other: a shared key, and of each message a MAC that is good once and for half a minute. Pure.

A request is bound to who is asked, what is asked for (the content id, which is a hash of url, etag and size) and which blocks; an answer
to the request's nonce and the checksums of its blocks. So none can be sent again, sent to somebody else, or changed on the way by who does
not have the key. Who has the key can lie; checksums and the pinned etag then find mistakes, not malice.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

LIFETIME_S = 30.0
MAX_SKEW_S = 60.0
"""Clocks of two nodes may differ by this; beyond it peers refuse each other and the origin is read."""

MIN_KEY_BYTES = 16
SCHEME = "Railhead"


@dataclass(frozen=True)
class Ask:
    """What a request asks for. `audience`: the node that is asked; `content_id`: "" to ask who it is."""

    audience: str
    content_id: str
    first: int
    end: int

    @property
    def target(self) -> str:
        """As sent in the request line."""
        return f"/v1/blocks/{self.content_id}/{self.first}-{self.end}" if self.content_id else "/v1/hello"


def authorization(key: bytes, ask: Ask, nonce: str, now_s: float) -> str:
    """The Authorization header of a request. `now_s`: Unix time."""
    expires = f"{now_s + LIFETIME_S:.3f}"
    return f"{SCHEME} {expires} {nonce} {_request_mac(key, ask, expires, nonce)}"


def check_authorization(key: bytes, ask: Ask, header: str, now_s: float) -> tuple[str, float] | str:
    """(nonce, expiry) of a sound request; otherwise the reason for the log. Whether the nonce is new is not known here."""
    parts = header.split(" ")
    if len(parts) != 4 or parts[0] != SCHEME:
        return "no authorization"
    _, expires, nonce, mac = parts
    if not (16 <= len(nonce) <= 64 and nonce.isascii() and nonce.isalnum()):
        return "a nonce that is none"
    if not hmac.compare_digest(mac.encode("latin-1", "replace"), _request_mac(key, ask, expires, nonce).encode()):
        return "another key, or another request than was signed"
    expires_s = float(expires)  # Signed by who has the key: it is a number.
    if not now_s - MAX_SKEW_S < expires_s < now_s + LIFETIME_S + MAX_SKEW_S:
        return f"expired, or clocks differ by more than {MAX_SKEW_S:g} s"
    return nonce, expires_s


def proof(key: bytes, ask: Ask, nonce: str, checksums: str) -> str:
    """What an answer carries: these are the checksums of the blocks that this request asked for."""
    return _mac(key, "answer", ask.audience, ask.target, nonce, checksums)


def is_proven(key: bytes, ask: Ask, nonce: str, checksums: str, given: str) -> bool:
    return hmac.compare_digest(given.encode("latin-1", "replace"), proof(key, ask, nonce, checksums).encode())


def _request_mac(key: bytes, ask: Ask, expires: str, nonce: str) -> str:
    return _mac(key, "request", ask.audience, ask.target, expires, nonce)


def _mac(key: bytes, *parts: str) -> str:
    text = "\n".join(("railhead-peer-1", *parts))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


class Nonces:
    """Which nonces were seen and are not over yet. A request that comes again is no new one."""

    def __init__(self, limit: int = 1_000_000) -> None:
        self._seen: dict[str, float] = {}
        self._limit = limit
        self._swept_s = 0.0

    def is_new(self, nonce: str, expires_s: float, now_s: float) -> bool:
        """True once for each nonce. When too many are remembered, nothing is new until some are over."""
        if abs(now_s - self._swept_s) > LIFETIME_S or len(self._seen) >= self._limit:
            self._seen = {n: over_s for n, over_s in self._seen.items() if over_s > now_s - MAX_SKEW_S}
            self._swept_s = now_s
        if nonce in self._seen or len(self._seen) >= self._limit:
            return False
        self._seen[nonce] = expires_s
        return True
