"""One loader, two epochs, in a process of its own: how busy did it keep the accelerator? Prints one line of JSON.

The accelerator is emulated: a step takes `compute_s` and runs while the host prepares the next batch, as CUDA does; the host is one
step ahead at most. It costs no CPU, as a GPU costs none. Every batch is checked: every sample's checksum, every sample exactly once.
Without a step (`compute_s` 0) a third epoch follows, which is not checked, so that only the loader is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import psutil
import torch

from benchmarks import peers
from benchmarks.epoch_data import Dataset, load, number_of


@dataclass
class Accelerator:
    """Runs one step after the other, each as long; `submit` returns when the step has begun."""

    compute_s: float
    free_at: float = 0.0
    busy_s: float = 0.0

    def submit(self) -> None:
        begins_at = max(time.perf_counter(), self.free_at)
        self.free_at = begins_at + self.compute_s
        self.busy_s += self.compute_s
        if self.compute_s:
            time.sleep(max(0.0, begins_at - time.perf_counter()))

    def finish(self) -> None:
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


class Audit:
    """Every sample's bytes, and every sample once."""

    def __init__(self, dataset: Dataset) -> None:
        self._checksums = dataset.checksums
        self._seen = [0] * dataset.num_samples
        self.num_wrong = 0

    def take(self, batch: torch.Tensor) -> None:
        for row in batch.numpy():
            view = memoryview(row)
            number = number_of(view)
            if number >= len(self._seen) or crc32c.crc32c(view) != self._checksums[number]:
                self.num_wrong += 1
            else:
                self._seen[number] += 1

    def verdict(self) -> str:
        """ "ok", or what was wrong."""
        missing, repeated = self._seen.count(0), sum(count - 1 for count in self._seen if count > 1)
        faults = {"wrong": self.num_wrong, "missing": missing, "repeated": repeated}
        found = [f"{count} {name}" for name, count in faults.items() if count]
        return ", ".join(found) or "ok"


def cpu_s() -> float:
    """CPU of this process, its living children and those that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage) + tree_cpu_s(os.getpid(), with_root=False)


def tree_cpu_s(pid: int, with_root: bool = True) -> float:
    total = 0.0
    root = psutil.Process(pid)
    for process in [*([root] if with_root else []), *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class Origin:
    """The proxy's counters."""

    def __init__(self, control: str) -> None:
        self._control = control

    def bytes_out(self) -> int:
        with urllib.request.urlopen(f"{self._control}/counters", timeout=30) as answer:
            return int(json.load(answer)["bytes_out"].get("GET", 0))


def run_epoch(
    batches: Iterable[torch.Tensor], audit: Audit | None, accelerator: Accelerator, started: float
) -> dict[str, Any]:
    first_batch_s, num_samples = None, 0
    for batch in batches:
        if first_batch_s is None:
            first_batch_s = time.perf_counter() - started
        accelerator.submit()
        # Checked while the step runs, where a training loop would do its logging.
        if audit is not None:
            audit.take(batch)
        num_samples += len(batch)
    accelerator.finish()
    elapsed_s = time.perf_counter() - started
    return {
        "utilisation": accelerator.busy_s / elapsed_s,
        "first_batch_s": first_batch_s,
        "samples_per_s": num_samples / elapsed_s,
        "elapsed_s": elapsed_s,
        "verdict": "not checked" if audit is None else audit.verdict(),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    dataset = load(Path(arguments.dataset))
    task = peers.Task(dataset, arguments.num_workers, arguments.batch_size, Path(arguments.scratch), arguments.seed)
    module: Any = peers.module_of(arguments.loader)
    origin = Origin(arguments.control)
    torch.set_num_threads(1)
    if hasattr(module, "preload"):
        module.preload(task)  # what is not part of the question
    loader: peers.Loader | None = None
    epochs = []
    for number in range(2 if arguments.compute_s else 3):
        audit, accelerator = Audit(dataset) if number < 2 else None, Accelerator(arguments.compute_s)
        own, daemon = cpu_s(), tree_cpu_s(arguments.daemon_pid) if arguments.daemon_pid else 0.0
        sent = origin.bytes_out()
        started = time.perf_counter()
        if loader is None:
            loader = module.open_loader(task)
        result = run_epoch(loader.epoch(number), audit, accelerator, started)
        result["cpu_s"] = cpu_s() - own
        result["daemon_cpu_s"] = tree_cpu_s(arguments.daemon_pid) - daemon if arguments.daemon_pid else 0.0
        result["origin_bytes"] = origin.bytes_out() - sent
        epochs.append(result)
    assert loader is not None
    loader.close()
    names = ("cold", "warm", "bare")
    return dict(zip(names, epochs, strict=False))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("loader", "dataset", "scratch", "control"):
        parser.add_argument(f"--{name}", required=True)
    for name, kind in (("num-workers", int), ("batch-size", int), ("compute-s", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--daemon-pid", type=int, default=0)
    result = run(parser.parse_args(argv))
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
