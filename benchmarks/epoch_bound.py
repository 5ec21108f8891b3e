"""What no loader can do better in the epoch benchmark, by arithmetic: bytes come in the order in which training needs them, at the
full rate of the link, from the earliest moment on. Pure.

The earliest moment is three answers after the start, one after the other: the listing, the index, and the first sample's first byte.
Bytes come in units: single pages, or the blocks that the cache fetches. Under a full shuffle a sample that is needed brings the rest of
its blocks, which are needed only later.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache.order.batches import Cursor
from cache.order.schedule import Schedule
from cache.order.shuffle import Full

NUM_ROUND_TRIPS = 3
TAR_HEADER_BYTES = 512


@dataclass(frozen=True)
class Bound:
    """`busy`: share of the epoch in which the accelerator computes (1 without steps)."""

    first_batch_s: float
    elapsed_s: float
    busy: float


@dataclass(frozen=True)
class Epoch:
    num_samples: int
    sample_bytes: int
    samples_per_shard: int
    batch_size: int
    first_byte_s: float
    rate_total: float
    seed: int

    def bound(self, step_s: float, unit_bytes: int) -> Bound:
        """Fully shuffled, steps of `step_s`, bytes in units of `unit_bytes`.

        >>> Epoch(64, 4096 - 512, 16, 4, 0.0, 4096 * 64.0, 1).bound(0.0, 4096).elapsed_s
        1.0
        """
        num_shards = -(-self.num_samples // self.samples_per_shard)
        sizes = [self.samples_per_shard] * (num_shards - 1)
        sizes.append(self.num_samples - sum(sizes))
        schedule = Schedule(tuple(sizes), self.batch_size, self.seed, Full())
        stride = self.sample_bytes + TAR_HEADER_BYTES
        came: set[tuple[int, int]] = set()
        free_s, first_s, num_steps = 0.0, 0.0, schedule.plan.num_steps
        starts_s = NUM_ROUND_TRIPS * self.first_byte_s
        for place, samples in schedule.batches(Cursor(0, 0), rank=0, world_size=1):
            if place.epoch > 0:
                break
            for sample in samples.tolist():
                shard, nth = divmod(sample, self.samples_per_shard)
                start = nth * stride + TAR_HEADER_BYTES
                end = start + self.sample_bytes
                came.update((shard, unit) for unit in range(start // unit_bytes, (end - 1) // unit_bytes + 1))
            ready_s = starts_s + len(came) * unit_bytes / self.rate_total
            first_s = first_s or ready_s
            free_s = max(ready_s, free_s) + step_s
        return Bound(first_s, free_s, num_steps * step_s / free_s if step_s else 1.0)
