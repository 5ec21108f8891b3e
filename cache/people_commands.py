"""`python -m cache ls | evict | pin | unpin | resize`: a person asks a daemon. Translates; holds no judgement."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cache.cli_options import EXIT_INCOMPLETE, bytes_of, dir_option, find_socket, socket_option
from cache.client import Cache
from cache.daemon.config import format_bytes
from cache.origin.urls import canonical_url

SHRINK_TIMEOUT_S = 30.0

_urls = click.argument("urls", nargs=-1, metavar="[URL]...")
_some_urls = click.argument("urls", nargs=-1, required=True, metavar="URL...")


def objects_here(cache: Cache, urls: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What lies on the node's disk, below the urls or all. An answer of the daemon at a time. Raises DaemonUnavailable."""
    for url in map(canonical_url, urls) if urls else ("",):
        after: str | None = ""
        while after is not None:
            answer = cache.ask_daemon({"op": "ls", "url": url, "after": after})
            yield from answer["objects"]
            after = answer["after"]


def plural(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


@click.command()
@_urls
@socket_option
@dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def ls(urls: tuple[str, ...], socket: Path | None, directory: Path | None, as_json: bool) -> None:
    """What lies on this node's disk: everything, or what is below the URLs."""
    count, size, on_disk = 0, 0, 0
    with Cache(find_socket(socket, directory)) as cache:
        for here in objects_here(cache, urls):
            count, size, on_disk = count + 1, size + here["size_bytes"], on_disk + here["on_disk_bytes"]
            click.echo(json.dumps(here) if as_json else _line(here))
    if not as_json:
        click.echo(f"{plural(count, 'object')}, {format_bytes(on_disk)} of their {format_bytes(size)} here", err=True)


def _line(here: dict[str, Any]) -> str:
    share = here["on_disk_bytes"] / here["size_bytes"] if here["size_bytes"] else 1.0
    used = "not since the start" if here["used_ago_s"] is None else f"used {_ago(here['used_ago_s'])} ago"
    marks = [used]
    if here["num_readers"]:
        marks.append(f"open in {plural(here['num_readers'], 'reader')}")
    if here["is_pinned"]:
        marks.append("pinned")
    return f"{share:5.0%} of {format_bytes(here['size_bytes']):>9}  {here['url']}  ({', '.join(marks)})"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@click.command()
@_some_urls
@socket_option
@dir_option
def evict(urls: tuple[str, ...], socket: Path | None, directory: Path | None) -> None:
    """Remove objects from this node's disk, also those that the origin no longer has. Open readers go on reading.

    What is pinned stays (exit code 1).
    """
    num_pinned = 0
    with Cache(find_socket(socket, directory)) as cache:
        for url in map(canonical_url, urls):
            answer = cache.ask_daemon({"op": "evict", "url": url})
            count, pinned = answer["num_objects"], answer["num_pinned"]
            num_pinned += pinned
            freed = format_bytes(answer["evicted_bytes"])
            stays = f"; {plural(pinned, 'object')} pinned: unpin first" if pinned else ""
            click.echo(f"{url}: {freed} of {plural(count, 'object')} evicted{stays}" if count else f"{url}: not here")
    sys.exit(EXIT_INCOMPLETE if num_pinned else 0)


@click.command()
@_some_urls
@socket_option
@dir_option
def pin(urls: tuple[str, ...], socket: Path | None, directory: Path | None) -> None:
    """Keep objects on this node's disk: what is below the URLs is not evicted for others' sake, now and after a restart.

    It fetches nothing (preload does), and gives way only if the capacity could not be kept otherwise.
    """
    with Cache(find_socket(socket, directory)) as cache:
        for url in map(canonical_url, urls):
            answer = cache.ask_daemon({"op": "pin", "url": url, "is_pinned": True})
            here = f"{format_bytes(answer['on_disk_bytes'])} of {plural(answer['num_objects'], 'object')} here now"
            click.echo(f"{url}: pinned{' already' if answer['was_pinned'] else ''}; {here}")


@click.command()
@_some_urls
@socket_option
@dir_option
def unpin(urls: tuple[str, ...], socket: Path | None, directory: Path | None) -> None:
    """Let objects be evicted again. Exit code 1 for a URL that was not pinned itself."""
    was_all = True
    with Cache(find_socket(socket, directory)) as cache:
        for url in map(canonical_url, urls):
            answer = cache.ask_daemon({"op": "pin", "url": url, "is_pinned": False})
            was_all &= answer["was_pinned"]
            others = f"; still pinned by {', '.join(answer['still_pinned_by'])}" if answer["still_pinned_by"] else ""
            click.echo(f"{url}: {'not pinned any more' if answer['was_pinned'] else 'was not pinned'}{others}")
    sys.exit(0 if was_all else EXIT_INCOMPLETE)


@click.command()
@socket_option
@dir_option
@click.option("--capacity", callback=bytes_of, metavar="SIZE", required=True, help="The new bound: 200GB, 1.5TiB, …")
@click.option("--max-files", type=int, help="The new bound on the number of files. [default: as it is]")
def resize(socket: Path | None, directory: Path | None, capacity: int, max_files: int | None) -> None:
    """Give a running daemon another capacity, until it ends (`serve --capacity` says what it starts with).

    Exit code 0 when what is there fits; 1 if readers still hold too much after half a minute (it goes as they let go).
    """
    with Cache(find_socket(socket, directory)) as cache:
        answer = cache.ask_daemon({"op": "resize", "capacity_bytes": capacity, "max_files": max_files})
        click.echo(f"the capacity is {format_bytes(capacity)} now, it was {format_bytes(answer['before_bytes'])}")
        deadline_s = time.monotonic() + SHRINK_TIMEOUT_S
        while (account := cache.daemon_status()) is not None:
            if account["used_bytes"] <= capacity and account["files"] <= account["max_files"]:
                click.echo(f"used: {format_bytes(account['used_bytes'])}")
                return
            if time.monotonic() > deadline_s:
                held = format_bytes(account["held_bytes"])
                click.echo(
                    f"still used: {format_bytes(account['used_bytes'])}, of which readers hold {held} that was evicted"
                )
                sys.exit(EXIT_INCOMPLETE)
            time.sleep(0.1)
