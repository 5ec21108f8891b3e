"""Real disks in real trouble: full, out of inodes, read-only, dying, unmounted, needed by others, rotting. Each costs the cache, never a
reader's bytes, and the daemon says what is wrong and comes back by itself.

Small file systems of their own need root; where it is not at hand these tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.blocks import BLOCK_BYTES, FETCH_BYTES
from cache.client import Cache
from cache.client.object import CachedObject
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]
Mount = Callable[..., Path]
MIB = 2**20
SIZE = FETCH_BYTES + 77
DATA = [random_bytes(SIZE, idx) for idx in range(8)]

EXT4_IOC_SHUTDOWN = 0x8004587D


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts small file systems: `mount("tmpfs", "size=32m")`, or `mount("ext4", "")` of 64 MiB on a loop device."""
    mounted: list[Path] = []

    def at(kind: str, options: str) -> Path:
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        source = "tmpfs"
        if kind == "ext4":
            source, options = str(tmp_path / f"image{len(mounted)}"), f"loop,{options}".strip(",")
            with open(source, "wb") as image:
                image.truncate(64 * MIB)
            subprocess.run(["mkfs.ext4", "-q", "-F", source], check=True)
        command = ["mount", "-t", kind, "-o", options, source, str(where)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a small file system here: {getattr(error, 'stderr', b'') or error}")
        mounted.append(where)
        return where

    yield at
    for where in mounted:
        subprocess.run(["umount", "-l", where], check=False, capture_output=True)


def shards(origin: CountingOrigin) -> list[str]:
    return [origin.put(f"o{idx}", data) for idx, data in enumerate(DATA)]


def state(daemon: CacheDaemon) -> str:
    return str(daemon.status()["disk"]["state"])


def whole(obj: CachedObject) -> bytes:
    return obj.read(0, obj.size)


def test_a_full_disk_one_without_inodes_and_a_read_only_one_cost_only_the_cache_and_come_back(
    mount: Mount, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Three daemons at once, because each waits out the pause before its probe."""
    urls = shards(counting_origin)
    disks = {
        "full": mount("tmpfs", "size=20m"),
        "inodes": mount("tmpfs", "size=64m,nr_inodes=24"),
        "read-only": mount("ext4", ""),
    }
    options = ("--keep-free", "0", "--keep-free-files", "0")
    with contextlib.ExitStack() as stack:
        daemons = {
            kind: stack.enter_context(CacheDaemon(capacity="60MiB", options=options, dir=disk / "cache"))
            for kind, disk in disks.items()
        }
        caches = {kind: open_cache(daemon.socket) for kind, daemon in daemons.items()}
        for cache in caches.values():
            assert cache.open(urls[0]).fetch()
        _fill_bytes(disks["full"])
        _fill_inodes(disks["inodes"])
        subprocess.run(["mount", "-o", "remount,abort", disks["read-only"]], check=True)
        for kind, cache in caches.items():
            for url, data in zip(urls[:4], DATA, strict=False):
                assert whole(cache.open(url)) == data, kind
            disk = daemons[kind].status()["disk"]
            assert disk["state"] == "read-only" and disk["failures"].get(kind, 0) >= 1, (kind, disk)
            assert cache.stats().direct_reads > 0
        assert all(whole(cache.open(urls[0])) == DATA[0] for cache in caches.values()), "what is here is still served"
        for kind in ("full", "inodes"):
            for filler in disks[kind].glob("filler*"):
                filler.unlink()
        for kind in ("full", "inodes"):
            wait_until(lambda kind=kind: state(daemons[kind]) in ("probation", "ok"), f"{kind} is tried again")  # type: ignore[misc]
            assert caches[kind].open(urls[5]).fetch(), "and used again"
            assert "is read-only: " in daemons[kind].log and "is probation: " in daemons[kind].log
        assert state(daemons["read-only"]) == "read-only"
        wait_until(lambda: "probe" in daemons["read-only"].status()["disk"]["reason"], "its probe says no")


def _fill_bytes(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def _fill_inodes(disk: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(1000):
            (disk / f"filler{number}").touch()


def test_a_dying_disk_goes_out_of_service_and_readers_get_their_bytes(
    mount: Mount, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """ext4 that was shut down answers everything with EIO, as a dead device does."""
    disk = mount("ext4", "")
    urls = shards(counting_origin)
    with CacheDaemon(capacity="40MiB", options=("--keep-free", "0"), dir=disk / "cache") as daemon:
        cache = open_cache(daemon.socket)
        objects = [cache.open(url) for url in urls[:4]]
        assert all(obj.fetch() for obj in objects)
        handle = os.open(disk, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", 2))
        except OSError as error:
            pytest.skip(f"cannot shut a file system down here: {error}")
        finally:
            os.close(handle)
        for _ in range(2):
            for obj, data in zip(objects, DATA, strict=False):
                assert whole(obj) == data
        wait_until(lambda: state(daemon) == "out of service", "the daemon has seen that it cannot be read")
        misses_before = cache.stats().direct_reads
        assert whole(objects[0]) == DATA[0] and cache.stats().direct_reads > misses_before
        assert daemon.status()["disk"]["failures"]["io"] >= 3


def test_the_cache_gives_way_to_the_other_users_of_its_disk(
    mount: Mount, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    disk = mount("tmpfs", "size=64m")
    urls = shards(counting_origin)
    with CacheDaemon(capacity="1GiB", options=("--keep-free", "16MiB"), dir=disk / "cache") as daemon:
        cache = open_cache(daemon.socket)
        for url, data in zip(urls, DATA, strict=True):
            with cache.open(url) as obj:
                assert whole(obj) == data
        assert daemon.status()["disk"]["bound_bytes"] <= 48 * MIB
        before = len(daemon.extent_files)
        (disk / "others").write_bytes(bytes(30 * MIB))

        def has_given_way() -> bool:
            status = os.statvfs(disk)
            return status.f_bavail * status.f_frsize >= 16 * MIB

        wait_until(has_given_way, "16 MiB are free again")
        assert 0 < len(daemon.extent_files) < before, "as much as was needed, and no more"
        assert whole(cache.open(urls[0])) == DATA[0]
        (disk / "others").unlink()
        wait_until(lambda: daemon.status()["disk"]["bound_bytes"] > 40 * MIB, "what the others gave back is ours again")


def test_an_unmounted_disk_does_not_fill_the_one_below_it(
    mount: Mount, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    disk = mount("tmpfs", "size=32m")
    urls = shards(counting_origin)
    with CacheDaemon(capacity="24MiB", dir=disk) as daemon:
        cache = open_cache(daemon.socket)
        assert cache.open(urls[0]).fetch()
        subprocess.run(["umount", "-l", disk], check=True)
        assert whole(cache.open(urls[1])) == DATA[1]
        wait_until(lambda: state(daemon) == "read-only", "it is noticed")
        wait_until(
            lambda: "probe" in daemon.status()["disk"]["reason"], "the probe does not take the mount point for the disk"
        )
        assert list(disk.iterdir()) == []


def test_files_that_somebody_removed_are_made_anew(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    url = shards(counting_origin)[0]
    assert open_cache(cache_daemon.socket).open(url).fetch()
    for path in cache_daemon.extent_files:
        path.unlink()
    other = Cache(cache_daemon.socket)
    with other.open(url) as obj:
        obj._door.close()  # a process that was not given the file yet
        assert whole(obj) == DATA[0]
    wait_until(lambda: cache_daemon.status()["counters"]["lost_extents"] == 1, "the daemon has seen that it is gone")
    with other.open(url) as obj:
        assert obj.fetch() and whole(obj) == DATA[0]
    other.close()
    assert len(cache_daemon.extent_files) == 1 and state(cache_daemon) == "ok"


def test_what_rots_while_the_daemon_runs_is_found_by_scrubbing_and_fetched_again(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    url = shards(counting_origin)[0]
    with CacheDaemon(options=("--scrub-rate", "1GiB")) as daemon:
        cache = open_cache(daemon.socket)
        obj = cache.open(url)
        assert obj.fetch()
        wait_until(lambda: daemon.status()["counters"]["scrubbed_blocks"] >= 2, "blocks were read back")
        assert daemon.status()["counters"]["rotten_blocks"] == 0
        _flip_a_bit(daemon.extent_files[0], 5)
        wait_until(lambda: daemon.status()["counters"]["rotten_blocks"] == 1, "the rotten block was found")
        assert whole(obj) == DATA[0]
        assert daemon.status()["counters"]["fetched_bytes"] == SIZE + BLOCK_BYTES, "its neighbours stay"


def _flip_a_bit(path: Path, offset: int) -> None:
    """Through the page cache and onto the device, as a bad sector would be read."""
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), offset)
        os.fsync(file.fileno())


def test_a_file_that_was_cut_short_is_mended_after_the_first_reader_that_meets_it(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    url = shards(counting_origin)[0]
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(url)
    assert obj.fetch()
    os.truncate(cache_daemon.extent_files[0], 1000)
    assert whole(obj) == DATA[0] and cache.stats().direct_reads > 0
    wait_until(lambda: cache_daemon.status()["counters"]["lost_extents"] == 1, "the daemon has looked")
    assert obj.fetch()
    direct_before = cache.stats().direct_reads
    assert whole(obj) == DATA[0] and cache.stats().direct_reads == direct_before
