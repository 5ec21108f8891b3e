"""What does a read from the page cache cost, by how the file was written? `python -m benchmarks.pages` (half a minute).

The kernel keeps what was written at once in large pages, and copies out of them for less. So it matters in which pieces, and how aligned, a
cache writes what it fetches. Reads are preads into new bytes, and copies out of a map whose pages were not
touched before (as views of a file that was just opened are). One process, interleaved rounds; CPU time, which other programs disturb less
than the clock.
"""

from __future__ import annotations

import mmap
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
    "pieces of 4 MiB, from 0": (0, 4 * 2**20),
    "pieces of 256 KiB, from 0 (extent files)": (0, 256 * 1024),
    "pieces of 256 KiB behind a head of 64 KiB": (64 * 1024, 256 * 1024),
    "pieces of 256 KiB behind a head of 8 KiB (extent files until format 2)": (8192, 256 * 1024),
    "pieces of 64 KiB, from 0": (0, 64 * 1024),
    "pieces of 30,000 bytes, from 0 (as a socket gives them)": (0, 30_000),
}
"""What is written: (where the payload begins, in which pieces)."""


def write(path: Path, data: bytes, start: int, piece: int) -> int:
    """A descriptor of the file, which stays open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, start + len(data))
    for at in range(0, len(data), piece):
        os.pwrite(fd, data[at : at + piece], start + at)
    return fd


def copy_out_of_a_new_map(fd: int, buffer: memoryview, places: list[int]) -> None:
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        for place in places:
            buffer[:] = view[place : place + READ_BYTES]


def main() -> int:
    data = np.random.default_rng(0).bytes(SIZE)
    chance = random.Random(0)
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    buffer = memoryview(bytearray(READ_BYTES))
    with tempfile.TemporaryDirectory(prefix="pages-") as directory:
        files = {
            name: write(Path(directory) / str(number), data, *way) for number, (name, way) in enumerate(WAYS.items())
        }
        for _ in range(ROUNDS):
            # Each place once, as in an epoch: what a map has touched costs less the second time.
            places = [place * READ_BYTES for place in chance.sample(range(SIZE // READ_BYTES), READS)]
            for name, fd in chance.sample(list(files.items()), len(files)):
                started = time.process_time()
                for place in places:
                    os.pread(fd, READ_BYTES, place)
                between = time.process_time()
                copy_out_of_a_new_map(fd, buffer, places)
                costs[name].append(((between - started) / READS * 1e6, (time.process_time() - between) / READS * 1e6))
        for fd in files.values():
            os.close(fd)
    print(f"# What does a read of {READ_BYTES // 1024} KiB from the page cache cost, by how the file was written?\n")
    print(f"- Hardware: {hardware()}\n- Command: `python -m benchmarks.pages`")
    print(
        f"- {ROUNDS} interleaved rounds of {READS} reads at random places of {SIZE // 2**20} MiB; CPU time in µs, least (median)\n"
    )
    print("| written | pread | copy out of a new map |\n|---|---|---|")
    for name, found in costs.items():
        each = [f"{min(times):.1f} ({median(times):.1f})" for times in zip(*found, strict=True)]
        print(f"| {name} | {each[0]} | {each[1]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
