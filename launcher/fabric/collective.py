"""One rank of a small all-reduce over gloo, in a process of its own: proves that collectives work on the chosen interfaces.

Run on every node at once: `python -m launcher.fabric.collective RANK WORLD_SIZE HOST PORT`, with GLOO_SOCKET_IFNAME as the rules
decided it. Rank 0 hosts the store at HOST:PORT. Prints one JSON line: {"seconds": …, "bytes": …}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

NUM_BYTES = 4 << 20
REPEATS = 3
TIMEOUT_S = 60.0
"""Processes of a gang do not start at the same moment: importing torch alone takes seconds."""


def main(argv: Sequence[str]) -> int:
    """Takes part in one all-reduce as rank argv[0] of argv[1]."""
    if len(argv) != 4:
        print("usage: python -m launcher.fabric.collective RANK WORLD_SIZE HOST PORT", file=sys.stderr)
        return 64
    rank, world_size, port = int(argv[0]), int(argv[1]), int(argv[3])
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{argv[2]}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        values = torch.ones(NUM_BYTES // 4)
        times = []
        for _ in range(REPEATS):
            values.fill_(1.0)
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - started)
        if not bool((values == world_size).all()):
            print(f"the sum is wrong: {values[:4].tolist()} instead of {world_size}", file=sys.stderr)
            return 1
        print(json.dumps({"seconds": min(times), "bytes": NUM_BYTES}))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
