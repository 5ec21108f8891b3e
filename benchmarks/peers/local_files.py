"""The same tars as plain local files, one pread per sample: what a dataset that was copied beforehand gives."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers import Task
from benchmarks.peers.mapstyle import MapStyleLoader


def open_loader(task: Task) -> MapStyleLoader:
    dataset = task.dataset
    files = [os.open(Path(dataset.local_dir) / name, os.O_RDONLY) for name in dataset.shards]

    def read(number: int) -> bytes:
        shard_idx, offset = dataset.offsets[number]
        return os.pread(files[shard_idx], dataset.sample_bytes, offset)

    return MapStyleLoader(task, read)
