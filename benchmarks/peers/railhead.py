"""Railhead: the same tars through the cache daemon of this node, in the order that the sampler announces, with the index that was
published beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.peers import Task, stack
from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.tar import TarFormat
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler


def payload(raw: dict[str, Any]) -> bytes:
    data: bytes = raw["bin"]
    return data


def collate(samples: Sequence[bytes]) -> torch.Tensor:
    return stack(samples)


class RailheadLoader:
    def __init__(
        self, task: Task, *, shard_format: TarFormat | None = None, shuffle: str = "full", zero_copy: bool = False
    ) -> None:
        dataset = ShardDataset(
            Cache(), f"{task.dataset.url}/tar", shard_format or TarFormat(), decode=payload, zero_copy=zero_copy
        )
        self._sampler = ElasticBatchSampler(dataset, task.batch_size, seed=task.seed, shuffle=shuffle)
        self._loader = ElasticLoader(
            dataset,
            self._sampler,
            num_workers=task.num_workers,
            collate_fn=collate,
            persistent_workers=task.num_workers > 0,
        )

    def epoch(self, number: int) -> Iterable[torch.Tensor]:
        return self._loader

    def close(self) -> None:
        self._sampler.close()


def open_loader(task: Task) -> RailheadLoader:
    return RailheadLoader(task)
