"""Nodes that were slow are left out for a while, and never too many of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.fabric.quarantine import KEEP_S, MAX_SHARE, Verdict, excluded, from_json, remember, to_json

HOSTS = [f"n{idx}" for idx in range(8)]

verdicts = st.lists(
    st.builds(Verdict, st.sampled_from(HOSTS), st.just("slow"), st.floats(0, 2 * KEEP_S, allow_nan=False)), max_size=12
)


def test_a_slow_node_is_left_out_and_comes_back_after_a_day() -> None:
    history = remember((), [Verdict("n3", "half rate", 1000.0)], now=1000.0)
    assert excluded(history, HOSTS, needed=7, now=2000.0).hosts == {"n3": "half rate"}
    assert excluded(history, HOSTS, needed=7, now=1000.0 + KEEP_S).hosts == {}


def test_a_node_that_the_job_needs_stays_in_and_that_is_said() -> None:
    found = excluded([Verdict("n3", "half rate", 0.0)], HOSTS, needed=8, now=1.0)
    assert found.hosts == {}
    assert "n3 stay in" in found.remark


def test_many_slow_nodes_are_one_network() -> None:
    """A switch at half speed must not empty the cluster."""
    history = [Verdict(f"n{idx}", "slow", 0.0) for idx in range(4)]
    found = excluded(history, HOSTS, needed=1, now=1.0)
    assert found.hosts == {}
    assert "network they share" in found.remark


@given(verdicts, st.integers(0, 8), st.floats(0, 3 * KEEP_S))
def test_what_remains_is_enough_and_what_is_left_out_is_a_minority(
    history: list[Verdict], needed: int, now: float
) -> None:
    found = excluded(history, HOSTS, needed=needed, now=now)
    assert len(HOSTS) - len(found.hosts) >= needed
    assert len(found.hosts) <= max(1, MAX_SHARE * len(HOSTS))


@given(verdicts)
def test_the_memory_survives_json(history: list[Verdict]) -> None:
    assert from_json(to_json(history)) == tuple(history)


@given(st.text(max_size=30))
def test_a_broken_memory_is_an_empty_one(text: str) -> None:
    assert from_json(text) == ()
