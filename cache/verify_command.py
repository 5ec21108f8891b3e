"""`python -m cache verify`: is what lies on this node's disk what was written? Asks the daemon; where none runs, reads the files itself."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from cache.cli_options import EXIT_INCOMPLETE, dir_option, find_socket, socket_option
from cache.client import Cache
from cache.daemon import probe
from cache.daemon.config import format_bytes
from cache.errors import DaemonUnavailable
from cache.origin.urls import canonical_url
from cache.people_commands import objects_here, plural
from cache.residency.residents import is_below_any
from cache.store.directory import CacheDirectory
from cache.store.verification import ExtentFile, Verdict, files_to_verify, verify_file

PROGRESS_S = 1.0
MAX_THREADS = 8
"""Files read at once: a disk of many queues wants several, and checksums are computed on as many cores."""
FILES_AT_ONCE = 256


@dataclass
class Result:
    """What has been read back so far. `rotten`: by object, what was wrong with it."""

    objects: set[str] = field(default_factory=set)
    verified_bytes: int = 0
    rotten: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "num_objects": len(self.objects),
            "verified_bytes": self.verified_bytes,
            "rotten": self.rotten,
            "is_sound": not self.rotten,
        }


class Progress:
    """A line on a terminal, once a second."""

    def __init__(self) -> None:
        self._started_s = self._said_s = time.monotonic()

    def show(self, done_bytes: int, total_bytes: int | None = None) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._said_s < PROGRESS_S:
            return
        self._said_s = now
        rate = done_bytes / (now - self._started_s)
        of_all = ""
        if total_bytes is not None:
            of_all = f" of {format_bytes(total_bytes)}, {(total_bytes - done_bytes) / max(rate, 1.0):.0f} s left"
        click.echo(f"\r{format_bytes(done_bytes)}{of_all}, {format_bytes(rate)}/s \033[K", nl=False, err=True)


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@socket_option
@dir_option
@click.option("--repair", is_flag=True, help="Without a daemon: discard what is not sound. (A daemon does so anyway.)")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def verify(urls: tuple[str, ...], socket: Path | None, directory: Path | None, repair: bool, as_json: bool) -> None:
    """Read what is on this node's disk back from the device, and compare it with its checksums: everything, or what is below the URLs.

    With --dir and no daemon that serves it, its files are read without one. Exit code 0 if and only if all of it was what had been
    written. What was not is discarded (without a daemon only with --repair), and fetched again when it is wanted.
    """
    wanted = tuple(canonical_url(url) for url in urls)
    here = _directory_without_daemon(directory) if directory is not None else None
    if here is None:
        result, fate = _by_the_daemon(find_socket(socket, directory), wanted), "discarded"
    else:
        try:
            result = _without_a_daemon(here, wanted, repair=repair)
        finally:
            here.close()
        fate = "discarded" if repair else "left as it is"
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _say(result, fate)
    sys.exit(EXIT_INCOMPLETE if result.rotten else 0)


def _say(result: Result, fate: str) -> None:
    for url, found in result.rotten.items():
        click.echo(f"ROTTEN: {url}: {'; '.join(found)}: {fate}")
    sound = f"{format_bytes(result.verified_bytes)} in {plural(len(result.objects), 'object')}"
    if not result.rotten:
        click.echo(f"sound: {sound}")
        return
    click.echo(f"{plural(len(result.rotten), 'object')} had rotted; sound: {sound}")
    if fate != "discarded":
        click.echo(
            "  nothing was changed: --repair discards it; a daemon that starts here does, too, before it serves it"
        )


def _directory_without_daemon(path: Path) -> CacheDirectory | None:
    """The directory, locked, so that no daemon starts on it meanwhile; None when one serves it. Raises CacheConfigError."""
    found = CacheDirectory.open_existing(path)
    if isinstance(found, CacheDirectory):
        found.serve_at("")  # A daemon that is started meanwhile names this process.
        return found
    if found.socket and probe.answers(found.socket):
        return None
    raise DaemonUnavailable(
        f"{path} is locked by process {found.pid or '(unknown)'}, which does not answer",
        advice="it is starting or on its way out, or frozen: try again, or end it",
    )


def _by_the_daemon(socket: str, urls: tuple[str, ...]) -> Result:
    result, progress = Result(), Progress()
    with Cache(socket) as cache:
        for here in objects_here(cache, urls):
            url = here["url"]
            result.objects.add(here["content_id"])
            for extent_idx in here["extents"]:
                request = {"op": "check", "content_id": here["content_id"], "extent_idx": extent_idx}
                cause = cache.ask_daemon(request)["cause"]
                if cause not in ("hit", "sound"):
                    result.rotten.setdefault(url, []).append(f"extent {extent_idx}: {cause}")
            result.verified_bytes += here["on_disk_bytes"] * (url not in result.rotten)
            progress.show(result.verified_bytes)
    return result


def _without_a_daemon(directory: CacheDirectory, urls: tuple[str, ...], *, repair: bool) -> Result:
    result, progress = Result(), Progress()
    files = files_to_verify(directory)
    total_bytes, done_bytes = sum(file.size_bytes for file in files), 0
    is_meant = _is_meant(urls)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for file, verdict in _verdicts(pool, files, is_meant, repair):
                done_bytes += file.size_bytes
                if verdict is not None:
                    result.objects.add(file.extent.content_id)
                    result.verified_bytes += verdict.sound_bytes
                    if not verdict.is_sound:
                        result.rotten.setdefault(verdict.url or str(file.path), []).append(verdict.sentence())
                progress.show(done_bytes, total_bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return result


def _verdicts(
    pool: ThreadPoolExecutor, files: list[ExtentFile], is_meant: Callable[[str], bool], repair: bool
) -> Iterator[tuple[ExtentFile, Verdict | None]]:
    """Some at a time: 100,000 futures would take more memory than the daemon does."""
    for start in range(0, len(files), FILES_AT_ONCE):
        some = files[start : start + FILES_AT_ONCE]
        yield from zip(some, pool.map(lambda file: verify_file(file, is_meant, repair=repair), some), strict=True)


def _is_meant(urls: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda url: not urls or is_below_any(url, urls)
