"""The clock of a node is stepped by hours, in both directions, under daemons that serve: NTP after a boot, a VM that slept, a person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest

from benchmarks.seaweed import free_ports
from cache.blocks import BLOCK_BYTES
from cache.client import Cache
from cache.client.object import CachedObject
from cache.errors import AccessDenied
from tests.counting_origin import CountingOrigin, Fault, random_bytes
from tests.daemon import CacheDaemon, wait_until
from tests.fakes.keyed_store import KeyedStore
from tests.integration.test_cache_refusals import store
from tests.steppedclock import SteppedClock

__all__ = ["store"]

OpenCache = Callable[[str], Cache]
SIZE = 600_000


@pytest.fixture
def clock(tmp_path: Path) -> SteppedClock:
    return SteppedClock(tmp_path)


def test_a_process_sees_the_step_and_its_monotonic_clock_does_not(clock: SteppedClock) -> None:
    """Else the tests below would step nothing."""
    clock.step(5)
    script = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic())"
    seen = subprocess.run([sys.executable, "-c", script], env=clock.environment, capture_output=True, check=True)
    clock.step(0)
    again = subprocess.run([sys.executable, "-c", script], env=clock.environment, capture_output=True, check=True)
    (wall, date, monotonic), (wall_then, _, monotonic_then) = (map(float, o.stdout.split()) for o in (seen, again))
    assert wall - wall_then > 4 * 3600 and abs(wall - date) < 60 and monotonic < monotonic_then


def test_a_step_by_hours_costs_a_node_its_peers_and_nothing_else(
    counting_origin: CountingOrigin, open_cache: OpenCache, tmp_path: Path, clock: SteppedClock
) -> None:
    """Peers whose clocks differ refuse each other, and read the origin; back in step they share again. What is believed of an object for a
    fifth of a second is not believed for five hours, an origin that says when to come again is not kept waiting for them, and every byte is
    right."""
    ports = free_ports(2)
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o600)
    peers = ("--peers", ",".join(f"127.0.0.1:{port}" for port in ports), "--peer-key-file", str(key))
    with (
        CacheDaemon(
            options=(*peers, "--peer-listen", f"127.0.0.1:{ports[0]}"), environment=clock.environment
        ) as stepped,
        CacheDaemon(options=(*peers, "--peer-listen", f"127.0.0.1:{ports[1]}")) as other,
    ):
        both = (stepped, other)
        caches = [open_cache(daemon.socket) for daemon in both]
        wait_until(lambda: _share(both, True), "they are peers")
        for number, hours in enumerate((-5, 0)):  # back, and forward again
            clock.step(hours)
            counting_origin.fault = _busy_once()
            names = [f"o{number}.{idx}" for idx in range(4)]
            data = [random_bytes(SIZE, number * 10 + idx) for idx in range(4)]
            for cache in caches:
                for name, content in zip(names, data, strict=True):
                    with cache.open(counting_origin.put(name, content)) as obj:
                        assert obj.read(0, SIZE) == content, f"{hours} h"
            newer = random_bytes(SIZE, 99 - number)
            url = counting_origin.put(names[0], newer)
            for cache in caches:
                wait_until(partial(_is_now, cache, url, newer), "the overwritten object is seen")
            wait_until(partial(_share, both, hours == 0), f"who shares at {hours} h")
        assert all(cache.stats().direct_reads == 0 for cache in caches), "no daemon was taken for dead"
        assert "Traceback" not in stepped.log + other.log


def _is_now(cache: Cache, url: str, data: bytes) -> bool:
    with cache.open(url) as obj:
        return obj.read(0, SIZE) == data


def _share(daemons: Sequence[CacheDaemon], is_wanted: bool) -> bool:
    """Whether all are members of one cluster; not wanted: whether one was refused by another."""
    accounts = [daemon.status()["peers"] for daemon in daemons]
    if is_wanted:
        return all(account["members"] == len(daemons) for account in accounts)
    return any(account["members"] == 1 or account["bypassed"].get("refused") for account in accounts)


def _busy_once() -> Callable[[str, int, int], Fault | None]:
    """The first range is refused until a date."""
    left = [True]

    def fault(path: str, start: int, end: int) -> Fault | None:
        if not left:
            return None
        left.clear()
        return Fault(refuse=503, headers=(("Retry-After", formatdate(usegmt=True)),))

    return fault


def test_keys_that_expire_are_renewed_or_refused_by_name_whatever_the_clock_says(
    store: KeyedStore, tmp_path: Path, open_cache: OpenCache, clock: SteppedClock
) -> None:
    """A clock that runs ahead takes good keys for expired, one that fell behind takes expired ones for good. Neither may hang, and what the
    store accepts in the end is read."""
    keys = tmp_path / "keys.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = /bin/cat {keys}\n")

    def give_out(access_key: str, hours: float) -> None:
        until = datetime.now(UTC) + timedelta(hours=hours)
        told = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": "s", "SessionToken": "t"}
        part = keys.with_suffix(".part")
        part.write_text(json.dumps({**told, "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        part.rename(keys)

    data = random_bytes(40 * BLOCK_BYTES)
    store.objects["/lab/train/0.tar"] = data
    give_out("first", hours=1)
    with (
        CacheDaemon(environment=clock.environment | _aws()) as daemon,
        open_cache(daemon.socket).open("s3://lab/train/0.tar") as opened,
    ):
        assert opened.read(0, 100) == data[:100]
        clock.step(5)
        with pytest.raises(AccessDenied, match="expired"):
            open_cache(daemon.socket).open("s3://lab/train/1.tar")
        assert opened.read(0, 100) == data[:100], "what is here is served"
        give_out("first", hours=9)
        wait_until(partial(_is_read, opened, 20 * BLOCK_BYTES, data), "longer lived keys are used")
        clock.step(-5)
        give_out("second", hours=1)
        store.key = "second"
        wait_until(partial(_is_read, opened, 30 * BLOCK_BYTES, data), "other keys are used")


def _is_read(opened: CachedObject, offset: int, data: bytes) -> bool:
    """Keys are looked for anew once in a while, not after each refusal."""
    try:
        return opened.read(offset, 100) == data[offset : offset + 100]
    except AccessDenied:
        return False


def _aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
