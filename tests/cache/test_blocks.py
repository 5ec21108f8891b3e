"""Which bytes of an object belong to which block and extent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.blocks import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    ObjectId,
    block_span,
    blocks_of,
    extent_of,
    extent_span,
    num_blocks,
    num_extents,
)

near_edges = st.builds(
    lambda unit, count, off: max(0, unit * count + off),
    st.sampled_from([1, BLOCK_BYTES, EXTENT_BYTES]),
    st.integers(0, 40),
    st.integers(-2, 2),
)
sizes = st.one_of(near_edges, st.integers(0, 5 * EXTENT_BYTES))


@given(sizes)
def test_the_blocks_of_an_object_tile_it(size: int) -> None:
    spans = [block_span(size, block) for block in range(num_blocks(size))]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][:-1] if spans else size == 0
    assert sum(end - start for start, end in spans) == size
    assert all(0 < end - start <= BLOCK_BYTES for start, end in spans)


@given(sizes)
def test_the_extents_of_an_object_tile_it_and_hold_whole_blocks(size: int) -> None:
    end = 0
    for extent_idx in range(num_extents(size)):
        start, end_of_extent = extent_span(size, extent_idx)
        assert start == end and start % BLOCK_BYTES == 0
        first, last = start // BLOCK_BYTES, (end_of_extent - 1) // BLOCK_BYTES
        assert {extent_of(block) for block in range(first, last + 1)} == {extent_idx}
        end = end_of_extent
    assert end == size


@given(sizes, near_edges, near_edges)
def test_the_blocks_of_a_range_are_those_that_share_a_byte_with_it(size: int, offset: int, length: int) -> None:
    """By brute force over all blocks of the object."""
    expected = []
    for block in range(num_blocks(size)):
        start, end = block_span(size, block)
        if max(start, offset) < min(end, offset + length):
            expected.append(block)
    assert list(blocks_of(size, offset, length)) == expected


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -1)])
def test_a_negative_range_is_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        blocks_of(10, offset, length)


@pytest.mark.parametrize("index", [-1, 1])
def test_there_is_no_block_or_extent_outside_the_object(index: int) -> None:
    with pytest.raises(IndexError):
        block_span(BLOCK_BYTES, index)
    with pytest.raises(IndexError):
        extent_span(EXTENT_BYTES, index)


def test_every_part_of_an_identity_is_part_of_its_name() -> None:
    """Two generations in one file would be a mixture of bytes."""
    names = {ObjectId(u, e, s).content_id for u in ("s3://b/k", "s3://b/k2") for e in ('"1"', '"2"') for s in (1, 2)}
    assert len(names) == 8


def test_parts_of_an_identity_do_not_run_into_each_other() -> None:
    assert ObjectId("s3://b/k1", "2", 3).content_id != ObjectId("s3://b/k", "12", 3).content_id
    assert ObjectId("s3://b/k", "1", 23).content_id != ObjectId("s3://b/k", "12", 3).content_id


def test_the_name_of_an_identity_stays_what_it_is() -> None:
    """It names files on disk: with another hash every cache would be cold after an upgrade, unnoticed."""
    assert ObjectId("s3://b/k", '"e1"', 10).content_id == GOLDEN_CONTENT_ID


GOLDEN_CONTENT_ID = "4b4612fa611d8ab2d6e4d5dfd2542b03"
