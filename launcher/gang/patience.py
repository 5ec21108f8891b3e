"""How long a job may stand still: until who holds it up is named, and until it is given up. Pure.

*Base* is what this job's own steps set: the larger of 10 s and 3 × its p99 step. Naming costs a few lines; giving up costs an attempt. So
naming is quick where nothing but a hang looks so, and giving up is generous where a healthy job may look the same, or does not happen:

| what is seen | named after | given up after |
|---|---|---|
| a rank is stopped (SIGSTOP) | 10 s | at once; if all are, 1 h |
| before the first step: it does nothing within an import (`startup.py`) | 10 s | 300 s if two threads wait for each other's; else never |
| the others wait in a collective; one sleeps in one place, waits elsewhere than most, or has ended with 0 | base | max(300 s, 10 base) |
| the others wait; one *computes* in one place: a livelock or a long call | a notice: base; max(60 s, 6 base) | max(600 s, 20 base) |
| all wait for each other | 3 base | max(300 s, 10 base) |
| the others wait; one waits for its data loader, or for a disk (state D) | 3 base | twice as long; never while its workers work |
| nobody is seen to wait: all stand still, or one does while the others step on | 3 base | max(1 h, 30 base); never if others step |
| it reads, writes, computes in children, moves about in its code, or is known to be at work (`work.py`) | max(600 s, 10 base) | never |

300 s is half of what NCCL waits before it aborts by itself; a rank that burns its CPU is given all of it, because nothing that is seen from
outside tells a loop that never ends from one that does (decisions/0095). The notice is a line, no alarm: it names the rank as soon as the
others, and is not counted as a hang. A quiet time that ended by itself is remembered: the same is not named again
below 1.5 times of it, nothing is given up below 3 times. A limit of the user's own (`--hang-timeout SECONDS`) is both limits for all of it,
ten times that before the first step; only where others step on is nothing given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.gang.diagnosis import Diagnosis, Kind

_FIRST_STEP_FACTOR = 10.0
_LOOK_S, _SHARE_OF_TIMEOUT = 1.0, 0.1


@dataclass(frozen=True)
class Limits:
    """Where a job's own steps set none, or would set too short ones."""

    quick_s: float = 10.0
    steps_factor: float = 3.0
    give_up_s: float = 300.0
    alone_give_up_s: float = 3600.0
    work_name_s: float = 600.0
    compute_name_s: float = 60.0
    compute_give_up_s: float = 600.0
    looks_s: float = 12.0
    """A rank is not named before it was looked at often enough, or the looks are overdue by so long. (One that fails takes 8.5 s.)"""


LIMITS = Limits()
"""The launcher's. Tests put shorter ones."""


@dataclass(frozen=True)
class HangRules:
    """What of the JobSpec health needs."""

    is_on: bool = True
    timeout_s: float | None = None
    """The user's own limit; None: learnt."""
    limits: Limits = LIMITS


def look_every_s(timeout_s: float | None) -> float:
    """How often ranks are looked at: what a person calls at once, and a thousandth of a core. With a short limit, more often.

    >>> look_every_s(None), look_every_s(60.0), look_every_s(2.0)
    (1.0, 1.0, 0.2)
    """
    return _LOOK_S if timeout_s is None else min(_LOOK_S, timeout_s * _SHARE_OF_TIMEOUT)


def base_limit_s(rules: HangRules, p99_step_s: float, *, has_stepped: bool) -> float | None:
    """None: nothing to go by."""
    if rules.timeout_s is not None:
        return rules.timeout_s if has_stepped else rules.timeout_s * _FIRST_STEP_FACTOR
    return max(rules.limits.quick_s, rules.limits.steps_factor * p99_step_s) if has_stepped else None


def limits_s(
    rules: HangRules, diagnosis: Diagnosis, base_s: float, healed: Mapping[Kind, float], *, is_moving: bool
) -> tuple[float, float]:
    """To name, and to give up (inf: never). `healed`: the longest quiet time of each sort (`sort_of`) that was named and ended by itself.
    `is_moving`: some ranks get on."""
    kind, limits, own_s = diagnosis.kind, rules.limits, rules.timeout_s
    if own_s is not None:
        limit_s = own_s if kind is Kind.FROZEN else base_s
        return limit_s, math.inf if is_moving and not diagnosis.is_certain else limit_s
    if kind is Kind.FROZEN:
        return limits.quick_s, limits.quick_s if diagnosis.is_certain else limits.alone_give_up_s
    if kind in (Kind.WORKING, Kind.QUIET):
        name_s, give_up_s = max(limits.work_name_s, 10 * base_s), math.inf
    elif diagnosis.is_certain and kind is Kind.SPINNING:
        name_s, give_up_s = _computing_s(limits, base_s), max(limits.compute_give_up_s, 20 * base_s)
    elif diagnosis.is_certain:
        is_late = kind in (Kind.DATA, Kind.FETCHING, Kind.DEVICE, Kind.ALL_WAIT)
        name_s, give_up_s = 3 * base_s if is_late else base_s, max(limits.give_up_s, 10 * base_s)
        give_up_s *= 2 if kind in (Kind.DATA, Kind.DEVICE) else 1
    else:
        name_s = _computing_s(limits, base_s) if kind is Kind.SPINNING else 3 * base_s
        give_up_s = math.inf if is_moving else max(limits.alone_give_up_s, 30 * base_s)
    if kind is Kind.FETCHING:
        give_up_s = math.inf
    longest_s = max(healed.values(), default=0.0)
    return max(name_s, 1.5 * _healed_s(kind, healed)), max(give_up_s, 3 * longest_s)


def notice_s(rules: HangRules, diagnosis: Diagnosis, base_s: float, healed: Mapping[Kind, float]) -> float | None:
    """When a line says who keeps the others waiting, well before it is called a hang; None: there is none for the like."""
    if diagnosis.kind is not Kind.SPINNING or not diagnosis.is_certain or rules.timeout_s is not None:
        return None
    return max(base_s, 1.5 * _healed_s(diagnosis.kind, healed))


def _computing_s(limits: Limits, base_s: float) -> float:
    return max(limits.compute_name_s, 6 * base_s)


def sort_of(kind: Kind) -> Kind:
    """What people would call the same."""
    return {Kind.STILL: Kind.AWAY, Kind.FETCHING: Kind.DATA}.get(kind, kind)


def _healed_s(kind: Kind, healed: Mapping[Kind, float]) -> float:
    """The next evaluation in one call may compute where this one waited. Not the other way round: a rank that has computed for a minute
    does not make those that sleep elsewhere less suspicious."""
    sorts = (Kind.SPINNING, Kind.AWAY) if kind is Kind.SPINNING else (sort_of(kind),)
    return max(healed.get(sort, 0.0) for sort in sorts)
