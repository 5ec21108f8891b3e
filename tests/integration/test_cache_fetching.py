"""Fetching through a real daemon from an origin that fails: what came is kept, and the origin is asked for no more than it must be."""

from __future__ import annotations

from collections.abc import Callable

from cache.blocks import BLOCK_BYTES
from cache.client import Cache
from tests.counting_origin import CountingOrigin, Fault, random_bytes
from tests.daemon import CacheDaemon, cache_daemon, open_cache

__all__ = ["cache_daemon", "open_cache"]

OpenCache = Callable[[str], Cache]


def test_every_body_is_cut_and_nothing_is_fetched_twice(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Each answer ends after 100 kB: the blocks are whole and right all the same, and what the origin sent is what the object has."""
    data = random_bytes(16 * BLOCK_BYTES + 12_345)
    url = counting_origin.put("o", data)
    counting_origin.fault = lambda path, start, end: Fault(after_bytes=100_000) if end - start > 100_000 else None
    with open_cache(cache_daemon.socket).open(url) as f:
        assert f.read(0, len(data)) == data
    assert counting_origin.bytes_sent == len(data)
    assert cache_daemon.status()["fetching"]["resumed_fetches"] > 0


def test_connections_are_reset_in_mid_body_and_every_byte_comes(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """A reset throws away what had come and was not read yet; that much is asked for again."""
    data = random_bytes(16 * BLOCK_BYTES + 12_345)
    resets: list[tuple[int, int]] = []

    def fault(path: str, start: int, end: int) -> Fault | None:
        if len(resets) == 5 or (start, end) in resets:
            return None
        resets.append((start, end))
        return Fault(after_bytes=(end - start) // 2, resets=True)

    url = counting_origin.put("o", data)
    counting_origin.fault = fault
    with open_cache(cache_daemon.socket).open(url) as f:
        assert f.read(0, len(data)) == data
    assert len(resets) == 5 and cache_daemon.status()["counters"]["failed_blocks"] == 0


def test_refusals_slow_the_daemon_down_and_every_block_comes(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """One answer in three is a 503: nothing is lost, and the account says that the origin refused."""
    data = random_bytes(40 * BLOCK_BYTES)
    url = counting_origin.put("o", data)
    counting_origin.fault = lambda path, start, end: Fault(refuse=503) if len(counting_origin.asked) % 3 == 1 else None
    with open_cache(cache_daemon.socket).open(url) as f:
        assert f.read(0, len(data)) == data
    status = cache_daemon.status()
    assert status["fetching"]["throttled"] > 0
    assert counting_origin.bytes_sent == len(data)
    (origin,) = status["origins"].values()
    assert origin["in_flight"] == 0
    assert origin["limit"] >= 1
