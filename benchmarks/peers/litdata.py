"""LitData over chunks of the same samples in its own format, shuffled, cached below the trial's directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader
from litdata.streaming.cache import Cache

from benchmarks import epoch_data
from benchmarks.peers import Task, stack

_NAME = "litdata"

# It reads S3 through obstore and offers no setting for an endpoint without TLS.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def write_shards(dataset: epoch_data.Dataset) -> None:
    """Chunks of as many samples as the tars have, below local_dir/litdata and url/litdata."""
    local = Path(dataset.local_dir) / _NAME
    cache = Cache(str(local), chunk_size=dataset.samples_per_shard)
    for number in range(dataset.num_samples):
        cache[number] = epoch_data.sample(number, dataset.sample_bytes)
    cache.done()
    cache.merge()
    epoch_data.upload(local, f"{dataset.url}/{_NAME}")


def collate(samples: list[bytes]) -> torch.Tensor:
    return stack(samples)


class LitDataLoader:
    def __init__(self, task: Task) -> None:
        dataset = StreamingDataset(
            f"{task.dataset.url}/{_NAME}",
            cache_dir=str(task.scratch / _NAME),
            shuffle=True,
            seed=task.seed,
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )
        self._loader: Any = StreamingDataLoader(
            dataset,
            batch_size=task.batch_size,
            num_workers=task.num_workers,
            collate_fn=collate,
            persistent_workers=task.num_workers > 0,
        )

    def epoch(self, number: int) -> Iterable[torch.Tensor]:
        batches: Iterable[torch.Tensor] = self._loader
        return batches

    def close(self) -> None:
        del self._loader


def open_loader(task: Task) -> LitDataLoader:
    return LitDataLoader(task)
