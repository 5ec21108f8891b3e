"""The disk's health: each failure has its state, its reason and its way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.residency.health import (
    AT_ONCE,
    FIRST_PAUSE_S,
    FORGIVE_S,
    MAX_FAILURES,
    MAX_PAUSE_S,
    PROBATION_S,
    PROBATION_SUCCESSES,
    TRANSITIONS,
    DiskHealth,
    Health,
)


def failing(health: DiskHealth, kind: str, times: int, *, on_read: bool = False) -> None:
    for number in range(times):
        health.failed(kind, f"{kind} {number}", 10.0 + number, on_read=on_read)


@pytest.mark.parametrize("kind", sorted(AT_ONCE))
def test_a_disk_that_says_no_is_believed_at_once(kind: str) -> None:
    """Full, quota, no inodes, read-only, gone: it will say it again, and each try costs a reader's time."""
    health = DiskHealth()
    assert health.failed(kind, f"it is {kind}", 10.0)
    assert (health.state, health.reason) == (Health.READ_ONLY, f"it is {kind}")
    assert not health.may_write and health.may_read


@pytest.mark.parametrize(("kind", "on_read", "ends"), [("io", False, Health.READ_ONLY), ("slow", False, Health.READ_ONLY),
                                                       ("io", True, Health.OUT_OF_SERVICE)])  # fmt: skip
def test_one_failure_is_an_accident_and_three_are_not(kind: str, on_read: bool, ends: Health) -> None:
    health = DiskHealth()
    failing(health, kind, MAX_FAILURES - 1, on_read=on_read)
    assert health.state is Health.SUSPICIOUS and health.may_write and not health.may_prefetch
    health.failed(kind, "the third", 20.0, on_read=on_read)
    assert health.state is ends and health.reason == "the third"


def test_failures_far_apart_are_forgotten() -> None:
    health = DiskHealth()
    for number in range(10):
        health.failed("io", "once in a while", 1 + number * FORGIVE_S)
        assert health.state is Health.SUSPICIOUS
        assert not health.time_passed(1 + number * FORGIVE_S + FORGIVE_S / 2)
        if number % 2:
            assert health.time_passed(1 + (number + 1) * FORGIVE_S) and health.state is Health.OK


def test_the_way_back_is_a_probe_and_then_good_conduct() -> None:
    health = DiskHealth()
    health.failed("full", "full", 10.0)
    assert not health.takes_probe(10.0 + FIRST_PAUSE_S - 0.1)
    assert health.takes_probe(10.0 + FIRST_PAUSE_S) and not health.takes_probe(100.0), "one probe at a time"
    assert health.probed(None, 16.0) and health.state is Health.PROBATION
    assert health.may_write and not health.may_prefetch, "only for readers that wait"
    for _ in range(PROBATION_SUCCESSES - 1):
        assert not health.worked(17.0)
    assert health.worked(17.0) and health.state is Health.OK
    assert health.next_deadline_s() is None


def test_a_disk_that_nobody_needs_is_trusted_again_by_time() -> None:
    health = DiskHealth()
    health.failed("full", "full", 10.0)
    health.takes_probe(15.0)
    health.probed(None, 15.0)
    deadline_s = health.next_deadline_s()
    assert deadline_s == 15.0 + PROBATION_S
    assert health.time_passed(deadline_s) and health.state is Health.OK


def test_each_probe_that_fails_doubles_the_pause_up_to_a_bound() -> None:
    health = DiskHealth()
    health.failed("gone", "unmounted", 0.0)
    now, pauses = 0.0, []
    for _ in range(10):
        deadline_s = health.next_deadline_s()
        assert deadline_s is not None
        pauses.append(deadline_s - now)
        now = deadline_s
        assert health.takes_probe(now)
        assert not health.probed("still unmounted", now)
    assert (
        pauses[:4] == [FIRST_PAUSE_S * factor for factor in (1, 2, 4, 8)] and max(pauses) == pauses[-1] == MAX_PAUSE_S
    )
    assert health.reason == "still unmounted"


def test_one_failure_on_probation_is_enough() -> None:
    """And the disk is left in peace for longer than before: it flaps."""
    health = DiskHealth()
    health.failed("read-only", "remounted", 0.0)
    health.takes_probe(FIRST_PAUSE_S)
    health.probed(None, FIRST_PAUSE_S)
    assert health.failed("io", "again", 6.0) and health.state is Health.READ_ONLY
    assert health.next_deadline_s() == 6.0 + 2 * FIRST_PAUSE_S


def test_a_disk_that_is_full_still_takes_what_has_its_place() -> None:
    health = DiskHealth()
    health.failed("full", "full", 1.0)
    assert health.may_fill and not health.may_write
    other = DiskHealth()
    other.failed("read-only", "remounted", 1.0)
    assert not other.may_fill


EVENTS = st.one_of(
    st.tuples(st.just("failed"), st.sampled_from([*sorted(AT_ONCE), "io", "slow", "other"]), st.booleans()),
    st.tuples(st.just("worked")),
    st.tuples(st.just("time"), st.sampled_from([0.1, 3.0, 20.0, 100.0])),
    st.tuples(st.just("probed"), st.booleans()),
)


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_each_change_is_in_the_table_and_a_way_back_exists(events: list[tuple[object, ...]]) -> None:
    health, now = DiskHealth(), 1.0
    for name, *arguments in events:
        match name, arguments:
            case "failed", [str(kind), bool(on_read)]:
                health.failed(kind, kind, now, on_read=on_read)
            case "worked", []:
                health.worked(now)
            case "time", [float(seconds)]:
                now += seconds
                health.time_passed(now)
            case "probed", [bool(is_fine)] if health.takes_probe(now):
                health.probed(None if is_fine else "no", now)
    assert all((change.before, change.after) in TRANSITIONS for change in health.history)
    for _ in range(10):
        deadline_s = health.next_deadline_s()
        if deadline_s is None:
            break
        now = max(now, deadline_s)
        if health.takes_probe(now):
            health.probed(None, now)
        health.time_passed(now)
    assert health.state is Health.OK, (health.state, list(health.history))
