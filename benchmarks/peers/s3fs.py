"""s3fs: one ranged GET per sample, no cache. The offsets in the tars are given to it for nothing."""

from __future__ import annotations

from s3fs import S3FileSystem

from benchmarks.peers import Task
from benchmarks.peers.mapstyle import MapStyleLoader


def open_loader(task: Task) -> MapStyleLoader:
    dataset = task.dataset
    filesystems: list[S3FileSystem] = []  # filled on first use: an s3fs of before the fork hangs in the worker

    def read(number: int) -> bytes:
        if not filesystems:
            filesystems.append(S3FileSystem(skip_instance_cache=True))
        shard_idx, offset = dataset.offsets[number]
        data: bytes = filesystems[0].cat_file(
            f"{dataset.url}/{dataset.shards[shard_idx]}", start=offset, end=offset + dataset.sample_bytes
        )
        return data

    return MapStyleLoader(task, read)
