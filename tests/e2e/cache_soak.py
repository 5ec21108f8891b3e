"""Every fault at once, for as long as one likes, with every byte and every sample audited.

    python -m tests.e2e.cache_soak --kills 1000 --page benchmarks/results/cache_faults_….md

One origin answers 2 % of ranges with 503, resets 1 %, cuts 1 % and stalls some in the middle; it goes away now and then; one of its
objects is overwritten again and again. One daemon has room for two thirds of the data, on a disk of its own (tmpfs, if root is at hand)
that is filled up now and then. A trainer reads shards in a known order, and readers read, map, fork, open and close. Daemon, fetch workers
and readers are killed with SIGKILL at random moments; with everything dead, files are flipped, cut, emptied and removed.

What must hold: no wrong byte, no sample lost or doubled, nobody hangs; in the end books balance, nothing is leaked, and what is complete is
not fetched again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.client import Cache
from cache.store.format import LABEL_BYTES
from tests.counting_origin import CountingOrigin, Fault, random_bytes
from tests.daemon import CacheDaemon, wait_until

NUM_SHARDS, SAMPLES_PER_SHARD, SAMPLE_BYTES = 12, 16, 150_000
NUM_BLOBS, BLOB_BYTES = 6, 5_000_077
BATCH = 16
HANG_S = 120.0
"""Nobody who lives may make no progress for this long (the origin is away for a minute at most). On a machine that does other work a start
alone may take as long: `--hang-s`."""

TRAINER = """
import os, random, sys
from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.tar import TarFormat
from cache.client.sampler import ElasticBatchSampler
from cache.errors import OriginUnavailable
socket, log, batch, size, *urls = sys.argv[1:]
lines = open(log).read().split("\\n")[:-1] if os.path.exists(log) else []
while True:
    try:
        dataset = ShardDataset(Cache(socket), urls, TarFormat())
        break
    except OriginUnavailable:
        continue
