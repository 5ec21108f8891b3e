"""The number of requests that an origin is given, on simulated links: it fills them, does not flood them, and yields to refusals."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.residency.concurrency import FLOOR, Concurrency
from tests.models.link import Link, drive


@pytest.mark.parametrize(
    ("total", "each", "first_byte_s"),
    [(200e6, 60e6, 0.03), (335e6, 20e6, 0.04), (100e6, 90e6, 0.1), (800e6, 25e6, 0.02), (50e6, 5e6, 0.2)],
)
def test_links_of_all_shapes_are_filled(total: float, each: float, first_byte_s: float) -> None:
    """Neither a thin connection on a fat link nor the reverse may leave bandwidth unused."""
    control = Concurrency(cap=128)
    goodput = drive(Link(total, each, first_byte_s), control, 30)
    assert sum(goodput[15:]) / 15 >= 0.85 * total


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    each=st.floats(20e6, 100e6),
    ratio=st.floats(1.0, 40.0),
    first_byte_s=st.floats(0.005, 0.15),
    seed=st.integers(0, 1000),
)
def test_any_link_is_filled_within_its_cap(each: float, ratio: float, first_byte_s: float, seed: int) -> None:
    """Whatever the link: after a start-up nearly all of it is used."""
    total = each * ratio
    control = Concurrency(cap=128)
    goodput = drive(Link(total, each, first_byte_s), control, 24, seed=seed)
    assert sum(goodput[12:]) / 12 >= 0.85 * total


def test_a_link_that_few_requests_fill_is_not_flooded() -> None:
    """Requests beyond what keeps the link full only queue, and a reader that needs a block now would queue behind them."""
    control = Concurrency(cap=128)
    drive(Link(200e6, 60e6), control, 60)
    assert control.limit <= 12, control.reason


def test_a_link_that_becomes_faster_is_noticed() -> None:
    control = Concurrency(cap=128)
    drive(Link(100e6, 20e6), control, 30)
    narrow = control.limit
    goodput = drive(Link(600e6, 20e6), control, 60, start_s=31.0)
    assert control.limit > narrow
    assert sum(goodput[40:]) / 20 >= 0.85 * 600e6


def test_an_origin_that_refuses_when_it_is_pushed_is_pushed_less() -> None:
    """AIMD: above 20 at once this store answers SlowDown; the number ends near that, not at the cap and not at the floor."""
    control = Concurrency(cap=64, seed=64)
    drive(Link(1e9, 20e6, refuse=lambda in_flight, rng: in_flight > 20), control, 60)
    assert 8 <= control.limit <= 30, control.reason


def test_an_origin_that_refuses_at_random_is_not_starved() -> None:
    """One answer in ten is a 503 whatever we do: asking less would only cost bandwidth (a pure AIMD ends at two requests)."""
    control = Concurrency(cap=64)
    goodput = drive(Link(200e6, 20e6, refuse=lambda in_flight, rng: rng.random() < 0.1), control, 60)
    assert sum(goodput[30:]) / 30 >= 0.75 * 200e6, control.reason


def test_random_refusals_cost_nothing_but_a_look_at_the_beginning() -> None:
    """The first batches of a training come in the first seconds: by then it must be known that less would not help."""
    for seed in range(5):
        control = Concurrency(cap=64)
        goodput = drive(Link(200e6, 60e6, refuse=lambda in_flight, rng: rng.random() < 0.1), control, 10, seed=seed)
        assert sum(goodput[2:]) / 8 >= 0.75 * 200e6, control.reason


def test_the_limit_stays_within_its_bounds_whatever_happens() -> None:
    rng = random.Random(1)
    control = Concurrency(cap=32)
    now, in_flight = 1.0, 0
    for _ in range(20_000):
        now += rng.random() * 0.05
        if in_flight < control.limit and rng.random() < 0.6:
            in_flight += 1
            control.started(in_flight, now)
        elif in_flight:
            in_flight -= 1
            control.ended(now, 4 << 20, rng.random(), throttled=rng.random() < 0.3)
        assert FLOOR <= control.limit <= 32
    assert Concurrency(cap=1).limit == 1
