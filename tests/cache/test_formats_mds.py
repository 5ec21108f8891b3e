"""MDS data sets that mosaicml-streaming itself wrote (tests/fixtures/mds): every value as its reader gives it, and nothing that was
damaged taken for a sample."""

from __future__ import annotations

import contextlib
import doctest
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.cli import cli
from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats import mds_encodings
from cache.client.formats.decompress import decompress
from cache.client.formats.index import Shard, join
from cache.client.formats.mds import Entry, MdsFormat
from cache.client.formats.mds_encodings import decoder_for
from cache.client.indexing import build_index
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from cache.errors import FormatError, ObjectNotFound
from cache.origin.ports import ObjectInfo
from tests.cache.stored import Stored
from tests.daemon import CacheDaemon
from tests.fixtures.mds.write import FEW, IMAGES, NUM_SAMPLES, pixels, values

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mds"


@pytest.fixture
def cache() -> Iterator[Cache]:
    cache = Cache(socket="")
    yield cache
    cache.close()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    return bool(type(found) is type(expected) or isinstance(found, np.generic)) and found == expected


def caught(work: Callable[[], Any]) -> tuple[Any, FormatError | None]:
    """What it gave, or the FormatError that it raised; anything else is raised on."""
    try:
        return work(), None
    except FormatError as error:
        return None, error


def test_doctests_say_the_truth() -> None:
    assert doctest.testmod(mds_encodings).failed == 0


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_every_encoding_is_read_as_the_library_that_wrote_it_does(cache: Cache, name: str) -> None:
    dataset = ShardDataset(cache, f"file://{FIXTURES}/{name}", MdsFormat())
    assert len(dataset) == NUM_SAMPLES and dataset.shard_sizes == (3, 3)
    for number, raw in enumerate(dataset.__getitems__(range(NUM_SAMPLES))):
        for column, expected in values(number).items():
            assert same(raw[column], expected), (column, raw[column], expected)
        assert raw["jpg"][:2] == raw["ja"][0][:2] == b"\xff\xd8"
        assert len(raw["pngs"]) == number % 3
        assert np.array_equal(np.asarray(raw["pil"]), pixels(number))
        assert raw["__key__"] == str(number % 3) and raw["__index__"] == number


def test_images_may_be_opened_as_the_library_does(cache: Cache) -> None:
    dataset = ShardDataset(cache, f"file://{FIXTURES}/plain", MdsFormat(decode_images=True))
    raw = dataset[2]
    assert np.array_equal(np.asarray(raw["png"]), pixels(2))
    assert [np.array_equal(np.asarray(image), pixels(2 + i)) for i, image in enumerate(raw["pngs"])] == [True, True]
    assert raw["jpg"].size == raw["ja"][0].size == (5, 4)
    plain = ShardDataset(cache, f"file://{FIXTURES}/plain", MdsFormat())[2]
    assert {key for key in raw if not same(raw[key], plain[key])} <= {*IMAGES}


@pytest.mark.parametrize("name", ["gz", "br", "bz2", "snappy"])
def test_every_compression_is_read(cache: Cache, name: str) -> None:
    dataset = ShardDataset(cache, f"file://{FIXTURES}/{name}", MdsFormat())
    assert [dataset[number]["i"] for number in range(NUM_SAMPLES)] == [-number for number in range(NUM_SAMPLES)]
    assert [dataset[number]["b"] for number in range(NUM_SAMPLES)] == [values(n)["b"] for n in range(NUM_SAMPLES)]


def test_pickled_columns_are_refused_unless_allowed(cache: Cache) -> None:
    """Reading them runs code: a data set from elsewhere must not be able to do that unasked."""
    url = f"file://{FIXTURES}/pickled"
    with pytest.raises(FormatError, match=r"column 'x': it is pickled"):
        ShardDataset(cache, url, MdsFormat())
    assert ShardDataset(cache, url, MdsFormat(allow_pickle=True))[0]["x"] == {1: 2}


def test_a_plain_sample_costs_its_own_bytes() -> None:
    """The index reads the table and no sample; a sample is one range, so that a full shuffle costs no more than a sequential one."""
    data = (FIXTURES / "plain" / "shard.00000.mds").read_bytes()
    shard = Stored(data)
    index = MdsFormat().index_entry(shard, Entry(3, len(data), "[]", None))
    assert shard.bytes_read == 20
    joined = join([Shard("mem://b/s", "e", len(data))], [index])
    assert [joined.spans(number) for number in range(3)] == [
        [(int(offset), int(length))] for offset, length in zip(index.offsets, index.lengths, strict=True)
    ]
    assert int(index.offsets[0]) + int(index.lengths.sum()) == len(data)