sampler = ElasticBatchSampler(dataset, global_batch_size=int(batch), seed=3, rank=0, world_size=1)
steps = sampler.steps_per_epoch
sampler.seek(len(lines) // steps, len(lines) % steps)
with open(log, "a", buffering=1) as file:
    while True:
        for indices in sampler:
            seen = []
            for index in indices:
                while True:
                    try:
                        sample = dataset[index]
                        break
                    except OriginUnavailable:  # away for longer than reads are tried again
                        continue
                number = int(sample["__key__"].rsplit("/", 1)[-1])
                if sample["bin"] != random.Random(number).randbytes(int(size)):
                    os.write(2, f"WRONG BYTES in sample {number}".encode())
                    os._exit(3)
                seen.append(number)
            file.write(" ".join(map(str, seen)) + "\\n")
"""

READER = """
import json, os, random, sys
from cache.client import Cache
from cache.errors import ObjectChanged, ObjectNotFound, OriginUnavailable
socket, seed, size, generations, mutable, *urls = sys.argv[1:]
size, rng = int(size), random.Random(int(seed))
expected = [random.Random(5000 + idx).randbytes(size) for idx in range(len(urls))]
cache = Cache(socket)
def wrong(what):
    os.write(2, f"WRONG BYTES in {what}".encode())
    os._exit(3)

def in_child(obj, offset, length, want):
    try:
        os._exit(0 if obj.read(offset, length) == want else 3)
    except OriginUnavailable:
        os._exit(4)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(5)

objects, views = [], []

def step():
    global views
    while len(objects) < len(urls):
        objects.append(cache.open(urls[len(objects)]))
    idx, offset, length = rng.randrange(len(urls)), rng.randrange(size), rng.choice([10, 60_000, 1_000_000])
    way = rng.randrange(8)
    want = expected[idx][offset : offset + length]
    if way < 3:
        if objects[idx].read(offset, length) != want:
            wrong(f"read of {idx}")
    elif way < 5:
        view = objects[idx].view(offset, length)
        views = [*views[-3:], (view, want)]
        if any(view != held for view, held in views):
            wrong(f"view of {idx}")
    elif way == 5:
        objects[idx] = cache.open(urls[idx])
    elif way == 6:
        child = os.fork()
        if child == 0:
            in_child(objects[idx], offset, length, want)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 3:
            wrong(f"read of {idx} in a forked child")
        if code not in (0, 4):
            sys.exit(f"a forked child ended with {code}")
    else:
        try:
            with cache.open(mutable) as obj:
                known = json.load(open(generations))
                got = obj.read(offset, length)
                if got != random.Random(known[obj.etag]).randbytes(size)[offset : offset + length]:
                    wrong("the overwritten object")
        except (ObjectChanged, ObjectNotFound):
            pass

while True:
    try:
        step()
        os.write(1, b".")
    except OriginUnavailable:  # away for longer than reads are tried again
        os.write(1, b"-")
"""


class Soak:
    """`run` raises AssertionError with what went wrong; `counts` says what was done."""

    def __init__(self, seed: int, root: Path, *, minute_away: bool, hang_s: float = HANG_S) -> None:
        self.rng = random.Random(seed)
        self.root = root
        self.counts: Counter[str] = Counter()
        self.longest_silence_s = 0.0
        self._minute_away = minute_away
        self._hang_s = hang_s
        self._origin = CountingOrigin()
        self._faults = random.Random(seed + 1)
        self._origin.fault = self._fault
        self._shards = [self._origin.put(f"shard-{idx}.tar", _shard(idx)) for idx in range(NUM_SHARDS)]
        self._blobs = [
            self._origin.put(f"blob-{idx}", random_bytes(BLOB_BYTES, 5000 + idx)) for idx in range(NUM_BLOBS)
        ]
        self._generations: dict[str, int] = {}
        self._mutable = self._overwrite()
        self._people: dict[str, subprocess.Popen[bytes]] = {}
        self._output: dict[str, Path] = {}
        self._progress: dict[str, tuple[int, float]] = {}
        self._workers: set[int] = set()
        self._disk = _mounted(root / "disk")
        data = NUM_SHARDS * SAMPLES_PER_SHARD * SAMPLE_BYTES + (NUM_BLOBS + 1) * BLOB_BYTES
        options = ("--keep-free", "4MiB", "--scrub-rate", "64MiB")
        self.daemon = CacheDaemon(capacity=data * 2 // 3, options=options, dir=root / "disk" / "cache")

    # -- what is done --

    def run(self, kills: int) -> None:
        shm_before = _shared_memory()
        with self.daemon:
            baseline = _descriptors(self.daemon.pid)
            self._start_people()
            while sum(self.counts[name] for name in ("daemon killed", "worker killed")) < kills:
                self._one_event()
                self._watch_people()
            while self._num_steps() < NUM_SHARDS * SAMPLES_PER_SHARD // BATCH:
                self._origin.release()
                self._pause(0.2)  # whatever happened, an epoch comes to its end
            self._stop_people()
            self._audit_samples()
            self._audit_books(baseline)
            self._audit_nothing_twice()
        self._origin.close()
        for pid in self._workers:
            assert not _is_our_worker(pid), f"fetch worker {pid} outlived its daemon"
        assert _shared_memory() == shm_before, "shared memory was left behind"
        if self._disk:
            subprocess.run(["umount", "-l", self.root / "disk"], check=True)

    def _one_event(self) -> None:
        self._pause(self.rng.uniform(0.02, 0.5))
        if self.rng.random() < 0.1:
            self._origin.release()  # bodies that stalled until now are cut
        events = {
            self._kill_daemon: 40, self._kill_worker: 40, self._kill_reader: 6, self._kill_trainer: 4,
            self._overwrite: 4, self._fill_disk: 2, self._corrupt: 2, self._origin_away: 1,
        }  # fmt: skip
        self.rng.choices(list(events), list(events.values()))[0]()

    def _kill_daemon(self) -> None:
        self._workers.update(self.daemon.worker_pids())
        self.daemon.kill()
        if self.rng.random() < 0.3:
            self._pause(self.rng.uniform(0.0, 1.0))
        self.daemon.start()
        self.counts["daemon killed"] += 1

    def _kill_worker(self) -> None:
        pids = self.daemon.worker_pids()
        self._workers.update(pids)
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(pids), signal.SIGKILL)
                self.counts["worker killed"] += 1

    def _kill_reader(self) -> None:
        self._kill(self.rng.choice(["reader-0", "reader-1"]))
        self.counts["reader killed"] += 1
        self._start_people()

    def _kill_trainer(self) -> None:
        self._kill("trainer")
        self.counts["trainer killed"] += 1
        self._start_people()

    def _overwrite(self) -> str:
        """Told to the readers before it is so: what they see has a generation that they know."""
        seed = 9000 + len(self._generations)
        data = random_bytes(BLOB_BYTES, seed)
        import hashlib

        self._generations[f'"{hashlib.md5(data).hexdigest()}"'] = seed
        file = self.root / "generations.tmp"
        known = {etag.strip('"'): seed for etag, seed in self._generations.items()} | self._generations
        file.write_text(json.dumps(known))
        file.rename(self.root / "generations")
        self.counts["object overwritten"] += 1
        return self._origin.put("mutable", data)

    def _fill_disk(self) -> None:
        if not self._disk:
            return
        filler = self.root / "disk" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        self._pause(self.rng.uniform(0.5, 3.0))
        filler.unlink()
        self.counts["disk filled"] += 1

    def _corrupt(self) -> None:
        """With nobody alive: who has a file mapped would see any change of it, as no disk's rot is seen through the page cache."""
        self._stop_people()
        self.daemon.kill()
        files = self.daemon.extent_files
        for path in self.rng.sample(files, min(4, len(files))):
            size = path.stat().st_size
            match self.rng.randrange(5):
                case 0 | 1:
                    for _ in range(3):
                        _flip(path, self.rng.randrange(size), self.rng)
                    self.counts["file with flipped bits"] += 1
                case 2:
                    os.truncate(path, self.rng.randrange(size))
                    self.counts["file cut short"] += 1
                case 3:
                    path.unlink()
                    self.counts["file removed"] += 1
                case _:
                    with path.open("r+b") as file:
                        file.seek(max(0, size - LABEL_BYTES))
                        file.write(self.rng.randbytes(4096))
                    self.counts["label overwritten"] += 1
        if self.rng.random() < 0.3:
            (self.daemon.dir / "index.db").write_bytes(self.rng.randbytes(5000))
            self.counts["index overwritten"] += 1
        self.daemon.start()
        self._start_people()

    def _origin_away(self) -> None:
        is_long = self._minute_away and not self.counts["origin away for a minute"]
        with self._origin.away():
            self._pause(60.0 if is_long else self.rng.uniform(0.5, 4.0))
        self.counts["origin away for a minute" if is_long else "origin away for seconds"] += 1

    def _fault(self, path: str, start: int, end: int) -> Fault | None:
        draw, middle = self._faults.random(), (end - start) // 2
        if draw < 0.02:
            self.counts["503 answered"] += 1
            return Fault(refuse=503, headers=(("Retry-After", "0"),))
        if draw < 0.03:
            self.counts["connection reset"] += 1
            return Fault(after_bytes=middle, resets=True)
        if draw < 0.04:
            self.counts["body cut"] += 1
            return Fault(after_bytes=middle)
        if draw < 0.043:
            self.counts["body stalled"] += 1
            return Fault(after_bytes=middle, stalls=True)
        return None

    # -- people --

    def _start_people(self) -> None:
        for name in ("trainer", "reader-0", "reader-1"):
            if name in self._people and self._people[name].poll() is None:
                continue
            seed = str(self.rng.randrange(1 << 30))
            generations = str(self.root / "generations")
            common = [self.daemon.socket]
            if name == "trainer":
                script = TRAINER
                common += [str(self.root / "samples"), str(BATCH), str(SAMPLE_BYTES), *self._shards]
            else:
                script = READER
                common += [seed, str(BLOB_BYTES), generations, self._mutable, *self._blobs]
            self._output[name] = self.root / f"{name}.out"
            with self._output[name].open("wb") as out, (self.root / f"{name}.err").open("wb") as err:
                command = [sys.executable, "-c", script, *common]
                self._people[name] = subprocess.Popen(command, stdout=out, stderr=err)
            self._progress[name] = (-1, time.monotonic())

    def _watch_people(self) -> None:
        """Who has ended has an error to show; who lives must get on."""
        for name, process in self._people.items():
            errors = (self.root / f"{name}.err").read_text()
            assert "WRONG BYTES" not in errors, errors
            assert process.poll() is None, f"{name} ended with {process.returncode}: {errors[-3000:]}"
            samples = self.root / "samples"
            source = samples if name == "trainer" else self._output[name]
            done = source.stat().st_size if source.exists() else 0
            before, since_s = self._progress[name]
            if done != before:
                self._progress[name] = (done, time.monotonic())
            else:
                silence_s = time.monotonic() - since_s
                self.longest_silence_s = max(self.longest_silence_s, silence_s)
                assert silence_s < self._hang_s, (
                    f"{name} has made no progress for {silence_s:.0f} s\n{self.daemon.log[-3000:]}"
                )

    def _pause(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.5))
            if self._people:
                self._watch_people()

    def _kill(self, name: str) -> None:
        process = self._people.pop(name)
        output = self._output[name].read_bytes()
        self.counts["reads audited"] += output.count(b".")
        self.counts["reads refused while the origin was away"] += output.count(b"-")
        process.kill()
        process.wait()
        errors = (self.root / f"{name}.err").read_text()
        assert "WRONG BYTES" not in errors, errors

    def _stop_people(self) -> None:
        for name in list(self._people):
            self._kill(name)

    # -- what must hold --

    def _num_steps(self) -> int:
        log = self.root / "samples"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def _audit_samples(self) -> None:
        lines = (self.root / "samples").read_text().split("\n")[:-1]
        per_epoch = NUM_SHARDS * SAMPLES_PER_SHARD // BATCH
        for start in range(0, len(lines) - per_epoch + 1, per_epoch):
            numbers = sorted(int(n) for line in lines[start : start + per_epoch] for n in line.split())
            assert numbers == list(range(NUM_SHARDS * SAMPLES_PER_SHARD)), f"epoch {start // per_epoch} is not whole"
            self.counts["epochs exactly once"] += 1
        self.counts["samples audited"] += len(lines) * BATCH

    def _audit_books(self, baseline: int) -> None:
        wait_until(lambda: self.daemon.status()["clients"] == 0, "all readers have gone", 60)
        wait_until(lambda: self.daemon.status()["in_flight_blocks"] == 0, "nothing is under way", 120)
        wait_until(lambda: self.daemon.status()["held_bytes"] == 0, "nobody holds what was evicted", 60)
        # What the readers had hinted at may come still, and files for it come and go while we count.
        polls: list[list[Any]] = []
        wait_until(lambda: self._comes_to_rest(polls), "no file comes or goes", 60)
        status = self.daemon.status()
        assert status["held_bytes"] == status["waiting_requests"] == status["streams"] == 0, status
        num_indexes = len(list(self.daemon.dir.rglob("*.idx")))
        assert status["extents"] == len(self.daemon.extent_files) == status["files"] - num_indexes, status
        assert self.daemon.disk_bytes() <= status["used_bytes"] <= status["capacity_bytes"], status
        assert not list(self.daemon.dir.glob("extents/*/*.tmp")), "half-made files were left"
        assert not self.daemon.held_files, "files that nobody holds were left"
        wait_until(lambda: _descriptors(self.daemon.pid) <= baseline + 2, "no descriptor was leaked", 60)
        assert "Traceback" not in self.daemon.log, self.daemon.log[-5000:]

    def _comes_to_rest(self, polls: list[list[Any]]) -> bool:
        """Nothing has happened for many polls, and what the machine counts is there: no file is being made or removed."""
        status = self.daemon.status()
        counters = status["counters"]
        seen = [status["used_bytes"], counters["fetched_blocks"], counters["evicted_extents"], self.daemon.disk_bytes()]
        polls.append(seen)
        is_idle = status["in_flight_blocks"] == status["held_bytes"] == 0
        return is_idle and status["extents"] == len(self.daemon.extent_files) and polls[-20:] == [seen] * 20

    def _audit_nothing_twice(self) -> None:
        """With room for all and all of it here, a daemon that is killed and started again asks the origin for nothing."""
        self._origin.fault = lambda path, start, end: None
        self.daemon.stop()
        self.daemon.capacity = "80MiB"
        if self._disk:
            subprocess.run(["mount", "-o", "remount,size=160m", self.root / "disk"], check=True)
        self.daemon.start()
        urls = [*self._shards, *self._blobs]
        self._read_all(urls)
        gets = self._origin.num_gets
        for _ in range(3):
            self.daemon.kill()
            self.daemon.start()
            self._read_all(urls)
        assert self._origin.num_gets == gets, f"{self._origin.num_gets - gets} ranges were fetched a second time"
        self.counts["ranges fetched twice though complete"] = 0

    def _read_all(self, urls: list[str]) -> None:
        with Cache(self.daemon.socket) as cache:
            for url in urls:
                with cache.open(url) as obj:
                    assert obj.fetch(), "there is room for all"
                    expected = self._origin.objects[url.rsplit("/", 1)[1]]
                    assert obj.read(0, obj.size) == expected


