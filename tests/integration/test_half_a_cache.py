"""A cache of half the data, with the real daemon: from the second epoch on only what does not fit comes from the origin again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.client import Cache
from cache.client.datasets import TokenDataset
from cache.client.formats.tokens import pack_tokens
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from tests.daemon import CacheDaemon

NUM_SHARDS, SAMPLES, SEQ_LEN = 72, 2, 65536


@pytest.fixture
def url(tmp_path: Path) -> str:
    values = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        tokens = pack_tokens(values.integers(0, 2**16, SAMPLES * SEQ_LEN + 1))
        (tmp_path / f"{shard:03d}.tokens").write_bytes(tokens)
    return f"file://{tmp_path}"


def test_from_the_second_epoch_on_only_what_does_not_fit_is_fetched_again(url: str) -> None:
    """The daemon is told the function that the order is, so it knows the next epoch before anybody announces a visit of it."""
    shard_bytes = Path(url.removeprefix("file://"), "000.tokens").stat().st_size
    data_bytes = NUM_SHARDS * shard_bytes
    with CacheDaemon(capacity=data_bytes // 2 + NUM_SHARDS // 2 * 9000) as daemon:
        cache = Cache(daemon.socket)
        dataset = TokenDataset(cache, url, SEQ_LEN)
        sampler = ElasticBatchSampler(dataset, 4, seed=1, shuffle="windowed:1")
        fetched = []
        for epoch in range(3):
            before = daemon.status()["counters"]["fetched_bytes"]
            sampler.set_epoch(epoch)
            for _ in ElasticLoader(dataset, sampler):
                pass
            fetched.append((daemon.status()["counters"]["fetched_bytes"] - before) / data_bytes)
        sampler.close()
        status = daemon.status()
    assert status["used_bytes"] <= status["capacity_bytes"]
    assert "ignored" not in daemon.log, daemon.log
    assert sum(fetched[1:]) / 2 <= 0.64, fetched
