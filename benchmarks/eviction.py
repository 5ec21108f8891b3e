"""What does it cost the daemon to find room for one more file, when its cache is full of many?

    python -m benchmarks.eviction --result benchmarks/results/eviction_2cores_202611.md

The daemon's own machine, without disk or network: a full cache of N extents of 64 MiB that nobody announced, and a reader that announces
others. Timed are the machine's steps, in which for each new file another goes; with the shortlist (docs/decisions/0050), and with a look
at every extent each time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.machine import hardware, versions
from cache.blocks import BLOCKS_PER_FETCH, EXTENT_BYTES, ExtentId, ObjectId
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.budget import INDEX_BYTES_PER_EXTENT, UNKNOWN_READERS, Budget
from cache.residency.machine import Residency
from cache.residency.state import Limits
from cache.store.format import LABEL_BYTES

SIZES = (2_000, 20_000, 100_000)
WAYS = {"shortlist": Limits().full_look, "every extent each time": 1 << 60}
NUM_IN_FLIGHT = 32


def trial(num_extents: int, full_look: int, num_files: int) -> tuple[float, float]:
    """Mean seconds of the machine for each of `num_files` new files, and its longest step."""
    file_bytes = LABEL_BYTES + EXTENT_BYTES + INDEX_BYTES_PER_EXTENT
    machine = Residency(
        Budget(num_extents * file_bytes, 10 * num_extents),
        limits=Limits(NUM_IN_FLIGHT, NUM_IN_FLIGHT // 4, LABEL_BYTES, full_look=full_look),
        num_words=1 << 30,
    )
    objects = [ObjectId(f"s3://data/{idx:06d}", '"1"', EXTENT_BYTES) for idx in range(num_extents + num_files)]
    for idx, held in enumerate(objects[:num_extents], start=1):
        machine.step(m.ExtentFound(held, 0, idx, LABEL_BYTES + EXTENT_BYTES, None), 0.0)
    new = objects[num_extents:]
    for one in new:
        machine.step(m.ObjectOpened("reader", one), 1.0)
    took: list[float] = []

    def step(event: m.Event, now: float) -> list[m.Action]:
        began_s = time.perf_counter()
        actions = machine.step(event, now)
        took.append(time.perf_counter() - began_s)
        return actions

    visits = tuple(Visit(one.content_id, 0, BLOCKS_PER_FETCH) for one in new)
    now, todo, num_evicted = 1.0, step(m.OrderAnnounced("reader", "stream", visits), 1.0), 0
    while todo:
        now += 0.001
        match todo.pop(0):
            case m.RemoveExtent(extent, generation):
                num_evicted += 1
                todo += step(m.ExtentReleased(UNKNOWN_READERS, extent, generation), now)
            case m.CreateExtent(object_id, extent_idx, generation):
                todo += step(m.ExtentCreated(ExtentId(object_id.content_id, extent_idx), generation), now)
            case m.FetchBlocks() as fetch:
                extent = ExtentId(fetch.object_id.content_id, fetch.extent_idx)
                todo += step(m.BlocksLanded(extent, fetch.generation, fetch.first, fetch.end, 1 << 22), now)
    assert num_evicted >= num_files, f"{num_evicted} files went for {num_files} new ones: nothing was measured"
    return sum(took) / num_files, max(took)


def report(found: dict[tuple[int, str], list[tuple[float, float]]], num_files: int, command: str) -> str:
    lines = [
        "# What it costs to find room in a full cache\n",
        f"{num_files} new files, one after the other evicting one; times are those of the machine that decides, alone on one core.\n",
        f"- Hardware: {hardware()}",
        f"- Versions: {versions(('railhead',))}",
        f"- Command: `{command}`; medians of {len(next(iter(found.values())))} runs\n",
        "| extents of 64 MiB | way | for each new file (ms) | spread | longest step (ms) |",
        "|---|---|---|---|---|",
    ]
    for (num_extents, way), trials in found.items():
        each = [1000 * mean_s for mean_s, _ in trials]
        longest = max(1000 * longest_s for _, longest_s in trials)
        lines.append(
            f"| {num_extents:,} | {way} | {median(each):.2f} | {min(each):.2f} to {max(each):.2f} | {longest:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=60)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args(argv)
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(options.runs):
        for num_extents in SIZES:
            for way, full_look in WAYS.items():
                outcome = trial(num_extents, full_look, options.files)
                found.setdefault((num_extents, way), []).append(outcome)
                print(f"{num_extents} {way}: {outcome}", file=sys.stderr, flush=True)
    page = report(found, options.files, f"python -m benchmarks.eviction {' '.join(argv)}".strip())
    print(page)
    if options.result is not None:
        options.result.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
