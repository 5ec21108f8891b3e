"""fsspec's filecache over s3fs: whole shards into a local directory on first touch, local reads afterwards."""

from __future__ import annotations

from typing import Any

import fsspec

from benchmarks.peers import Task
from benchmarks.peers.mapstyle import MapStyleLoader


def open_loader(task: Task) -> MapStyleLoader:
    dataset = task.dataset
    files: dict[int, Any] = {}  # per process, opened on first use: s3fs does not survive a fork

    def read(number: int) -> bytes:
        shard_idx, offset = dataset.offsets[number]
        if shard_idx not in files:
            # One directory per worker: filecache writes to the final name, and readers of one directory see halves of files.
            worker = getattr(_worker_info(), "id", 0)
            options = {"cache_storage": str(task.scratch / f"filecache-{worker}")}
            url = f"filecache::{dataset.url}/{dataset.shards[shard_idx]}"
            files[shard_idx] = fsspec.open(url, "rb", filecache=options).open()
        files[shard_idx].seek(offset)
        data: bytes = files[shard_idx].read(dataset.sample_bytes)
        return data

    return MapStyleLoader(task, read)


def _worker_info() -> Any:
    from torch.utils.data import get_worker_info

    return get_worker_info()
