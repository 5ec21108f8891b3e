"""Readers come as forked children, spawned children, threads and all at once; the daemon sees who is alive."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.blocks import FETCH_BYTES
from cache.client import Cache, CachedObject
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]
DATA = random_bytes(3 * FETCH_BYTES)

# torch and other libraries in the test's process run threads; forking beside them is what DataLoader does, and what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def read_everything(obj: CachedObject, seed: int, num_reads: int = 50) -> bool:
    rng = random.Random(seed)
    for _ in range(num_reads):
        offset, length = rng.randrange(len(DATA)), rng.randrange(200_000)
        if obj.read(offset, length) != DATA[offset : offset + length]:
            return False
    return True


def in_child(work: Callable[[], bool]) -> int:
    """Forks; the child exits with 0 if and only if `work` says True."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_forked_children_read_beside_their_parent(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    obj.read(0, 10)
    children = [in_child(lambda seed=seed: read_everything(obj, seed)) for seed in range(3)]  # type: ignore[misc]
    assert read_everything(obj, 99)
    assert [exit_code(pid) for pid in children] == [0, 0, 0]
    assert set(counting_origin.gets.values()) == {1}, "all of them share each fetch"
    wait_until(lambda: cache_daemon.status()["clients"] == 1, "the daemon saw the children go")


def test_a_fork_in_the_middle_of_other_threads_reads_is_safe(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Locks may be held, and requests half sent, by threads that the child does not have."""
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    done = threading.Event()
    failures: list[str] = []

    def read(seed: int) -> None:
        while not done.is_set():
            if not read_everything(obj, seed, 5):
                failures.append("wrong bytes in the parent")
            cache.open(obj.url).close()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(12):
            assert exit_code(in_child(lambda seed=seed: read_everything(obj, seed, 20))) == 0  # type: ignore[misc]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_fork_without_a_daemon_is_safe(counting_origin: CountingOrigin, open_cache: OpenCache) -> None:
    """Each process has a worker of its own for reading the origin; an answer never reaches the wrong one."""
    obj = open_cache("").open(counting_origin.put("o", DATA))
    assert obj.read(5, 10) == DATA[5:15]
    children = [in_child(lambda seed=seed: read_everything(obj, seed, 10)) for seed in range(2)]  # type: ignore[misc]
    assert read_everything(obj, 99, 10)
    assert [exit_code(pid) for pid in children] == [0, 0]


def _read_pickled(blob: bytes) -> bool:
    return read_everything(pickle.loads(blob), seed=5)


@pytest.mark.parametrize("with_daemon", [True, False])
def test_an_object_survives_pickling_into_a_spawned_child(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache, with_daemon: bool
) -> None:
    obj = open_cache(cache_daemon.socket if with_daemon else "").open(counting_origin.put("o", DATA))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_pickled, (pickle.dumps(obj),))
        pool.close()
        pool.join()


HOLDER = """
import os, sys, threading, time
from cache.client import Cache
obj = Cache(sys.argv[1]).open(sys.argv[2])
obj.read(0, 10)
threading.Thread(target=obj.read, args=(obj.size - 10, 10), daemon=True).start()
while len(obj._mapping.link._channels) < 1 or obj._mapping.link._idle:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


def test_a_child_does_not_keep_its_killed_parent_alive_in_the_daemons_eyes(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin
) -> None:
    """It was forked while another thread of the parent waited on a connection, whose copy nobody in the child refers to."""
    url = counting_origin.put("o", DATA)
    counting_origin.hold("o", from_byte=2 * FETCH_BYTES)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, cache_daemon.socket, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as reader:
        assert reader.stdout is not None
        child = int(reader.stdout.readline())
        try:
            assert cache_daemon.status()["clients"] == 1
            reader.kill()
            wait_until(lambda: cache_daemon.status()["clients"] == 0, "the daemon saw the parent die")
            assert cache_daemon.status()["waiting_requests"] == 0
        finally:
            counting_origin.release()
            os.kill(child, signal.SIGKILL)


def test_programs_that_the_reader_starts_inherit_no_file_of_the_cache(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    obj = open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA))
    assert obj.fetch()
    code = "import os; os.system('ls -l /proc/self/fd')"
    listing = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, close_fds=False, check=True
    ).stdout.decode()
    assert listing and "extents" not in listing and "railhead-words" not in listing


def test_nothing_of_two_hundred_readers_is_left_in_the_daemon(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin
) -> None:
    """Descriptors, clients and streams, of readers that say goodbye and of those that just break off."""
    url = counting_origin.put("o", DATA)

    def num_descriptors() -> int:
        return len(os.listdir(f"/proc/{cache_daemon.pid}/fd"))

    def visit(number: int) -> None:
        cache = Cache(cache_daemon.socket)
        with cache.open(url) as obj:
            obj.read(0, 10)
            stream = cache.stream("s")
            stream.announce([(url, 0, 10)])
        link = cache._door.link()
        assert link is not None
        if number % 2:
            link.close()
        else:
            cache.close()

    visit(0)
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] == 0, "it is at rest")
    wait_until(lambda: cache_daemon.status()["clients"] == 0, "the first has gone")
    before = num_descriptors()
    for number in range(200):
        visit(number)
    wait_until(lambda: cache_daemon.status()["clients"] == 0, "all have gone")
    wait_until(lambda: num_descriptors() <= before, "no descriptor is left")
    status = cache_daemon.status()
    assert (status["streams"], status["announced_visits"], status["held_bytes"], status["waiting_requests"]) == (
        0,
        0,
        0,
        0,
    )
    assert "Traceback" not in cache_daemon.log and "never retrieved" not in cache_daemon.log


def test_an_impatient_reader_that_goes_away_leaves_the_fetch_to_the_others(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache, tmp_path: Path
) -> None:
    url = counting_origin.put("o", DATA)
    counting_origin.hold("o")
    code = "import sys; from cache.client import Cache; Cache(sys.argv[1]).open(sys.argv[2]).read(0, 10)"
    with subprocess.Popen([sys.executable, "-c", code, cache_daemon.socket, url]) as impatient:
        wait_until(lambda: cache_daemon.status()["waiting_requests"] == 1, "it waits")
        read: list[bytes] = []
        obj = open_cache(cache_daemon.socket).open(url)
        patient = threading.Thread(target=lambda: read.append(obj.read(0, 10)))
        patient.start()
        wait_until(lambda: cache_daemon.status()["waiting_requests"] == 2, "both wait")
        impatient.kill()
    wait_until(lambda: cache_daemon.status()["waiting_requests"] == 1, "one is left")
    counting_origin.release()
    patient.join()
    assert read == [DATA[:10]] and counting_origin.gets["o", 0] == 1
