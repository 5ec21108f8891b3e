"""What a daemon remembers of what its readers opened: nothing, once they have closed it and it has left the disk."""

from __future__ import annotations

from collections.abc import Callable

from cache.client import Cache
from cache.client.link import CLOSED_AT_ONCE
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]
SIZE = 700_000
NUM_OBJECTS = 70
ROOM = 12


def test_a_reader_of_many_small_files_leaves_those_behind_that_are_still_here(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """A job that reads a million images for a week announces, opens and closes each of them in every epoch."""
    data = [random_bytes(SIZE, seed) for seed in range(4)]
    urls = [counting_origin.put(f"{idx}.jpg", data[idx % 4]) for idx in range(NUM_OBJECTS)]
    with CacheDaemon(capacity=ROOM * (SIZE + 16_384)) as daemon:
        cache = open_cache(daemon.socket)
        stream = cache.stream("train")
        stream.announce([(url, 0, SIZE) for url in urls])
        for idx, url in enumerate(urls):
            with cache.open(url) as image:
                assert image.read(0, SIZE) == data[idx % 4]
            stream.advance(idx + 1)
        stream.close()
        known = lambda: daemon.status()["objects"]  # noqa: E731
        wait_until(lambda: known() <= ROOM + CLOSED_AT_ONCE, "what was closed and evicted is forgotten")
        with cache.open(urls[0]) as image:
            assert image.read(0, SIZE) == data[0], "and is fetched anew when it is wanted"
        cache.close()
        wait_until(lambda: known() <= ROOM, "when the reader ends the rest goes, too")