def _shard(idx: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(idx * SAMPLES_PER_SHARD, (idx + 1) * SAMPLES_PER_SHARD):
            info = tarfile.TarInfo(f"{number:06d}.bin")
            info.size = SAMPLE_BYTES
            tar.addfile(info, io.BytesIO(random_bytes(SAMPLE_BYTES, number)))
    return buffer.getvalue()


def _flip(path: Path, offset: int, rng: random.Random) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ (1 << rng.randrange(8))]), offset)


def _mounted(where: Path) -> bool:
    """A disk of its own that can be filled up, where root is at hand."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(where)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _shared_memory() -> set[str]:
    """Named segments of ours; other programs of this machine come and go."""
    return {name for name in os.listdir("/dev/shm") if "railhead" in name or name.startswith("rh-")}


def _is_our_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"cache.daemon.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def soaked(seed: int, kills: int, *, minute_away: bool = False, hang_s: float = HANG_S) -> Iterator[Soak]:
    """A soak that has run."""
    with tempfile.TemporaryDirectory(prefix="rh-soak-") as folder:
        soak = Soak(seed, Path(folder), minute_away=minute_away, hang_s=hang_s)
        try:
            soak.run(kills)
            yield soak
        finally:
            for process in soak._people.values():
                process.kill()
                process.wait()
            if soak._disk:
                subprocess.run(["umount", "-l", Path(folder) / "disk"], check=False, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="of daemon and workers, together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-s", type=float, default=HANG_S, help="silence of a reader that is a hang")
    parser.add_argument("--page", type=Path, help="write the result page here")
    options = parser.parse_args()
    started = time.monotonic()
    with soaked(options.seed, options.kills, minute_away=True, hang_s=options.hang_s) as soak:
        text = page(soak, options, time.monotonic() - started)
    print(text)
    if options.page:
        options.page.write_text(text)


def page(soak: Soak, options: Any, seconds: float) -> str:
    from benchmarks.machine import hardware, versions

    rows = "\n".join(f"| {name} | {count:,} |" for name, count in sorted(soak.counts.items()))
    return f"""# The cache under every fault at once

Question: does any reader ever see a wrong byte, lose or repeat a sample, or hang, whatever is killed, broken or overwritten?

- Command: `python -m tests.e2e.cache_soak --kills {options.kills} --seed {options.seed} --hang-s {options.hang_s:g}`,
  one run of {seconds / 60:.0f} minutes
- {hardware()}
- {versions(["railhead", "torch", "obstore"])}
- Load average over the last quarter of an hour: {os.getloadavg()[2]:.1f}

Result: no wrong byte, no sample lost or doubled, no hang (the longest time in which one reader got nothing done:
{soak.longest_silence_s:.1f} s), books balanced, no descriptor, file, process or shared memory left, and with all data resident
nothing was fetched again over three more kills. Each is asserted: the run ends at the first violation.

| what was done | times |
|---|---|
{rows}

Files are damaged only while nobody has them open: a change through the file system is seen by whoever has the file mapped, which rot on a
device is not. What rots while a daemon runs: tests/integration/test_cache_disks.py.
Disk of its own (tmpfs): {"yes" if soak._disk else "no, so it was never full"}.
"""


if __name__ == "__main__":
    main()
