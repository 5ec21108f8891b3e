"""The index over many shards, raw files and token shards."""

from __future__ import annotations

import doctest
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.client.formats import index as index_module
from cache.client.formats import tar as tar_module
from cache.client.formats import tokens as tokens_module
from cache.client.formats.index import MAX_GAP_BYTES, SampleIndex, Shard, ShardIndex, join, pack_keys
from cache.client.formats.raw import RawFormat
from cache.client.formats.tokens import HEADER_BYTES, TokenFormat, pack_tokens, parse_header, unpack_tokens
from cache.errors import FormatError
from cache.origin.ports import ObjectInfo


@pytest.mark.parametrize("module", [index_module, tar_module, tokens_module], ids=lambda module: module.__name__)
def test_doctests_say_the_truth(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


# --- index ----------------------------------------------------------------------------------------------------------------------


def shard_index(samples: list[dict[str, tuple[int, int]]], keys: list[str] | None = None) -> ShardIndex:
    extensions = sorted({ext for sample in samples for ext in sample})
    members = [(extensions.index(ext), *place) for sample in samples for ext, place in sample.items()]
    key_lengths, key_bytes = pack_keys([key.encode() for key in keys] if keys is not None else [b""] * len(samples))
    return ShardIndex(
        key_lengths=key_lengths,
        key_bytes=key_bytes,
        member_counts=np.array([len(sample) for sample in samples], dtype=np.int64),
        offsets=np.array([offset for _, offset, _ in members], dtype=np.int64),
        lengths=np.array([length for _, _, length in members], dtype=np.int64),
        extensions=tuple(extensions),
        extension_ids=np.array([ext for ext, _, _ in members], dtype=np.int32),
    )


places = st.tuples(st.integers(0, 10 * MAX_GAP_BYTES), st.integers(0, 5000))
shards_of_samples = st.lists(
    st.lists(st.dictionaries(st.sampled_from("abc"), places, min_size=1), max_size=5), min_size=1, max_size=4
)


def joined(shards: list[list[dict[str, tuple[int, int]]]]) -> SampleIndex:
    infos = [Shard(f"mem://b/{idx}", "e", 10**6) for idx in range(len(shards))]
    return join(infos, [shard_index(samples) for samples in shards])


@given(shards_of_samples)
def test_joined_index_gives_each_sample_its_members(shards: list[list[dict[str, tuple[int, int]]]]) -> None:
    index = joined(shards)
    flat = [
        (shard_idx, number, sample) for shard_idx, samples in enumerate(shards) for number, sample in enumerate(samples)
    ]
    assert len(index) == len(flat) == sum(index.shard_sizes)
    for sample_idx, (shard_idx, number, sample) in enumerate(flat):
        assert {ext: (offset, length) for ext, offset, length in index.members(sample_idx)} == sample
        assert index.shard_of(np.array([sample_idx])).tolist() == [shard_idx]
        assert index.key(sample_idx) == str(number)


@given(shards_of_samples, st.data())
def test_visits_cover_every_member_and_little_else(
    shards: list[list[dict[str, tuple[int, int]]]], data: st.DataObject
) -> None:
    """What is announced to the cache is exactly what a batch will read."""
    index = joined(shards)
    if not len(index):
        return
    asked = data.draw(st.lists(st.integers(0, len(index) - 1), max_size=6))
    visits, counts = index.visits(np.array(asked, dtype=np.int64))
    assert counts.sum() == len(visits)
    at = 0
    for sample, count in zip(asked, counts.tolist(), strict=True):
        mine = visits[at : at + count]
        at += count
        assert mine == [
            (index.shards[int(index.shard_of(np.array([sample]))[0])].url, *span) for span in index.spans(sample)
        ]
        for _, offset, length in index.members(sample):
            assert any(start <= offset and offset + length <= start + size for _, start, size in mine)
        useful = sum(length for _, _, length in index.members(sample))
        assert sum(size for _, _, size in mine) <= useful + MAX_GAP_BYTES * len(index.members(sample))


def test_neighbouring_members_are_one_span_and_distant_ones_are_two() -> None:
    near = joined([[{"a": (512, 100), "b": (1536, 10)}]])
    assert near.spans(0) == [(512, 1034)]
    far = joined([[{"a": (512, 100), "b": (10**6, 10)}]])
    assert far.spans(0) == [(512, 100), (10**6, 10)]


def test_index_survives_pickling() -> None:
    """Spawned DataLoader workers get the index this way."""
    index = joined([[{"a": (0, 1)}], [{"b": (5, 2)}]])
    again = pickle.loads(pickle.dumps(index))
    assert [again.members(sample) for sample in range(2)] == [[("a", 0, 1)], [("b", 5, 2)]]


# --- raw files ------------------------------------------------------------------------------------------------------------------


def listing(*paths: str) -> list[ObjectInfo]:
    return [ObjectInfo(f"s3://b/train/{path}", 10 + idx, f"e{idx}") for idx, path in enumerate(paths)]


def test_raw_files_take_their_class_from_the_directory() -> None:
    index = RawFormat().index_listing(
        "s3://b/train", listing("cat/1.jpg", "cat/deep/2.JPG", "dog/1.png", "dog/.DS_Store")
    )
    assert index.classes == ("cat", "dog")
    assert index.class_ids is not None
    assert index.class_ids.tolist() == [0, 0, 1]
    assert [index.key(sample) for sample in range(3)] == ["cat/1.jpg", "cat/deep/2.JPG", "dog/1.png"]
    assert [index.members(sample) for sample in range(3)] == [[("jpg", 0, 10)], [("jpg", 0, 11)], [("png", 0, 12)]]
    assert index.skipped == (("s3://b/train/dog/.DS_Store", "dog/.DS_Store", "hidden file"),)
    assert index.visits(np.array([2]))[0] == [("s3://b/train/dog/1.png", 0, 12)]


def test_raw_files_without_classes() -> None:
    index = RawFormat(has_classes=False, suffixes=(".wav",)).index_listing("s3://b/train/", listing("1.wav"))
    assert index.class_ids is None
    assert RawFormat(suffixes=(".wav",)).accepts("s3://b/x.WAV")
    assert not RawFormat(suffixes=(".wav",)).accepts("s3://b/x.txt")


# --- tokens ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_tokens_go_round(values: list[int]) -> None:
    tokens = np.array(values, dtype=np.int64)
    assert unpack_tokens(pack_tokens(tokens, token_bytes=4)).tolist() == values
    if all(value < 2**16 for value in values):
        assert unpack_tokens(pack_tokens(tokens)).tolist() == values
    else:
        with pytest.raises(ValueError, match="use token_bytes=4"):
            pack_tokens(tokens)


def test_token_shard_never_changes_its_format() -> None:
    """Shards are written once and read for years: this is version 1, byte for byte."""
    assert pack_tokens(np.array([1, 258])) == (
        b"RHTOKENS" + b"\1\0" + b"\2\0" + bytes(4) + b"\2" + bytes(7) + bytes(40) + b"\1\0\2\1"
    )


@given(st.integers(0, 200), st.integers(1, 20))
def test_every_token_but_the_first_is_predicted_once(num_tokens: int, seq_len: int) -> None:
    data = pack_tokens(np.arange(num_tokens))
    shard = _Bytes(data)
    index = join([Shard(shard.url, "e", shard.size)], [TokenFormat(seq_len).index(shard)])
    predicted = []
    for sample in range(len(index)):
        ((dtype, offset, length),) = index.members(sample)
        window = np.frombuffer(data[offset : offset + length], dtype=dtype)
        assert len(window) == seq_len + 1
        predicted += window[1:].tolist()
    assert predicted == list(range(1, len(predicted) + 1))
    assert num_tokens - 1 - len(predicted) < seq_len


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"NOTTOKEN" + d[8:], "not a token shard: it begins with b'NOTTOKEN'"),
        (lambda d: d[:8] + b"\2\0" + d[10:], "version 2 with tokens of 2 bytes"),
        (lambda d: d[:10] + b"\3\0" + d[12:], "tokens of 3 bytes"),
        (lambda d: d[:-1], "3 tokens of 2 bytes make 70 bytes, but the object has 69"),
        (lambda d: d + b"\0", "but the object has 71"),
        (lambda d: d[:30], "not a token shard"),
        (lambda d: b"", "not a token shard"),
    ],
)
def test_a_shard_that_is_not_what_it_says_is_refused(change: object, message: str) -> None:
    data = change(pack_tokens(np.array([1, 2, 3])))  # type: ignore[operator]
    with pytest.raises(FormatError, match=message):
        parse_header(data[:HEADER_BYTES], url="mem://b/0.tokens", size_bytes=len(data))


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.url, self.size = data, "mem://b/0.tokens", len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]
