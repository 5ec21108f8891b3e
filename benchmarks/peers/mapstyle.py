"""What map-style loaders share: torch's own DataLoader over a function from sample number to bytes, in random order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.peers import Task, stack

Read = Callable[[int], bytes | memoryview]


class _Samples(torch.utils.data.Dataset[bytes]):
    def __init__(self, read: Read, count: int) -> None:
        self.read = read
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> bytes:
        return self.read(number)


class MapStyleLoader:
    """Workers stay between epochs (persistent_workers), as anyone who cares about speed has it."""

    def __init__(self, task: Task, read: Read) -> None:
        dataset = _Samples(read, task.dataset.num_samples)
        self._generator = torch.Generator()
        self._seed = task.seed
        self._loader = DataLoader(
            dataset,
            batch_size=task.batch_size,
            sampler=RandomSampler(dataset, generator=self._generator),
            num_workers=task.num_workers,
            collate_fn=stack,
            persistent_workers=task.num_workers > 0,
        )

    def epoch(self, number: int) -> Iterable[torch.Tensor]:
        self._generator.manual_seed(self._seed + number)
        return self._loader

    def close(self) -> None:
        del self._loader
