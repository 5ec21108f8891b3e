"""What does a hit cost from Python? Reads of 100 KiB at random places of resident objects, beside what others need for the same.

    python -m benchmarks.hits
    python -m benchmarks.hits --result benchmarks/results/hits_2cores_202611.md

All ways read the same bytes from the same page cache, one process, one thread, in interleaved rounds. Every read is timed by itself
(a clock reading costs 0.05 µs); rates are of rounds. What Railhead asks of its daemon meanwhile is counted at the client's own door.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import numpy as np

from benchmarks.epoch import daemon
from benchmarks.machine import hardware, versions
from cache.client import Cache
from cache.client.link import Link

READ_BYTES = 100 * 1024
Read = Callable[[int, int], bytes]


@dataclass
class Way:
    name: str
    read: Read
    times_ns: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


@dataclass
class Asked:
    """How often a link was used."""

    requests: int = 0
    messages: int = 0

    def watch(self) -> None:
        request, tell = Link.request, Link.tell

        def counted_request(link: Link, *args: Any) -> Any:
            self.requests += 1
            return request(link, *args)

        def counted_tell(link: Link, *args: Any) -> None:
            self.messages += 1
            tell(link, *args)

        Link.request, Link.tell = counted_request, counted_tell  # type: ignore[method-assign]


def ways(cache: Cache, paths: list[Path]) -> list[Way]:
    """Each reads READ_BYTES of the n-th object."""
    objects = [cache.open(path.as_uri()) for path in paths]
    files = [os.open(path, os.O_RDONLY) for path in paths]
    local = fsspec.filesystem("file")
    names = [str(path) for path in paths]
    handles = [local.open(name, "rb") for name in names]

    def seek_and_read(which: int, offset: int) -> bytes:
        handles[which].seek(offset)
        data: bytes = handles[which].read(READ_BYTES)
        return data

    def cat(which: int, offset: int) -> bytes:
        data: bytes = local.cat_file(names[which], start=offset, end=offset + READ_BYTES)
        return data

    return [
        Way("pread of a local file", lambda which, offset: os.pread(files[which], READ_BYTES, offset)),
        Way("railhead: CachedObject.read", lambda which, offset: objects[which].read(offset, READ_BYTES)),
        Way("fsspec, open local file: seek and read", seek_and_read),
        Way("fsspec, local: cat_file", cat),
    ]


def measure(found: list[Way], asked: Asked, num_objects: int, size: int, rounds: int, reads: int) -> tuple[int, int]:
    """Fills the ways' times; what Railhead asked of its daemon in all rounds: (requests, messages)."""
    chance = random.Random(1)
    requests = messages = 0
    for _ in range(rounds):
        places = [(chance.randrange(num_objects), chance.randrange(size - READ_BYTES)) for _ in range(reads)]
        for way in chance.sample(found, len(found)):
            read, times = way.read, way.times_ns
            before = asked.requests, asked.messages
            started = time.perf_counter_ns()
            for which, offset in places:
                begun = time.perf_counter_ns()
                read(which, offset)
                times.append(time.perf_counter_ns() - begun)
            way.rates.append(reads / (time.perf_counter_ns() - started) * 1e9)
            if way.name.startswith("railhead"):
                requests += asked.requests - before[0]
                messages += asked.messages - before[1]
    return requests, messages


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--reads", type=int, default=10_000, help="of each way in a round")
    parser.add_argument("--result", type=Path, help="write the page here")
    options = parser.parse_args(argv)
    num_objects, size = 4, 32 * 1024 * 1024
    asked = Asked()
    with tempfile.TemporaryDirectory(prefix="hits-") as directory:
        scratch = Path(directory)
        paths = [scratch / f"{number}.bin" for number in range(num_objects)]
        for number, path in enumerate(paths):
            path.write_bytes(np.random.default_rng(number).bytes(size))
        with daemon(scratch, dict(os.environ)) as (_, environment):
            cache = Cache(environment["RAILHEAD_CACHE_SOCKET"])
            asked.watch()
            found = ways(cache, paths)
            for path in paths:
                with cache.open(path.as_uri()) as opened:
                    opened.fetch()
            for way in found:  # right bytes, warm caches and descriptors
                for which, path in enumerate(paths):
                    assert way.read(which, 12345) == path.read_bytes()[12345 : 12345 + READ_BYTES], way.name
                    for offset in range(0, size - READ_BYTES, 1024 * 1024):
                        way.read(which, offset)
            misses = cache.stats().misses
            gc.disable()
            requests, messages = measure(found, asked, num_objects, size, options.rounds, options.reads)
            gc.enable()
            missed = cache.stats().misses - misses
            cache.close()
    page = report(found, requests, messages, missed, options, " ".join(["python -m benchmarks.hits", *argv]))
    print(page)
    if options.result is not None:
        options.result.write_text(page)
    return 0


def report(
    found: list[Way], requests: int, messages: int, missed: int, options: argparse.Namespace, command: str
) -> str:
    rows = []
    for way in found:
        p50, p99, p999 = (np.percentile(way.times_ns, rank) / 1e3 for rank in (50, 99, 99.9))
        rates = sorted(way.rates)
        spread = f"{median(rates):,.0f} [{rates[0]:,.0f}–{rates[-1]:,.0f}]"
        rows.append(f"| {way.name} | {p50:.1f} | {p99:.1f} | {p999:.1f} | {spread} |")
    total = options.rounds * options.reads
    return (
        "# What does a hit of 100 KiB cost from Python?\n\n"
        f"- Hardware: {hardware()}\n- Versions: {versions(('railhead', 'fsspec'))}\n- Command: `{command}`\n"
        f"- {options.rounds} interleaved rounds of {options.reads:,} reads at random places of four objects of 32 MiB, all in the page "
        "cache; one thread. Rates: median of rounds, with the range.\n\n"
        "| way | p50 (µs) | p99 (µs) | p99.9 (µs) | reads/s |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nOf Railhead's {total:,} reads {missed} were misses. They made {requests} requests to the daemon, and {messages} messages "
        "that nobody waits for (its counters, at most once in some seconds).\n\n"
        "Goal: p50 ≤ 12 µs, p99 ≤ 40 µs, no request, ≥ 60,000 reads/s.\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
