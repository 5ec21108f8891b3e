"""Up to which next use an extent is worth keeping: against Belady's rule played through, and in whole histories."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import Data, Job, Node, Simulation
from cache.residency import keeping
from cache.residency.keeping import NUM_BINS, Uses, keep_horizon

traces = st.lists(st.integers(0, 9), min_size=1, max_size=60)


def test_doctests_say_the_truth() -> None:
    assert doctest.testmod(keeping).failed == 0


def stays_until_its_next_use(trace: list[int], here: set[int], capacity: int) -> set[int]:
    """Of what is here, what Belady's rule (with the right to keep nothing of what comes) leaves until it is used."""
    held, hits = set(here), set()
    for now, item in enumerate(trace):
        first = trace.index(item) == now
        if item in held and first and item in here:
            hits.add(item)
        held.add(item)
        later = trace[now + 1 :]
        while len(held) > capacity:
            held.remove(max(held, key=lambda one: later.index(one) if one in later else len(trace) + one))
    return hits


@settings(deadline=None)
@given(traces, st.integers(1, 6), st.sets(st.integers(0, 9)))
def test_beyond_the_horizon_lies_what_beladys_rule_evicts_and_nothing_else(
    trace: list[int], capacity: int, here: set[int]
) -> None:
    here = set(sorted(here)[:capacity])
    width = max(map(trace.count, trace))
    begins = np.full((width, 10), np.inf)
    for item in range(10):
        times = [now + 0.5 for now, one in enumerate(trace) if one == item]
        begins[: len(times), item] = times
    is_here = np.array([item in here for item in range(10)])
    horizon = keep_horizon([Uses(begins, begins, is_here, np.ones(10))], capacity, NUM_BINS)
    kept = {item for item in here if item in trace and trace.index(item) + 0.5 <= horizon}
    assert kept == stays_until_its_next_use(trace, here, capacity)


DATA = Data(num_shards=120, samples_per_shard=8, sample_bytes=192 * 1024)
RATE = 640.0


def epochs(share: float, origin_share: float, num_jobs: int = 1, lookahead: int = 512) -> Simulation:
    node = Node(int(share * DATA.num_bytes), origin_share * RATE * DATA.sample_bytes)
    epoch_s = DATA.num_bytes / DATA.sample_bytes / RATE
    jobs = [
        Job(
            DATA,
            RATE,
            shuffle="windowed:1",
            seed=seed,
            num_epochs=3,
            lookahead=lookahead,
            starts_at_s=seed * epoch_s / num_jobs,
        )
        for seed in range(num_jobs)
    ]
    return Simulation(node, jobs)


@pytest.mark.parametrize(("share", "origin_share"), [(0.3, 0.75), (0.5, 0.25), (0.7, 0.5)])
def test_of_data_larger_than_the_cache_only_what_does_not_fit_is_fetched_again(
    share: float, origin_share: float
) -> None:
    """The bound for fresh permutations: 1 − f of the data in an epoch, whatever is fetched ahead, and the link used for all of it."""
    simulation = epochs(share, origin_share)
    results = simulation.run()[0]
    assert simulation.peak_bytes <= share * DATA.num_bytes
    bound = min(1.0, origin_share / (1 - share))
    for epoch in results[1:]:
        assert epoch.origin_bytes <= 1.04 * (1 - share) * DATA.num_bytes, "a window is 0.008 of the data"
        assert epoch.utilisation >= 0.95 * bound


def test_two_jobs_that_share_half_a_cache_send_a_third_of_their_reads_to_the_origin_at_most() -> None:
    """Their futures are merged, so that one fetch serves both; LRU sends two thirds."""
    results = epochs(0.5, 1.0, num_jobs=2).run()
    fetched = [epoch.origin_bytes / DATA.num_bytes / 2 for job in results for epoch in job[1:]]
    assert sum(fetched) / len(fetched) <= 0.33
