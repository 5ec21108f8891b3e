"""Who fetches what in a cluster: evenly, by weight, and with little moving when members come and go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blocks import ExtentId
from cache.residency.peerhealth import (
    DISTRUST_S,
    MAX_SILENCE_S,
    MIN_SIGNS,
    MIN_SILENCE_S,
    MISSED_HELLOS,
    START_SILENCE_S,
    PeerHealth,
)
from cache.residency.placement import Placement

EXTENTS = [ExtentId(f"{obj:032x}", idx) for obj in range(200) for idx in range(30)]
members = st.sets(st.text("0123456789abcdef", min_size=4, max_size=8), min_size=2, max_size=12)


@pytest.mark.parametrize("num_nodes", [2, 8, 16])
def test_what_nodes_own_is_balanced(num_nodes: int) -> None:
    """A node that owned far more than its share would hold up all the others."""
    placement = Placement("n0", {f"n{i}": 1.0 for i in range(num_nodes)})
    owned = Counter(map(placement.owner, EXTENTS))
    mean = len(EXTENTS) / num_nodes
    assert max(owned.values()) <= 1.2 * mean
    assert min(owned.values()) >= 0.8 * mean


def test_a_node_with_twice_the_room_owns_twice_as_much() -> None:
    placement = Placement("a", {"a": 2.0, "b": 1.0, "c": 1.0})
    owned = Counter(map(placement.owner, EXTENTS))
    assert 0.45 <= owned["a"] / len(EXTENTS) <= 0.55


@settings(max_examples=20, deadline=None)
@given(names=members, data=st.data())
def test_when_a_node_goes_only_what_it_owned_moves(names: set[str], data: st.DataObject) -> None:
    """Anything else that moved would be fetched from the origin a second time."""
    gone = data.draw(st.sampled_from(sorted(names)))
    before = Placement("x", dict.fromkeys(names, 1.0))
    after = Placement("x", dict.fromkeys(names - {gone}, 1.0))
    for extent in EXTENTS[:300]:
        if before.owner(extent) != gone:
            assert after.owner(extent) == before.owner(extent)


def test_all_nodes_agree_whatever_the_order_in_which_they_met() -> None:
    one = Placement("a", {"a": 1.0, "b": 3.0, "c": 2.0})
    other = Placement("c", {"c": 2.0, "b": 3.0, "a": 1.0})
    assert [one.owner(e) for e in EXTENTS] == [other.owner(e) for e in EXTENTS]
    assert all((one.lender(e) is None) == (one.owner(e) == "a") for e in EXTENTS)


def test_a_peer_that_failed_is_out_until_it_answers_and_one_that_lied_for_longer() -> None:
    health = PeerHealth()
    health.greeted("a", 1.0, now=100.0)
    health.greeted("b", 2.0, now=100.0)
    assert health.failed("a", "dead", now=100.0)
    assert health.members(100.0) == {"b": 2.0}
    health.greeted("a", 1.0, now=101.0)
    assert set(health.members(101.0)) == {"a", "b"}
    assert health.failed("b", "wrong-bytes", now=101.0)
    health.greeted("b", 2.0, now=102.0)
    assert set(health.members(101.0 + DISTRUST_S - 1)) == {"a"}
    assert set(health.members(101.0 + DISTRUST_S)) == {"a", "b"}
    health.failed("b", "wrong-bytes", now=200.0)
    assert set(health.members(200.0 + DISTRUST_S)) == {"a"}, "the second time counts double"
    assert not health.failed("a", "slow", now=300.0)
    assert "a" in health.members(300.0), "slow is not out of use"
    for _ in range(MISSED_HELLOS):
        health.missed("a")
    assert "a" not in health.members(300.0)


def test_silence_of_a_peer_that_has_greeted_meanwhile_is_no_death() -> None:
    """Where all processors are taken a peer may be silent about one block. To make others owners of all that it owns, and it again a second
    later, had the origin read several times over (benchmarks/cluster.py on a machine with ten times more to do than processors)."""
    health = PeerHealth()
    health.greeted("a", 1.0, now=10.0)
    assert not health.failed("a", "silent", now=11.0, silent_for_s=1.5)
    assert "a" in health.members(11.0)
    assert health.failed("a", "silent", now=12.0, silent_for_s=1.5)
    assert "a" not in health.members(12.0)
    health.greeted("a", 1.0, now=13.0)
    assert "a" in health.members(13.0)


def peer_with_signs(*signs_s: float) -> PeerHealth:
    health = PeerHealth()
    health.greeted("a", 1.0, now=0.0, took_s=signs_s[0])
    for gap_s in signs_s[1:]:
        health.heard("a", gap_s)
    return health


def test_what_counts_as_silence_is_learnt_from_the_peer() -> None:
    """On an idle cluster a frozen owner must cost a second, and not what is right for a machine that is short of processors."""
    assert PeerHealth().silence_s("nobody") == START_SILENCE_S
    assert peer_with_signs(0.01).silence_s("a") == START_SILENCE_S, "one sign says little"
    assert peer_with_signs(*[0.01] * MIN_SIGNS).silence_s("a") == MIN_SILENCE_S
    assert peer_with_signs(*[0.3] * MIN_SIGNS).silence_s("a") == pytest.approx(4 * 0.3)
    assert peer_with_signs(*[30.0] * MIN_SIGNS).silence_s("a") == MAX_SILENCE_S
    assert peer_with_signs(*[0.01] * 150, 4.0).silence_s("a") == MIN_SILENCE_S, "one long pause is no habit"


def test_a_peer_that_was_given_up_and_lives_is_waited_for_longer_next_time() -> None:
    """Else one that always needs a little longer than we wait would never be heard in time, and its habits never learnt."""
    health = peer_with_signs(*[0.1] * MIN_SIGNS)
    for nth in range(3):
        assert health.failed("a", "silent", now=10.0 * (nth + 1), silent_for_s=0.5)
        health.greeted("a", 1.0, now=10.0 * (nth + 1) + 0.4, took_s=0.4)
    assert health.silence_s("a") == pytest.approx(4 * 0.9)


def test_who_has_left_is_forgotten() -> None:
    health = PeerHealth()
    health.greeted("a", 1.0, now=10.0)
    health.forget("a")
    assert health.members(10.0) == {}
