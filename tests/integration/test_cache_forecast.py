"""A daemon whose origin gives less than its reader needs says so while it happens, with real processes."""

from __future__ import annotations

import time

from benchmarks.proxy_process import ProxyProcess
from cache.client import Cache
from cache.status_command import status_page
from tests.counting_origin import CountingOrigin
from tests.daemon import CacheDaemon

READ = 256 * 1024
STEP_S = 0.005
NEEDS = READ / STEP_S
GIVES = 0.6 * NEEDS
NUM_READS = 512
PASSES = 3
"""More than are needed: that the daemon or we are held up for a while must not leave it nothing to foretell."""
FACTOR = 3
"""Of what is measured on a machine that has other things to do."""


def test_a_reader_that_needs_more_than_the_origin_gives_is_foretold_that_it_will_wait() -> None:
    """From what it announces and how it waits alone; looked for while it reads, for there is something to be foretold only then."""
    origin = CountingOrigin()
    path = "data.bin"
    origin.put(path, bytes(NUM_READS * READ))
    try:
        with (
            ProxyProcess(f"http://127.0.0.1:{origin.port}", rate_total=GIVES) as proxy,
            CacheDaemon(capacity="512MiB") as daemon,
        ):
            url = f"{proxy.endpoint}/{path}"
            cache = Cache(daemon.socket)
            stream = cache.stream("train")
            before = daemon.status()["forecast"]
            stream.announce([(url, idx * READ, READ) for idx in range(NUM_READS)] * PASSES)
            seen = daemon.status()
            with cache.open(url) as data:
                for idx in range(NUM_READS * PASSES):
                    data.read(idx % NUM_READS * READ, READ)
                    time.sleep(STEP_S)  # What a step of training takes.
                    stream.advance(idx + 1)
                    if not idx % 16:
                        seen = daemon.status()
                        if None not in (seen["forecast"][key] for key in ("utilisation", "origin_gives_bytes_per_s")):
                            break
            cache.close()
    finally:
        origin.close()
    assert before["utilisation"] is None and "nobody reads" in before["text"]
    told = seen["forecast"]
    assert told["utilisation"] is not None, f"all was read before anything was foretold: {told}"
    assert 0.6 / FACTOR < told["utilisation"] <= 1.0, told
    assert NEEDS / FACTOR < told["need_bytes_per_s"] < NEEDS * FACTOR, told
    assert GIVES / FACTOR < told["origin_gives_bytes_per_s"] < GIVES * FACTOR, told
    assert 0 <= told["here_share"] <= 1 and told["unknown_because"] is None
    assert f"forecast         {told['text']}" in status_page(seen) and "utilisation" in told["text"]
