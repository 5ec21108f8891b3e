"""The format of an extent file: the payload, then two pages of label. Pure: bytes in, values out.

Why pages of our own: the disk is distrusted. A file says of itself which object generation and which bytes it holds and what their
checksums are, so a file in the wrong place, a torn write or a rotten sector is found, and the index can be rebuilt from files alone.
Why behind the payload: a block that begins where a large page of the page cache begins is written and read for a third less
(decisions/0084).

    offset 0             payload: the bytes of the extent, at their offset within the extent
    the last 8192 bytes  label: magic, version, length and CRC-32C of the identity
        at 32            identity: JSON (content id, url, etag, sizes, extent index)
        at 4096          block table: 256 entries of 16 bytes, each guarded by a check of its own; all zero means absent

A block's entry is written after its payload. Neither is synced: after a power cut an entry may have outlived its payload, which is why
nothing found on disk is served before its checksum has been verified.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

import crc32c

from cache.blocks import BLOCKS_PER_EXTENT, ObjectId, extent_span, num_extents
from cache.errors import CorruptBlock

FORMAT_VERSION = 3
LABEL_BYTES = 8192
TABLE_OFFSET = 4096
"""Where in the label the block table begins."""
ENTRY_BYTES = 16

_MAGIC = b"RAILHEAD"
_PREFIX = struct.Struct("<8sIII12x")
_ENTRY = struct.Struct("<IIII")
_PRESENT = 0x0B10C4ED
_MAX_IDENTITY_BYTES = TABLE_OFFSET - _PREFIX.size


def checksum(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C of the data.

    >>> hex(checksum(b"123456789"))
    '0xe3069283'
    """
    return crc32c.crc32c(data)


@dataclass(frozen=True)
class ExtentLabel:
    """What an extent file says of itself."""

    object_id: ObjectId
    extent_idx: int

    @property
    def payload_bytes(self) -> int:
        start, end = extent_span(self.object_id.size_bytes, self.extent_idx)
        return end - start

    @property
    def file_bytes(self) -> int:
        return self.payload_bytes + LABEL_BYTES

    def entry_at(self, slot: int) -> int:
        """Where in the file the entry of the extent's block number `slot` lies."""
        return self.payload_bytes + entry_offset(slot)


@dataclass(frozen=True)
class BlockEntry:
    """Checksum (CRC-32C) and length of one block that was written."""

    crc: int
    length: int


def encode_label(label: ExtentLabel) -> bytes:
    """The label of a new file, with an empty block table."""
    object_id = label.object_id
    identity = {
        "content_id": object_id.content_id,
        "etag": object_id.etag,
        "extent_idx": label.extent_idx,
        "size_bytes": object_id.size_bytes,
        "url": object_id.url,
    }
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()
    if len(text) > _MAX_IDENTITY_BYTES:
        raise ValueError(f"url and etag of {len(text)} bytes are too long for an extent label ({_MAX_IDENTITY_BYTES})")
    page = bytearray(LABEL_BYTES)
    _PREFIX.pack_into(page, 0, _MAGIC, FORMAT_VERSION, len(text), checksum(text))
    page[_PREFIX.size : _PREFIX.size + len(text)] = text
    return bytes(page)


def decode_label(page: bytes) -> tuple[ExtentLabel, list[BlockEntry | None]]:
    """Header and block table of a file; entries that do not pass their own check read as absent.

    Raises CorruptBlock when the page is not a sound label of this format's version.
    """
    if len(page) < LABEL_BYTES:
        raise CorruptBlock(f"extent label of {len(page)} bytes instead of {LABEL_BYTES}")
    label = decode_identity(page)
    content_id, extent_idx = label.object_id.content_id, label.extent_idx
    return label, [decode_entry(page, content_id, extent_idx, slot) for slot in range(BLOCKS_PER_EXTENT)]


def decode_identity(page: bytes) -> ExtentLabel:
    """What a file says of itself, from the first TABLE_OFFSET bytes of its label. Raises CorruptBlock as decode_label does."""
    if len(page) < TABLE_OFFSET:
        raise CorruptBlock(f"extent label of {len(page)} bytes instead of {LABEL_BYTES}")
    magic, version, length, crc = _PREFIX.unpack_from(page)
    if magic != _MAGIC:
        raise CorruptBlock(f"not an extent file: it starts with {magic!r}")
    if version != FORMAT_VERSION:
        raise CorruptBlock(f"extent file of format {version}; this is {FORMAT_VERSION}")
    text = page[_PREFIX.size : _PREFIX.size + min(length, _MAX_IDENTITY_BYTES)]
    if len(text) != length or checksum(text) != crc:
        raise CorruptBlock("extent label does not match its checksum")
    identity = json.loads(text)
    object_id = ObjectId(identity["url"], identity["etag"], identity["size_bytes"])
    label = ExtentLabel(object_id, identity["extent_idx"])
    if object_id.content_id != identity["content_id"] or not 0 <= label.extent_idx < num_extents(object_id.size_bytes):
        raise CorruptBlock(f"extent label contradicts itself: {identity}")
    return label


def entry_offset(slot: int) -> int:
    """Where in the label the entry of the extent's block number `slot` lies."""
    if not 0 <= slot < BLOCKS_PER_EXTENT:
        raise IndexError(slot)
    return TABLE_OFFSET + slot * ENTRY_BYTES


def encode_entry(entry: BlockEntry, content_id: str, extent_idx: int, slot: int) -> bytes:
    return _ENTRY.pack(_PRESENT, entry.crc, entry.length, _entry_check(entry, content_id, extent_idx, slot))


def decode_entry(page: bytes, content_id: str, extent_idx: int, slot: int) -> BlockEntry | None:
    present, crc, length, check = _ENTRY.unpack_from(page, entry_offset(slot))
    entry = BlockEntry(crc, length)
    if present != _PRESENT or check != _entry_check(entry, content_id, extent_idx, slot):
        return None
    return entry


def _entry_check(entry: BlockEntry, content_id: str, extent_idx: int, slot: int) -> int:
    """Ties an entry to its place, so that a table copied from another file is not believed."""
    return checksum(f"{content_id}:{extent_idx}:{slot}:{entry.length}:{entry.crc}".encode())
