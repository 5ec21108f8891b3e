"""Objects, extents and blocks: which bytes of an object belong to which unit.

A block (256 KiB, aligned) is what is resident or not; a fetch brings a run of neighbouring blocks, up to 4 MiB of them; an extent (256
blocks, 64 MiB, one local file) is what is evicted. Blocks are small so that a sample that is needed now costs its own bytes and not 4 MiB;
fetches are large where there is time (decisions/0060). Pure arithmetic: this module knows neither disk nor network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

BLOCK_BYTES = 256 * 1024
BLOCKS_PER_FETCH = 16
"""The most that one fetch brings. Beyond 4 MiB a request's latency no longer matters, and its memory and its loss by a cut do."""

FETCH_BYTES = BLOCKS_PER_FETCH * BLOCK_BYTES
BLOCKS_PER_EXTENT = 256
EXTENT_BYTES = BLOCK_BYTES * BLOCKS_PER_EXTENT


@dataclass(frozen=True)
class ObjectId:
    """One generation of one object: the same url with another etag is another object.

    >>> ObjectId("s3://b/k", '"e1"', 10).content_id == ObjectId("s3://b/k", '"e2"', 10).content_id
    False
    """

    url: str
    etag: str
    size_bytes: int

    @cached_property
    def content_id(self) -> str:
        """32 hex digits that name this generation on disk and on the wire (BLAKE2b-128 of url, etag and size)."""
        text = f"{self.url}\0{self.etag}\0{self.size_bytes}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, order=True)
class ExtentId:
    content_id: str
    extent_idx: int


def num_blocks(size_bytes: int) -> int:
    """Blocks of an object of this size.

    >>> num_blocks(0), num_blocks(1), num_blocks(BLOCK_BYTES), num_blocks(BLOCK_BYTES + 1)
    (0, 1, 1, 2)
    """
    return -(-size_bytes // BLOCK_BYTES)


def num_extents(size_bytes: int) -> int:
    return -(-size_bytes // EXTENT_BYTES)


def block_span(size_bytes: int, block_idx: int) -> tuple[int, int]:
    """Half-open byte range of a block within its object.

    >>> block_span(BLOCK_BYTES + 5, 1) == (BLOCK_BYTES, BLOCK_BYTES + 5)
    True
    """
    start = block_idx * BLOCK_BYTES
    if not 0 <= start < size_bytes:
        raise IndexError(f"block {block_idx} of an object of {size_bytes} bytes")
    return start, min(start + BLOCK_BYTES, size_bytes)


def run_span(size_bytes: int, first: int, end: int) -> tuple[int, int]:
    """Half-open byte range of the blocks [first, end), at least one, within their object."""
    return block_span(size_bytes, first)[0], block_span(size_bytes, end - 1)[1]


def extent_span(size_bytes: int, extent_idx: int) -> tuple[int, int]:
    """Half-open byte range of an extent within its object."""
    start = extent_idx * EXTENT_BYTES
    if not 0 <= start < size_bytes:
        raise IndexError(f"extent {extent_idx} of an object of {size_bytes} bytes")
    return start, min(start + EXTENT_BYTES, size_bytes)


def extent_of(block_idx: int) -> int:
    return block_idx // BLOCKS_PER_EXTENT


def blocks_of(size_bytes: int, offset: int, length: int) -> range:
    """Blocks that hold the bytes [offset, offset + length), cut at the end of the object.

    >>> list(blocks_of(3 * BLOCK_BYTES, BLOCK_BYTES - 1, 2))
    [0, 1]
    >>> list(blocks_of(10, 10, 5))
    []
    """
    if offset < 0 or length < 0:
        raise ValueError(f"offset {offset} and length {length} must not be negative")
    end = min(offset + length, size_bytes)
    if end <= offset:
        return range(0)
    return range(offset // BLOCK_BYTES, num_blocks(end))