def test_a_compressed_shard_is_visited_once_for_all_of_its_samples(cache: Cache) -> None:
    """Announcing it for each sample would make the cache count the whole shard thousands of times."""
    index = build_index(cache, f"file://{FIXTURES}/zstd", MdsFormat()).index
    sizes = [shard.size_bytes for shard in index.shards]
    visits, counts = index.visits(np.array([4, 0, 5, 1]))
    assert [(offset, length) for _, offset, length in visits] == [(0, sizes[1]), (0, sizes[0])]
    assert counts.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_the_published_index_is_read_instead_of_the_shards(cache: Cache, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(FIXTURES / name, tmp_path / name)
    before = ShardDataset(cache, f"file://{root}", MdsFormat())
    run = CliRunner().invoke(cli, ["index", "--format", "mds", f"file://{root}"], env={"RAILHEAD_CACHE_SOCKET": ""})
    assert run.exit_code == 0 and f"{NUM_SAMPLES} samples of 2 shards" in run.output, run.output
    report = build_index(cache, f"file://{root}", MdsFormat())
    assert report.num_built == 0
    after = ShardDataset(cache, f"file://{root}", MdsFormat())
    assert after.shard_sizes == before.shard_sizes
    assert [s["i"] for s in after.__getitems__([5, 0])] == [-5, 0]


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_an_epoch_with_workers_through_the_daemon_has_every_sample_once(name: str) -> None:
    with CacheDaemon() as daemon:
        cache = Cache(daemon.socket)
        dataset = ShardDataset(cache, f"file://{FIXTURES}/{name}", MdsFormat(), decode=number_of)
        sampler = ElasticBatchSampler(dataset, 2, shuffle="windowed:1")
        loader = ElasticLoader(dataset, sampler, num_workers=2, multiprocessing_context="fork", collate_fn=list)
        assert sorted(number for batch in loader for number in batch) == list(range(NUM_SAMPLES))
        loader.close()
        assert daemon.status()["readers"].get("direct_bytes", 0) == 0
        cache.close()


def number_of(raw: dict[str, Any]) -> int:
    return -int(raw["i"])


def test_what_the_index_names_and_the_store_lacks_is_an_error_that_names_it(cache: Cache, tmp_path: Path) -> None:
    root = shutil.copytree(FIXTURES / "plain", tmp_path / "d")
    (root / "shard.00001.mds").unlink()
    with pytest.raises(FormatError, match=r"shard\.00001\.mds: named by .*index\.json, but not there"):
        ShardDataset(cache, f"file://{root}", MdsFormat())
    with pytest.raises(ObjectNotFound, match=r"index\.json: there is no such manifest") as refused:
        ShardDataset(cache, f"file://{tmp_path}", MdsFormat())
    assert refused.value.advice == f"name file://{root}"


def test_a_shard_that_was_cut_is_refused_by_its_size(cache: Cache, tmp_path: Path) -> None:
    root = shutil.copytree(FIXTURES / "zstd", tmp_path / "d")
    path = root / "shard.00000.mds.zstd"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"shard\.00000\.mds\.zstd: 1,774 bytes, but .*index\.json says 1,775"):
        ShardDataset(cache, f"file://{root}", MdsFormat())


# --- damage of every kind ---------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_index_with_anything_anywhere_is_a_format_error_or_a_data_set(data: st.DataObject) -> None:
    """Never a traceback of another kind: whoever wrote index.json is told which file is wrong."""
    content = json.loads((FIXTURES / "zstd" / "index.json").read_text())
    path = data.draw(st.sampled_from([place for place in places(content) if place]))
    at = content
    for key in path[:-1]:
        at = at[key]
    if data.draw(st.booleans()):
        at[path[-1]] = data.draw(json_values)
    else:
        del at[path[-1]]
    listed = {
        f"mem://b/d/{file.name}": ObjectInfo(f"mem://b/d/{file.name}", file.stat().st_size, "e")
        for file in (FIXTURES / "zstd").iterdir()
    }
    entries, refused = caught(
        lambda: MdsFormat().read_manifest("mem://b/d/index.json", json.dumps(content).encode(), listed)
    )
    assert "mem://b/d/" in refused.message if refused else all(url in listed for url in entries)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_an_index_of_garbage_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"mem://b/index\.json"):
        MdsFormat().read_manifest("mem://b/index.json", data, {})


