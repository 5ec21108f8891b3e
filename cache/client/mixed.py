"""Several data sets as one, mixed by weight.

    mixed = MixedDataset([web, code, books], weights=[0.7, 0.2, 0.1])
    sampler = ElasticBatchSampler(mixed, global_batch_size=256)

Proportions are exact in every window of batches (cache/order/mixing.py); each data set is walked through in its own epochs, so that
none of its samples comes twice before all have come once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cache.client.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.index import Ints
from cache.order.mixing import Mixture, Weight
from cache.order.shuffle import Shuffle


class MixedDataset(Dataset[Any]):
    """The samples of all data sets, numbered through them in their order; each is decoded by its own data set.

    `weights`: how many samples of each, relative to each other; fractions of 1, counts, or their sizes (`len(d)`) for a plain union.
    `epoch_samples`: what an epoch is, None for as many as there are in all. ValueError for weights that cannot be.
    """

    def __init__(
        self, datasets: Sequence[ShardDataset], weights: Sequence[Weight], *, epoch_samples: int | None = None
    ) -> None:
        if len({dataset.cache.socket for dataset in datasets}) != 1:
            raise ValueError("data sets that are mixed must read through one cache; give all of them the same")
        self.datasets = tuple(datasets)
        self.weights = tuple(weights)
        self.epoch_samples = epoch_samples
        self.schedule(1)  # refuses weights that cannot be, here and not at the first batch
        self._starts = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])]).astype(np.int64)

    def schedule(self, global_batch_size: int, **options: Any) -> Mixture:
        """The order of this mixture; options are Mixture's `seed` and `shuffle`."""
        sizes = tuple(dataset.shard_sizes for dataset in self.datasets)
        return Mixture(sizes, self.weights, global_batch_size, epoch_samples=self.epoch_samples, **options)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, sample: int) -> Any:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[Any]:
        numbers = np.asarray(samples, dtype=np.int64)
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= len(self)):
            raise IndexError(f"samples {numbers.min()}..{numbers.max()} of data sets of {len(self)}")
        fetched: list[Any] = [None] * len(numbers)
        for dataset, places, own in self._split(numbers):
            for place, value in zip(places.tolist(), dataset.__getitems__(own.tolist()), strict=True):
                fetched[place] = value
        return fetched

    def which(self, sample: int) -> tuple[int, int]:
        """The data set that a sample is of, and its number there."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return number, sample - int(self._starts[number])

    # -- for the sampler --

    @property
    def cache(self) -> Cache:
        return self.datasets[0].cache

    @cached_property
    def etags(self) -> Mapping[str, str]:
        return {url: etag for dataset in self.datasets for url, etag in dataset.etags.items()}

    def outlined_objects(self) -> bytes | None:
        """The order of a mixture is told visit by visit only."""
        return None

    def visits(self, samples: Ints) -> tuple[list[tuple[str, int, int]], Ints]:
        """See SampleIndex.visits."""
        counts = np.zeros(len(samples), dtype=np.int64)
        of_sample: list[list[tuple[str, int, int]]] = [[]] * len(samples)
        for dataset, places, own in self._split(samples):
            visits, own_counts = dataset.visits(own)
            counts[places] = own_counts
            end = 0
            for place, count in zip(places.tolist(), own_counts.tolist(), strict=True):
                of_sample[place] = visits[end : end + count]
                end += count
        return [visit for visits in of_sample for visit in visits], counts

    def _split(self, numbers: Ints) -> list[tuple[ShardDataset, Ints, Ints]]:
        """(data set, places in the batch, numbers in the data set), for those that have any."""
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        found = []
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            found.append((self.datasets[owner], places, numbers[places] - self._starts[owner]))
        return found


def mixture_schedule(
    data: MixedDataset, global_batch_size: int, *, seed: int, shuffle: Shuffle, drop_last: bool
) -> Mixture:
    """ValueError for drop_last=False: the batches of a mixture are always full."""
    if not drop_last:
        raise ValueError("a mixture has no last batch to be filled: leave drop_last as it is")
    return data.schedule(global_batch_size, seed=seed, shuffle=shuffle)
