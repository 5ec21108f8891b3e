"""A failing cache is a slower cache, and never a wrong byte: daemons, workers, readers and origins are killed, frozen and damaged."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable

import pytest

from cache.blocks import FETCH_BYTES
from cache.client import Cache, door
from cache.daemon import wire
from cache.errors import CacheError, ObjectChanged, ObjectNotFound, OriginUnavailable
from cache.store.format import LABEL_BYTES, TABLE_OFFSET
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]


def restart(daemon: CacheDaemon) -> None:
    """Starts it again and waits until this process, which looks once a second, has found it."""
    daemon.start()
    cache = Cache(daemon.socket)
    wait_until(lambda: cache.daemon_status() is not None, "this process found the daemon again")


DATA = random_bytes(3 * FETCH_BYTES + 99)


def test_a_daemon_killed_while_a_reader_waits_costs_the_reader_nothing_but_time(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    assert obj.read(0, 100) == DATA[:100]
    counting_origin.hold("o", from_byte=2 * FETCH_BYTES)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(obj.read(0, len(DATA))))
    reader.start()
    wait_until(lambda: cache_daemon.status()["waiting_requests"] == 1, "the reader waits")
    cache_daemon.kill()
    counting_origin.release()
    reader.join()
    assert read == [DATA]
    assert obj.read(100, 5000) == DATA[100:5100], "what is held open is readable without a daemon"


def test_a_restart_fetches_nothing_complete_again(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """kill -9 with two blocks on disk and two on their way; then the same reader goes on with the new daemon."""
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    assert obj.read(0, 2 * FETCH_BYTES) == DATA[: 2 * FETCH_BYTES]
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    already = dict(counting_origin.gets)
    cache_daemon.kill()
    restart(cache_daemon)
    assert cache_daemon.announced["resident_bytes"] > 0
    with open_cache(cache_daemon.socket).open(obj.url) as again:
        assert again.read(0, len(DATA)) == DATA
        assert again.verify()
    assert obj.read(0, len(DATA)) == DATA
    assert {key: counting_origin.gets[key] for key in already} == already
    assert set(counting_origin.gets.values()) == {1} and len(counting_origin.gets) == 4


def test_a_reader_never_mixes_two_daemons(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """A link whose connections are all in use connects again, and meets the successor, whose generations mean other files."""
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    obj.read(0, 100)
    link = cache._door.link()
    assert link is not None
    in_use = list(link._idle)  # as if other threads had them
    link._idle.clear()
    cache_daemon.kill()
    cache_daemon.start()
    assert obj.read(3 * FETCH_BYTES, 99) == DATA[3 * FETCH_BYTES :]
    assert in_use and not link.is_alive
    for channel in in_use:
        link._drop(channel)
    wait_until(lambda: cache._door.link() is not None, "the reader found the new daemon")
    assert obj.read(0, len(DATA)) == DATA


def test_a_frozen_daemon_is_taken_for_dead_and_used_again_when_it_thaws(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    obj.read(0, 100)
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    cache_daemon.freeze()
    try:
        assert obj.read(3 * FETCH_BYTES, 99) == DATA[3 * FETCH_BYTES :]
        assert cache.stats().direct_reads == 1
    finally:
        cache_daemon.thaw()
    wait_until(lambda: cache._door.link() is not None, "the reader came back")
    assert obj.fetch() and obj.read(0, len(DATA)) == DATA


def test_a_killed_worker_is_replaced_and_its_blocks_are_fetched_again(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    counting_origin.hold("o")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(obj.read(0, len(DATA))))
    reader.start()
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] > 1, "workers fetch")
    old = cache_daemon.worker_pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    counting_origin.release()
    reader.join()
    assert read == [DATA]
    wait_until(lambda: cache_daemon.status()["worker_restarts"] == 2, "both were replaced")
    assert not set(old) & set(cache_daemon.worker_pids())


def test_workers_die_with_their_daemon(cache_daemon: CacheDaemon) -> None:
    workers = cache_daemon.worker_pids()
    assert len(workers) == 2
    cache_daemon.kill()
    wait_until(lambda: not any(_is_running(pid) for pid in workers), "the workers ended")


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_an_object_overwritten_in_mid_read_is_its_old_self_or_an_error(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    new = random_bytes(len(DATA), seed=9)
    cache = open_cache(cache_daemon.socket)
    old = cache.open(counting_origin.put("o", DATA))
    assert old.read(0, FETCH_BYTES // 2) == DATA[: FETCH_BYTES // 2]
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    counting_origin.put("o", new)
    assert old.read(0, FETCH_BYTES) == DATA[:FETCH_BYTES], "what is here stays readable"
    with pytest.raises(ObjectChanged):
        old.read(3 * FETCH_BYTES, 99)
    wait_until(lambda: cache.open(old.url).etag != old.etag, "a new open sees the new generation")
    with cache.open(old.url) as fresh:
        assert fresh.read(0, len(new)) == new
    assert old.read(0, FETCH_BYTES) == DATA[:FETCH_BYTES]
    with pytest.raises(ObjectChanged):
        cache.open(old.url, etag='"never"')


def test_a_deleted_object_is_an_error_once_its_blocks_are_needed(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    obj.read(0, 10)
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    del counting_origin.objects["o"]
    assert obj.read(0, 100) == DATA[:100]
    with pytest.raises((ObjectNotFound, ObjectChanged)):
        obj.read(3 * FETCH_BYTES, 99)


def test_with_the_origin_away_what_is_here_is_served_and_the_rest_comes_when_it_is_back(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    obj.read(0, 10)
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "readahead has landed")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(obj.read(0, len(DATA))))
    with counting_origin.away():
        assert cache.open(obj.url).read(0, 1000) == DATA[:1000], "an open goes on with the generation seen last"
        with pytest.raises(OriginUnavailable):
            cache.open(counting_origin.url("unknown"))
        reader.start()
        wait_until(lambda: cache_daemon.status()["counters"]["retries"] > 0, "the daemon tries again")
    reader.join()
    assert read == [DATA]


def test_a_daemon_of_another_version_is_none(
    cache_daemon: CacheDaemon,
    counting_origin: CountingOrigin,
    open_cache: OpenCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A node's daemon is upgraded while images of jobs still have the old client: its files may mean something else to them, so they must
    not get any, and training must go on."""
    url = counting_origin.put("o", DATA)
    with monkeypatch.context() as patched:
        patched.setattr(wire, "PROTOCOL_VERSION", wire.PROTOCOL_VERSION - 1)
        patched.setattr(door, "FIRST_CONNECT_WAIT_S", 0.0)
        obj = open_cache(cache_daemon.socket).open(url)
        assert obj.read(5, 1000) == DATA[5:1005] and obj.on_disk_bytes is None
        assert "run the same version of railhead on both sides" in caplog.text
    assert cache_daemon.extent_files == []


