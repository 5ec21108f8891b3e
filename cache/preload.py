"""Fetching whole data sets ahead of time: every byte, verified, with a result that tells the truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from cache.blocks import EXTENT_BYTES, num_extents
from cache.client import Cache
from cache.daemon.config import format_bytes
from cache.errors import CacheError, CapacityError, DaemonUnavailable
from cache.origin.ports import ObjectInfo
from cache.residency.budget import INDEX_BYTES_PER_EXTENT
from cache.store.format import LABEL_BYTES

PLAIN_PROGRESS_S = 5.0


@dataclass
class PreloadResult:
    num_objects: int
    total_bytes: int
    resident_bytes: int = 0
    verified_bytes: int = 0
    origin_bytes: int = 0
    seconds: float = 0.0
    wants_verification: bool = True
    failures: dict[str, str] = field(default_factory=dict)
    """Url → what went wrong."""

    @property
    def is_complete(self) -> bool:
        verified = self.verified_bytes == self.total_bytes or not self.wants_verification
        return not self.failures and self.resident_bytes == self.total_bytes and verified

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "is_complete": self.is_complete}

    def summary(self) -> str:
        rate = self.resident_bytes / self.seconds if self.seconds else 0.0
        objects = "1 object" if self.num_objects == 1 else f"{self.num_objects} objects"
        lines = [
            f"{'complete' if self.is_complete else 'INCOMPLETE'}: {format_bytes(self.resident_bytes)} of "
            f"{format_bytes(self.total_bytes)} in {objects} resident, {format_bytes(self.origin_bytes)} came from the origin; "
            f"{self.seconds:.1f} s, {format_bytes(rate)}/s"
        ]
        if self.wants_verification:
            lines.append(f"verified on disk: {format_bytes(self.verified_bytes)}")
        shown = list(self.failures.items())
        lines += [f"failed: {url}: {reason}" for url, reason in shown[:20]]
        if len(shown) > 20:
            lines.append(f"failed: … and {len(shown) - 20} more")
        return "\n".join(lines)


def preload(socket: str, urls: Sequence[str], *, jobs: int, verify: bool) -> PreloadResult:
    """Fetches everything below `urls` through the daemon at `socket`. Raises DaemonUnavailable, CapacityError (it would not fit) and
    the OriginError of a listing that failed; failures of single objects are in the result."""
    started = time.monotonic()
    cache = Cache(socket)
    before = cache.daemon_status()
    if before is None:
        raise DaemonUnavailable(f"no cache daemon answers at {socket}")
    objects = {info.url: info for url in urls for info in cache.list(url)}
    _check_room(list(objects.values()), int(before["capacity_bytes"]))
    result = PreloadResult(len(objects), sum(info.size_bytes for info in objects.values()), wants_verification=verify)
    progress = Progress(result)
    with ThreadPoolExecutor(max_workers=jobs) as threads:
        try:
            pending: dict[Future[None], str] = {
                threads.submit(_preload_one, cache, info, verify, result): info.url for info in objects.values()
            }
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    url = pending.pop(future)
                    error = future.exception()
                    if isinstance(error, CacheError):
                        result.failures[url] = str(error)
                    elif error is not None:
                        raise error
                progress.show(time.monotonic() - started)
        except BaseException:
            # Ctrl-C, most of all: threads that wait for a slow origin must not hold up the end.
            threads.shutdown(wait=False, cancel_futures=True)
            cache.close()
            raise
    after = cache.daemon_status()
    if after is not None and after["counters"]["evicted_extents"] != before["counters"]["evicted_extents"]:
        _look_again(cache, list(objects.values()), result)
    if after is not None:
        result.origin_bytes = after["counters"]["fetched_bytes"] - before["counters"]["fetched_bytes"]
    result.seconds = time.monotonic() - started
    progress.end()
    cache.close()
    return result


def _preload_one(cache: Cache, info: ObjectInfo, verify: bool, result: PreloadResult) -> None:
    with cache.open(info.url) as obj:
        obj.prefetch()
        for offset in range(0, obj.size, EXTENT_BYTES):
            length = min(EXTENT_BYTES, obj.size - offset)
            if not obj.fetch(offset, length):
                raise CapacityError("the daemon could not keep it (no room, or it went away)")
            result.resident_bytes += length
        if not verify:
            return
        if not obj.verify():
            raise CacheError("what was read back from the disk does not match its checksums")
        result.verified_bytes += obj.size


def _look_again(cache: Cache, objects: list[ObjectInfo], result: PreloadResult) -> None:
    """Something was evicted meanwhile, for another reader perhaps: it may have been ours."""
    for info in objects:
        if info.url in result.failures:
            continue
        with cache.open(info.url) as obj:
            missing = obj.size - (obj.on_disk_bytes or 0)
        if missing:
            result.resident_bytes -= missing
            result.failures[info.url] = f"{format_bytes(missing)} of it were evicted again while the rest was fetched"


def _check_room(objects: list[ObjectInfo], capacity_bytes: int) -> None:
    """Refuses what cannot fit as a whole: loading half of it, or evicting its own beginning, would be reported as success by nobody."""
    overhead = LABEL_BYTES + INDEX_BYTES_PER_EXTENT
    need = sum(info.size_bytes + num_extents(info.size_bytes) * overhead for info in objects)
    if need > capacity_bytes:
        raise CapacityError(
            f"{len(objects)} objects need {format_bytes(need)}; the cache's capacity is {format_bytes(capacity_bytes)}",
            advice="preload fewer objects, or start the daemon with a larger --capacity",
        )


class Progress:
    """A live bar on a terminal, a plain line now and then elsewhere; on standard error, so that results stay clean."""

    def __init__(self, result: PreloadResult) -> None:
        self._result = result
        self._said_s = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("preload", total=result.total_bytes)
            self._bar.start()

    def show(self, elapsed_s: float) -> None:
        result = self._result
        if self._bar is not None:
            self._bar.update(self._task, completed=result.resident_bytes)
        elif elapsed_s - self._said_s >= PLAIN_PROGRESS_S:
            self._said_s = elapsed_s
            rate = result.resident_bytes / elapsed_s
            eta_s = (result.total_bytes - result.resident_bytes) / rate if rate else float("inf")
            done = f"{format_bytes(result.resident_bytes)} of {format_bytes(result.total_bytes)}"
            print(f"preload: {done}, {format_bytes(rate)}/s, {eta_s:.0f} s to go", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._result.resident_bytes)
            self._bar.stop()
