"""Whom to evict: against brute force over all sets of victims."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cache.blocks import ExtentId
from cache.residency.policy import UNKNOWN_USE, Candidate, FarthestNextUse

candidate_lists = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.one_of(st.integers(0, 9).map(float), st.just(UNKNOWN_USE)),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=7,
).map(
    lambda found: [
        Candidate(ExtentId("x", idx), size, next_use, float(last), held)
        for idx, (size, next_use, last, held) in enumerate(found)
    ]
)
next_uses = st.one_of(st.integers(-1, 9).map(float), st.just(UNKNOWN_USE))


def may_go(candidate: Candidate, own_next_use: float) -> bool:
    return candidate.next_use > own_next_use or candidate.next_use == UNKNOWN_USE


@given(candidate_lists, st.integers(0, 40), next_uses, st.integers(0, 4))
def test_it_evicts_if_and_only_if_enough_can_go(
    candidates: list[Candidate], need: int, own_next_use: float, need_files: int
) -> None:
    eligible = [c for c in candidates if may_go(c, own_next_use)]
    possible = any(
        sum(c.size_bytes for c in chosen) >= need and len(chosen) >= need_files
        for count in range(len(eligible) + 1)
        for chosen in itertools.combinations(eligible, count)
    )
    victims = FarthestNextUse().choose(need, candidates, own_next_use, need_files).victims
    by_extent = {c.extent: c for c in candidates}
    assert len(set(victims)) == len(victims)
    assert all(may_go(by_extent[victim], own_next_use) for victim in victims), (
        "a prefetch displaced what is needed sooner"
    )
    if possible:
        assert sum(by_extent[victim].size_bytes for victim in victims) >= need and len(victims) >= need_files
    else:
        assert victims == (), "half of the room is no room: nothing may be lost for it"


@given(candidate_lists, st.integers(1, 40), next_uses)
def test_what_stays_is_needed_no_later_than_what_goes(
    candidates: list[Candidate], need: int, own_next_use: float
) -> None:
    victims = set(FarthestNextUse().choose(need, candidates, own_next_use).victims)
    goes = [c for c in candidates if c.extent in victims]
    stays = [c for c in candidates if c.extent not in victims]
    if goes and stays:
        assert min(c.next_use for c in goes) >= max(c.next_use for c in stays)


@given(candidate_lists, st.integers(1, 40), next_uses)
def test_no_victim_is_superfluous(candidates: list[Candidate], need: int, own_next_use: float) -> None:
    victims = FarthestNextUse().choose(need, candidates, own_next_use).victims
    sizes = {c.extent: c.size_bytes for c in candidates}
    assert not victims or sum(sizes[victim] for victim in victims[:-1]) < need


def test_of_what_nobody_announced_the_longest_unused_goes_first_and_what_is_held_last() -> None:
    """What a live reader has open frees its bytes only when it lets go."""
    held = Candidate(ExtentId("held", 0), 5, UNKNOWN_USE, last_use_s=0, is_held=True)
    fresh = Candidate(ExtentId("fresh", 0), 5, UNKNOWN_USE, last_use_s=9, is_held=False)
    stale = Candidate(ExtentId("stale", 0), 5, UNKNOWN_USE, last_use_s=1, is_held=False)
    victims = FarthestNextUse().choose(15, [held, fresh, stale], own_next_use=0).victims
    assert [victim.content_id for victim in victims] == ["stale", "fresh", "held"]


def test_the_choice_does_not_depend_on_the_order_of_the_candidates() -> None:
    candidates = [Candidate(ExtentId("x", idx), 1, UNKNOWN_USE, 0.0, is_held=False) for idx in range(5)]
    chosen = {FarthestNextUse().choose(2, order, 0).victims for order in itertools.permutations(candidates)}
    assert len(chosen) == 1


def test_the_refusal_says_how_much_could_have_been_freed() -> None:
    near = Candidate(ExtentId("near", 0), 7, next_use=2, last_use_s=0, is_held=False)
    decision = FarthestNextUse().choose(10, [near], own_next_use=5)
    assert decision.victims == () and "0 of 10 bytes" in decision.reason and "5 visits" in decision.reason
