"""An extent file describes itself: what was written is read back, and no changed byte goes unnoticed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.blocks import BLOCKS_PER_EXTENT, EXTENT_BYTES, ObjectId
from cache.errors import CorruptBlock
from cache.store.format import (
    ENTRY_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    TABLE_OFFSET,
    BlockEntry,
    ExtentHeader,
    checksum,
    decode_header,
    encode_entry,
    encode_header,
    entry_offset,
)

HEADER = ExtentHeader(ObjectId("s3://bucket/träin/0.tar", '"etag-1"', EXTENT_BYTES + 10), 1)


def page_with(header: ExtentHeader, entries: dict[int, BlockEntry]) -> bytes:
    page = bytearray(encode_header(header))
    for slot, entry in entries.items():
        data = encode_entry(entry, header.object_id.content_id, header.extent_idx, slot)
        page[entry_offset(slot) : entry_offset(slot) + ENTRY_BYTES] = data
    return bytes(page)


entries = st.dictionaries(
    st.integers(0, BLOCKS_PER_EXTENT - 1), st.builds(BlockEntry, st.integers(0, 2**32 - 1), st.integers(1, 2**22))
)


@given(st.text(min_size=1, max_size=100), st.text(min_size=1, max_size=40), st.integers(1, 2**50), entries, st.data())
def test_what_was_written_is_read_back(
    url: str, etag: str, size: int, table: dict[int, BlockEntry], data: st.DataObject
) -> None:
    object_id = ObjectId(url, etag, size)
    header = ExtentHeader(object_id, data.draw(st.integers(0, (size - 1) // EXTENT_BYTES)))
    read, read_table = decode_header(page_with(header, table))
    assert read == header
    assert {slot: entry for slot, entry in enumerate(read_table) if entry is not None} == table


def test_the_format_does_not_change_without_its_version() -> None:
    """If this fails, the layout changed: raise FORMAT_VERSION, or old caches are read as what they are not; then renew the digest."""
    page = page_with(HEADER, {0: BlockEntry(0xDEADBEEF, 4194304), 15: BlockEntry(1, 10)})
    assert (FORMAT_VERSION, hashlib.sha256(page).hexdigest()) == (
        2,
        "6b92a50f88c3cce4ea72572d834a5eae4845a5df2883fa90dc465f1fc30e6024",
    )
    assert (len(page), checksum(b"123456789")) == (HEADER_BYTES, 0xE3069283)


def test_every_changed_byte_of_header_or_table_is_noticed() -> None:
    """All 8,192 of them, several changes each. The padding between holds nothing; a change there must change nothing."""
    table = {slot: BlockEntry(slot * 7919, 4194304) for slot in range(BLOCKS_PER_EXTENT)}
    page = page_with(HEADER, table)
    sound = decode_header(page)
    used = 20, 32 + len(page[32:TABLE_OFFSET].rstrip(b"\0"))
    for position in range(HEADER_BYTES):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(page)
            damaged[position] ^= change
            try:
                header, entries_read = decode_header(bytes(damaged))
            except CorruptBlock:
                assert position < TABLE_OFFSET
                continue
            if position >= TABLE_OFFSET:
                slot = (position - TABLE_OFFSET) // ENTRY_BYTES
                assert entries_read[slot] is None, f"byte {position}: a damaged entry is believed"
                assert entries_read[:slot] + entries_read[slot + 1 :] == sound[1][:slot] + sound[1][slot + 1 :]
            else:
                assert (header, entries_read) == sound and (used[0] <= position < 32 or position >= used[1])


@given(st.binary(max_size=HEADER_BYTES + 100))
def test_garbage_is_a_corrupt_block_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        decode_header(data)


@pytest.mark.parametrize(
    "other",
    [
        ExtentHeader(HEADER.object_id, 0),
        ExtentHeader(ObjectId("s3://bucket/träin/0.tar", '"etag-2"', EXTENT_BYTES + 10), 1),
    ],
    ids=["another extent", "another generation"],
)
def test_a_table_from_another_file_is_not_believed(other: ExtentHeader) -> None:
    donor = page_with(other, {slot: BlockEntry(5, 10) for slot in range(BLOCKS_PER_EXTENT)})
    page = encode_header(HEADER)[:TABLE_OFFSET] + donor[TABLE_OFFSET:]
    assert decode_header(page)[1] == [None] * BLOCKS_PER_EXTENT


def test_an_entry_in_another_place_is_not_believed() -> None:
    page = bytearray(page_with(HEADER, {3: BlockEntry(5, 10)}))
    page[entry_offset(4) : entry_offset(5)] = page[entry_offset(3) : entry_offset(4)]
    table = decode_header(bytes(page))[1]
    assert table[3] is not None and table[4] is None


def test_a_url_too_long_for_the_header_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        encode_header(ExtentHeader(ObjectId("s3://b/" + "k" * 5000, '"e"', 10), 0))
