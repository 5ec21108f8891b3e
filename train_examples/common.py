"""What both examples share: joining the other ranks, checkpoints, and the account at the end. Nothing here knows a
model."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.loader import ElasticLoader


@dataclass(frozen=True)
class World:
    """This rank among the others, as the environment says; alone without a launcher."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Prints, once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def join_world() -> World:
    """NCCL on GPUs, gloo on CPUs. A script that was started alone is a world of one and needs no process group."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
    return World(rank, local_rank, world_size, device)


def leave_world() -> None:
    if dist.is_initialized():
        # torch 2.13 joins gloo's threads with the GIL in its hand; they need it to let go of the last collective's tensors.
        time.sleep(0.05)
        dist.destroy_process_group()


def parallel(model: nn.Module, world: World, example_loss: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    """The model under DistributedDataParallel, with its gradient buckets in their final arrangement.

    DDP arranges its buckets anew after the first backward pass, and over three or more ranks another arrangement adds
    gradients up in another order: the first step after a resume would round differently than the same step of an
    uninterrupted run. So one pass is made before the first step and leaves no trace. `example_loss` is a loss of any
    input of the right shape.
    """
    if world.world_size == 1:
        return model
    before = copy.deepcopy(model.state_dict())
    ddp = DistributedDataParallel(model)
    example_loss(ddp).backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return ddp


def use_bf16(world: World, precision: str) -> bool:
    """ "auto" is bf16 where the GPU has it, fp32 elsewhere."""
    if precision == "auto":
        return world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


class Checkpoints:
    """Files `<epoch>-<step>.pt` in one directory, each complete or absent; the newest few are kept.

    The directory need not be shared between nodes: the rank that has the newest one sends it to the others.
    """

    def __init__(self, world: World, directory: str | None, keep: int = 3) -> None:
        self.world = world
        self.directory = Path(directory) if directory else None
        self.keep = keep

    def save(self, epoch: int, step: int, state: dict[str, Any]) -> None:
        if self.directory is None or self.world.rank != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{epoch:06}-{step:08}.pt"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        for old in self._all()[: -self.keep]:
            old.unlink(missing_ok=True)

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that any rank can see, None if there is none."""
        newest = self._all()[-1] if self._all() else None
        names = self.world.gather(newest.name if newest else "")
        if not any(names):
            return None
        source = names.index(max(names))
        state = [None]
        if self.world.rank == source and newest is not None:
            state = [torch.load(newest, map_location="cpu", weights_only=True)]
        if self.world.world_size > 1:
            dist.broadcast_object_list(state, src=source)
        return state[0]

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("*-*.pt")) if self.directory and self.directory.is_dir() else []


class Account:
    """What the run cost: time, waiting for data, where the bytes came from."""

    def __init__(self, world: World, cache: Cache) -> None:
        """Make it before the data sets, whose indexing reads from the cache already."""
        self.world, self.cache = world, cache
        self.start_status = cache.daemon_status()
        world.gather(None)  # nobody reads before every rank has its starting point
        self.train_s = self.read_s = 0.0
        self.num_steps = self.num_samples = 0

    def say_how_warm(self, dataset: ShardDataset) -> None:
        """How much of the data set lay on the nodes' disks before any rank's index read from it: of each shard the least that any
        rank found (whoever opens a shard after another finds what that one has fetched)."""
        known = [found for found in self.world.gather(dataset.resident_bytes_at_open) if found is not None]
        if self.start_status is None:
            self.world.say("cache: none, reading the origin directly")
        elif known:
            resident_bytes = sum(min(of_shard) for of_shard in zip(*known, strict=True))
            share = resident_bytes / max(1, dataset.index.size_bytes)
            kind = "warm" if share >= 1 else "cold" if share == 0 else "partly warm"
            self.world.say(f"cache: {kind}, {100 * share:.0f} % resident before the first step")

    def step_begins(self) -> None:
        """A step begins with waiting for its batch. Call it before the first step and after whatever is no step (evaluation)."""
        self._began_s = time.perf_counter()
        self._read_before_s = self.cache.stats().wait_s

    def step_done(self, num_samples: int) -> None:
        """The step is over, and the next begins."""
        self.train_s += time.perf_counter() - self._began_s
        self.read_s += self.cache.stats().wait_s - self._read_before_s
        self.num_steps += 1
        self.num_samples += num_samples
        self.step_begins()

    def report(self, loader: ElasticLoader) -> None:
        """Prints the account of all ranks and nodes."""
        world = self.world
        end_status = self.cache.daemon_status()  # gives this rank's numbers to the daemon
        world.sum(0)  # every rank has done so
        hits, reads, origin_bytes = self._reads(end_status)
        hits, reads, origin_bytes = world.sum(hits, reads, origin_bytes)
        wait_s, read_s, train_s = world.sum(loader.wait_s, self.read_s, self.train_s)
        if not self.num_steps:
            world.say("account: no step was left to do")
            return
        speed = self.num_samples * world.world_size / (train_s / world.world_size)
        world.say(
            f"account: {self.num_steps:,} steps, {speed:,.0f} samples/s; "
            f"waited for data {wait_s / world.world_size:.2f} s ({100 * wait_s / train_s:.1f} % of the step time), decoding "
            f"included, {read_s / world.world_size:.2f} s of it for bytes; "
            f"{100 * hits / max(1, reads):.1f} % of {reads:,.0f} reads were cache hits; "
            f"{origin_bytes / 1e6:,.1f} MB from the origin"
        )

    def _reads(self, end_status: dict[str, Any] | None) -> tuple[float, float, float]:
        """(hits, reads, bytes from the origin). A daemon counts for all its readers, DataLoader workers included; the first
        rank that uses it speaks for it. Without one, this process's own count is all there is."""
        daemon_id = end_status["daemon_id"] if end_status is not None else None
        daemons = self.world.gather(daemon_id)
        if self.start_status is None or end_status is None:
            own = self.cache.stats()
            return own.hits, own.hits + own.misses + own.direct_reads, own.direct_bytes
        if daemons.index(daemon_id) != self.world.rank:
            return 0, 0, 0
        end_status = self.cache.daemon_status() or end_status
        # A daemon that was started again counts from zero; what its forerunner had counted went with it.
        start_status = self.start_status if self.start_status["daemon_id"] == end_status["daemon_id"] else {}

        def since(group: str, key: str) -> float:
            return end_status[group].get(key, 0) - start_status.get(group, {}).get(key, 0)

        hits = since("readers", "hits")
        reads = hits + since("readers", "misses") + since("readers", "direct_reads")
        return hits, reads, since("counters", "fetched_bytes") + since("readers", "direct_bytes")
