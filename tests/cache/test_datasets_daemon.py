"""Data sets through a real daemon: the same batches from every kind of worker, with the daemon alive, killed, and fetching ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cache.blocks import FETCH_BYTES
from cache.client import Cache
from cache.client.datasets import ShardDataset, TokenDataset
from cache.client.formats.tokens import HEADER_BYTES, TokenFormat, pack_tokens
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from tests.daemon import CacheDaemon

SEQ_LEN = 4096
NUM_BLOCKS = 5
BATCH = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor]:
    """(url, tokens): one shard of five blocks."""
    values = np.random.default_rng(0).integers(0, 2**16, (NUM_BLOCKS * FETCH_BYTES - HEADER_BYTES) // 2)
    root = tmp_path_factory.mktemp("tokens")
    (root / "0.tokens").write_bytes(pack_tokens(values))
    return f"file://{root}", torch.from_numpy(values)


@pytest.fixture
def daemon() -> Iterator[CacheDaemon]:
    with CacheDaemon() as daemon:
        yield daemon


def numbered(raw: dict[str, Any]) -> tuple[int, torch.Tensor]:
    return raw["__index__"], torch.from_numpy(np.frombuffer(raw["uint16"], dtype=np.uint16).astype(np.int64))


def loader_over(cache: Cache, url: str, **options: Any) -> ElasticLoader:
    dataset = TokenDataset(cache, url, SEQ_LEN, numbered)
    return ElasticLoader(dataset, ElasticBatchSampler(dataset, BATCH, seed=1), **options)


def check(batch: list[torch.Tensor], values: torch.Tensor) -> list[int]:
    """Every window is the one that its number says; the numbers."""
    for number, window in zip(batch[0].tolist(), batch[1], strict=True):
        assert torch.equal(window, values[number * SEQ_LEN : (number + 1) * SEQ_LEN + 1])
    return batch[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
    ids=["in the process", "forked", "spawned"],
)
def test_every_kind_of_worker_reads_through_the_daemon(
    daemon: CacheDaemon, tokens: tuple[str, torch.Tensor], options: dict[str, Any]
) -> None:
    """The parent has read through the daemon before it forks, as every script that looks at its first sample does."""
    url, values = tokens
    cache = Cache(daemon.socket)
    loader = loader_over(cache, url, **options)
    expected = [
        batch
        for _, batch in zip(range(len(loader)), ElasticBatchSampler(len(values) // SEQ_LEN, BATCH, seed=1), strict=True)
    ]
    assert [check(batch, values) for batch in loader] == expected
    del loader
    status = cache.daemon_status()
    assert status is not None
    assert status["counters"]["fetched_bytes"] == NUM_BLOCKS * FETCH_BYTES
    assert status["readers"].get("direct_bytes", 0) == 0
    cache.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_of_the_caches_files_are_the_same_bytes(
    daemon: CacheDaemon, tokens: tuple[str, torch.Tensor], num_workers: int
) -> None:
    """Two epochs: cold, where most reads wait, and warm, where every read is a slice of a memory map."""
    url, values = tokens
    cache = Cache(daemon.socket)
    dataset = ShardDataset(cache, url, TokenFormat(SEQ_LEN), viewed, zero_copy=True)
    options: dict[str, Any] = {"multiprocessing_context": "fork"} if num_workers else {}
    loader = ElasticLoader(dataset, ElasticBatchSampler(dataset, BATCH, seed=1), num_workers=num_workers, **options)
    for _ in range(2):
        seen = [number for batch in loader for number in check(batch, values)]
        assert len(set(seen)) == len(seen) == len(loader) * BATCH
    loader.close()
    cache.close()


def viewed(raw: dict[str, Any]) -> tuple[int, torch.Tensor]:
    assert isinstance(raw["uint16"], memoryview) and raw["uint16"].readonly
    return numbered(raw)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_killing_the_daemon_in_mid_epoch_changes_no_sample(
    daemon: CacheDaemon, tokens: tuple[str, torch.Tensor], num_workers: int
) -> None:
    """A failing cache is a slower cache: the loop does not even notice."""
    url, values = tokens
    cache = Cache(daemon.socket)
    loader = loader_over(cache, url, num_workers=num_workers)
    seen = []
    for batch in loader:
        seen += check(batch, values)
        if loader.step == 2:
            daemon.kill()
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) == len(loader) * BATCH
    cache.close()


def test_the_announced_order_is_fetched_before_it_is_read(
    daemon: CacheDaemon, tokens: tuple[str, torch.Tensor]
) -> None:
    """The index needs the first block only; a loop that has asked for one batch and is busy with it finds all others there."""
    url, _ = tokens
    cache = Cache(daemon.socket)
    dataset = TokenDataset(cache, url, SEQ_LEN, numbered)
    loader = ElasticLoader(dataset, ElasticBatchSampler(dataset, BATCH, seed=1, shuffle=False))
    batches = iter(loader)
    next(batches)
    deadline_s = time.monotonic() + 20
    status: dict[str, Any] = {}
    while time.monotonic() < deadline_s:
        status = cache.daemon_status() or {}
        if status["counters"]["fetched_bytes"] == NUM_BLOCKS * FETCH_BYTES:
            break
        time.sleep(0.02)
    assert status["counters"]["prefetches"] >= NUM_BLOCKS - 2
    before = cache.stats().misses
    for _ in batches:
        pass
    assert cache.stats().misses == before
    loader.close()
    cache.close()


def test_what_was_resident_before_indexing_is_known(daemon: CacheDaemon, tokens: tuple[str, torch.Tensor]) -> None:
    """'The cache was warm' must not be said of bytes that indexing itself has fetched."""
    url, _ = tokens
    cache = Cache(daemon.socket)
    loader = loader_over(cache, url)
    assert set(loader.loader.dataset.resident_bytes_at_open) == {0}  # type: ignore[attr-defined]
    for _ in loader:
        pass
    again = Cache(daemon.socket)
    assert sum(TokenDataset(again, url, SEQ_LEN).resident_bytes_at_open or ()) == NUM_BLOCKS * FETCH_BYTES
    cache.close()
    again.close()
