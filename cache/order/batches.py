"""Which positions of an epoch form the global batch of a step, and which part of it is a rank's.

The global batch of step s is [s·G, (s+1)·G) of the epoch's order. Ranks, nodes and DataLoader workers only cut it
into contiguous slices, so the batches, and with them the training run, do not depend on how many there are. Resuming
needs two numbers: epoch and step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.order.permutation import Indices


@dataclass(frozen=True, order=True)
class Cursor:
    """A place between two global batches: `step` batches of `epoch` are behind us.

    A cursor at the end of an epoch and one at the start of the next mean the same place; `BatchPlan.normalised` makes
    them equal.
    """

    epoch: int
    step: int

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.step < 0:
            raise ValueError(f"epoch {self.epoch}, step {self.step}: neither may be negative")


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch of `num_samples` is cut into global batches of `global_batch_size`.

    What happens with the samples that do not fill a batch is said, never guessed: with `drop_last`, they are left out
    of this epoch (other ones in the next: the order differs); without, the last batch is filled with the first
    samples of the same epoch's order, which are then seen twice (`num_padding` of them).
    """

    num_samples: int
    global_batch_size: int
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"{self.num_samples} samples in global batches of {self.global_batch_size}; both must be at least 1"
            )
        if self.drop_last and self.num_samples < self.global_batch_size:
            raise ValueError(
                f"{self.num_samples} samples do not fill one global batch of {self.global_batch_size}, and drop_last leaves out "
                "what does not fill a batch\n  lower global_batch_size or set drop_last=False"
            )

    @property
    def num_steps(self) -> int:
        """Global batches in an epoch; at least 1."""
        if self.drop_last:
            return self.num_samples // self.global_batch_size
        return -(-self.num_samples // self.global_batch_size)

    @property
    def num_padding(self) -> int:
        """Samples that the last batch of an epoch repeats; 0 with `drop_last`."""
        return max(0, self.num_steps * self.global_batch_size - self.num_samples)

    @property
    def num_dropped(self) -> int:
        """Samples that an epoch leaves out; 0 without `drop_last`."""
        return max(0, self.num_samples - self.num_steps * self.global_batch_size)

    def num_padding_at(self, step: int) -> int:
        """How many of the positions of this step repeat samples: they stand at the end of the batch."""
        return self.num_padding if step == self.num_steps - 1 else 0

    def positions(self, step: int, *, rank: int = 0, world_size: int = 1) -> Indices:
        """A rank's contiguous slice of the positions of a step; all of them by default. The slices of all ranks, in
        order, are the global batch.

        >>> plan = BatchPlan(num_samples=10, global_batch_size=4, drop_last=False)
        >>> [plan.positions(2, rank=rank, world_size=2).tolist() for rank in range(2)]
        [[8, 9], [0, 1]]
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        local_size = self.local_batch_size(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}")
        start = step * self.global_batch_size + rank * local_size
        return np.arange(start, start + local_size, dtype=np.int64) % self.num_samples

    def local_batch_size(self, world_size: int) -> int:
        """Samples of a rank in a step. ValueError if the ranks' shares would differ: gradients averaged over ranks
        would then weigh samples differently, and the result would depend on the world size."""
        if world_size < 1 or self.global_batch_size % world_size:
            divisors = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:3])
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be shared equally by {world_size} ranks\n"
                f"  use {' or '.join(map(str, near))} ranks, or a global_batch_size that is a multiple of {world_size}"
            )
        return self.global_batch_size // world_size

    def normalised(self, cursor: Cursor) -> Cursor:
        """The same place with step < num_steps: the end of an epoch is the start of the next.

        >>> BatchPlan(10, 5).normalised(Cursor(epoch=0, step=2))
        Cursor(epoch=1, step=0)
        """
        if cursor.step > self.num_steps:
            raise ValueError(f"step {cursor.step} of an epoch of {self.num_steps} steps")
        return Cursor(cursor.epoch + 1, 0) if cursor.step == self.num_steps else cursor

    def after(self, cursor: Cursor, num_steps: int) -> Cursor:
        """The place `num_steps` global batches later."""
        total = cursor.epoch * self.num_steps + cursor.step + num_steps
        return Cursor(*divmod(total, self.num_steps))

    def steps_between(self, start: Cursor, end: Cursor) -> int:
        """Global batches from one place to another; negative if `end` is before `start`."""
        return (end.epoch - start.epoch) * self.num_steps + end.step - start.step
