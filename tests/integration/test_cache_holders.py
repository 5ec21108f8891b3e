"""What readers hold open counts over a restart of their daemon: by the kernel's word, for nobody else knows it any more."""

from __future__ import annotations

import contextlib
import os
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
SIZE = 3 * MIB

HOLDER = """
import random, sys
from cache.client import Cache
views = [Cache(sys.argv[1]).open(url).view(0, int(sys.argv[2])) for url in sys.argv[3:]]
print("holding", flush=True)
sys.stdin.readline()
print([view == random.Random(seed).randbytes(len(view)) for seed, view in enumerate(views)], flush=True)
sys.stdin.read()
"""


def bytes_open_or_there(daemon: CacheDaemon, *pids: int) -> int:
    """The kernel's account of extent files, by inode: in the directory, or open or mapped in these processes (the daemon frozen)."""
    daemon.freeze()
    try:
        paths = [*daemon.dir.glob("extents/*/*")]
        for pid in (daemon.pid, *daemon.worker_pids(), *pids):
            for entry in [*Path(f"/proc/{pid}/fd").iterdir(), *Path(f"/proc/{pid}/map_files").iterdir()]:
                with contextlib.suppress(OSError):
                    if os.readlink(entry).startswith(f"{daemon.dir}/extents/"):
                        paths.append(entry)
        files = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files[status.st_ino] = status.st_size
        return sum(files.values())
    finally:
        daemon.thaw()


def test_what_a_reader_maps_while_the_daemon_is_killed_and_started_again_counts_until_it_lets_go(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """One file was evicted before the kill, one is evicted by the new daemon, which was never told of either reader. Until now such bytes
    were on the disk beyond the bound."""
    data = [random_bytes(SIZE, seed) for seed in range(8)]
    urls = [counting_origin.put(f"o{seed}", content) for seed, content in enumerate(data)]
    with CacheDaemon(capacity="16MiB") as daemon:
        command = [sys.executable, "-c", HOLDER, daemon.socket, str(SIZE), *urls[:2]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            assert holder.stdout.readline() == b"holding\n"
            wait_until(lambda: daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
            Cache(daemon.socket).ask_daemon({"op": "evict", "url": urls[0]})
            wait_until(lambda: len(daemon.held_files) == 1, "it is set aside")
            daemon.kill()
            daemon.start()
            status = daemon.status()
            assert SIZE < status["held_bytes"] < 2 * SIZE < status["used_bytes"], "counted from the first moment"
            cache = Cache(daemon.socket)
            wait_until(lambda: cache.daemon_status() is not None, "this process found the daemon again")
            cache.ask_daemon({"op": "evict", "url": urls[1]})
            wait_until(lambda: len(daemon.held_files) == 2, "the second, too, is set aside")
            for url, content in zip(urls[2:], data[2:], strict=True):
                assert cache.open(url).read(0, SIZE) == content
                assert bytes_open_or_there(daemon, holder.pid, os.getpid()) <= 16 * MIB
            assert daemon.status()["held_bytes"] > 2 * SIZE
            holder.stdin.write(b"\n")
            assert holder.stdout.readline() == b"[True, True]\n", "what it holds is right to the end"
            holder.kill()
        wait_until(lambda: not daemon.held_files, "a dead reader holds nothing")
        wait_until(lambda: daemon.status()["held_bytes"] == 0, "and its bytes can be used")
        cache.close()


def test_a_reader_that_finds_everything_in_files_that_it_holds_goes_over_to_the_new_daemon(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """It never needs to ask, so it would go on for ever with files of which the new daemon knows nothing, and which it could not evict."""
    data = random_bytes(FETCH_BYTES)
    cache = open_cache(cache_daemon.socket)
    objects = [cache.open(counting_origin.put(name, data)) for name in ("read-on", "left-alone")]
    assert [obj.read(0, len(data)) for obj in objects] == [data, data]
    cache_daemon.kill()
    cache_daemon.start()

    def is_there() -> bool:
        assert all(objects[0].read(7, 100) == data[7:107] for _ in range(1100))
        return bool(cache_daemon.status()["clients"] == 1)

    wait_until(is_there, "it has found the new daemon")
    cache.ask_daemon({"op": "evict", "url": objects[1].url})
    wait_until(lambda: cache_daemon.status()["held_bytes"] == 0, "what it no longer reads, it let go of")
    assert counting_origin.num_gets == 2 and cache.stats().direct_reads == 0
