"""How long until a daemon that finds 100,000 extents on its disk serves readers?

    python -m benchmarks.restart [--extents 100000] [--runs 5] [--result benchmarks/results/restart_….md]

Makes a cache directory with so many extent files (of small objects, sparse: what a restart looks at is their number, not their bytes)
and the index that belongs to it, as a daemon would have left them when it was killed. Then, for each run: the daemon is started as users
start it, timed from the command to the line that says that it serves, on to the first block that a reader got (verified, of course), and
to the moment when the daemon has learned of all files; SIGKILL. Without its index the daemon reads every file's label: that is shown too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import hardware, versions
from cache.blocks import ObjectId
from cache.client import Cache
from cache.daemon import probe
from cache.origin.registry import origin_for
from cache.store.directory import CacheDirectory
from cache.store.format import (
    BlockEntry,
    ExtentLabel,
    checksum,
    encode_entry,
    encode_label,
    entry_offset,
)
from cache.store.index import Index, IndexRow

OBJECT_BYTES = 100_000

Run = tuple[float, float, float, float]
"""Seconds until it served, until a reader had a block, until all was known; MiB of the control process's memory."""


def make_directory(path: Path, origin: Path, count: int) -> None:
    """A cache directory with `count` extents, each whole: the objects are files below `origin` (only the first ones are really there)."""
    directory = CacheDirectory.open(path)
    assert isinstance(directory, CacheDirectory)
    data = bytes(OBJECT_BYTES)
    rows = []
    for number in range(count):
        source = origin / f"shard-{number:06d}"
        if number < 10:
            source.write_bytes(data)
        etag = asyncio.run(_etag(f"file://{source}")) if number < 10 else '"1"'
        object_id = ObjectId(f"file://{source}", etag, OBJECT_BYTES)
        label = ExtentLabel(object_id, 0)
        page = bytearray(encode_label(label))
        entry = encode_entry(BlockEntry(checksum(data), OBJECT_BYTES), object_id.content_id, 0, 0)
        page[entry_offset(0) : entry_offset(0) + len(entry)] = entry
        row = IndexRow(object_id, 0, number + 1, label.file_bytes)
        file = directory.extent_path(row.extent, row.generation)
        file.parent.mkdir(exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, label.file_bytes)
        os.pwrite(fd, page, label.payload_bytes)
        os.close(fd)
        rows.append(row)
    index = Index(directory.index_path)
    index.add(rows)
    index.close()
    directory.close()


async def _etag(url: str) -> str:
    return (await origin_for(url).head(url)).etag


def start(path: Path, socket: str) -> tuple[subprocess.Popen[bytes], float, float]:
    """The daemon, and the seconds until it served and until a reader had a block."""
    command = [sys.executable, "-m", "cache", "serve", "--dir", str(path), "--capacity", "1TiB", "--socket", socket]
    command += ["--announce", "--keep-free", "0", "--keep-free-files", "0"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "serving"
    serving_s = time.perf_counter() - started
    return process, serving_s, started


def first_block(socket: str, url: str) -> None:
    with Cache(socket) as cache, cache.open(url) as obj:
        assert obj.read(0, 1000) == bytes(1000)
        assert cache.stats().direct_reads == 0


def wait_until_all_is_known(socket: str) -> None:
    while True:
        status = probe.status(socket)
        assert status is not None
        if not status["recovery"]["objects_left"]:
            return
        time.sleep(0.02)


def memory_mib(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extents", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--result", type=Path)
    parser.add_argument(
        "--dir", type=Path, help="make the directory below this one. [default: the temporary directory]"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rh-restart-", dir=options.dir) as folder:
        root = Path(folder)
        (root / "origin").mkdir()
        results: dict[str, list[Run]] = {}
        for count in (0, options.extents):
            path = root / f"cache-{count}"
            make_directory(path, root / "origin", count)
            for number in range(options.runs):
                results.setdefault(f"{count:,} extents", []).append(_one(path, root, number if count else None))
        for number in range(min(3, options.runs)):
            for file in path.glob("index.db*"):
                file.unlink()
            results.setdefault(f"{options.extents:,} extents, the index lost", []).append(_one(path, root, number))
    text = page(results, options)
    print(text)
    if options.result:
        options.result.write_text(text)


def _one(path: Path, root: Path, number: int | None) -> Run:
    process, serving_s, started = start(path, str(root / "s"))
    try:
        if number is not None:
            first_block(str(root / "s"), f"file://{root}/origin/shard-{number % 10:06d}")
        block_s = time.perf_counter() - started
        wait_until_all_is_known(str(root / "s"))
        return serving_s, block_s, time.perf_counter() - started, memory_mib(process.pid)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def page(results: dict[str, list[Run]], options: argparse.Namespace) -> str:
    rows = []
    for name, runs in results.items():
        serving, block, known, memory = (sorted(column) for column in zip(*runs, strict=True))
        rows.append(
            f"| {name} | {statistics.median(serving):.2f} ({serving[0]:.2f}–{serving[-1]:.2f}) "
            f"| {statistics.median(block):.2f} ({block[0]:.2f}–{block[-1]:.2f}) "
            f"| {statistics.median(known):.2f} ({known[0]:.2f}–{known[-1]:.2f}) | {statistics.median(memory):.0f} | {len(runs)} |"
        )
    return "\n".join(
        [
            "# Restart of a daemon",
            "",
            "Question: how long until a daemon that finds so many extents on its disk serves readers?",
            "",
            f"- Command: `python -m benchmarks.restart --extents {options.extents} --runs {options.runs}`",
            f"- {hardware()}",
            f"- {versions(['railhead', 'prometheus-client', 'obstore'])}",
            "",
            "Seconds from the command, interpreter included: median (least–most). The control process's memory in MiB. The second number",
            "includes the reader's connection, reading the extent's table and comparing the block with its checksum.",
            "",
            "| on the disk | serving | first block, verified | all is known | memory | runs |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
