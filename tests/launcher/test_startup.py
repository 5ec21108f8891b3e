"""Imports that never end are named, with the module; slow ones, and whatever else a job does before its first step, are not.

For real: in the catalogue of faults (test_faults.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from launcher.gang.diagnosis import Kind
from launcher.gang.health import Finding, GivenUp, GoesOn, Named, NeedStacks
from launcher.gang.observations import NodeProgress, RankSample, RankStack, StacksTaken
from launcher.gang.patience import HangRules
from launcher.gang.startup import Startup
from launcher.gang.work import is_import_locked

MACHINERY = (
    "_load_unlocked (<frozen importlib._bootstrap>:690)",
    "_find_and_load (<frozen importlib._bootstrap>:1176)",
)
JOINS = ("Thread.join (threading.py:1119)", "<module> (stuck.py:5)", *MACHINERY, "<module> (train.py:3)")
LOCKED = ("_ModuleLock.acquire (<frozen importlib._bootstrap>:120)", "<module> (child.py:1)", *MACHINERY)
READS = ("get_data (<frozen importlib._bootstrap_external>:1131)", *MACHINERY, "<module> (train.py:3)")
WAITS = ("barrier (torch/distributed/distributed_c10d.py:4800)", "<module> (experiment.py:9)", *MACHINERY)
BEYOND = ("prepare (train.py:20)", "<module> (train.py:40)")

Stacks = Mapping[int, RankStack]


def sample(rank: int, now: float) -> RankSample:
    """Of a rank that does nothing."""
    return RankSample(rank, now, state="S", cpu_s=3.0, io_bytes=1000, child_cpu_s=0.0, child_io_bytes=0)


def stack(rank: int, frames: tuple[str, ...], *, is_locked: bool = False) -> RankStack:
    return RankStack(rank, frames, is_import_locked=is_locked)


def watched(
    stacks: Stacks, seconds: int, change: Callable[[RankSample, float], RankSample] = lambda seen, now: seen
) -> list[tuple[int, Finding]]:
    """What is found, and when, but for the stacks that are asked for: they come at once."""
    startup = Startup(HangRules(), len(stacks))
    found: list[tuple[int, Finding]] = []
    for now in range(seconds):
        seen = tuple(change(sample(rank, float(now)), now) for rank in stacks)
        startup.see(NodeProgress(0, "a", float(now), seen), float(now))
        for finding in startup.judge(float(now)):
            if isinstance(finding, NeedStacks):
                startup.see_stacks(StacksTaken(0, "a", finding.look, tuple(stacks.values())))
            else:
                found.append((now, finding))
    return found


STUCK = {0: stack(0, BEYOND), 1: stack(1, JOINS, is_locked=True)}
SLOW = {0: stack(0, BEYOND), 1: stack(1, READS)}


def test_a_deadlocked_import_is_named_in_ten_seconds_with_its_module_and_given_up() -> None:
    (named_at, named), (given_up_at, given_up) = watched(STUCK, 400)
    assert isinstance(named, Named)
    assert (named.diagnosis.kind, named.diagnosis.culprits) == (Kind.IMPORTING, (1,))
    assert named.groups == (
        (("Thread.join (threading.py:1119)", "<module> (stuck.py:5)", "<module> (train.py:3)"), (1,)),
    )
    assert named_at == 10
    assert isinstance(given_up, GivenUp)
    assert given_up_at == 300
    assert given_up.place == "<module> (stuck.py:5)"


def test_all_ranks_may_be_in_the_same_deadlock() -> None:
    """It is the program's doing, so it mostly happens everywhere."""
    _, named = watched({rank: stack(rank, JOINS, is_locked=True) for rank in range(3)}, 20)[0]
    assert isinstance(named, Named)
    assert named.diagnosis.culprits == (0, 1, 2)


def test_an_import_that_may_wait_for_somebody_is_named_if_the_others_are_past_it_and_left_alone() -> None:
    """A file system that does not answer looks so, and it may come back."""
    ((_, named),) = watched(SLOW, 4000)
    assert isinstance(named, Named)
    assert named.gives_up_in_s is None
    assert watched({rank: stack(rank, READS) for rank in range(2)}, 4000) == [], "nobody is past it"


@pytest.mark.parametrize("what", ["cpu_s", "io_bytes", "child_cpu_s", "child_io_bytes", "steps", "batches"])
def test_whoever_computes_or_reads_or_has_children_that_do_is_not_stuck(what: str) -> None:
    """Slow imports, compilers, first steps: no false alarm for an hour."""
    per_s = {"cpu_s": 0.05, "child_cpu_s": 0.05, "io_bytes": 1 << 14, "child_io_bytes": 1 << 14}.get(what, 1)

    def change(seen: RankSample, now: float) -> RankSample:
        changed: Any = {what: (getattr(seen, what) or 0) + now * per_s}
        return replace(seen, **changed)

    assert watched(STUCK, 3600, change) == []


@pytest.mark.parametrize("state", ["R", "D", "T"])
def test_whoever_would_run_or_waits_for_a_disk_or_is_stopped_is_not_stuck_in_an_import(state: str) -> None:
    assert watched(STUCK, 3600, lambda seen, now: replace(seen, state=state)) == []


@pytest.mark.parametrize("frames", [WAITS, BEYOND])
def test_a_program_that_runs_within_an_import_is_none(frames: tuple[str, ...]) -> None:
    """`import experiment`, which does everything: its collectives wait for others."""
    assert watched({0: stack(0, BEYOND), 1: stack(1, frames)}, 3600) == []
    compiling = RankStack(1, READS, work="compiles")
    assert watched({0: stack(0, BEYOND), 1: compiling}, 3600) == []


def test_an_import_that_goes_on_is_said() -> None:
    def change(seen: RankSample, now: float) -> RankSample:
        return replace(seen, cpu_s=seen.cpu_s + (5.0 if now >= 20 else 0.0))

    found = [finding for _, finding in watched(SLOW, 26, change)]
    assert [type(finding) for finding in found] == [Named, GoesOn]


def test_two_threads_in_each_others_imports_are_a_lock() -> None:
    assert is_import_locked(JOINS, [LOCKED])
    assert is_import_locked(LOCKED, [JOINS])
    assert not is_import_locked(JOINS, [BEYOND]), "a thread that computes"
    assert not is_import_locked(BEYOND, [LOCKED, JOINS]), "not the main thread's business"