Damage = Callable[[bytearray], None]


def _flip(offset: int) -> Damage:
    def damage(content: bytearray) -> None:
        content[offset] ^= 0x10

    return damage


def _truncate(size: int) -> Damage:
    def damage(content: bytearray) -> None:
        del content[size:]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _flip(0),
        _flip(2 * FETCH_BYTES + 17),
        _flip(3 - LABEL_BYTES),
        _flip(40 - LABEL_BYTES),
        _flip(TABLE_OFFSET + 1 - LABEL_BYTES),
        _truncate(FETCH_BYTES),
        _truncate(-10),
        _truncate(0),
    ],
    ids=["first byte", "third block", "magic", "identity", "table", "truncated", "label cut", "emptied"],
)
def test_damage_on_disk_is_noticed_after_a_restart_and_fetched_again(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache, damage: Damage
) -> None:
    with open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA)) as obj:
        assert obj.fetch()
    cache_daemon.kill()
    (path,) = cache_daemon.extent_files
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)
    restart(cache_daemon)
    with open_cache(cache_daemon.socket).open(obj.url) as obj:
        assert obj.read(0, len(DATA)) == DATA
        assert obj.verify()
    assert counting_origin.num_gets > 4, "the damaged bytes were fetched again"
    assert len(cache_daemon.extent_files) == 1


@pytest.mark.parametrize("what", ["lost", "garbage", "other tables"])
def test_the_index_is_made_again_from_the_files(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache, what: str
) -> None:
    with open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA)) as obj:
        assert obj.fetch()
    cache_daemon.kill()
    index = cache_daemon.dir / "index.db"
    for path in cache_daemon.dir.glob("index.db*"):
        path.unlink()
    if what == "garbage":
        index.write_bytes(random_bytes(9000))
    elif what == "other tables":
        with contextlib.closing(sqlite3.connect(index)) as db:
            db.executescript("CREATE TABLE extents(a); CREATE TABLE objects(b);")
    restart(cache_daemon)
    with open_cache(cache_daemon.socket).open(obj.url) as obj:
        assert obj.read(0, len(DATA)) == DATA
    assert counting_origin.num_gets == 4, "nothing was fetched again"


def test_a_file_cut_short_under_a_running_daemon_sends_its_readers_to_the_origin(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    assert obj.fetch()
    os.truncate(cache_daemon.extent_files[0], 50)
    assert obj.read(100, 1000) == DATA[100:1100]
    wait_until(lambda: cache_daemon.status()["counters"]["rotten_blocks"] > 0, "the daemon has looked at it")
    assert obj.read(0, len(DATA)) == DATA


def test_an_emptied_directory_under_a_running_daemon_costs_only_the_cache(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    cache = open_cache(cache_daemon.socket)
    first = cache.open(counting_origin.put("a", DATA))
    assert first.fetch(0, FETCH_BYTES)
    for path in cache_daemon.extent_files:
        path.unlink()
        path.parent.rmdir()
    (cache_daemon.dir / "extents").rmdir()
    assert first.read(0, len(DATA)) == DATA
    assert cache.open(counting_origin.put("b", DATA)).read(0, 100) == DATA[:100]


def test_without_a_daemon_everything_comes_from_the_origin(
    counting_origin: CountingOrigin, open_cache: OpenCache, tmp_path: object
) -> None:
    cache = open_cache("")
    with cache.open(counting_origin.put("o", DATA)) as obj:
        assert obj.read(0, len(DATA)) == DATA and obj.view(5, 10) == DATA[5:15]
        assert obj.fetch() is False and obj.verify() is None and obj.on_disk_bytes is None
        counting_origin.put("o", DATA[:100])
        with pytest.raises(ObjectChanged):
            obj.read(0, 10 * 2**20)
    assert cache.daemon_status() is None
    with pytest.raises(CacheError):
        cache.open(counting_origin.url("nothing"))