def read_all(data: bytes, num_samples: int, codec: str | None, stored: bytes) -> list[dict[str, Any]]:
    """All samples of a shard of the columns `b` and `i`."""
    schema = json.dumps([["b", "bytes", None], ["i", "int", 8]])
    mds, shard = MdsFormat(), Stored(stored)
    index = mds.index_entry(shard, Entry(num_samples, len(data), schema, codec))
    if codec is not None:
        unit = mds.open_unit(shard, index.extensions[0], 0, shard.size)
        return [unit.sample(number) for number in range(unit.num_samples)]
    return [
        mds.unpack(index.extensions[0], shard.read(int(offset), int(length)))
        for offset, length in zip(index.offsets, index.lengths, strict=True)
    ]


def few_shard() -> bytes:
    """The plain shard of FEW columns, by the documented layout: the library wrote only compressed ones of it."""
    stored = (FIXTURES / "snappy" / "shard.00000.mds.snappy").read_bytes()
    assert set(FEW) == {"b", "i"}
    return decompress(stored, "snappy", url="x", max_bytes=10**6)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_shard_with_any_byte_changed_is_refused_or_gives_samples_from_within_itself(data: st.DataObject) -> None:
    whole = bytearray(few_shard())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples = read_all(bytes(whole), NUM_SAMPLES, None, bytes(whole))
    except (FormatError, ValueError):
        return
    assert len(samples) == NUM_SAMPLES
    assert all(sample["b"] in whole and type(sample["i"]) is int for sample in samples)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["zstd", "gz", "br", "bz2", "snappy"]), st.data())
def test_a_damaged_or_cut_compressed_shard_is_refused_or_right(name: str, data: st.DataObject) -> None:
    """Codecs without a checksum (snappy, brotli, zstd as it is written) cannot notice every changed byte; the table and the columns
    then decide. What is cut is always noticed."""
    path = next((FIXTURES / name).glob("shard.00000.mds.*"))
    stored = bytearray(path.read_bytes())
    is_cut = data.draw(st.booleans())
    if is_cut:
        del stored[data.draw(st.integers(0, len(stored) - 1)) :]
    else:
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    unit, refused = caught(lambda: MdsFormat().open_unit(Stored(bytes(stored)), f"mds+{name}:[]", 0, len(stored)))
    assert refused.url == "mem://b/shard" if refused else unit is not None and not is_cut


def test_a_decompression_bomb_is_refused_before_it_fills_the_memory() -> None:
    import gzip

    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(FormatError, match="more than 1,000,000 bytes"):
        decompress(bomb, "gz", url="mem://b/bomb", max_bytes=1_000_000)
    with pytest.raises(FormatError, match="when decompressed"):
        decompress(b"\xff\xff\xff\xff\x0f" + bytes(10), "snappy", url="mem://b/bomb", max_bytes=1_000_000)


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            *("str", "int", "json", "uint16", "float64", "str_int", "str_float", "str_decimal", "pil", "pkl", "png"),
            *("ndarray", "ndarray:float32", "ndarray:int16:2,3", "jpeg_array", "list[jpeg]", "list[png]", "list[pil]"),
        ]
    ),
    st.binary(max_size=40),
)
def test_garbage_in_a_column_is_a_value_or_a_value_error(encoding: str, data: bytes) -> None:
    if encoding == "pkl" and data:
        data = b"." + data  # pickles may run anything: these cannot
    with contextlib.suppress(ValueError):
        decoder_for(encoding, allow_pickle=True, decode_images=True)(data)


@pytest.mark.parametrize("encoding", ["nonsense", "int:5", "ndarray:float99", "ndarray:int8:2:3", "ndarray:int8:a", ""])
def test_unknown_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match="unknown encoding"):
        decoder_for(encoding)


def test_a_list_that_promises_more_than_it_has_is_refused() -> None:
    """Four billion elements are not allocated first and missed later."""
    with pytest.raises(ValueError, match="a list"):
        decoder_for("list[png]")(struct.pack("<II", 0, 2**32 - 1) + bytes(8))
    assert decoder_for("list[png]")(struct.pack("<IIII", 0, 2, 1, 2) + b"abc") == [b"a", b"bc"]
