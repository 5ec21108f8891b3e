"""A prefix of an object store as a directory of real files: for programs that read paths, where no file system can be mounted.

    <dir>/<path below the prefix>          whole files, renamed into place
    <dir>/.railhead-preload/done.jsonl     what each file is: url, etag, size, a checksum for every 8 MiB
    <dir>/.railhead-preload/<id>.part      an object that is not whole yet, and beside it (.ranges) which of its ranges are

No daemon is needed. Killed at any moment, the next run goes on: ranges that are here and match their checksums are not fetched again. Files
that it did not make are never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.blocks import ObjectId
from cache.daemon.config import format_bytes
from cache.errors import CacheConfigError, CacheError, CapacityError, OriginThrottled
from cache.origin.ports import ObjectInfo
from cache.origin.registry import close_origins, origin_for
from cache.origin.urls import canonical_url
from cache.preload import PreloadResult, Progress
from cache.residency.retry import RetryPolicy
from cache.store.files import disk_error
from cache.store.format import checksum

RANGE_BYTES = 8 * 1024 * 1024
OWN_FOLDER = ".railhead-preload"
_RANGE = struct.Struct("<II")
RETRY = RetryPolicy()


def relative_path(prefix: str, url: str) -> Path:
    """Where an object below `prefix` goes. Raises CacheConfigError for a key that cannot be a path here.

    >>> relative_path("s3://b/train", "s3://b/train/a/0.tar"), relative_path("s3://b/train/0.tar", "s3://b/train/0.tar")
    (PosixPath('a/0.tar'), PosixPath('0.tar'))
    """
    rest = url[len(prefix.rstrip("/")) :].lstrip("/") or url.rstrip("/").rpartition("/")[2]
    parts = rest.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or parts[0] == OWN_FOLDER:
        raise CacheConfigError(
            f"{url} cannot be a file: {rest!r} is no path", advice="copy prefixes that do not hold it"
        )
    return Path(*parts)


@dataclass
class _Copy:
    """One object on its way into one file."""

    info: ObjectInfo
    target: Path
    part: Path
    fd: int = -1
    crcs: dict[int, int] = field(default_factory=dict)
    """Of the ranges that are here."""
    is_broken: bool = False
    """One of its ranges failed: no further one is fetched."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a range is written: the descriptor must not be closed, and its number taken by another file, meanwhile."""

    @property
    def num_ranges(self) -> int:
        return -(-self.info.size_bytes // RANGE_BYTES)

    def span(self, idx: int) -> tuple[int, int]:
        return idx * RANGE_BYTES, min((idx + 1) * RANGE_BYTES, self.info.size_bytes)

    @property
    def ranges(self) -> Path:
        return self.part.with_suffix(".ranges")

    def begin(self) -> None:
        """Opens the part, and looks what of it is here already: believed only if its bytes have their checksum."""
        self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(FileNotFoundError):
            noted = self.ranges.read_bytes()
            for idx, crc in _RANGE.iter_unpack(noted[: len(noted) // _RANGE.size * _RANGE.size]):
                if idx < self.num_ranges and self._crc_of(idx) == crc:
                    self.crcs[idx] = crc
        self.ranges.write_bytes(b"".join(_RANGE.pack(idx, crc) for idx, crc in self.crcs.items()))
        if self.info.size_bytes:
            os.posix_fallocate(self.fd, 0, self.info.size_bytes)

    def _crc_of(self, idx: int) -> int:
        start, end = self.span(idx)
        data = os.pread(self.fd, end - start, start)
        return checksum(data) if len(data) == end - start else -1

    def keep(self, idx: int, data: memoryview) -> None:
        """The bytes, then the note that they are here."""
        start, _ = self.span(idx)
        done, crc = 0, checksum(data)
        with self.lock:
            while self.fd >= 0 and done < len(data):
                done += os.pwrite(self.fd, data[done:], start + done)
            if self.fd < 0:
                return  # given up meanwhile
            with self.ranges.open("ab") as noted:
                noted.write(_RANGE.pack(idx, crc))
            self.crcs[idx] = crc

    def is_sound(self) -> bool:
        """Reads it back from the device."""
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return all(self._crc_of(idx) == crc for idx, crc in self.crcs.items())

    def close(self) -> None:
        with self.lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


class Mirror:
    """One run. `verify`: what was written, and what an earlier run had written, is read back and compared."""

    def __init__(self, url: str, directory: Path, *, jobs: int, verify: bool) -> None:
        self._prefix, self._directory = canonical_url(url), directory
        self._own = directory / OWN_FOLDER
        self._jobs, self._verify = jobs, verify
        self._rng = random.Random()
        self._result = PreloadResult(0, 0, wants_verification=verify)

    async def run(self) -> PreloadResult:
        """What fails for single files is in the result. Raises CacheConfigError, CapacityError (no room), the listing's OriginError."""
        started = time.monotonic()
        objects = [info async for info in origin_for(self._prefix).list(self._prefix)]
        targets = {info.url: relative_path(self._prefix, info.url) for info in objects}
        _refuse_conflicts(targets)
        try:
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheConfigError(f"cannot write to {self._directory}: {error.strerror}") from error
        self._result.num_objects = len(objects)
        self._result.total_bytes = sum(info.size_bytes for info in objects)
        missing = [info for info in objects if not await asyncio.to_thread(self._is_here, info, targets[info.url])]
        self._require_room(missing)
        progress = Progress(self._result)
        copies = iter([self._copy(info, targets[info.url]) for info in missing])
        workers = [asyncio.create_task(self._work(copies)) for _ in range(self._jobs)]
        try:
            while workers:
                done, _ = await asyncio.wait(workers, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    workers.remove(worker)
                    worker.result()
                progress.show(time.monotonic() - started)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            progress.end()
            await close_origins()
        self._result.seconds = time.monotonic() - started
        return self._result

    def _copy(self, info: ObjectInfo, target: Path) -> _Copy:
        content_id = ObjectId(info.url, info.etag, info.size_bytes).content_id
        return _Copy(info, self._directory / target, self._own / f"{content_id}.part")

    # -- what is here --

    def _is_here(self, info: ObjectInfo, target: Path) -> bool:
        """Whether an earlier run has finished this very generation, and nobody has changed the file. A file of others is refused."""
        path, entry = self._directory / target, self._done().get(str(target))
        if not path.exists():
            return False
        if entry is None:
            self._result.failures[info.url] = f"{path} exists, and was not made by preload: it is left alone"
            return True
        is_same = entry["etag"] == info.etag and entry["size_bytes"] == info.size_bytes == path.stat().st_size
        if not is_same:
            return False
        self._result.resident_bytes += info.size_bytes
        if self._verify:
            with path.open("rb") as file:
                crcs = [checksum(data) for data in iter(lambda: file.read(RANGE_BYTES), b"")]
            if crcs != entry["crcs"]:
                self._result.resident_bytes -= info.size_bytes
                return False
            self._result.verified_bytes += info.size_bytes
        return True

    def _done(self) -> dict[str, Any]:
        if not hasattr(self, "_entries"):
            self._entries: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError):
                for line in (self._own / "done.jsonl").read_text().splitlines():
                    with contextlib.suppress(ValueError, KeyError):  # a line that a kill tore
                        entry = json.loads(line)
                        self._entries[entry["path"]] = entry
        return self._entries

    def _require_room(self, missing: list[ObjectInfo]) -> None:
        begun = sum(path.stat().st_blocks * 512 for path in self._own.glob("*.part"))
        need, free = sum(info.size_bytes for info in missing) - begun, shutil.disk_usage(self._directory).free
        if need > free:
            raise CapacityError(
                f"{format_bytes(need)} are to be written, and {format_bytes(free)} are free in {self._directory}",
                advice="choose a larger disk, or a smaller prefix",
            )

    # -- the work --

    async def _work(self, copies: Iterator[_Copy]) -> None:
        for copy in copies:
            try:
                await asyncio.to_thread(copy.begin)
                self._result.resident_bytes += sum(copy.span(idx)[1] - copy.span(idx)[0] for idx in copy.crcs)
                todo = iter([idx for idx in range(copy.num_ranges) if idx not in copy.crcs])
                # Several ranges of one object at once, so that a single large one is not slower than many small ones.
                helpers = min(4, copy.num_ranges - len(copy.crcs))
                fetching = [self._fetch_ranges(copy, todo) for _ in range(helpers)]
                for outcome in await asyncio.gather(*fetching, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
                await asyncio.to_thread(self._finish, copy)
            except OSError as error:
                self._result.failures[copy.info.url] = str(
                    disk_error(error, f"cannot write {copy.target}", self._directory)
                )
            except CacheError as error:
                self._result.failures[copy.info.url] = str(error)
            finally:
                copy.close()

    async def _fetch_ranges(self, copy: _Copy, todo: Iterator[int]) -> None:
        for idx in todo:
            if copy.is_broken:
                return
            start, end = copy.span(idx)
            try:
                data = memoryview(await self._get(copy.info, start, end)).cast("B")
                await asyncio.to_thread(copy.keep, idx, data)
            except BaseException:
                copy.is_broken = True
                raise
            self._result.resident_bytes += len(data)
            self._result.origin_bytes += len(data)

    async def _get(self, info: ObjectInfo, start: int, end: int) -> Any:
        attempts = 0
        while True:
            try:
                return await origin_for(info.url).get_range(info.url, info.etag, start, end)
            except CacheError as error:
                attempts += 1
                asked_s = error.retry_after_s if isinstance(error, OriginThrottled) else None
                delay_s = RETRY.delay_s(attempts, asked_s, self._rng) if error.is_retryable else None
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)

    def _finish(self, copy: _Copy) -> None:
        """Verified, written down, renamed: in this order, so that a kill between any two costs no fetch."""
        if self._verify:
            if not copy.is_sound():
                copy.ranges.unlink()
                raise CacheError("what was read back from the disk does not match its checksums")
            self._result.verified_bytes += copy.info.size_bytes
        copy.target.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "path": str(copy.target.relative_to(self._directory)),
            "url": copy.info.url,
            "etag": copy.info.etag,
            "size_bytes": copy.info.size_bytes,
            "crcs": [copy.crcs[idx] for idx in range(copy.num_ranges)],
        }
        with (self._own / "done.jsonl").open("a") as done:
            done.write(f"\n{json.dumps(entry)}\n" if done.tell() else f"{json.dumps(entry)}\n")
        copy.part.replace(copy.target)
        copy.ranges.unlink(missing_ok=True)


def _refuse_conflicts(targets: dict[str, Path]) -> None:
    """An object store may hold both `a` and `a/b`; a directory cannot."""
    files = {path: url for url, path in targets.items()}
    for path, url in files.items():
        for parent in path.parents:
            if parent in files:
                raise CacheConfigError(f"{files[parent]} would be a file, and {url} needs it to be a directory")


def mirror(url: str, directory: Path, *, jobs: int, verify: bool) -> PreloadResult:
    """Everything below `url` as files in `directory`. Raises as Mirror.run."""
    return asyncio.run(Mirror(url, directory, jobs=jobs, verify=verify).run())
