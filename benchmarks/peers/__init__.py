"""The loaders of the epoch benchmark, one file each, all behind `Loader`. A loader that needs a package says so in `missing`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.epoch_data import Dataset

NAMES = (
    "memory",
    "local_files",
    "local_mmap",
    "railhead",
    "railhead_views",
    "railhead_unindexed",
    "railhead_windowed",
    "s3fs",
    "filecache",
    "webdataset",
    "mosaicml_streaming",
    "litdata",
)


@dataclass(frozen=True)
class Task:
    """What a loader is asked to do."""

    dataset: Dataset
    num_workers: int
    batch_size: int
    scratch: Path
    """An empty directory of this trial, for caches."""
    seed: int = 0


class Loader(Protocol):
    """Made once per trial, inside the measured time of the first epoch; then iterated once per epoch."""

    def epoch(self, number: int) -> Iterable[torch.Tensor]:
        """Batches of uint8, shape [batch, sample_bytes], every sample once."""
        ...

    def close(self) -> None: ...


def module_of(name: str) -> object:
    return importlib.import_module(f"benchmarks.peers.{name}")


def missing_package(name: str) -> str | None:
    """The package that a loader lacks here, None if it can run."""
    package = {"webdataset": "webdataset", "mosaicml_streaming": "streaming", "litdata": "litdata"}.get(name)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def stack(samples: Sequence[bytes | memoryview]) -> torch.Tensor:
    """Samples as one batch; the same one copy for every loader that hands out bytes."""
    batch = torch.empty((len(samples), len(samples[0])), dtype=torch.uint8)
    rows = batch.numpy()
    for row, data in zip(rows, samples, strict=True):
        memoryview(row)[:] = data
    return batch
