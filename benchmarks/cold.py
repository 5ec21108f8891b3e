"""What does a cold epoch lose by decisions alone, and how far is that from what arithmetic allows?

    python -m benchmarks.cold --result benchmarks/results/cold_202611.md

The data, link and steps of benchmarks/epoch.py and benchmarks/faulty.py in simulated time (benchmarks/cold_simulation.py): the daemon's own
decisions, and nothing that depends on this machine. Two seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from statistics import mean

from benchmarks.cold_simulation import ColdEpoch, Link, Result, Task
from benchmarks.epoch import DEMANDS
from benchmarks.epoch_bound import Epoch
from cache.blocks import BLOCK_BYTES

PAGE_BYTES = 4096
LINKS = {"30 ms": Link(), "100 ms": Link(first_byte_s=0.1), "200 ms": Link(first_byte_s=0.2)}
FAULTY = Link(throttle_share=0.1, cut_share=0.1)
NUM_SEEDS = 6


def task_of(demand: str, link: Link) -> Task:
    task = Task(num_shards=17, samples_per_shard=160, starts_s=2 * link.first_byte_s + 0.015)
    share = DEMANDS[demand]
    step_s = 0.0 if share is None else task.batch_size * task.sample_bytes / (share * link.rate_total)
    return dataclasses.replace(task, step_s=step_s)


def faulty(link: Link) -> list[Result]:
    """The data of benchmarks/faulty.py, with several seeds."""
    base = Task(num_shards=96, samples_per_shard=40, stride=192 * 1024)
    step_s = base.batch_size * base.sample_bytes / (0.5 * link.rate_total)
    return [
        ColdEpoch(dataclasses.replace(base, step_s=step_s, seed=seed), link).run() for seed in range(1, 1 + NUM_SEEDS)
    ]


def report(command: str) -> str:
    lines = [
        "# A cold epoch in simulated time\n",
        "17 shards of 160 samples of 192 KiB, fully shuffled, batches of 16; 60 MB/s per connection, 200 MB/s in all. The daemon's own",
        "machine over a modelled link; computing costs no time. Bound: bytes in the order of need at the link's full rate, byte by byte,",
        f"or in blocks of 256 KiB (benchmarks/epoch_bound.py).\n\n- Command: `{command}`\n",
        "| first byte | steps need | busy | bound, bytes | bound, blocks | of the link | first batch (s) | bound, blocks | requests |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, link in LINKS.items():
        for demand, share in DEMANDS.items():
            task = task_of(demand, link)
            found = ColdEpoch(task, link).run()
            sizes = 17 * 160, task.sample_bytes, task.samples_per_shard, task.batch_size
            epoch = Epoch(*sizes, link.first_byte_s, link.rate_total, task.seed)
            by_bytes, by_blocks = epoch.bound(task.step_s, PAGE_BYTES), epoch.bound(task.step_s, BLOCK_BYTES)
            busy = [f"{value:.3f}" if share else "–" for value in (found.busy, by_bytes.busy, by_blocks.busy)]
            lines.append(
                f"| {name} | {f'{share:.0%} of it' if share else 'no step'} | {' | '.join(busy)} | {found.link:.1%} "
                f"| {found.first_batch_s:.3f} | {by_blocks.first_batch_s:.3f} | {found.num_requests} |"
            )
    lines += ["\n## A store that fails one request in five, steps need half of the link\n"]
    lines += ["| store | busy, mean of six seeds | range | refused | cut |", "|---|---|---|---|---|"]
    for name, link in {"no faults": Link(), "10 % 503 with Retry-After: 1, 10 % cut": FAULTY}.items():
        results = faulty(link)
        busy_of = sorted(result.busy for result in results)
        refused, cut = mean(r.num_refused for r in results), mean(r.num_cut for r in results)
        lines.append(
            f"| {name} | {mean(busy_of):.3f} | {busy_of[0]:.3f}–{busy_of[-1]:.3f} | {refused:.0f} | {cut:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, help="write the report here")
    options = parser.parse_args(argv)
    page = report(f"python -m benchmarks.cold {' '.join(argv)}".strip())
    print(page)
    if options.result is not None:
        options.result.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
