"""Which nodes to leave out of the next gang, from what is remembered of them: one memory for the preflight and for lost nodes.

Pure: the history is a value, `now` an argument (`exclusion_file` keeps it on disk, across jobs). A node that a preflight named slow, or
whose hardware failed, is left out at once; one that was lost, only the second time: anything may reboot once. After a day it comes back
by itself, because nobody clears lists. Never so many are left out that the list itself becomes the outage.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1

KEEP_S = 24 * 3600.0
"""A cable that is reseated or a switch that is rebooted is mended within a day; if not, the node is named again."""

MAX_SHARE = 0.25
"""When more nodes than this are named, the network as a whole is more likely at fault than each of them."""


class Cause(enum.Enum):
    """Why a node is remembered."""

    SLOW = "slow"
    """A preflight measured it."""
    HARDWARE = "hardware"
    """A rank died of what only the node can be blamed for: an uncorrectable memory error, a GPU that fell off the bus."""
    LOST = "lost"
    """It went away, or its agent could not do its part."""

    @property
    def num_to_exclude(self) -> int:
        """How often within KEEP_S before the node is left out."""
        return 2 if self is Cause.LOST else 1


@dataclass(frozen=True)
class Verdict:
    """One node, named once."""

    host: str
    reason: str
    unix_time: float
    cause: Cause = Cause.SLOW


@dataclass(frozen=True)
class Exclusion:
    """Hosts to leave out, each with its reason, and a sentence when the rule held back."""

    hosts: dict[str, str]
    remark: str = ""


def remember(history: Sequence[Verdict], new: Sequence[Verdict], *, now: float) -> tuple[Verdict, ...]:
    """The history with the new verdicts: of each host and cause as many of the latest as count, none older than KEEP_S."""
    kept: dict[tuple[str, Cause], list[Verdict]] = {}
    for verdict in sorted([*history, *new], key=lambda verdict: verdict.unix_time):
        if 0 <= now - verdict.unix_time < KEEP_S:
            same = kept.setdefault((verdict.host, verdict.cause), [])
            same.append(verdict)
            del same[: -verdict.cause.num_to_exclude]
    return tuple(verdict for same in kept.values() for verdict in same)


def named(history: Sequence[Verdict], *, now: float) -> dict[str, Verdict]:
    """The hosts that have been named often enough, each with the latest of its verdicts."""
    found: dict[str, Verdict] = {}
    fresh = remember(history, (), now=now)
    counts = Counter((verdict.host, verdict.cause) for verdict in fresh)
    for verdict in sorted(fresh, key=lambda verdict: verdict.unix_time):
        if counts[(verdict.host, verdict.cause)] >= verdict.cause.num_to_exclude:
            found[verdict.host] = verdict
    return found


def excluded(history: Sequence[Verdict], hosts: Sequence[str], *, needed: int, now: float) -> Exclusion:
    """Which of `hosts` to leave out so that `needed` of them remain; the most recently named first.

    A host that stands there more than once is several nodes on one machine; none of them can be told from the others, so all stay.
    """
    there = Counter(hosts)
    chosen = [verdict for host, verdict in named(history, now=now).items() if there[host] == 1]
    if len(chosen) > MAX_SHARE * len(hosts) and len(chosen) > 1:
        return Exclusion(
            {},
            f"{len(chosen)} of {len(hosts)} nodes were named within a day: that many are not left out, "
            "look at what they share (network, power, image)",
        )
    chosen.sort(key=lambda verdict: -verdict.unix_time)
    spare = max(0, len(hosts) - needed)
    remark = ""
    if len(chosen) > spare:
        kept = ", ".join(f"{verdict.host} ({verdict.reason})" for verdict in chosen[spare:])
        remark = f"the job needs {needed} of {len(hosts)} nodes, so these stay in though they were named: {kept}"
    return Exclusion({verdict.host: verdict.reason for verdict in chosen[:spare]}, remark)


def describe(hosts: Iterable[tuple[str, str]], source: str) -> str:
    """What a person is told: who is left out, why, and how to change that."""
    told = ", ".join(f"{host} ({reason})" for host, reason in hosts)
    return f"leaving out {told}; remembered for a day in {source}: delete it to forget, or --exclude none to use them"


def to_json(history: Sequence[Verdict]) -> str:
    verdicts = [{"host": v.host, "reason": v.reason, "unix_time": v.unix_time, "cause": v.cause.value} for v in history]
    return json.dumps({"version": FORMAT_VERSION, "verdicts": verdicts}, indent=1)


def from_json(text: str) -> tuple[Verdict, ...]:
    """The history that was written; empty for anything else: a lost memory must not stop a job."""
    try:
        document: Any = json.loads(text)
        if document["version"] != FORMAT_VERSION:
            return ()
        return tuple(
            Verdict(str(item["host"]), str(item["reason"]), float(item["unix_time"]), Cause(item["cause"]))
            for item in document["verdicts"]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
