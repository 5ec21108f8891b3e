"""What will a node's cache give for this data set? Hit ratio, bytes from the origin and utilisation of each epoch, without any data.

    python -m benchmarks.simulate --data 315MB --shards 200 --sample 192KiB --cache 150MB --origin 60MB --need 126MB --shuffle windowed:4

The product's own machine decides (benchmarks/simulation.py); the link and the readers are modelled. Use a scaled-down data set: what
counts is the cache's share of the data, the size of a shuffle window beside it, and the origin's rate beside the need.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.policies import POLICIES
from benchmarks.simulation import Data, EpochResult, Job, Node, Simulation
from cache.daemon.config import parse_bytes
from cache.residency.forecast import expected_utilisation


def bound(cached_share: float, origin_share: float) -> float:
    """The utilisation that no policy exceeds for one job with fresh permutations: hits are at most the cached share, and the rest comes at
    the origin's rate.

    >>> bound(0.5, 0.25), bound(0.5, 0.75)
    (0.5, 1.0)
    """
    return expected_utilisation(origin_share, 1.0, min(cached_share, 1.0))


def table(results: list[list[EpochResult]], data: Data) -> str:
    lines = ["| job | epoch | utilisation | hit ratio | from the origin (× data) |", "|---|---|---|---|---|"]
    lines += [
        f"| {job_idx} | {epoch} | {r.utilisation:.2f} | {r.hit_ratio:.2f} | {r.origin_bytes / data.num_bytes:.2f} |"
        for job_idx, epochs in enumerate(results)
        for epoch, r in enumerate(epochs)
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=parse_bytes, default="315MB", help="bytes of the data set")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--sample", type=parse_bytes, default="192KiB", help="bytes of a sample")
    parser.add_argument("--cache", type=parse_bytes, required=True, help="capacity of a node's cache")
    parser.add_argument("--origin", type=parse_bytes, required=True, help="what the origin gives one node in a second")
    parser.add_argument("--need", type=parse_bytes, required=True, help="what one job reads on a node in a second")
    parser.add_argument(
        "--nodes", type=int, default=1, help="the job's nodes; each has its own cache, peers are not modelled"
    )
    parser.add_argument("--jobs", type=int, default=1, help="jobs with orders of their own that share the node's cache")
    parser.add_argument("--shuffle", default="windowed:4")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, over all nodes")
    parser.add_argument(
        "--policy", choices=POLICIES, default="farthest", help="whom to evict; the daemon's is farthest"
    )
    parser.add_argument("--unannounced", action="store_true", help="readers that say nothing of what they will read")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(argv)
    samples_per_shard = max(1, round(options.data / options.shards / options.sample))
    data = Data(options.shards, samples_per_shard, options.sample)
    rate = options.need / options.sample
    epoch_s = data.num_bytes / options.nodes / options.need
    jobs = [
        Job(
            data,
            rate * options.nodes,
            batch_size=options.batch,
            shuffle=options.shuffle,
            seed=seed,
            num_epochs=options.epochs,
            world_size=options.nodes,
            starts_at_s=seed * epoch_s / options.jobs,
            announces=not options.unannounced,
        )
        for seed in range(options.jobs)
    ]
    simulation = Simulation(Node(options.cache, options.origin), jobs, POLICIES[options.policy]())
    results = simulation.run()
    print(table(results, data))
    share = options.cache / data.num_bytes
    origin_share = options.origin / options.need / options.jobs
    print(
        f"\ncache {share:.2f} of the data, origin {origin_share:.2f} of the need: no policy gives one job alone more than "
        f"{bound(share, origin_share):.2f}. At most {simulation.peak_bytes / data.num_bytes:.2f} × data were on the disk."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
