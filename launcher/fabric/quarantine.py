"""Remembering nodes that were slow or unreachable, and deciding which to leave out of the next gang.

Pure: the history is a value, `now` an argument. A node is left out after a preflight named it, for a day; it comes back by
itself, because nobody clears lists. Never so many are left out that the list itself becomes the outage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1

KEEP_S = 24 * 3600.0
"""A cable that is reseated or a switch that is rebooted is mended within a day; the next preflight would name it again."""

MAX_SHARE = 0.25
"""When more nodes than this are named, the network as a whole is more likely at fault than each of them."""


@dataclass(frozen=True)
class Verdict:
    """One node, named by one preflight."""

    host: str
    reason: str
    unix_time: float


@dataclass(frozen=True)
class Exclusion:
    """Hosts to leave out, each with its reason, and a sentence when the rule held back."""

    hosts: dict[str, str]
    remark: str = ""


def remember(history: Sequence[Verdict], new: Sequence[Verdict], *, now: float) -> tuple[Verdict, ...]:
    """The history with the new verdicts; the latest of each host, none older than KEEP_S."""
    latest: dict[str, Verdict] = {}
    for verdict in sorted([*history, *new], key=lambda verdict: verdict.unix_time):
        latest[verdict.host] = verdict
    return tuple(verdict for verdict in latest.values() if 0 <= now - verdict.unix_time < KEEP_S)


def excluded(history: Sequence[Verdict], hosts: Sequence[str], *, needed: int, now: float) -> Exclusion:
    """Which of `hosts` to leave out so that `needed` of them remain; the most recently named first."""
    named = [verdict for verdict in remember(history, (), now=now) if verdict.host in hosts]
    if len(named) > MAX_SHARE * len(hosts) and len(named) > 1:
        return Exclusion(
            {},
            f"{len(named)} of {len(hosts)} nodes were named slow within a day: that many are not left out, "
            "look at the network they share",
        )
    named.sort(key=lambda verdict: -verdict.unix_time)
    spare = max(0, len(hosts) - needed)
    chosen = {verdict.host: verdict.reason for verdict in named[:spare]}
    remark = ""
    if len(named) > spare:
        kept = ", ".join(verdict.host for verdict in named[spare:])
        remark = f"{kept} stay in though they were named slow: the job needs {needed} of {len(hosts)} nodes"
    return Exclusion(chosen, remark)


def to_json(history: Sequence[Verdict]) -> str:
    return json.dumps({"version": FORMAT_VERSION, "verdicts": [asdict(verdict) for verdict in history]})


def from_json(text: str) -> tuple[Verdict, ...]:
    """The history that was written; empty for anything else: a lost memory must not stop a job."""
    try:
        document: Any = json.loads(text)
        if document["version"] != FORMAT_VERSION:
            return ()
        return tuple(
            Verdict(str(item["host"]), str(item["reason"]), float(item["unix_time"])) for item in document["verdicts"]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
