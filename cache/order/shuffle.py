"""Which sample stands at which place of an epoch: a function of (seed, epoch) and nothing else.

Three shuffles, all computed where asked (see permutation.py), all covering every sample exactly once:

- `Full()`: any sample may stand anywhere. The best mixing; needs the data set resident, or an origin fast enough for
  random reads.
- `Windowed(num_shards=W)`: the shards are shuffled and cut into windows of W; within a window, all samples of its
  shards are shuffled. The working set is W shards (2 W at a boundary, with lookahead), whatever the size of the data
  set. The choice for data larger than the cache.
- `Sequential()`: as stored. For evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from cache.order.permutation import Indices, KeyedPermutation


@dataclass(frozen=True)
class Sequential:
    """Samples in the order in which they are stored, in every epoch."""


@dataclass(frozen=True)
class Full:
    """One permutation over all samples, another one in each epoch."""


@dataclass(frozen=True)
class Windowed:
    """Shards shuffled, then samples shuffled within windows of `num_shards` shards."""

    num_shards: int

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"a shuffle window of {self.num_shards} shards; it needs at least 1")


Shuffle = Sequential | Full | Windowed


class EpochOrder(Protocol):
    """The order of one epoch."""

    @property
    def num_samples(self) -> int: ...

    def samples_at(self, positions: ArrayLike | range) -> Indices:
        """The samples that stand at these positions, in their order; IndexError outside range(num_samples)."""
        ...


def epoch_order(shuffle: Shuffle, shard_sizes: Sequence[int] | Indices, *, seed: int, epoch: int) -> EpochOrder:
    """The order of an epoch over shards that hold `shard_sizes` samples each. Samples are numbered through all
    shards, from 0.

    >>> [int(i) for i in epoch_order(Sequential(), [2, 1], seed=0, epoch=5).samples_at(range(3))]
    [0, 1, 2]
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    match shuffle:
        case Sequential():
            return _SequentialOrder(int(sizes.sum()))
        case Full():
            return _FullOrder(int(sizes.sum()), seed, epoch)
        case Windowed(num_shards):
            return _WindowedOrder(sizes, num_shards, seed, epoch)


class _SequentialOrder:
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def samples_at(self, positions: ArrayLike | range) -> Indices:
        return _checked(positions, self.num_samples).copy()


class _FullOrder:
    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples = num_samples
        self._permutation = KeyedPermutation(num_samples, ("full", seed, epoch))

    def samples_at(self, positions: ArrayLike | range) -> Indices:
        return self._permutation(positions)


class _WindowedOrder:
    """Three lookups: position → window; within the window, permuted → place in the shuffled shards; place → shard and
    sample."""

    def __init__(self, sizes: Indices, window: int, seed: int, epoch: int) -> None:
        self.num_samples = int(sizes.sum())
        self._key = (seed, epoch)
        self._window = window
        self._shards = KeyedPermutation(len(sizes), ("shards", seed, epoch))(range(len(sizes)))
        self._first_sample = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        # Where each shuffled shard, and each window of them, begins among the positions of the epoch.
        self._shard_starts = np.concatenate([[0], np.cumsum(sizes[self._shards])]).astype(np.int64)
        self._window_starts = np.append(self._shard_starts[:-1:window], self.num_samples)

    def part_windows(self) -> tuple[Indices, Indices]:
        windows = np.arange(len(self._shards)) // self._window
        starts, ends = np.empty_like(self._shards), np.empty_like(self._shards)
        starts[self._shards] = self._window_starts[windows]
        ends[self._shards] = self._window_starts[windows + 1]
        return starts, ends

    def samples_at(self, positions: ArrayLike | range) -> Indices:
        asked = _checked(positions, self.num_samples)
        places = np.empty_like(asked)
        windows = np.searchsorted(self._window_starts, asked, side="right") - 1
        for window_idx in np.unique(windows):
            inside = windows == window_idx
            start, end = (int(edge) for edge in self._window_starts[window_idx : window_idx + 2])
            permutation = KeyedPermutation(end - start, ("window", *self._key, int(window_idx)))
            places[inside] = start + permutation(asked[inside] - start)
        # side="right" passes over empty shards, which begin where the next one does.
        ranks = np.searchsorted(self._shard_starts, places, side="right") - 1
        return np.asarray(
            self._first_sample[self._shards[ranks]] + (places - self._shard_starts[ranks]), dtype=np.int64
        )


def part_windows(order: EpochOrder) -> tuple[Indices, Indices]:
    """Of a windowed order: for each shard, where the window that it stands in begins and ends among the positions of the epoch.

    >>> [edges.tolist() for edges in part_windows(epoch_order(Windowed(2), [3, 3, 3], seed=0, epoch=0))]
    [[6, 0, 0], [9, 6, 6]]
    """
    assert isinstance(order, _WindowedOrder), order
    return order.part_windows()


def _checked(positions: ArrayLike | range, num_samples: int) -> Indices:
    asked = np.asarray(positions, dtype=np.int64)
    if asked.size and (int(asked.min()) < 0 or int(asked.max()) >= num_samples):
        raise IndexError(f"positions {asked.min()}..{asked.max()} of an epoch of {num_samples} samples")
    return asked
