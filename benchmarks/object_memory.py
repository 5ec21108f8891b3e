"""Objects that the shaping proxy serves from its own memory, so that the store costs this machine as little as a distant one does.

SeaweedFS takes 2 to 4 CPU milliseconds for a range of a few hundred KiB (10 s per GB, more than everything else in the benchmark together):
on two cores the store, which in life is elsewhere, would decide how fast a cache may be. What an object is (etag, times, bytes) still
comes from the real server, once; answers to whatever is more than a plain GET of a range do, too. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.http1 import Head, parse_head
from benchmarks.shaping import Request

_CONDITIONS = ("if-none-match", "if-modified-since", "if-unmodified-since", "if-range")
_OF_ONE_ANSWER = re.compile(rb"(?im)^(content-length|content-range|date|connection|x-amz-request-id):[^\r\n]*\r\n")


@dataclass(frozen=True)
class StoredObject:
    """`fields`: the header lines that every answer about it has."""

    etag: str
    fields: bytes
    body: memoryview

    @classmethod
    def of(cls, head: Head, body: bytes) -> StoredObject:
        """`head`: of a 200 with this body."""
        _, _, fields = head.raw.partition(b"\r\n")
        return cls(
            head.headers.get("etag", ""), _OF_ONE_ANSWER.sub(b"", fields.removesuffix(b"\r\n")), memoryview(body)
        )

    def answer(self, request: Request, head: Head) -> tuple[Head, memoryview] | None:
        """Head and body for a request; None: the server is to be asked."""
        if any(name in head.headers for name in _CONDITIONS) or head.headers.get("if-match", self.etag) != self.etag:
            return None
        size = len(self.body)
        if "range" not in head.headers:
            return self._head(b"200 OK", b"", size), self.body
        if request.range is None or request.range[0] >= size:
            return None
        start, end = request.range[0], min(request.range[1] or size, size)
        place = b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, size)
        return self._head(b"206 Partial Content", place, end - start), self.body[start:end]

    def _head(self, status: bytes, place: bytes, length: int) -> Head:
        raw = b"HTTP/1.1 %s\r\n%s%sContent-Length: %d\r\n\r\n" % (status, self.fields, place, length)
        return parse_head(raw)


def may_be_kept(request: Request, head: Head) -> bool:
    """A GET of an object: no listing, no question about it, no body."""
    return request.kind == "GET" and not _has_questions(request) and not head.length and not head.is_chunked


def _has_questions(request: Request) -> bool:
    """Signed urls have parameters of their own (X-Amz-…); others ask for something else than the bytes."""
    query = request.target.partition("?")[2]
    return any(part and not part.lower().startswith("x-") for part in query.split("&"))
