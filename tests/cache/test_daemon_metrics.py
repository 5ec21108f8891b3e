"""The table of metrics in docs/cache.md, and what the daemon gives: the same names, with their units."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cache.daemon import metrics

DOCS = Path(__file__).parents[2] / "docs" / "cache.md"
COUNTED = (
    "blocks",
    "fetches",
    "prefetches",
    "hits",
    "misses",
    "reads",
    "extents",
    "bypasses",
    "retries",
    "room",
    "files",
    "clients",
)
STATES = ("streams", "visits", "requests", "state")


class Account:
    """A daemon's status in which everything is 1."""

    def status(self) -> dict[str, Any]:
        return {
            **dict.fromkeys(metrics.GAUGES, 1),
            "disk": {"state": "ok"},
            "forecast": dict.fromkeys(metrics.FORECAST, 1),
            "counters": dict.fromkeys(metrics.COUNTERS, 1),
            "readers": dict.fromkeys(metrics.READERS, 1) | {f"wait_s:{cause}": 1 for cause in metrics.WAIT_CAUSES},
        }


def families() -> dict[str, Any]:
    return {family.name: family for family in metrics._DaemonCollector(Account()).collect()}


def documented() -> set[str]:
    section = DOCS.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    table = section.partition("What a reader waited for")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([a-z_]+)(?:\{[^`]*\})?`", row)]
    return {f"railhead_cache_{name}" for name in names}


def test_every_metric_is_in_the_table_and_nothing_else_is() -> None:
    assert documented() == set(families())


def test_every_name_ends_with_its_unit_or_with_what_is_counted() -> None:
    for name in families():
        assert name.endswith(("_bytes", "_seconds", "_bytes_per_second", "_ratio", *COUNTED, *STATES)), name
        assert not name.endswith("_s") and "_ms" not in name


def test_causes_of_waiting_are_those_that_the_manual_explains() -> None:
    explained = set(
        re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text().partition("What a reader waited for")[2], re.MULTILINE)
    )
    waits = families()["railhead_cache_reader_wait_by_cause_seconds"]
    given = {sample.labels["cause"] for sample in waits.samples if sample.name.endswith("_total")}
    assert given <= explained and {"origin", "peer", "disk", "delayed-hit", "order-unknown"} <= given
    assert all(sample.value == 1 for sample in waits.samples)


def test_what_is_not_foretold_has_no_value() -> None:
    """A made-up 0 or 1 would raise an alarm, or hide one."""
    account = Account()
    unknown = account.status() | {"forecast": dict.fromkeys(metrics.FORECAST)}
    account.status = lambda: unknown  # type: ignore[method-assign]
    given = {family.name: family.samples for family in metrics._DaemonCollector(account).collect()}
    assert all(given[f"railhead_cache_{name}"] == [] for name, _ in metrics.FORECAST.values())
