"""What `status --watch` says, from two accounts of a daemon."""

from __future__ import annotations

from typing import Any

from cache.status_command import watch_page

MIB = 2**20


def account(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "daemon_id": "d",
        "uptime_s": 10.0,
        "used_bytes": 64 * MIB,
        "capacity_bytes": 128 * MIB,
        "in_flight_blocks": 0,
        "disk": {"state": "ok"},
        "forecast": {"text": "expect 81% utilisation"},
        "counters": {"fetched_bytes": 0, "borrowed_bytes": 0, "evicted_bytes": 0},
        "readers": {},
        "each_reader": [],
    }
    return base | changes


def reader(pid: int, **stats: float) -> dict[str, Any]:
    return {"client_id": f"{pid}-x", "pid": pid, "streams": 1, "connected_s": 1.0, "stats": stats}


def test_rates_and_shares_are_of_the_time_between_two_looks() -> None:
    before = account(readers={"hits": 100, "misses": 100, "hit_bytes": 50 * MIB, "wait_s": 7.0, "wait_s:origin": 7.0})
    stats = {"hits": 190, "misses": 110, "hit_bytes": 70 * MIB, "miss_bytes": 2 * MIB, "wait_s": 7.5}
    waits = {"wait_s:origin": 7.1, "wait_s:order unknown": 0.4}
    counters = {"fetched_bytes": 4 * MIB, "borrowed_bytes": 6 * MIB, "evicted_bytes": 0}
    page = watch_page(before, account(uptime_s=12.0, readers=stats | waits, counters=counters))
    assert "90.0% of 100 reads" in page
    assert "disk 10 MiB/s, waited for 1 MiB/s" in page and "origin 2 MiB/s, peers 3 MiB/s" in page
    assert "forecast     expect 81% utilisation" in page
    assert "25.0% of the time: order unknown 20.0%, origin 5.0%" in page


def test_who_waits_most_is_shown_first_and_a_crowd_is_cut_short() -> None:
    before = account(each_reader=[reader(n, wait_s=100.0) for n in range(40)])
    now = account(uptime_s=11.0, each_reader=[reader(n, wait_s=100.0 + n / 100) for n in range(40)])
    lines = watch_page(before, now).splitlines()
    readers = [line for line in lines if line.startswith("  pid")]
    assert readers[0].startswith("  pid 39") and "waited 39.0% of the time" in readers[0]
    assert len(readers) == 16 and "24 more" in lines[-1]


def test_a_restarted_daemon_counts_from_its_start() -> None:
    """Else the rates would be negative."""
    counters = {"fetched_bytes": 8 * MIB, "borrowed_bytes": 0, "evicted_bytes": 0}
    page = watch_page(account(counters=counters), account(daemon_id="e", uptime_s=2.0, counters=counters))
    assert "origin 4 MiB/s" in page
