"""How near does a cache smaller than the data come to what arithmetic allows? Simulated, for every cached share and origin.

    python -m benchmarks.bounds --result benchmarks/results/bounds_202611.md

The product's own machine decides (benchmarks/simulation.py), over a modelled link and modelled readers, so the numbers are exact and
repeatable. The bounds: one job with fresh permutations fetches at least 1 − f of the data in an epoch (f: the cached share) and is kept
busy at most b / (1 − f) of the time (b: the origin's rate, of the need). For two jobs that share a cache, Belady's rule over their merged
order, played through shard by shard.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import versions
from benchmarks.simulate import bound
from benchmarks.simulation import Data, EpochResult, Job, Node, Simulation
from cache.order.batches import Cursor

NEED_BYTES_PER_S = 126e6
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ORIGINS = (0.25, 0.5, 0.75)


def fewest_fetches(trace: list[int], capacity: int) -> list[bool]:
    """Of each access to a shard, whether it has to be fetched, when what is needed last always goes (Belady 1966).

    >>> fewest_fetches([0, 1, 2, 0, 1], capacity=2)
    [True, True, True, False, True]
    """
    ahead: dict[int, deque[int]] = defaultdict(deque)
    for now, shard in enumerate(trace):
        ahead[shard].append(now)
    held: set[int] = set()
    farthest: list[tuple[int, int]] = []
    missed = []
    for shard in trace:
        ahead[shard].popleft()
        next_use = ahead[shard][0] if ahead[shard] else len(trace)
        missed.append(shard not in held)
        if shard not in held and len(held) == capacity:
            while True:
                use, victim = heapq.heappop(farthest)
                if victim in held and -use == (ahead[victim][0] if ahead[victim] else len(trace)):
                    held.remove(victim)
                    break
        held.add(shard)
        heapq.heappush(farthest, (-next_use, shard))
    return missed


def merged_trace(data: Data, jobs: list[Job], offset_epochs: float) -> list[tuple[float, int, int]]:
    """(time in epochs, job, shard) of every sample of jobs that go on at one rate and begin `offset_epochs` apart."""
    found = []
    for number, job in enumerate(jobs):
        num_steps = job.schedule.plan.num_steps
        for step in range(job.num_epochs * num_steps):
            at = step / num_steps + number * offset_epochs
            samples = job.schedule.global_batch(Cursor(*divmod(step, num_steps))).tolist()
            found += [(at, number, sample // data.samples_per_shard) for sample in samples]
    return sorted(found)


def one_job(data: Data, shuffle: str, num_epochs: int) -> Iterator[tuple[float, float, list[EpochResult], float]]:
    for share in SHARES:
        for origin in ORIGINS:
            node = Node(int(share * data.num_bytes), origin * NEED_BYTES_PER_S)
            job = Job(data, NEED_BYTES_PER_S / data.sample_bytes, shuffle=shuffle, num_epochs=num_epochs)
            simulation = Simulation(node, [job])
            results = simulation.run()[0]
            print(f"f={share} b={origin}: {results}", file=sys.stderr, flush=True)
            yield share, origin, results[1:], simulation.peak_bytes / node.capacity_bytes


def two_jobs(data: Data, shuffle: str, num_epochs: int) -> tuple[list[float], float]:
    """What both send to the origin, of their reads, after the first epoch: in the simulator for each origin, and by Belady's rule."""
    rate = NEED_BYTES_PER_S / data.sample_bytes
    epoch_s = data.num_bytes / NEED_BYTES_PER_S

    def jobs() -> list[Job]:
        return [
            Job(data, rate, shuffle=shuffle, seed=seed, num_epochs=num_epochs, starts_at_s=seed * epoch_s / 2)
            for seed in range(2)
        ]

    found = []
    for origin in ORIGINS:
        results = Simulation(Node(data.num_bytes // 2, origin * 2 * NEED_BYTES_PER_S), jobs()).run()
        warm = [epoch.origin_bytes / data.num_bytes / 2 for job in results for epoch in job[1:-1]]
        found.append(sum(warm) / len(warm))
        print(f"two jobs, b={origin}: {results}", file=sys.stderr, flush=True)
    trace = merged_trace(data, jobs(), 0.5)
    missed = fewest_fetches([shard for _, _, shard in trace], data.num_shards // 2)
    warm_misses = sum(miss for miss, (at, _, _) in zip(missed, trace, strict=True) if 1.5 <= at < num_epochs - 0.5)
    return found, warm_misses / (2 * data.num_shards * (num_epochs - 2))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--samples", type=int, default=8, help="in each shard, of 192 KiB")
    parser.add_argument("--shuffle", default="windowed:4")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args(argv)
    data = Data(options.shards, options.samples, 192 * 1024)
    lines = [
        "# A cache smaller than the data, beside what arithmetic allows\n",
        f"{data.num_shards} shards of {data.samples_per_shard} samples of 192 KiB, shuffle `{options.shuffle}`,",
        f"need {NEED_BYTES_PER_S / 1e6:.0f} MB/s, 30 ms to the first byte; simulated with the product's own machine,",
        f"epochs 2 to {options.epochs} of {options.epochs}, mean and worst.\n",
        f"- Versions: {versions(('railhead', 'numpy'))}",
        f"- Command: `python -m benchmarks.bounds {' '.join(argv)}`\n",
        "| cached share f | origin b | from the origin ÷ (1 − f) | worst | utilisation ÷ min(1, b ÷ (1 − f)) | worst "
        "| most on disk ÷ capacity |",
        "|---|---|---|---|---|---|---|",
    ]
    for share, origin, results, peak in one_job(data, options.shuffle, options.epochs):
        fetched = [epoch.origin_bytes / data.num_bytes / (1 - share) for epoch in results]
        busy = [epoch.utilisation / bound(share, origin) for epoch in results]
        lines.append(
            f"| {share} | {origin} | {sum(fetched) / len(fetched):.3f} | {max(fetched):.3f} | {sum(busy) / len(busy):.3f} "
            f"| {min(busy):.3f} | {peak:.3f} |"
        )
    found, fewest = two_jobs(data, options.shuffle, options.epochs)
    each, origins = ", ".join(f"{part:.3f}" for part in found), ", ".join(map(str, ORIGINS))
    lines.append(
        f"\nTwo jobs half an epoch apart over a cache of half the data send {each} of their reads to the origin (origins of {origins} of "
        f"what both need). Belady's rule over their merged order, played through shard by shard without fetching ahead: {fewest:.3f}."
    )
    page = "\n".join(lines) + "\n"
    print(page)
    if options.result is not None:
        options.result.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
