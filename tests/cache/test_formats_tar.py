"""Tar shards: the index is exact for every dialect that people's tools write, and a damaged archive is refused, never
misread."""

from __future__ import annotations

import contextlib
import io
import tarfile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cache.client.formats.index import SampleIndex, Shard, join
from cache.client.formats.tar import TarFormat, split_key
from cache.client.formats.tarheaders import FAR_READ_BYTES, WINDOW_BYTES, entries
from cache.errors import FormatError


class Bytes:
    """An opened object in memory that counts what is read."""

    def __init__(self, data: bytes, url: str = "mem://b/shard.tar") -> None:
        self.data, self.url, self.size = data, url, len(data)
        self.bytes_read = 0
        self.num_reads = 0

    def read(self, offset: int, length: int) -> bytes:
        found = self.data[offset : offset + length]
        self.bytes_read += len(found)
        self.num_reads += 1
        return found


def archive(members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def indexed(data: bytes, tar_format: TarFormat | None = None) -> SampleIndex:
    shard = Bytes(data)
    return join([Shard(shard.url, "e", shard.size)], [(tar_format or TarFormat()).index(shard)])


def samples_in(data: bytes, index: SampleIndex) -> dict[str, dict[str, bytes]]:
    return {
        index.key(sample): {ext: data[offset : offset + length] for ext, offset, length in index.members(sample)}
        for sample in range(len(index))
    }


stems = st.text(st.characters(blacklist_characters="./\0", blacklist_categories=["Cs"]), min_size=1, max_size=60)
sample_sets = st.dictionaries(
    st.lists(stems, min_size=1, max_size=5).map("/".join),
    st.dictionaries(st.sampled_from(["png", "cls", "seg.png", "json"]), st.binary(max_size=1500), min_size=1),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(sample_sets, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_every_member_is_found_where_it_is(samples: dict[str, dict[str, bytes]], tar_format: int) -> None:
    """Whatever dialect and names: the bytes at the index's offsets are the bytes that were put in."""
    samples = {key: members for key, members in samples.items() if not key.startswith("__")}
    members = [(f"{key}.{ext}", data) for key, exts in samples.items() for ext, data in exts.items()]
    try:
        data = archive(members, tar_format)
    except ValueError:  # a name that ustar cannot hold
        assume(False)
    assert samples_in(data, indexed(data)) == samples


@settings(max_examples=100, deadline=None)
@given(sample_sets, st.data())
def test_an_archive_that_was_cut_anywhere_is_refused(samples: dict[str, dict[str, bytes]], data: st.DataObject) -> None:
    """Half an upload must not become a smaller data set."""
    members = [(f"{key}.{ext}", body) for key, exts in samples.items() for ext, body in exts.items()]
    whole = archive(members)
    end_marker = len(whole.rstrip(b"\0"))
    end_marker += -end_marker % 512
    last = max((entry.offset + entry.size for entry in entries(Bytes(whole))), default=0)
    cut = data.draw(st.integers(0, max(end_marker, last + (-last % 512)) - 1 if members else 0))
    with pytest.raises(FormatError) as refused:
        indexed(whole[:cut])
    assert refused.value.url == "mem://b/shard.tar"
    assert 0 <= refused.value.offset <= cut
    assert "mem://b/shard.tar" in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(sample_sets, st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_refused_or_harmless_but_never_a_crash(
    samples: dict[str, dict[str, bytes]], changes: list[tuple[int, int]]
) -> None:
    """Any bytes may be wrong. What is still indexed lies within the archive; nothing but a FormatError comes out."""
    members = [(f"{key}.{ext}", body) for key, exts in samples.items() for ext, body in exts.items()]
    damaged = bytearray(archive(members))
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        index = indexed(bytes(damaged))
    except FormatError:
        return
    assert all(o >= 0 and o + n <= len(damaged) for sample in range(len(index)) for _, o, n in index.members(sample))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_refused_or_empty(noise: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert len(indexed(noise)) == 0


def test_members_of_a_sample_are_brought_together_from_anywhere_in_the_archive() -> None:
    """WebDataset would make four samples of this; `tar c *.png *.cls` makes such archives."""
    data = archive([("a.png", b"A"), ("b.png", b"B"), ("a.cls", b"0"), ("b.cls", b"1")])
    assert samples_in(data, indexed(data)) == {"a": {"png": b"A", "cls": b"0"}, "b": {"png": b"B", "cls": b"1"}}


def test_what_is_not_a_sample_is_skipped_with_its_reason() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("l.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("f.x", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        for name in (".hidden.png", "README", "a.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    index = indexed(out.getvalue())
    assert [index.key(sample) for sample in range(len(index))] == ["a"]
    assert {name: reason for _, name, reason in index.skipped} == {
        "d/": "directory",
        "l.png": "symbolic link",
        "h.png": "hard link",
        "f.x": "named pipe",
        ".hidden.png": "hidden file",
        "README": "no extension",
    }


def test_two_members_with_one_name_are_refused() -> None:
    """Which of them is meant nobody can know; serving either would be a guess."""
    with pytest.raises(FormatError, match="sample 'a' has two members 'png', at 512 and 1536"):
        indexed(archive([("a.png", b"1"), ("a.png", b"2")]))


@pytest.mark.parametrize(
    ("start", "kind"), [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz")]
)
def test_a_compressed_archive_is_named_as_such(start: bytes, kind: str) -> None:
    with pytest.raises(FormatError, match=f"compressed with {kind}"):
        indexed(start + b"x" * 600)


def test_an_archive_without_end_marker_can_be_allowed() -> None:
    data = archive([("a.png", b"A" * 600)])[:1536]
    with pytest.raises(FormatError, match="without its end marker"):
        indexed(data)
    assert len(indexed(data, TarFormat(require_end_marker=False))) == 1


def test_binary_sizes_and_old_headers_are_understood() -> None:
    """GNU tar writes sizes of 8 GiB and more in binary; v7 archives have no magic and mark directories by a slash."""
    block = bytearray(archive([("a.png", b"x" * 10)], tarfile.GNU_FORMAT))
    block[124:136] = (0x80 << 88 | 10).to_bytes(12, "big")
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert indexed(bytes(block)).members(0) == [("png", 512, 10)]


def test_a_sparse_file_is_skipped_and_the_next_member_found() -> None:
    """PAX sparse members hold a map and pieces, not the file: serving them as they lie would serve wrong bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("s.png")
        info.size, info.pax_headers = 600, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info, io.BytesIO(b"s" * 600))
        info = tarfile.TarInfo("a.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"A"))
    index = indexed(out.getvalue())
    assert samples_in(out.getvalue(), index) == {"a": {"png": b"A"}}
    assert index.skipped[0][2] == "sparse file"


def test_bodies_are_not_read_where_they_are_large() -> None:
    """An index over a data set larger than the cache must not read the data set."""
    shard = Bytes(archive([(f"{i}.bin", bytes(1_000_000)) for i in range(20)]))
    assert TarFormat().index(shard).num_samples == 20
    assert shard.bytes_read <= WINDOW_BYTES + 21 * FAR_READ_BYTES


def test_small_members_are_indexed_with_few_reads() -> None:
    shard = Bytes(archive([(f"{i:04}.cls", b"1") for i in range(2000)]))
    assert TarFormat().index(shard).num_samples == 2000
    assert shard.num_reads <= shard.size // WINDOW_BYTES + 2
    assert shard.bytes_read <= shard.size


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a/b.png", "a/b", "png"),
        ("a.b/c.tar.gz", "a.b/c", "tar.gz"),
        ("./x.JPG", "./x", "jpg"),
        ("x.", "x", ""),
    ],
)
def test_keys_end_at_the_first_dot_of_the_file_name(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)
