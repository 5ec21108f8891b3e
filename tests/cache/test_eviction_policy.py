"""Whom to evict: against brute force over all sets of victims."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policies import FirstInFirstOut, LeastRecentlyUsed
from benchmarks.simulation import Data, Job, Node, Simulation
from cache.blocks import ExtentId
from cache.residency.policy import UNKNOWN_USE, Candidate, EvictionPolicy, FarthestNextUse, Uses

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


# --- whole histories --------------------------------------------------------------------------------------------------------------------

traces = st.lists(st.integers(0, 5), min_size=1, max_size=14)


def misses(policy: EvictionPolicy, trace: list[int], capacity: int) -> int:
    """What a cache of `capacity` unit extents fetches for the trace, one access after the other, with the whole future known."""
    held: dict[int, float] = {}
    count = 0
    for now, item in enumerate(trace):
        if item not in held:
            count += 1
            if len(held) == capacity:
                later = trace[now + 1 :]
                candidates = [
                    Candidate(
                        ExtentId(str(other), 0),
                        1,
                        float(later.index(other) + 1) if other in later else UNKNOWN_USE,
                        last,
                        is_held=False,
                    )
                    for other, last in held.items()
                ]
                (victim,) = policy.choose(1, candidates, own_next_use=0).victims
                del held[int(victim.content_id)]
        held[item] = float(now)
    return count


def fewest_misses(trace: list[int], capacity: int) -> int:
    """Over all ways to choose victims."""

    @functools.cache
    def fewest(now: int, held: frozenset[int]) -> int:
        if now == len(trace):
            return 0
        if trace[now] in held:
            return fewest(now + 1, held)
        kept = [held] if len(held) < capacity else [held - {victim} for victim in held]
        return 1 + min(fewest(now + 1, rest | {trace[now]}) for rest in kept)

    return fewest(0, frozenset())


@given(traces, st.integers(1, 4))
def test_with_a_known_future_no_choice_of_victims_fetches_less(trace: list[int], capacity: int) -> None:
    """The exact optimum, by brute force; LRU and FIFO never beat it."""
    fewest = fewest_misses(trace, capacity)
    assert misses(FarthestNextUse(), trace, capacity) == fewest
    assert misses(LeastRecentlyUsed(), trace, capacity) >= fewest
    assert misses(FirstInFirstOut(), trace, capacity) >= fewest


def test_what_has_come_back_goes_after_what_one_pass_has_read_and_its_proof_runs_out() -> None:
    proven = Candidate(ExtentId("proven", 0), 5, UNKNOWN_USE, last_use_s=0, is_held=False, is_proven=True)
    scanned = Candidate(ExtentId("scanned", 0), 5, UNKNOWN_USE, last_use_s=9, is_held=False)
    assert FarthestNextUse().choose(5, [proven, scanned], own_next_use=0).victims == (scanned.extent,)
    uses = Uses(0).touched(100)
    assert uses.is_proven(100, 100)
    assert not uses.is_proven(100 + 8 * 100 + 1, 100), "a job that ended a week ago must not fill the cache for ever"


SHARES = [(0.5, 0.70, 0.80), (0.9, 0.22, 0.30)]
"""Of the data in the cache; the most that the sixth epoch may fetch of it; what LRU fetches at least. Static placement: 0.5 and 0.1."""


@pytest.mark.parametrize(("share", "most", "lru_least"), SHARES)
def test_without_announcements_passes_settle_towards_static_placement(
    share: float, most: float, lru_least: float
) -> None:
    """Readers that say nothing read all of the data in a new order each epoch: LRU throws away what is about to be read."""
    data = Data(100, 8, 192 * 1024)
    job = Job(data, 640.0, shuffle="windowed:4", num_epochs=6, announces=False)

    def fetched(policy: EvictionPolicy) -> float:
        node = Node(int(share * data.num_bytes), 400e6)
        return Simulation(node, [job], policy).run()[0][-1].origin_bytes / data.num_bytes

    assert fetched(FarthestNextUse()) <= most
    assert fetched(LeastRecentlyUsed()) >= lru_least


def test_a_scan_of_other_data_does_not_empty_the_cache() -> None:
    """Somebody copies three times as much as the cache holds past a job without announcements: its data stays."""
    ours, theirs = Data(20, 8, 192 * 1024, "ours"), Data(150, 8, 192 * 1024, "theirs")
    jobs = [
        Job(ours, 640.0, num_epochs=4, announces=False),
        Job(theirs, 640.0, shuffle="windowed:1", num_epochs=1, announces=False, starts_at_s=1e5),
        Job(ours, 640.0, num_epochs=1, announces=False, starts_at_s=2e5),
    ]
    node = Node(40 * ours.shard(0).size_bytes, 400e6)
    assert Simulation(node, jobs).run()[2][0].origin_bytes == 0, "all of it is still there"
    assert Simulation(node, jobs, LeastRecentlyUsed()).run()[2][0].origin_bytes == ours.num_bytes
