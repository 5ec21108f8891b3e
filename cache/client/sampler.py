"""A torch batch sampler whose order is a function of (seed, epoch, step): any number of ranks and workers, resumable
anywhere.

    sampler = ElasticBatchSampler(dataset, global_batch_size=256, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for step, batch in enumerate(loader, start=sampler.step): ...

What has been *trained on* is not what the sampler has handed out: a DataLoader asks for batches some steps ahead. So
`state_dict` is told how many steps training has consumed. `cache.client.loader.ElasticLoader` counts them itself and
is the natural choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import Sampler

from cache.client.announcer import Announcer
from cache.client.datasets import ShardDataset
from cache.client.mixed import MixedDataset, mixture_schedule
from cache.order.batches import Cursor
from cache.order.mixing import Mixture
from cache.order.schedule import Schedule, parse_shuffle
from cache.order.shuffle import Full, Sequential, Shuffle

STATE_VERSION = 1

PREFETCHED_BATCHES = 32
"""Without an ElasticLoader, nobody says which batches were read: a batch is taken for read when this many more have
been asked for (16 workers with torch's prefetch_factor of 2). Too many costs the cache some room, too few could evict
what is about to be read."""


class ElasticBatchSampler(Sampler[list[int]]):
    """Yields this rank's batches of the current epoch, as lists of sample numbers, from the current step on.

    `data`: the data set, a mixture of several, or a number of samples. With a data set that reads through a cache, the coming reads are
    announced to it. `global_batch_size`: samples of a step over all ranks; must be a multiple of `world_size`. The
    same global batches come out for every world size that divides it. `rank`, `world_size`: by default those of
    torch.distributed if it is initialised, else 0 of 1. `shuffle`: True (`Full()`), False (`Sequential()`), a
    Shuffle, or its name ("windowed:8" for data larger than the cache). `drop_last`: leave out the samples that do not
    fill the last batch; False fills it with the first samples of the epoch.
    """

    def __init__(
        self,
        data: ShardDataset | MixedDataset | int,
        global_batch_size: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool | str | Shuffle = True,
        drop_last: bool = True,
        announce: bool = True,
    ) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if is_distributed else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if is_distributed else 1
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of a world of {self.world_size}")
        self.schedule: Schedule | Mixture
        if isinstance(data, MixedDataset):
            self.schedule = mixture_schedule(
                data, global_batch_size, seed=seed, shuffle=_shuffle(shuffle), drop_last=drop_last
            )
        else:
            self.schedule = Schedule(
                shard_sizes=(data,) if isinstance(data, int) else data.shard_sizes,
                global_batch_size=global_batch_size,
                seed=seed,
                shuffle=_shuffle(shuffle),
                drop_last=drop_last,
            )
        self.batch_size = self.schedule.plan.local_batch_size(self.world_size)
        self._announcer: Announcer | None = None
        if announce and isinstance(data, ShardDataset | MixedDataset):
            # The daemon keeps streams apart by connection and name: one process may have several samplers.
            self._announcer = Announcer(
                data, self.schedule, rank=self.rank, world_size=self.world_size, name=f"rank{self.rank}-{id(self):x}"
            )
        self._cursor = Cursor(0, 0)
        self._is_exhausted = False
        self._loader_reports = False

    # -- where we are --

    @property
    def epoch(self) -> int:
        """The epoch that is iterated, or will be next."""
        return self._cursor.epoch

    @property
    def step(self) -> int:
        """The step at which the next iteration over this epoch begins: 0, or where a loaded state says."""
        return self._cursor.step

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.plan.num_steps

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over this epoch, from its beginning; if it is the one that was resumed in mid-epoch,
        from there.

        Without it, each finished iteration is followed by the next epoch.
        """
        if epoch != self._cursor.epoch or self._is_exhausted:
            self.seek(epoch, 0)

    def seek(self, epoch: int, step: int) -> None:
        """The next iteration begins at this step of this epoch."""
        self._cursor = self.schedule.plan.normalised(Cursor(epoch, step))
        self._is_exhausted = False

    def announce(self) -> None:
        """Tells the cache what the next iteration will read, now: a loader that first starts worker processes gives it that time."""
        if self._announcer is not None:
            self._announcer.seek(self._cursor)

    # -- torch's protocol --

    def __len__(self) -> int:
        """Steps of a whole epoch, also after resuming within one: schedules are computed from it."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self._is_exhausted:
            self.seek(self._cursor.epoch + 1, 0)
        start = self._cursor
        if self._announcer is not None:
            self._announcer.seek(start)
        for place, samples in self.schedule.batches(start, rank=self.rank, world_size=self.world_size):
            if place.epoch != start.epoch:
                break
            if not self._loader_reports and place.step >= start.step + PREFETCHED_BATCHES:
                self._announce_consumed(Cursor(place.epoch, place.step - PREFETCHED_BATCHES))
            yield samples.tolist()
        if start == self._cursor:  # not if somebody has moved us meanwhile
            self._is_exhausted = True

    # -- state --

    def state_dict(self, steps_consumed: int) -> dict[str, Any]:
        """What to save so that training goes on exactly: JSON-able.

        `steps_consumed`: how many steps of the current epoch training has finished, those before a resume included.
        Only the training loop knows: a DataLoader has asked this sampler for more.
        """
        return self.state_at(self.epoch, steps_consumed)

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        """The state of a training loop that has finished `step` steps of `epoch`."""
        place = self.schedule.plan.normalised(Cursor(epoch, step))
        return {"version": STATE_VERSION, "epoch": place.epoch, "step": place.step, **self.schedule.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the saved step, with any world size. ValueError if the saved place belongs to another order."""
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"sampler state of version {state.get('version')}; this is version {STATE_VERSION}")
        here = self.schedule.fingerprint()
        differences = [f"{key} was {state.get(key)!r}, is {here[key]!r}" for key in here if state.get(key) != here[key]]
        if differences:
            raise ValueError(
                f"the saved place belongs to another order of the data: {'; '.join(differences)}\n"
                "  to go on exactly, use the saved values; to begin a new order, do not load this state"
            )
        self.seek(state["epoch"], state["step"])

    # -- for loaders --

    def loader_reports_consumption(self) -> None:
        """A loader that knows what was read will say so by `consumed`; from now on nothing is guessed."""
        self._loader_reports = True

    def consumed(self, epoch: int, step: int, waited_s: float | None = None) -> None:
        """All batches before this place have been read: the cache may let go of what is needed by nobody else. `waited_s`: for how long the
        training loop has waited for batches in all, where other processes read them."""
        self._announce_consumed(Cursor(epoch, step), waited_s)

    def close(self) -> None:
        """Takes back what was announced."""
        if self._announcer is not None:
            self._announcer.close()

    def _announce_consumed(self, cursor: Cursor, waited_s: float | None = None) -> None:
        if self._announcer is not None:
            self._announcer.consumed(cursor, waited_s)


def _shuffle(shuffle: bool | str | Shuffle) -> Shuffle:
    if isinstance(shuffle, bool):
        return Full() if shuffle else Sequential()
    if isinstance(shuffle, str):
        return parse_shuffle(shuffle)
    return shuffle
