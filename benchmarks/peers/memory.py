"""All samples in memory: the bound that no loader can beat."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import Task
from benchmarks.peers.mapstyle import MapStyleLoader


def open_loader(task: Task) -> MapStyleLoader:
    dataset = task.dataset
    shards = [(Path(dataset.local_dir) / name).read_bytes() for name in dataset.shards]
    views = [
        memoryview(shards[shard_idx])[offset : offset + dataset.sample_bytes] for shard_idx, offset in dataset.offsets
    ]
    return MapStyleLoader(task, views.__getitem__)
