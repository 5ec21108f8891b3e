"""One node of the cluster benchmark: a cache daemon that knows its peers, and the reader that trains there, each a process of its own.

Run as a program, this file is the reader: it reads its share of an epoch in the epoch's order, compares every sample with its checksum,
and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LONGEST = 200
"""So many waits are reported of each reader."""

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Data:
    """A data set of fixed-size samples in objects of a store, with a checksum for each."""

    urls: tuple[str, ...]
    etags: tuple[str, ...]
    object_bytes: int
    sample_bytes: int
    checksums: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.urls) * self.object_bytes

    def place(self, sample: int) -> tuple[str, int, int]:
        per_object = self.object_bytes // self.sample_bytes
        return self.urls[sample // per_object], sample % per_object * self.sample_bytes, self.sample_bytes


@dataclass(frozen=True)
class Share:
    """What a reader reads: of epoch `epoch` every `num_readers`th sample from the `idx`th on, in an order that is new for each epoch."""

    epoch: int
    idx: int
    num_readers: int
    step_s: float
    """Time between two samples, if they are there; 0: as fast as they come."""

    def samples(self, num_samples: int) -> list[int]:
        order = list(range(num_samples))
        random.Random(self.epoch).shuffle(order)
        return order[self.idx :: self.num_readers]


class Node:
    """A daemon on loopback with a directory of its own. Ended by its process ids, with its workers."""

    def __init__(
        self,
        idx: int,
        directory: Path,
        capacity: int,
        peers: list[int],
        key: Path,
        environment: dict[str, str],
        cache: Path | None = None,
    ) -> None:
        """cache: where it keeps what it holds; None: in `directory`."""
        self.idx = idx
        self.directory = directory
        self.environment = environment
        self.socket = str(directory / "s")
        command = [sys.executable, "-m", "cache", "serve", "--dir", str(cache or directory / "cache")]
        command += ["--capacity", str(capacity), "--socket", self.socket, "--workers", "1", "--announce"]
        command += ["--peers", ",".join(f"127.0.0.1:{port}" for port in peers), "--exit-with-parent"]
        command += ["--peer-listen", f"127.0.0.1:{peers[idx]}", "--peer-key-file", str(key)]
        directory.mkdir(parents=True)
        with (directory / "log").open("w") as log:
            self.daemon = subprocess.Popen(
                command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.daemon.stdout is not None
        if not self.daemon.stdout.readline():
            raise RuntimeError(f"a daemon did not start: {(directory / 'log').read_text()}")
        self._pids = [self.daemon.pid, *_children(self.daemon.pid)]
        self.reader: subprocess.Popen[str] | None = None

    def status(self) -> dict[str, Any]:
        from cache.daemon import probe

        status = probe.status(self.socket)
        assert status is not None, f"the daemon of node {self.idx} does not answer"
        return status

    def read(self, data: Path, share: Share) -> None:
        """Starts this node's reader."""
        command = [sys.executable, "-m", "benchmarks.cluster_node", self.socket, str(data), json.dumps(asdict(share))]
        self.reader = subprocess.Popen(command, cwd=_ROOT, env=self.environment, stdout=subprocess.PIPE, text=True)

    def result(self) -> dict[str, Any]:
        """The reader's, when it is done."""
        assert self.reader is not None
        out, _ = self.reader.communicate(timeout=300)
        if self.reader.returncode != 0:
            return {"error": f"the reader of node {self.idx} ended with {self.reader.returncode}"}
        result: dict[str, Any] = json.loads(out)
        return result

    def end(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """The whole node at once: the daemon with its workers, and the reader. SIGSTOP freezes it."""
        readers = [self.reader.pid] if self.reader is not None and self.reader.poll() is None else []
        for pid in [*self._pids, *readers]:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue
        if signum == signal.SIGKILL:
            self.daemon.wait()
            assert self.daemon.stdout is not None
            self.daemon.stdout.close()
            if self.reader is not None:
                self.reader.wait()
                assert self.reader.stdout is not None
                self.reader.stdout.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_reader(socket: str, data: Data, share: Share) -> dict[str, Any]:
    import crc32c

    from cache.client import Cache

    cache, etags = Cache(socket), dict(zip(data.urls, data.etags, strict=True))
    samples = share.samples(len(data.checksums))
    stream = cache.stream(f"epoch {share.epoch}")
    stream.announce([data.place(sample) for sample in samples], etags)
    objects: dict[str, Any] = {}
    buffer = bytearray(data.sample_bytes)
    num_wrong, waits = 0, []
    began_s = time.monotonic()
    for nth, sample in enumerate(samples):
        due_s = began_s + nth * share.step_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        url, offset, _ = data.place(sample)
        asked_s = time.monotonic()
        if url not in objects:
            objects[url] = cache.open(url, etag=etags[url])
        objects[url].readinto(offset, buffer)
        waits.append((time.monotonic() - asked_s, asked_s))
        num_wrong += crc32c.crc32c(buffer) != data.checksums[sample]
        stream.advance(nth + 1)
    seconds = time.monotonic() - began_s
    stats = cache.stats()
    for opened in objects.values():
        opened.close()
    stream.close()
    cache.close()
    found = {"seconds": seconds, "wrong": num_wrong, "samples": len(samples), "direct": stats.direct_reads}
    # When each began, too: this machine's monotonic clock, so the one who broke something can tell what came after.
    return found | {"waits": sorted(waits, reverse=True)[:LONGEST]}


def main(argv: list[str]) -> None:
    socket, data_path, share = argv
    fields = json.loads(Path(data_path).read_text())
    data = Data(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    print(json.dumps(run_reader(socket, data, Share(**json.loads(share)))))


if __name__ == "__main__":
    main(sys.argv[1:])
