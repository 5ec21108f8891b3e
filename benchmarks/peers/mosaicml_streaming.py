"""MosaicML Streaming over MDS shards of the same samples, shuffled as it does by default, cached below the trial's directory."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import epoch_data
from benchmarks.peers import Task, stack


class _Empty(types.ModuleType):
    """A package whose every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """It imports torchvision and transformers for data sets that are not used here; where they are missing, empty modules will do."""

    _names = tuple(name for name in ("torchvision", "transformers") if importlib.util.find_spec(name) is None)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_ours = fullname.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Missing())

import streaming  # noqa: E402

_NAME = "mds"


def write_shards(dataset: epoch_data.Dataset) -> None:
    """MDS shards of as many samples as the tars have, below local_dir/mds and url/mds."""
    local = Path(dataset.local_dir) / _NAME
    # A shard is closed before the sample that would pass the limit; the slack is for its header.
    limit = dataset.samples_per_shard * (dataset.sample_bytes + 16) + 65536
    with streaming.MDSWriter(out=str(local), columns={"bin": "bytes"}, size_limit=limit) as writer:
        for number in range(dataset.num_samples):
            writer.write({"bin": epoch_data.sample(number, dataset.sample_bytes)})
    epoch_data.upload(local, f"{dataset.url}/{_NAME}")


def collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    return stack([sample["bin"] for sample in samples])


class StreamingLoader:
    def __init__(self, task: Task) -> None:
        os.environ.setdefault("S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(
            remote=f"{task.dataset.url}/{_NAME}",
            local=str(task.scratch / _NAME),
            shuffle=True,
            shuffle_seed=task.seed,
            batch_size=task.batch_size,
        )
        # The S3 client that fetched the index would be inherited by forked workers with its open connection, and two processes then
        # read each other's answers: measured here, wrong and missing samples (over TLS such a connection would break instead).
        for stream in dataset.streams:
            stream._downloader.clean_up()
        self._loader: Any = DataLoader(
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


def open_loader(task: Task) -> StreamingLoader:
    return StreamingLoader(task)
