"""Frames: what was encoded comes out again however the bytes were cut, and nothing else comes out."""

from __future__ import annotations

import contextlib
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.daemon.wire import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    Decoder,
    Frame,
    ProtocolError,
    encode,
    pack_visits,
    unpack_visits,
)

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
frames = st.builds(Frame, st.dictionaries(st.text(max_size=8), values, max_size=4), st.binary(max_size=64))


@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 500), max_size=12))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(frame.header, frame.body) for frame in sent)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder, received = Decoder(), []
    for start, end in pairwise(edges):
        received += decoder.feed(data[start:end])
    assert received == sent


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_waited_for_but_never_raises_anything_else(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Decoder().feed(data)


@given(frames, st.data())
def test_one_changed_byte_never_raises_anything_but_a_protocol_error(frame: Frame, data: st.DataObject) -> None:
    damaged = bytearray(encode(frame.header, frame.body))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        Decoder().feed(bytes(damaged))


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"17", b"{", b"\xff\xfe", b"nul", b"[" * 100_000], ids=lambda t: repr(t[:8])
)
def test_a_header_that_is_no_json_object_is_refused(text: bytes) -> None:
    """The deeply nested one exhausts the parser's stack: that, too, is the other side's fault and no crash of ours."""
    with pytest.raises(ProtocolError):
        Decoder().feed(struct.pack(">II", len(text), 0) + text)


@pytest.mark.parametrize("lengths", [(MAX_HEADER_BYTES + 1, 0), (2, MAX_BODY_BYTES + 1), (2**32 - 1, 2**32 - 1)])
def test_a_frame_beyond_the_limits_is_refused_before_its_bytes_come(lengths: tuple[int, int]) -> None:
    """Eight bytes must not make the daemon set aside 4 GiB."""
    with pytest.raises(ProtocolError, match="beyond the limit"):
        Decoder().feed(struct.pack(">II", *lengths))


def test_the_bytes_of_a_frame_stay_what_they_are() -> None:
    """Readers and daemon may be of different releases; the version is exchanged in a frame, so at least that must be readable."""
    assert (
        encode({"op": "hello", "version": 1}, b"xy") == b'\x00\x00\x00\x1a\x00\x00\x00\x02{"op":"hello","version":1}xy'
    )


visits = st.tuples(st.integers(0, 2), st.integers(0, 2**62), st.integers(0, 2**62))


@given(st.lists(visits, max_size=20))
def test_an_announced_order_survives_the_wire(order: list[tuple[int, int, int]]) -> None:
    urls = ["s3://b/a", "s3://b/b", "file:///c ü"]
    fields, body = pack_visits(urls, order)
    (frame,) = Decoder().feed(encode({"op": "announce", **fields}, body))
    assert unpack_visits(frame) == (urls, order)


@pytest.mark.parametrize(
    "frame",
    [
        Frame({"urls": ["a"], "num_visits": 2}, bytes(24)),
        Frame({"urls": ["a"], "num_visits": 1}, bytes(23)),
        Frame({"num_visits": 0}, b""),
        Frame({"urls": ["a"], "num_visits": "1"}, bytes(24)),
        Frame({"urls": [], "num_visits": 1}, bytes(24)),
        Frame({"urls": ["a"], "num_visits": 1}, struct.pack("=qqq", 0, -1, 5)),
        Frame({"urls": ["a"], "num_visits": 1}, struct.pack("=qqq", 0, 1, -5)),
        Frame({"urls": ["a"], "num_visits": 1}, struct.pack("=qqq", -1, 1, 5)),
        Frame({"urls": ["a"], "num_visits": True}, bytes(24)),
        Frame({"urls": [7], "num_visits": 1}, bytes(24)),
    ],
    ids=lambda frame: str(frame.header),
)
def test_an_order_that_does_not_hold_together_is_refused(frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        unpack_visits(frame)
