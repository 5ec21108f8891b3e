"""Daemons and workers are killed at random moments, round after round, while readers compare every byte.

RAILHEAD_FAULT_ROUNDS sets the number of rounds (default 3; run some hundred before a release), RAILHEAD_FAULT_SEED the first seed.
Every other fault beside it, and for longer: tests/e2e/cache_soak.py, of which a short run is here.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from cache.blocks import FETCH_BYTES
from cache.client import Cache
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until
from tests.e2e.cache_soak import soaked

NUM_ROUNDS = int(os.environ.get("RAILHEAD_FAULT_ROUNDS", "3"))
FIRST_SEED = int(os.environ.get("RAILHEAD_FAULT_SEED", "0"))
NUM_OBJECTS, OBJECT_BYTES, SEED_STRIDE = 6, 2 * FETCH_BYTES + 77, 1000

READER = """
import random, sys
from cache.client import Cache
socket, seed, size, stride, *urls = sys.argv[1:]
seed, size, stride = int(seed), int(size), int(stride)
expected = [random.Random(stride + idx).randbytes(size) for idx in range(len(urls))]
cache, rng = Cache(socket), random.Random(seed)
objects = [cache.open(url) for url in urls]
print("reading", flush=True)
for number in range(150):
    idx, offset, length = rng.randrange(len(urls)), rng.randrange(size), rng.choice([10, 60_000, 1_000_000])
    way = rng.randrange(3)
    if way == 0:
        got = objects[idx].read(offset, length)
    elif way == 1:
        got = bytes(objects[idx].view(offset, length))
    else:
        with cache.open(urls[idx]) as again:
            got = again.read(offset, length)
    if got != expected[idx][offset : offset + length]:
        sys.exit(f"wrong bytes in read {number}: object {idx}, [{offset}, {offset + length}), by way {way}")
stats = cache.stats()
print(stats.hits, stats.misses, stats.direct_reads, flush=True)
"""


@pytest.mark.e2e
@pytest.mark.timeout(120 + 30 * NUM_ROUNDS)
def test_no_reader_ever_sees_a_wrong_byte_whoever_is_killed(counting_origin: CountingOrigin) -> None:
    """Three readers per round in a cache that holds half of what they read; at the end the daemon's books balance."""
    urls = [counting_origin.put(f"o{idx}", random_bytes(OBJECT_BYTES, SEED_STRIDE + idx)) for idx in range(NUM_OBJECTS)]
    with CacheDaemon(capacity=NUM_OBJECTS * OBJECT_BYTES // 2) as daemon:
        for seed in range(FIRST_SEED, FIRST_SEED + NUM_ROUNDS):
            rng = random.Random(seed)
            arguments = [str(OBJECT_BYTES), str(SEED_STRIDE), *urls]
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", READER, daemon.socket, str(3 * seed + number), *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                for number in range(3)
            ]
            try:
                _make_trouble(daemon, readers, rng)
                for reader in readers:
                    output, errors = reader.communicate(timeout=100)
                    assert reader.returncode == 0, f"seed {seed}: {errors.decode()}\n{output.decode()}"
            finally:
                for reader in readers:
                    reader.kill()
                    reader.wait()
        _assert_books_balance(daemon, urls)


def _make_trouble(daemon: CacheDaemon, readers: list[subprocess.Popen[bytes]], rng: random.Random) -> None:
    """Kills the daemon or a worker after a random time, again and again while somebody reads."""
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline() == b"reading\n"
    for _ in range(4):
        with suppress(subprocess.TimeoutExpired):
            readers[0].wait(rng.uniform(0.05, 0.6))
        if rng.random() < 0.5:
            daemon.kill()
            if rng.random() < 0.5:
                with suppress(subprocess.TimeoutExpired):
                    readers[0].wait(rng.uniform(0.0, 0.5))
            daemon.start()
        else:
            for pid in daemon.worker_pids()[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _assert_books_balance(daemon: CacheDaemon, urls: list[str]) -> None:
    wait_until(lambda: daemon.status()["clients"] == 0, "all readers have gone")
    wait_until(lambda: daemon.status()["in_flight_blocks"] == 0, "nothing is under way")
    wait_until(lambda: daemon.status()["held_bytes"] == 0, "nobody holds what was evicted")
    status = daemon.status()
    assert status["held_bytes"] == status["waiting_requests"] == status["streams"] == 0
    assert status["files"] == status["extents"] == len(daemon.extent_files)
    assert status["used_bytes"] <= status["capacity_bytes"] and daemon.disk_bytes() <= status["used_bytes"]
    assert "Traceback" not in daemon.log
    cache = Cache(daemon.socket)
    for idx, url in enumerate(urls):
        with cache.open(url) as obj:
            assert obj.read(0, obj.size) == random_bytes(OBJECT_BYTES, SEED_STRIDE + idx)
            assert obj.verify() is not False
    cache.close()


@pytest.mark.e2e
@pytest.mark.timeout(300 + 10 * NUM_ROUNDS)
def test_no_byte_is_wrong_and_no_sample_lost_whatever_is_broken_besides() -> None:
    """Kills, damaged files, a full disk, an origin that fails and goes away, an object that is overwritten: a few of each."""
    with soaked(FIRST_SEED, kills=3 * NUM_ROUNDS) as soak:
        assert soak.counts["samples audited"] > 0 and soak.counts["reads audited"] > 0
