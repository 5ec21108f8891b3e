"""A DataLoader that knows which batches the training loop has had: its state is always that of the loop.

    loader = ElasticLoader(dataset, sampler, num_workers=2)
    loader.load_state_dict(saved)                      # if there is something to resume
    while loader.epoch < num_epochs:
        for batch in loader:                           # the rest of this epoch
            ...
            save(loader.state_dict())                  # after the optimizer's step: this batch counts as trained on

A batch counts from the moment at which it is handed out, so save after training on it, not before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from cache.client.records import BatchRecords, Numbered, NumberedCollate
from cache.client.sampler import ElasticBatchSampler
from cache.order.batches import Cursor


class ElasticLoader:
    """Iterates over the rest of the current epoch; when it is finished, the next iteration is over the next one.

    Leaving the loop early keeps the place: the next iteration goes on with the batch after the last one handed out.
    `options` are torch's DataLoader's (num_workers, collate_fn, pin_memory, multiprocessing_context,
    persistent_workers, …). `records`: a directory, or BatchRecords, in which every batch that is handed out is written down for
    `python -m cache audit`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ElasticBatchSampler,
        *,
        records: BatchRecords | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.sampler = sampler
        self.records = records if isinstance(records, BatchRecords | None) else BatchRecords(records)
        if self.records is not None:
            self.records.open(sampler.schedule, sampler.rank, sampler.world_size)
            dataset = Numbered(dataset)
            options["collate_fn"] = NumberedCollate(options.get("collate_fn"))
        self.loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=sampler, **options)
        self.epoch = sampler.epoch
        """The epoch that is iterated, or will be next."""
        self.step = sampler.step
        """Batches of this epoch that have been handed out, those before a resume included."""
        self.wait_s = 0.0
        """Seconds that the training loop waited for batches in this process: reading, decoding (without workers),
        transport."""
        self.num_batches = 0
        """Batches handed out by this process."""
        sampler.loader_reports_consumption()

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __len__(self) -> int:
        """Steps of a whole epoch, also after resuming within one."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        if self.sampler.epoch != self.epoch:  # somebody called sampler.set_epoch, as one does with a DistributedSampler
            self.epoch, self.step = self.sampler.epoch, self.sampler.step
        self.sampler.seek(self.epoch, self.step)
        self.epoch, self.step = self.sampler.epoch, self.sampler.step
        started_s = time.perf_counter()
        self.sampler.announce()
        batches = iter(self.loader)
        while True:
            batch = next(batches, _END)
            self.wait_s += time.perf_counter() - started_s
            if batch is _END:
                break
            if self.records is not None:
                numbers, batch = cast(tuple[list[int], Any], batch)
                place, after = Cursor(self.epoch, self.step), Cursor(self.epoch, self.step + 1)
                plan = self.sampler.schedule.plan
                self.records.handed_out(place, plan.normalised(after), numbers)
            self.step += 1
            self.num_batches += 1
            # Where this process reads, the cache knows what of the waiting was for it; what workers wait for shows here only.
            self.sampler.consumed(self.epoch, self.step, self.wait_s if self.loader.num_workers else None)
            yield batch
            started_s = time.perf_counter()
        self.epoch, self.step = self.epoch + 1, 0
        self.sampler.seek(self.epoch, self.step)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was handed out; JSON-able."""
        return self.sampler.state_at(self.epoch, self.step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the saved batch, with any number of ranks and workers. ValueError if the order is another
        one."""
        self.sampler.load_state_dict(state)
        self.epoch, self.step = self.sampler.epoch, self.sampler.step

    def close(self) -> None:
        """Takes back what was announced to the cache. Call it when no more batches will be asked for."""
        self.sampler.close()
        if self.records is not None:
            self.records.close()


_END = object()
