"""`python -m cache status`: what the daemon of this node holds and does, once or live (`--watch`)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from cache.cli_options import dir_option, find_socket, socket_option
from cache.daemon import probe
from cache.daemon.config import format_bytes
from cache.errors import DaemonUnavailable

MAX_READERS_SHOWN = 16
_CLEAR = "\033[H\033[J"


@click.command()
@socket_option
@dir_option
@click.option("--json", "as_json", is_flag=True, help="As JSON; with --watch one line each time.")
@click.option(
    "--watch",
    "watch_s",
    is_flag=False,
    flag_value=2.0,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Look again and again, and show what happened in between: every 2 seconds, or as many as given.",
)
def status(socket: Path | None, directory: Path | None, as_json: bool, watch_s: float | None) -> None:
    """What the daemon of this node holds and does."""
    path = find_socket(socket, directory)
    account = _ask(path)
    if watch_s is None:
        click.echo(json.dumps(account, indent=2) if as_json else status_page(account))
        return
    clear = _CLEAR if sys.stdout.isatty() else ""
    while True:
        # By the daemon's clock: that is what its counters grew by.
        time.sleep(watch_s)
        before, account = account, _ask(path)
        text = json.dumps(account) if as_json else clear + watch_page(before, account)
        click.echo(text + ("" if as_json or clear else "\n"))
        sys.stdout.flush()


def _ask(path: str) -> dict[str, Any]:
    account = probe.status(path)
    if account is None:
        raise DaemonUnavailable(f"no cache daemon answers at {path}")
    return account


def _by_cause(stats: dict[str, float]) -> list[tuple[str, float]]:
    """Seconds waited by cause, the longest first."""
    causes = [
        (key.removeprefix("wait_s:"), value) for key, value in stats.items() if key.startswith("wait_s:") and value
    ]
    return sorted(causes, key=lambda item: -item[1])


def watch_page(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What happened between two looks at one daemon; of a daemon that was restarted between them, since its start."""
    if before["daemon_id"] != now["daemon_id"]:
        before = {"uptime_s": 0.0, "counters": {}, "readers": {}, "each_reader": []}
    seconds = max(now["uptime_s"] - before["uptime_s"], 1e-6)
    counters = _difference(before["counters"], now["counters"])
    readers = _difference(before["readers"], now["readers"])
    rates = [("disk", readers.get("hit_bytes", 0)), ("waited for", readers.get("miss_bytes", 0))]
    fetched = [("origin", counters["fetched_bytes"]), ("peers", counters["borrowed_bytes"])]
    fetched += [("past the daemon", readers.get("direct_bytes", 0))]
    used, capacity = now["used_bytes"], now["capacity_bytes"]
    rows = [
        (
            "cache",
            f"{format_bytes(used)} of {format_bytes(capacity)}, disk {now['disk']['state']}, {now['in_flight_blocks']} fetches under way",
        ),
        ("hit ratio", _hit_ratio(readers)),
        ("readers got", ", ".join(f"{name} {format_bytes(count / seconds)}/s" for name, count in rates)),
        ("fetched", ", ".join(f"{name} {format_bytes(count / seconds)}/s" for name, count in fetched)),
        ("evicted", f"{format_bytes(counters['evicted_bytes'] / seconds)}/s"),
        ("waited", _waits(readers, seconds)),
        ("forecast", now["forecast"]["text"]),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    return "\n".join(lines + _reader_lines(before["each_reader"], now["each_reader"], seconds))


def _reader_lines(before: list[dict[str, Any]], now: list[dict[str, Any]], seconds: float) -> list[str]:
    """Those that waited longest first."""
    old = {reader["client_id"]: reader["stats"] for reader in before}
    moved = [(reader, _difference(old.get(reader["client_id"], {}), reader["stats"])) for reader in now]
    moved.sort(key=lambda item: -item[1].get("wait_s", 0.0))
    lines = []
    for reader, stats in moved[:MAX_READERS_SHOWN]:
        got = sum(stats.get(key, 0) for key in ("hit_bytes", "miss_bytes", "direct_bytes"))
        order = "" if reader["streams"] else ", order unknown"
        waited = f"waited {_waits(stats, seconds)}{order}"
        lines.append(
            f"  pid {reader['pid']:<8} {format_bytes(got / seconds)}/s, hit ratio {_hit_ratio(stats)}, {waited}"
        )
    if len(moved) > MAX_READERS_SHOWN:
        lines.append(f"  … and {len(moved) - MAX_READERS_SHOWN} more")
    return lines


def _difference(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0) for key, value in now.items()}


