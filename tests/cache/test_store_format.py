"""An extent file describes itself: what was written is read back, and no changed byte goes unnoticed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.blocks import BLOCKS_PER_EXTENT, EXTENT_BYTES, ObjectId
from cache.daemon.wire import PROTOCOL_VERSION
from cache.errors import CorruptBlock
from cache.store.format import (
    ENTRY_BYTES,
    FORMAT_VERSION,
    LABEL_BYTES,
    TABLE_OFFSET,
    BlockEntry,
    ExtentLabel,
    checksum,
    decode_label,
    encode_entry,
    encode_label,
    entry_offset,
)

LABEL = ExtentLabel(ObjectId("s3://bucket/träin/0.tar", '"etag-1"', EXTENT_BYTES + 10), 1)


def page_with(label: ExtentLabel, entries: dict[int, BlockEntry]) -> bytes:
    page = bytearray(encode_label(label))
    for slot, entry in entries.items():
        data = encode_entry(entry, label.object_id.content_id, label.extent_idx, slot)
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
    label = ExtentLabel(object_id, data.draw(st.integers(0, (size - 1) // EXTENT_BYTES)))
    read, read_table = decode_label(page_with(label, table))
    assert read == label
    assert {slot: entry for slot, entry in enumerate(read_table) if entry is not None} == table


def test_the_format_does_not_change_without_its_version() -> None:
    """If this fails, the layout changed: raise FORMAT_VERSION, or old caches are read as what they are not; and wire.PROTOCOL_VERSION, for
    readers find the payload in the files by themselves. Then renew the digest."""
    page = page_with(LABEL, {0: BlockEntry(0xDEADBEEF, 4194304), 15: BlockEntry(1, 10)})
    assert (FORMAT_VERSION, hashlib.sha256(page).hexdigest()) == (
        3,
        "066a16ee423c760ac53aec9964f75c610167b46beb014d63aeef60a1a3618fdb",
    )
    assert (len(page), checksum(b"123456789")) == (LABEL_BYTES, 0xE3069283)
    assert (LABEL.file_bytes, LABEL.entry_at(2)) == (10 + 8192, 10 + 4096 + 32), (
        "the payload is first, the label behind it"
    )
    assert PROTOCOL_VERSION == 2


def test_every_changed_byte_of_label_or_table_is_noticed() -> None:
    """All 8,192 of them, several changes each. The padding between holds nothing; a change there must change nothing."""
    table = {slot: BlockEntry(slot * 7919, 4194304) for slot in range(BLOCKS_PER_EXTENT)}
    page = page_with(LABEL, table)
    sound = decode_label(page)
    used = 20, 32 + len(page[32:TABLE_OFFSET].rstrip(b"\0"))
    for position in range(LABEL_BYTES):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(page)
            damaged[position] ^= change
            try:
                label, entries_read = decode_label(bytes(damaged))
            except CorruptBlock:
                assert position < TABLE_OFFSET
                continue
            if position >= TABLE_OFFSET:
                slot = (position - TABLE_OFFSET) // ENTRY_BYTES
                assert entries_read[slot] is None, f"byte {position}: a damaged entry is believed"
                assert entries_read[:slot] + entries_read[slot + 1 :] == sound[1][:slot] + sound[1][slot + 1 :]
            else:
                assert (label, entries_read) == sound and (used[0] <= position < 32 or position >= used[1])


@given(st.binary(max_size=LABEL_BYTES + 100))
def test_garbage_is_a_corrupt_block_and_nothing_else(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        decode_label(data)


@pytest.mark.parametrize(
    "other",
    [
        ExtentLabel(LABEL.object_id, 0),
        ExtentLabel(ObjectId("s3://bucket/träin/0.tar", '"etag-2"', EXTENT_BYTES + 10), 1),
    ],
    ids=["another extent", "another generation"],
)
def test_a_table_from_another_file_is_not_believed(other: ExtentLabel) -> None:
    donor = page_with(other, {slot: BlockEntry(5, 10) for slot in range(BLOCKS_PER_EXTENT)})
    page = encode_label(LABEL)[:TABLE_OFFSET] + donor[TABLE_OFFSET:]
    assert decode_label(page)[1] == [None] * BLOCKS_PER_EXTENT


def test_an_entry_in_another_place_is_not_believed() -> None:
    page = bytearray(page_with(LABEL, {3: BlockEntry(5, 10)}))
    page[entry_offset(4) : entry_offset(5)] = page[entry_offset(3) : entry_offset(4)]
    table = decode_label(bytes(page))[1]
    assert table[3] is not None and table[4] is None


def test_a_url_too_long_for_the_label_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        encode_label(ExtentLabel(ObjectId("s3://b/" + "k" * 5000, '"e"', 10), 0))
