"""Whole objects that are stored compressed: zstd, gzip, brotli, bzip2, snappy. Bounded: what would grow beyond `max_bytes` is refused.

pyarrow has all of these codecs, so nothing else needs to be installed.
"""

from __future__ import annotations

import pyarrow as pa

from cache.errors import FormatError

_STREAMED = {"zstd": "zstd", "gz": "gzip", "br": "brotli", "bz2": "bz2"}
NAMES = (*_STREAMED, "snappy")
_CHUNK_BYTES = 8 * 1024 * 1024


def decompress(data: bytes, codec: str, *, url: str, max_bytes: int) -> bytes:
    """`codec`: one of NAMES. Raises FormatError for data that is none of it, is cut short, or is larger than `max_bytes`."""
    try:
        if codec == "snappy":
            size = _snappy_size(data)
            if size > max_bytes:
                raise FormatError(f"{url}: {size:,} bytes when decompressed; {max_bytes:,} are possible", url=url)
            return bytes(pa.Codec("snappy").decompress(data, decompressed_size=size, asbytes=True))
        parts, total = [], 0
        with pa.CompressedInputStream(pa.BufferReader(data), _STREAMED[codec]) as stream:
            while chunk := stream.read(min(_CHUNK_BYTES, max_bytes + 1 - total)):
                parts.append(chunk)
                total += len(chunk)
                if total > max_bytes:
                    raise FormatError(f"{url}: more than {max_bytes:,} bytes when decompressed", url=url)
        return b"".join(parts)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise FormatError(
            f"{url}: cannot be decompressed as {codec}: {error}", advice="write or upload this shard again", url=url
        ) from error


def _snappy_size(data: bytes) -> int:
    """The length that a raw snappy block begins with."""
    size = shift = 0
    for byte in data[:5]:
        size |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return size
        shift += 7
    raise ValueError("no snappy block")
