"""When to try again, and which words belong to which object."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CapacityError
from cache.residency.retry import RetryPolicy
from cache.residency.slots import EVICTION_WORD, HEARTBEAT_WORD, Slots

policies = st.builds(RetryPolicy, st.integers(1, 12), st.floats(0.001, 1.0), st.floats(1.0, 20.0))


@given(policies, st.integers(1, 20), st.integers(0, 99))
def test_delays_double_up_to_the_cap_with_jitter_and_then_it_gives_up(
    policy: RetryPolicy, attempts: int, seed: int
) -> None:
    delay_s = policy.delay_s(attempts, None, random.Random(seed))
    if attempts >= policy.max_attempts:
        assert delay_s is None
    else:
        ceiling = min(policy.cap_s, policy.base_s * 2.0 ** (attempts - 1))
        assert delay_s is not None and ceiling / 2 <= delay_s <= ceiling


@given(policies, st.integers(1, 11), st.floats(0, 1000))
def test_the_origins_own_wish_is_respected_up_to_half_a_minute(
    policy: RetryPolicy, attempts: int, asked_s: float
) -> None:
    """More would leave a reader hanging because a proxy wrote `Retry-After: 86400`."""
    delay_s = policy.delay_s(attempts, asked_s, random.Random(0))
    if attempts < policy.max_attempts:
        assert delay_s is not None and min(asked_s, 30.0) <= delay_s <= max(30.0, policy.cap_s)


def test_two_nodes_do_not_try_again_in_step() -> None:
    delays = {RetryPolicy().delay_s(4, None, random.Random(seed)) for seed in range(20)}
    assert len(delays) == 20


@given(st.lists(st.one_of(st.integers(0, 9), st.none()), max_size=60))
def test_no_two_objects_share_a_word(operations: list[int | None]) -> None:
    """A number takes so many words, None gives the oldest range back."""
    slots, taken = Slots(120), list[tuple[int, int]]()
    for count in operations:
        if count is None:
            if taken:
                slots.give_back(*taken.pop(0))
            continue
        try:
            base = slots.take(count)
        except CapacityError:
            assert sum(c for _, c in taken) + count > 0
            continue
        assert base > max(EVICTION_WORD, HEARTBEAT_WORD) and base + count <= 120
        assert all(base + count <= b or b + c <= base for b, c in taken if c and count)
        taken.append((base, count))


def test_words_that_were_given_back_are_used_again() -> None:
    slots = Slots(12)
    first = slots.take(5)
    slots.take(5)
    with pytest.raises(CapacityError, match="12 residency words is full"):
        slots.take(5)
    slots.give_back(first, 5)
    assert slots.take(5) == first


def test_words_of_many_small_objects_serve_a_large_one_later() -> None:
    """Whoever re-packs a data set into larger shards must not have to restart the daemon."""
    slots = Slots(2 + 100)
    bases = [slots.take(2) for _ in range(50)]
    for base in bases:
        slots.give_back(base, 2)
    assert slots.take(100) == 2
