"""Frames between readers, the control process and fetch workers: a JSON header and an optional body of bytes. Pure: no sockets.

    4 bytes header length, 4 bytes body length (big endian), header (UTF-8 JSON object), body

File descriptors travel as ancillary data with the first byte of a frame; the header's `fds` says how many.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROTOCOL_VERSION = 2
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024

_LENGTHS = struct.Struct(">II")


class ProtocolError(Exception):
    """The other side does not speak this protocol; the connection is of no more use."""


@dataclass(frozen=True)
class Frame:
    header: dict[str, Any]
    body: bytes = b""


def encode(header: dict[str, Any], body: bytes | bytearray | memoryview = b"") -> bytes:
    """One frame as bytes.

    >>> Decoder().feed(encode({"op": "hello"}, b"xyz"))
    [Frame(header={'op': 'hello'}, body=b'xyz')]
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((_LENGTHS.pack(len(text), len(body)), text, body))


class Decoder:
    """Bytes in, frames out, in any portions. Raises ProtocolError on anything that is not a frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        self._buffer += data
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        header_len, body_len = _LENGTHS.unpack_from(self._buffer)
        if header_len > MAX_HEADER_BYTES or body_len > MAX_BODY_BYTES:
            raise ProtocolError(f"frame of {header_len} + {body_len} bytes is beyond the limit")
        end = _LENGTHS.size + header_len + body_len
        if len(self._buffer) < end:
            return None
        body_start = _LENGTHS.size + header_len
        try:
            header = json.loads(bytes(self._buffer[_LENGTHS.size : body_start]))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ProtocolError(f"header is a {type(header).__name__}, not an object")
        body = bytes(self._buffer[body_start:end])
        del self._buffer[:end]
        return Frame(header, body)


def pack_visits(urls: list[str], visits: list[tuple[int, int, int]]) -> tuple[dict[str, Any], bytes]:
    """An announced order as header fields and body; a visit is (index into urls, offset, length), each below 2**63."""
    flat = array("q", [number for visit in visits for number in visit])
    return {"urls": urls, "num_visits": len(visits)}, flat.tobytes()


MAX_OUTLINED = 1 << 17
"""Objects, and parts, of an outline: the daemon keeps half a KB for each."""


def pack_outlined(objects: Sequence[tuple[str, str, int]], parts: Sequence[tuple[int, int, int, int]]) -> bytes:
    """The body of an outline: objects as (url, etag, size), and the parts that a shuffle permutes as (object, start, end, samples)."""
    return json.dumps({"objects": objects, "parts": parts}).encode()


def unpack_outlined(body: bytes) -> tuple[list[tuple[str, str, int]], list[tuple[int, int, int, int]]]:
    """The inverse of pack_outlined. Raises ProtocolError when the body does not hold together."""
    try:
        found = json.loads(body)
        objects = [(str(url), str(etag), int(size)) for url, etag, size in found["objects"]]
        parts = [(int(idx), int(start), int(end), int(count)) for idx, start, end, count in found["parts"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"an outline that is none: {error!r}") from error
    if max(len(objects), len(parts)) > MAX_OUTLINED or min(len(objects), len(parts)) < 1:
        raise ProtocolError(f"an outline of {len(objects)} objects in {len(parts)} parts")
    for idx, start, end, count in parts:
        if not (0 <= idx < len(objects) and 0 <= start <= end <= objects[idx][2] and count >= 0):
            raise ProtocolError(f"a part [{start}, {end}) of object {idx} with {count} samples")
    return objects, parts


def unpack_etags(frame: Frame) -> list[str | None]:
    """At which etag each url of an announced order will be read; None where it was not said. Raises ProtocolError."""
    urls, etags = frame.header["urls"], frame.header.get("etags")
    if etags is None:
        return [None] * len(urls)
    if not isinstance(etags, list) or len(etags) != len(urls) or not all(isinstance(e, str | None) for e in etags):
        raise ProtocolError("an order whose etags are not those of its urls")
    return etags


def unpack_visits(frame: Frame) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The inverse of pack_visits. Raises ProtocolError when the frame does not hold together."""
    urls = frame.header.get("urls")
    count = frame.header.get("num_visits")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ProtocolError("an order without the list of its urls")
    if type(count) is not int or len(frame.body) != 24 * count:
        raise ProtocolError(f"an order of {count} visits in {len(frame.body)} bytes")
    flat = array("q")
    flat.frombytes(frame.body)
    visits = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    if any(not 0 <= url < len(urls) or offset < 0 or length < 0 for url, offset, length in visits):
        raise ProtocolError("a visit outside the announced urls, or with a negative offset or length")
    return urls, visits