def _hit_ratio(stats: dict[str, float]) -> str:
    reads = sum(stats.get(key, 0) for key in ("hits", "misses", "direct_reads"))
    return f"{stats.get('hits', 0) / reads:.1%} of {reads:,.0f} reads" if reads else "–"


def _waits(stats: dict[str, float], seconds: float) -> str:
    """As shares of the time: 100 % is one reader that does nothing but wait."""
    waits = ", ".join(f"{cause} {waited / seconds:.1%}" for cause, waited in _by_cause(stats))
    return f"{stats.get('wait_s', 0.0) / seconds:.1%} of the time" + (f": {waits}" if waits else "")


def status_page(account: dict[str, Any]) -> str:
    counters, readers = account["counters"], account["readers"]
    reads = sum(readers.get(key, 0) for key in ("hits", "misses", "direct_reads"))
    hit_ratio = f"{readers.get('hits', 0) / reads:.1%}" if reads else "–"
    used, capacity = account["used_bytes"], account["capacity_bytes"]
    waits = ", ".join(f"{cause} {seconds:.1f} s" for cause, seconds in _by_cause(readers)) or "none"
    rows = [
        ("serving", f"{account['dir']} at {account['socket']}, for {account['uptime_s']:.0f} s"),
        (
            "used",
            f"{format_bytes(used)} of {format_bytes(capacity)} ({used / capacity:.1%}), {account['extents']} extents",
        ),
        ("held by readers", f"{format_bytes(account['held_bytes'])} evicted but still open"),
        ("at start", f"{format_bytes(account['resident_bytes_at_start'])} found on disk"),
        ("from the origin", f"{format_bytes(counters['fetched_bytes'])} in {counters['fetched_blocks']} blocks"),
        (
            "",
            f"{counters['demand_fetches']} waited for, {counters['prefetches']} ahead, {counters['retries']} tried again",
        ),
        ("readers", f"{account['clients']} connected, {account['streams']} with known order"),
        (
            "reads",
            f"{reads:.0f}, hit ratio {hit_ratio}, {format_bytes(readers.get('direct_bytes', 0))} past the daemon",
        ),
        ("waited", f"{readers.get('wait_s', 0):.1f} s: {waits}"),
        ("forecast", account["forecast"]["text"]),
        ("disk", _disk_line(account["disk"], capacity)),
        (
            "verified",
            f"{counters['verified_blocks']} blocks, {counters['rotten_blocks']} rotten; scrubbed {counters['scrubbed_blocks']}, "
            f"{account['scrub_rounds']} times through",
        ),
        ("evicted", f"{format_bytes(counters['evicted_bytes'])} in {counters['evicted_extents']} extents"),
        ("pinned", ", ".join(account["pins"]) or "nothing"),
    ]
    return "\n".join(f"{name:<16} {text}" for name, text in rows)


def _disk_line(disk: dict[str, Any], capacity: int) -> str:
    free = f", {format_bytes(disk['free_bytes'])} free on it" if disk["free_bytes"] is not None else ""
    reason = f" ({disk['reason']})" if disk["state"] != "ok" else ""
    short = f"; others need it: {format_bytes(disk['bound_bytes'])} are ours" if disk["bound_bytes"] < capacity else ""
    return f"{disk['state']}{reason}{free}{short}"
