"""Capacity is a hard bound: on the disk's own account, with what readers hold open, whatever they do."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cache.blocks import FETCH_BYTES
from cache.client import Cache
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]
MIB = 2**20


def used_on_disk(daemon: CacheDaemon) -> int:
    """The kernel's account, by inode: files in the directory, and those that daemon, workers or this process have open, unlinked or
    not. The daemon is stopped meanwhile, so that a file which goes and one which comes are not both counted."""
    daemon.freeze()
    try:
        files: dict[int, int] = {}
        for path in daemon.dir.glob("extents/*/*"):
            status = path.stat()
            files[status.st_ino] = status.st_size
        for pid in (daemon.pid, os.getpid(), *daemon.worker_pids()):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(fd).startswith(f"{daemon.dir}/extents/"):
                        files[fd.stat().st_ino] = fd.stat().st_size
        return sum(files.values())
    finally:
        daemon.thaw()


def test_the_bound_holds_at_every_moment_while_five_times_as_much_is_read(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Looked at after each read, in the kernel's own account."""
    capacity = 24 * MIB
    data = [random_bytes(5 * MIB + idx, idx) for idx in range(24)]
    urls = [counting_origin.put(f"o{idx}", content) for idx, content in enumerate(data)]
    with CacheDaemon(capacity=capacity) as daemon:
        cache = open_cache(daemon.socket)
        objects = [cache.open(url) for url in urls]
        samples: list[int] = []
        rng, views = random.Random(0), []
        for _ in range(3):
            for idx in rng.sample(range(24), 24):
                offset = rng.randrange(4 * MIB)
                view = objects[idx].view(offset, 100_000)
                assert view == data[idx][offset : offset + 100_000]
                views = [*views[-1:], (view, data[idx][offset : offset + 100_000])]
                assert all(held == expected for held, expected in views), "a view changed under its reader"
                samples.append(used_on_disk(daemon))
        status = daemon.status()
        assert max(samples) <= capacity
        assert status["counters"]["evicted_extents"] > 24 and status["used_bytes"] <= capacity
        assert cache.stats().direct_reads == 0, "a reader at work always gets room"
        del view, views


def test_a_view_outlives_the_eviction_of_its_file(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    data = random_bytes(2 * FETCH_BYTES)
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", data))
    view = obj.view(10, FETCH_BYTES)
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    freed = cache.ask_daemon({"op": "evict", "url": obj.url})["evicted_bytes"]
    assert freed > len(data)
    wait_until(lambda: not cache_daemon.extent_files, "the file is unlinked")
    assert view == data[10 : 10 + FETCH_BYTES]
    assert cache_daemon.status()["held_bytes"] == freed, "its bytes still count"
    assert obj.read(0, len(data)) == data, "and the object is fetched anew"
    del view
    wait_until(lambda: bool(obj.read(0, 10)) and _flushed(cache), "the old file is let go of")
    wait_until(lambda: cache_daemon.status()["held_bytes"] == 0, "and the disk says that it is gone")


def _flushed(cache: Cache) -> bool:
    link = cache._door.link()
    assert link is not None
    link.flush_released()
    return not link.released


READER = """
import sys
from cache.client import Cache
objects = [Cache(sys.argv[1]).open(url) for url in sys.argv[2:]]
views = [obj.view(0, 10) for obj in objects]
print("holding", flush=True)
sys.stdin.read()
"""


def test_bytes_that_a_reader_held_come_back_when_it_is_killed(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    urls = [counting_origin.put(f"o{idx}", random_bytes(FETCH_BYTES, idx)) for idx in range(3)]
    with subprocess.Popen(
        [sys.executable, "-c", READER, cache_daemon.socket, *urls], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == b"holding\n"
        cache = open_cache(cache_daemon.socket)

        def is_evicted() -> bool:
            # What lies beside the ten bytes that were read is still being fetched: such an extent stays until that is over.
            for url in urls:
                cache.ask_daemon({"op": "evict", "url": url})
            status = cache_daemon.status()
            return bool(status["held_bytes"] == status["used_bytes"] > 3 * FETCH_BYTES)

        wait_until(is_evicted, "all is evicted, and held by the reader")
        reader.kill()
    wait_until(lambda: cache_daemon.status()["used_bytes"] == 0, "the dead reader's bytes came back")


def test_an_object_larger_than_the_cache_is_read_past_it_without_waiting_for_room(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    data = random_bytes(4 * FETCH_BYTES)
    url = counting_origin.put("large", data)
    with CacheDaemon(capacity="10MiB") as daemon:
        cache = open_cache(daemon.socket)
        with cache.open(url) as obj:
            assert obj.read(0, len(data)) == data
            assert obj.fetch() is False
        status = daemon.status()
        assert status["used_bytes"] == 0 and status["counters"]["refused_for_room"] > 0
        assert cache.open(counting_origin.put("small", data[:1000])).fetch(), "what fits is cached"


def test_a_smaller_capacity_and_fewer_files_are_kept_from_the_next_start_on(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    with CacheDaemon(capacity="64MiB") as daemon:
        cache = open_cache(daemon.socket)
        for idx in range(6):
            assert cache.open(counting_origin.put(f"o{idx}", random_bytes(MIB, idx))).fetch()
        cache.close()
        assert daemon.stop() == 0
        daemon.options = ("--max-files", "2")
        daemon.start()
        wait_until(lambda: len(daemon.extent_files) == 2, "all but two files are gone")
        assert daemon.status()["files"] == 2
