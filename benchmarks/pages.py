"""What does a read from the page cache cost, by how the file was written? `python -m benchmarks.pages` (half a minute).

The kernel keeps what was written at once in large pages, and copies out of them for less. So it matters in which pieces, and how aligned, a
cache writes what it fetches. One process, interleaved rounds; CPU time, which other programs disturb less than the clock.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.machine import hardware

SIZE, READ_BYTES, READS, ROUNDS = 48 * 2**20, 192 * 1024, 150, 30
WAYS = {
    "at once": (0, SIZE),
    "pieces of 4 MiB behind a head of 8 KiB": (8192, 4 * 2**20),
    "pieces of 256 KiB, aligned": (256 * 1024, 256 * 1024),
    "pieces of 256 KiB behind a head of 8 KiB (extent files)": (8192, 256 * 1024),
    "pieces of 64 KiB behind a head of 8 KiB": (8192, 64 * 1024),
    "pieces of 30,000 bytes behind a head of 8 KiB (as a socket gives them)": (8192, 30_000),
}


def write(path: Path, data: bytes, start: int, piece: int) -> int:
    """A descriptor of the file, which stays open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, start + len(data))
    for at in range(0, len(data), piece):
        os.pwrite(fd, data[at : at + piece], start + at)
    return fd


def main() -> int:
    data = np.random.default_rng(0).bytes(SIZE)
    chance = random.Random(0)
    costs: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="pages-") as directory:
        files = {
            name: write(Path(directory) / str(number), data, *way) for number, (name, way) in enumerate(WAYS.items())
        }
        for _ in range(ROUNDS):
            places = [chance.randrange(2**20, SIZE - READ_BYTES) for _ in range(READS)]
            for name, fd in chance.sample(list(files.items()), len(files)):
                started = time.process_time()
                for place in places:
                    os.pread(fd, READ_BYTES, place)
                costs[name].append((time.process_time() - started) / READS * 1e6)
        for fd in files.values():
            os.close(fd)
    print(f"# What does a read of {READ_BYTES // 1024} KiB from the page cache cost, by how the file was written?\n")
    print(f"- Hardware: {hardware()}\n- Command: `python -m benchmarks.pages`")
    print(f"- {ROUNDS} interleaved rounds of {READS} reads at random places of {SIZE // 2**20} MiB; CPU time\n")
    print("| written | least (µs) | median (µs) |\n|---|---|---|")
    for name, found in costs.items():
        print(f"| {name} | {min(found):.1f} | {median(found):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
