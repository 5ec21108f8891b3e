"""Reading through a real daemon: the bytes are the origin's, hits ask nobody, and each block is fetched once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache.blocks import EXTENT_BYTES, FETCH_BYTES
from cache.client import Cache, CachedObject
from cache.errors import ObjectNotFound
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]


def assert_reads_equal(obj: CachedObject, data: bytes, seed: int, num_reads: int = 60) -> None:
    """By every way of reading, at random places and at the edges of blocks, extents and the object."""
    rng = random.Random(seed)
    edges = [
        0,
        1,
        FETCH_BYTES - 1,
        FETCH_BYTES,
        FETCH_BYTES + 1,
        EXTENT_BYTES - 1,
        EXTENT_BYTES,
        len(data) - 1,
        len(data),
    ]
    for _ in range(num_reads):
        offset = rng.choice([*edges, rng.randrange(len(data) + 2)])
        length = rng.choice([0, 1, 100, 70_000, FETCH_BYTES + 3, rng.randrange(2 * FETCH_BYTES)])
        expected = data[offset : offset + length]
        match rng.randrange(3):
            case 0:
                assert obj.read(offset, length) == expected
            case 1:
                buffer = bytearray(b"\xee" * length)
                assert obj.readinto(offset, buffer) == len(expected)
                assert buffer == expected + b"\xee" * (length - len(expected)), "bytes beyond the end were touched"
            case 2:
                view = obj.view(offset, length)
                assert view.readonly and view == expected


def test_every_way_of_reading_gives_the_origins_bytes(
    cache_daemon: CacheDaemon, open_cache: OpenCache, tmp_path: Path
) -> None:
    """An object of two extents, so that reads cross the border between two files."""
    data = random_bytes(EXTENT_BYTES + FETCH_BYTES + 12345)
    (tmp_path / "big").write_bytes(data)
    with open_cache(cache_daemon.socket).open(str(tmp_path / "big")) as obj:
        assert (obj.size, obj.url) == (len(data), f"file://{tmp_path}/big")
        assert_reads_equal(obj, data, seed=1)
        assert obj.read(0, len(data)) == data
        assert obj.fetch() and obj.verify()
        assert_reads_equal(obj, data, seed=2)
    assert len(cache_daemon.extent_files) == 2


@pytest.mark.parametrize("size", [0, 1, FETCH_BYTES, FETCH_BYTES + 1])
def test_small_and_empty_objects_are_read(
    cache_daemon: CacheDaemon, open_cache: OpenCache, counting_origin: CountingOrigin, size: int
) -> None:
    data = random_bytes(size)
    with open_cache(cache_daemon.socket).open(counting_origin.put("o", data)) as obj:
        assert obj.size == size and obj.read(0, size + 5) == data and obj.read(size, 5) == b""
        assert obj.fetch() and bytes(obj.view(0, size)) == data
        assert obj.verify() is True


def test_what_is_not_there_is_said_with_its_url(
    cache_daemon: CacheDaemon, open_cache: OpenCache, counting_origin: CountingOrigin
) -> None:
    with pytest.raises(ObjectNotFound, match="nothing-here"):
        open_cache(cache_daemon.socket).open(counting_origin.url("nothing-here"))


def test_a_hit_asks_nobody(cache_daemon: CacheDaemon, open_cache: OpenCache, counting_origin: CountingOrigin) -> None:
    """The daemon is stopped in its tracks: whatever needed it would hang until it is taken for dead."""
    data = random_bytes(2 * FETCH_BYTES)
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", data))
    obj.read(0, len(data))
    cache_daemon.freeze()
    try:
        before = cache.stats().hits
        assert_reads_equal(obj, data, seed=3)
        assert all(obj.read(i, 100) == data[i : i + 100] for i in range(0, len(data), 10_000))
        assert cache.stats().hits > before and cache.stats().direct_reads == 0
    finally:
        cache_daemon.thaw()


def test_many_readers_of_one_object_fetch_each_block_once(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """The origin answers only when all readers are waiting, so all of them but one meet a fetch that is under way."""
    num_readers = 8
    data = random_bytes(3 * FETCH_BYTES + 7)
    url = counting_origin.put("o", data)
    counting_origin.hold("o")
    cache = open_cache(cache_daemon.socket)
    with ThreadPoolExecutor(num_readers) as threads:
        reads = [threads.submit(lambda: cache.open(url).read(0, len(data))) for _ in range(num_readers)]
        wait_until(lambda: cache_daemon.status()["waiting_requests"] == num_readers, "all readers wait")
        counting_origin.release()
        assert all(read.result() == data for read in reads)
    assert set(counting_origin.gets.values()) == {1} and len(counting_origin.gets) == 4
    counters = cache_daemon.status()["counters"]
    assert counters["delayed_hits"] == num_readers - 1 and counters["demand_fetches"] == 4


def test_a_reader_goes_on_as_blocks_land(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """The first block is read while the last has not left the origin."""
    data = random_bytes(4 * FETCH_BYTES)
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", data))
    counting_origin.hold("o", from_byte=3 * FETCH_BYTES)
    obj.prefetch()
    assert obj.read(0, 3 * FETCH_BYTES) == data[: 3 * FETCH_BYTES]
    assert counting_origin.gets["o", 3 * FETCH_BYTES] == 0
    counting_origin.release()
    assert obj.read(3 * FETCH_BYTES, FETCH_BYTES) == data[3 * FETCH_BYTES :]
    assert set(counting_origin.gets.values()) == {1}


def test_threads_of_one_process_may_read_one_object_at_once(
    open_cache: OpenCache, counting_origin: CountingOrigin
) -> None:
    """With room for a part of it only, so that files come and go under them."""
    data = [random_bytes(2 * FETCH_BYTES, seed) for seed in range(6)]
    urls = [counting_origin.put(f"o{idx}", content) for idx, content in enumerate(data)]
    with CacheDaemon(capacity="30MiB") as daemon:
        cache = open_cache(daemon.socket)
        objects = [cache.open(url) for url in urls]
        failures: list[BaseException] = []

        def read(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(40):
                    idx, offset = rng.randrange(6), rng.randrange(2 * FETCH_BYTES)
                    assert objects[idx].read(offset, 50_000) == data[idx][offset : offset + 50_000]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert daemon.status()["counters"]["evicted_extents"] > 0


def test_a_known_order_is_fetched_ahead_of_its_reader(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    data = random_bytes(2 * FETCH_BYTES)
    urls = [counting_origin.put(f"o{idx}", data) for idx in range(3)]
    cache = open_cache(cache_daemon.socket)
    stream = cache.stream("train")
    stream.announce([(url, 0, len(data)) for url in urls])
    wait_until(lambda: counting_origin.num_gets == 6, "everything announced was fetched")
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "all of it landed")
    for number, url in enumerate(urls, start=1):
        with cache.open(url) as obj:
            assert obj.read(0, len(data)) == data
        stream.advance(number)
    stream.close()
    wait_until(lambda: cache_daemon.status()["streams"] == 0, "the stream is closed")
    counters = cache_daemon.status()["counters"]
    assert (counters["demand_fetches"], counters["prefetches"]) == (0, 6)


def test_an_order_with_a_missing_object_still_counts_its_visits(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """One object that cannot be opened must not throw away the other thousands of the window."""
    data = random_bytes(1000)
    there = counting_origin.put("there", data)
    cache = open_cache(cache_daemon.socket)
    stream = cache.stream("train")
    stream.announce([(counting_origin.url("missing"), 0, 10), (there, 0, 1000), (there, 10, 20)])
    stream.advance(1)
    wait_until(lambda: counting_origin.num_gets == 1, "what is there was fetched")
    wait_until(lambda: cache_daemon.status()["announced_visits"] == 2, "the missing object is behind the reader")
    stream.close()


def test_closing_a_stream_does_not_overtake_its_announcement(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """The daemon looks up an announced object at the origin while the reader has long changed its mind."""
    cache = open_cache(cache_daemon.socket)
    urls = [counting_origin.put(f"o{idx}", b"x" * 100) for idx in range(50)]
    for _ in range(3):
        stream = cache.stream("train")
        stream.announce([(url, 0, 100) for url in urls])
        stream.close()
    stream = cache.stream("train")
    stream.announce([(urls[0], 0, 100), (urls[1], 0, 100)])
    stream.advance(1)
    wait_until(lambda: cache_daemon.status()["announced_visits"] == 1, "only the last order counts")
    stream.close()
    wait_until(lambda: cache_daemon.status()["streams"] == 0, "no stream is left")
