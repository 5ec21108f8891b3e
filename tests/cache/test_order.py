"""The order is a function (docs/SEMANTICS.md, Cache 6): seed, epoch and step decide, whatever the number of ranks and
workers."""

from __future__ import annotations

import doctest
import hashlib
import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.order import batches, permutation, schedule, shuffle
from cache.order.batches import BatchPlan, Cursor
from cache.order.permutation import KeyedPermutation
from cache.order.schedule import Schedule, parse_shuffle, shuffle_name
from cache.order.shuffle import Full, Sequential, Windowed, epoch_order

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
shuffles = st.one_of(st.just(Full()), st.just(Sequential()), st.integers(1, 5).map(Windowed))


@pytest.mark.parametrize("module", [permutation, shuffle, batches, schedule], ids=lambda module: module.__name__)
def test_doctests_say_the_truth(module: object) -> None:
    result = doctest.testmod(sys.modules[module.__name__])  # type: ignore[attr-defined]
    assert result.failed == 0


# --- permutation ----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers())
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    assert sorted(KeyedPermutation(n, (key,))(range(n)).tolist()) == list(range(n))


@given(st.integers(1, 2**62), st.data())
def test_permutation_of_any_size_is_computed_without_the_rest(n: int, data: st.DataObject) -> None:
    """An epoch larger than memory must cost nothing; distinct positions stay distinct and within range."""
    positions = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=50))
    images = KeyedPermutation(n, (1, 2))(np.array(positions, dtype=np.int64)).tolist()
    assert len(set(images)) == len(positions)
    assert all(0 <= image < n for image in images)


def test_permutation_never_changes() -> None:
    """A golden test: were it to fail, every running job would resume into another order, and nothing else would
    notice."""
    assert KeyedPermutation(10, ("full", 0, 0))(range(10)).tolist() == GOLDEN_10
    assert KeyedPermutation(100_000_000, ("full", 1234, 56))([0, 1, 2, 99_999_999]).tolist() == GOLDEN_1E8
    whole = KeyedPermutation(100_003, ("full", -1, 7))(range(100_003))
    assert hashlib.sha256(whole.astype("<i8").tobytes()).hexdigest() == GOLDEN_SHA


GOLDEN_10 = [5, 9, 3, 0, 8, 1, 6, 4, 7, 2]
GOLDEN_1E8 = [88906525, 58181653, 72991551, 27027851]
GOLDEN_SHA = "2eafe3c9bc9f72295b18eb35b145dc78b37bd83f354f1da98c91f79bcdd58128"


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_are_uniform(n: int) -> None:
    """Few elements are the hard case for a Feistel network: with 8 rounds instead of 24 this fails by many standard
    deviations."""
    num_keys = 100 * math.factorial(n)
    seen = Counter(tuple(KeyedPermutation(n, (key, "uniform"))(range(n)).tolist()) for key in range(num_keys))
    chi_square = sum((seen[images] - 100) ** 2 / 100 for images in itertools.permutations(range(n)))
    freedom = math.factorial(n) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together() -> None:
    """A batch of neighbours would be a batch of one class, or of one page of text."""
    n = 10_000
    images = KeyedPermutation(n, (3, "neighbours"))(range(n))
    jumps = np.abs(np.diff(images))
    assert abs(jumps.mean() / (n / 3) - 1) < 0.05  # two independent places of n are n / 3 apart on average
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.05


@pytest.mark.parametrize("positions", [[-1], [5], [0, 5]])
def test_position_outside_is_an_error(positions: list[int]) -> None:
    with pytest.raises(IndexError, match="5 elements"):
        KeyedPermutation(5, (0,))(positions)


# --- shuffle --------------------------------------------------------------------------------------------------------------------


@given(shard_sizes, shuffles, st.integers(0, 3), st.integers(0, 3))
def test_every_sample_stands_exactly_once_in_an_epoch(
    sizes: list[int], kind: shuffle.Shuffle, seed: int, epoch: int
) -> None:
    order = epoch_order(kind, sizes, seed=seed, epoch=epoch)
    assert sorted(order.samples_at(range(sum(sizes))).tolist()) == list(range(sum(sizes)))


