"""Indices that are kept on the node and published beside the shards: found again, never believed of other bytes, refused when damaged."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import crc32c
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cache.cli import cli
from cache.client import Cache
from cache.client.formats.index import Shard, ShardIndex, pack_keys
from cache.client.formats.pack import decode_pack, encode_pack, format_identity, pack_url
from cache.client.formats.raw import RawFormat
from cache.client.formats.tar import TarFormat
from cache.client.indexing import build_index
from cache.client.publishing import publish_index
from cache.errors import FormatError
from tests.daemon import CacheDaemon

TAR = "cache.client.formats.tar.TarFormat(suffix='.tar', require_end_marker=True) v1"
ROOT = "s3://b/train"


@st.composite
def shard_indices(draw: st.DrawFn) -> dict[Shard, ShardIndex]:
    found = {}
    for number in range(draw(st.integers(0, 3))):
        samples = draw(st.lists(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 100)), max_size=3), max_size=4))
        members = [member for sample in samples for member in sample]
        extensions = tuple(draw(st.lists(st.sampled_from(["png", "cls", "ä"]), min_size=1, unique=True)))
        key_lengths, key_bytes = pack_keys([draw(st.binary(max_size=5)) for _ in samples])
        root = draw(st.sampled_from([ROOT, "s3://other"]))
        found[Shard(f"{root}/{number}.tar", draw(st.text(max_size=5)), 1000)] = ShardIndex(
            key_lengths=key_lengths,
            key_bytes=key_bytes,
            member_counts=np.array([len(sample) for sample in samples], dtype=np.int64),
            offsets=np.array([offset for offset, _ in members], dtype=np.int64),
            lengths=np.array([length for _, length in members], dtype=np.int64),
            extensions=extensions,
            extension_ids=np.array([draw(st.integers(0, len(extensions) - 1)) for _ in members], dtype=np.int32),
            skipped=tuple(draw(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=2))),
        )
    return found


def plain(indices: dict[Shard, ShardIndex]) -> dict[Shard, object]:
    return {
        shard: (
            index.key_lengths.tolist(),
            index.key_bytes,
            index.member_counts.tolist(),
            index.offsets.tolist(),
            index.lengths.tolist(),
            [index.extensions[number] for number in index.extension_ids],
            index.skipped,
        )
        for shard, index in indices.items()
    }


@given(shard_indices())
def test_what_was_packed_comes_back(indices: dict[Shard, ShardIndex]) -> None:
    assert plain(decode_pack(ROOT, TAR, encode_pack(ROOT, TAR, indices), where="x")) == plain(indices)


@given(shard_indices())
def test_a_prefix_may_be_copied_with_its_index(indices: dict[Shard, ShardIndex]) -> None:
    moved = decode_pack("gs://copy/of/it/", TAR, encode_pack(ROOT, TAR, indices), where="x")
    assert [shard.url.replace("gs://copy/of/it", ROOT) for shard in moved] == [shard.url for shard in indices]


@given(st.data(), shard_indices())
def test_a_changed_or_cut_pack_is_a_format_error_and_nothing_else(
    data: st.DataObject, indices: dict[Shard, ShardIndex]
) -> None:
    pack = bytearray(encode_pack(ROOT, TAR, indices))
    if data.draw(st.booleans()):
        pack[data.draw(st.integers(0, len(pack) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del pack[data.draw(st.integers(0, len(pack) - 1)) :]
    with pytest.raises(FormatError, match="x"):
        decode_pack(ROOT, TAR, bytes(pack), where="x")


@given(st.data(), shard_indices())
def test_a_pack_that_lies_under_a_right_checksum_is_a_format_error_or_holds_together(
    data: st.DataObject, indices: dict[Shard, ShardIndex]
) -> None:
    """Somebody who can write beside the shards can write a checksum too: what comes out must still lie within its shard."""
    pack = bytearray(encode_pack(ROOT, TAR, indices))
    for _ in range(data.draw(st.integers(1, 4))):
        pack[data.draw(st.integers(16, len(pack) - 1))] = data.draw(st.integers(0, 255))
    struct.pack_into("<I", pack, 8, crc32c.crc32c(bytes(pack[16:])))
    try:
        found = decode_pack(ROOT, TAR, bytes(pack), where="x")
    except FormatError:
        return
    for shard, index in found.items():
        assert int(index.member_counts.sum()) == len(index.offsets)
        assert all(
            0 <= offset <= shard.size_bytes - length
            for offset, length in zip(index.offsets, index.lengths, strict=True)
        )


@given(st.binary(max_size=200))
def test_garbage_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_pack(ROOT, TAR, data, where="x")


def test_a_pack_of_another_format_or_other_settings_is_not_read() -> None:
    assert format_identity(TarFormat()) == TAR, "if this changes, kept and published indices are not found any more"
    assert format_identity(RawFormat()) is None
    other = format_identity(TarFormat(require_end_marker=False))
    assert other is not None and pack_url(ROOT, other) != pack_url(ROOT, TAR)
    with pytest.raises(FormatError, match="not of"):
        decode_pack(ROOT, other, encode_pack(ROOT, TAR, {}), where="x")


# --- through the cache --------------------------------------------------------------------------------------------------------------


def write_tar(path: Path, samples: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in samples:
            info = tarfile.TarInfo(f"{number:05d}.bin")
            info.size = 100 + number
            tar.addfile(info, io.BytesIO(bytes(info.size)))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "train"
    for number in range(3):
        write_tar(root / f"{number}.tar", range(number * 10, number * 10 + 10))
    return root


@pytest.fixture
def daemon() -> Iterator[CacheDaemon]:
    with CacheDaemon() as daemon:
        yield daemon


def sizes(cache: Cache, root: Path) -> tuple[int, list[int]]:
    """How many shards had to be read, and the lengths of all members."""
    report = build_index(cache, f"file://{root}", TarFormat())
    return report.num_built, report.index.lengths.tolist()


def test_a_published_index_is_read_instead_of_the_headers(shards: Path) -> None:
    everything = [100 + number for number in range(30)]
    with Cache("") as cache:
        assert sizes(cache, shards) == (3, everything)
        published = publish_index(cache, f"file://{shards}", TarFormat())
        assert (published.num_shards, published.num_samples, published.num_built) == (3, 30, 3)
        assert sizes(cache, shards) == (0, everything)
        write_tar(shards / "1.tar", range(50, 55))
        write_tar(shards / "3.tar", range(2))
        assert sizes(cache, shards) == (2, [*everything[:10], *range(150, 155), *everything[20:], 100, 101])
        assert publish_index(cache, f"file://{shards}", TarFormat()).num_built == 2, "only what is new is read"


def test_a_damaged_published_index_costs_time_and_nothing_else(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Cache("") as cache:
        publish_index(cache, f"file://{shards}", TarFormat())
        (path,) = (shards / ".railhead-index").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        assert sizes(cache, shards)[0] == 3
    assert "does not match its checksum; the shards' headers are read instead" in caplog.text


def test_the_index_is_built_once_on_a_node_and_survives_the_daemon(daemon: CacheDaemon, shards: Path) -> None:
    with Cache(daemon.socket) as cache:
        first = sizes(cache, shards)
        assert first[0] == 3 and sizes(cache, shards) == (0, first[1])
        used = daemon.status()["used_bytes"]
        cache.close()
        daemon.kill()
        daemon.start()
        assert daemon.status()["used_bytes"] == used, "a kept index counts against the capacity, before and after"
        assert sizes(cache, shards) == (0, first[1])
        (path,) = (daemon.dir / "indexes").iterdir()
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        assert sizes(cache, shards) == (3, first[1]), "a rotten one is built anew"


def test_what_is_resident_is_known_without_opening_a_shard(daemon: CacheDaemon, shards: Path) -> None:
    with Cache(daemon.socket) as cache:
        assert build_index(cache, f"file://{shards}", TarFormat()).resident_bytes == (0, 0, 0)
        with cache.open(f"file://{shards}/1.tar") as shard:
            assert shard.fetch()
            assert cache.resident_bytes(cache.list(f"file://{shards}"))[1] == shard.size  # type: ignore[index]


def test_indices_take_a_sixteenth_of_the_capacity_at_most(tmp_path: Path) -> None:
    with CacheDaemon(capacity="16MiB") as daemon, Cache(daemon.socket) as cache:
        keys = [f"{number:032x}" for number in range(5)]
        assert not cache.keep_index(keys[0], bytes(2**20)), "one alone would be too much"
        assert all(cache.keep_index(key, bytes([number]) * 300_000) for number, key in enumerate(keys))
        assert cache.kept_index(keys[0]) is None and cache.kept_index(keys[1]) is None, "the longest unused went"
        assert cache.kept_index(keys[4]) == bytes([4]) * 300_000
        assert daemon.status()["used_bytes"] == 3 * 300_512


def test_the_command_publishes_and_says_what_it_did(shards: Path) -> None:
    run = CliRunner().invoke(cli, ["index", f"file://{shards}"], env={"RAILHEAD_CACHE_SOCKET": ""})
    assert run.exit_code == 0 and "30 samples of 3 shards" in run.output and "(3 shards read)" in run.output
