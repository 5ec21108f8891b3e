"""What a link holds: enough that it never pauses, found out from what it brings, and not more."""

from __future__ import annotations

import pytest

from cache.blocks import BLOCK_BYTES
from cache.residency.origins import Origins
from cache.residency.pipe import GAIN, WINDOW_S, Pipe


def flow(pipe: Pipe, rate: float, first_byte_s: float, seconds: float, start_s: float = 1.0) -> float:
    """Blocks at a rate; when the last of them came."""
    now = start_s
    while now < start_s + seconds:
        now += BLOCK_BYTES / rate
        pipe.landed(BLOCK_BYTES, first_byte_s, now)
    return now


def test_nothing_is_claimed_before_anything_came() -> None:
    assert Pipe().num_bytes == 0


def test_a_link_holds_its_rate_times_its_delay() -> None:
    pipe = Pipe()
    flow(pipe, 200e6, 0.1, 1.0)
    assert pipe.num_bytes == pytest.approx(GAIN * 20e6, rel=0.05)


def test_what_queues_does_not_count_as_delay() -> None:
    """Else what was asked for too much would be a reason to ask for more, without end."""
    pipe = Pipe()
    end_s = flow(pipe, 200e6, 0.03, 0.3)
    flow(pipe, 200e6, 0.3, 5.0, end_s)
    assert pipe.num_bytes == pytest.approx(GAIN * 6e6, rel=0.05)


def test_a_pause_of_the_reader_is_no_slow_link() -> None:
    pipe = Pipe()
    end_s = flow(pipe, 200e6, 0.03, 1.0)
    before = pipe.num_bytes
    pipe.landed(BLOCK_BYTES, 0.03, end_s + 60)
    flow(pipe, 200e6, 0.03, 2 * WINDOW_S, end_s + 60)
    assert pipe.num_bytes == pytest.approx(before, rel=0.05)


def test_a_distant_origin_is_given_as_many_blocks_as_its_link_holds() -> None:
    origins = Origins(256)
    state = origins.of("s3://b/a")
    flow(state.pipe, 200e6, 0.2, 1.0)
    while state.has_room(is_demand=False):
        origins.started("s3://b/a", "", 1, 3.0)
    assert state.blocks * BLOCK_BYTES == pytest.approx(GAIN * 40e6, rel=0.05)


def test_a_peer_is_given_no_more_for_what_its_link_holds_and_small_requests_count_whole() -> None:
    """It is short of processor time, of which each request takes as much; its own readers wait behind them."""
    origins = Origins(256)
    state = origins.of("s3://b/a", "peer-1")
    flow(state.pipe, 2e9, 0.2, 1.0)
    num_requests = 0
    while state.has_room(is_demand=False):
        origins.started("s3://b/a", "peer-1", 1, 3.0)
        num_requests += 1
    assert num_requests == state.concurrency.limit