@given(shard_sizes, shuffles, st.data())
def test_any_part_of_an_epoch_equals_that_part_of_the_whole(
    sizes: list[int], kind: shuffle.Shuffle, data: st.DataObject
) -> None:
    """Resuming in the middle starts in the middle: what is computed first has no influence."""
    order = epoch_order(kind, sizes, seed=1, epoch=2)
    whole = order.samples_at(range(sum(sizes)))
    positions = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=20))
    assert order.samples_at(np.array(positions, dtype=np.int64)).tolist() == whole[positions].tolist()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_windowed_working_set_is_bounded(sizes: list[int], window: int) -> None:
    """Between two places of an epoch, at most `window` shards are open: this is what lets a data set exceed the
    cache."""
    samples = epoch_order(Windowed(window), sizes, seed=3, epoch=0).samples_at(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visited = shard_of[samples]
    first = {shard: int(np.argmax(visited == shard)) for shard in set(visited.tolist())}
    last = {shard: len(visited) - 1 - int(np.argmax(visited[::-1] == shard)) for shard in first}
    assert all(
        sum(first[shard] <= position <= last[shard] for shard in first) <= window for position in range(len(visited))
    )


@pytest.mark.parametrize("kind", [Full(), Windowed(2)])
def test_epochs_and_seeds_differ(kind: shuffle.Shuffle) -> None:
    orders = {
        tuple(epoch_order(kind, [50] * 4, seed=seed, epoch=epoch).samples_at(range(200)).tolist())
        for seed, epoch in itertools.product(range(3), range(3))
    }
    assert len(orders) == 9


def test_windowed_order_never_changes() -> None:
    order = epoch_order(Windowed(2), [3, 0, 4, 0, 0, 2, 5], seed=1, epoch=0)
    assert order.samples_at(range(14)).tolist() == GOLDEN_WINDOWED


GOLDEN_WINDOWED = [7, 8, 12, 2, 0, 9, 11, 10, 13, 1, 4, 3, 5, 6]


# --- batches --------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 64), st.booleans())
def test_an_epoch_of_batches_holds_every_position_once_but_for_what_is_said(n: int, size: int, drop_last: bool) -> None:
    if drop_last and n < size:
        return
    plan = BatchPlan(n, size, drop_last)
    positions = np.concatenate([plan.positions(step) for step in range(plan.num_steps)])
    counts = np.bincount(positions, minlength=n)
    assert (counts == 0).sum() == plan.num_dropped < size
    assert (counts - 1).clip(0).sum() == plan.num_padding == plan.num_padding_at(plan.num_steps - 1) < size


@given(st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 6, 12]), st.booleans(), st.data())
def test_batches_do_not_depend_on_the_number_of_ranks(
    n: int, world_size: int, drop_last: bool, data: st.DataObject
) -> None:
    if drop_last and n < 12:
        return
    plan = BatchPlan(n, 12, drop_last)
    step = data.draw(st.integers(0, plan.num_steps - 1))
    slices = [plan.positions(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert np.concatenate(slices).tolist() == plan.positions(step).tolist()


def test_ranks_that_cannot_share_a_batch_equally_are_refused_with_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"cannot be shared equally by 3 ranks\n  use 1 or 2 or 4 ranks"):
        BatchPlan(100, 8).positions(0, rank=0, world_size=3)


def test_too_few_samples_for_one_batch_is_refused() -> None:
    """Zero steps in an epoch would be a loop that never ends."""
    with pytest.raises(ValueError, match="do not fill one global batch of 8"):
        BatchPlan(7, 8)
    assert BatchPlan(7, 8, drop_last=False).num_steps == 1


# --- schedule -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shard_sizes, shuffles, st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(0, 9)), max_size=6))
def test_resizing_at_any_step_keeps_exactly_once(
    sizes: list[int], kind: shuffle.Shuffle, attempts: list[tuple[int, int]]
) -> None:
    """Attempts of any world size, each ended after any number of steps: together they saw what an uninterrupted job
    sees."""
    job = Schedule(tuple(sizes), global_batch_size=6, seed=5, shuffle=kind, drop_last=False)
    cursor = Cursor(0, 0)
    seen: list[int] = []
    for world_size, num_steps in [*attempts, (1, 2 * job.plan.num_steps)]:
        ranks = [job.batches(cursor, rank=rank, world_size=world_size) for rank in range(world_size)]
        for _ in range(num_steps):
            seen.extend(sample for rank in ranks for sample in next(rank)[1].tolist())
        cursor = job.plan.after(cursor, num_steps)
    whole = job.batches(Cursor(0, 0))
    expected = [sample for _ in range(len(seen) // 6) for sample in next(whole)[1].tolist()]
    assert seen == expected
    first_epoch = seen[: job.plan.num_steps * 6][: job.plan.num_samples]
    assert sorted(first_epoch) == list(range(job.plan.num_samples))


def test_batches_go_on_into_the_next_epochs() -> None:
    job = Schedule((5, 5), global_batch_size=4)
    ahead = list(itertools.islice(job.batches(Cursor(0, 1)), 4))
    assert [cursor for cursor, _ in ahead] == [Cursor(0, 1), Cursor(1, 0), Cursor(1, 1), Cursor(2, 0)]
    for cursor, samples in ahead:
        assert samples.tolist() == job.global_batch(cursor).tolist()


def test_end_of_an_epoch_is_the_start_of_the_next() -> None:
    job = Schedule((8,), global_batch_size=4)
    assert job.global_batch(Cursor(0, 2)).tolist() == job.global_batch(Cursor(1, 0)).tolist()
    with pytest.raises(ValueError, match="step 3 of an epoch of 2 steps"):
        job.plan.normalised(Cursor(0, 3))


@given(shuffles)
def test_shuffle_names_go_round(kind: shuffle.Shuffle) -> None:
    assert parse_shuffle(shuffle_name(kind)) == kind


@pytest.mark.parametrize("name", ["", "random", "windowed", "windowed:0", "windowed:x", "full:3"])
def test_unknown_shuffle_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="none of 'full', 'sequential', 'windowed:W'"):
        parse_shuffle(name)
