"""A store's `Retry-After` is kept to, but for what is needed sooner; that is asked for once more, where refusals are rare."""

from __future__ import annotations

import pytest

from cache.blocks import BLOCK_BYTES, ObjectId
from cache.errors import OriginThrottled
from cache.order.lookahead import Visit
from cache.residency.haste import NEAR_VISITS
from cache.residency.hedging import EARLY_BURST, EARLY_SHARE, Hedging
from cache.residency.origins import FULL_BLOCKS, Origins
from tests.models.residency_world import World

A = ObjectId("s3://b/a", '"1"', 3 * BLOCK_BYTES)
B = ObjectId("s3://b/b", '"1"', 3 * BLOCK_BYTES)
LATER = OriginThrottled("SlowDown", retry_after_s=5.0)


@pytest.fixture
def world() -> World:
    world = World(100 * BLOCK_BYTES)
    for object_id in (A, B):
        world.open("a", object_id)
    return world


def refuse(world: World) -> None:
    """The one fetch that is under way is answered with 503."""
    (fetch,) = world.fetches
    world.fetch_done(fetch, LATER)


def test_what_a_reader_waits_for_does_not_wait_as_long_as_the_store_says(world: World) -> None:
    """A flaky store says `Retry-After: 1` to one request in ten: with each of them a training would stand still for a second."""
    request_id = world.want("a", A, 0, 3)
    world.create_done(world.creations[0])
    refuse(world)
    assert not world.fetches, "not at once: with a little jitter"
    world.pass_time(0.05)
    world.run_until_quiet()
    assert world.answers[request_id].error is None


def test_who_refuses_much_is_left_alone_for_as_long_as_it_says(world: World) -> None:
    """Then Retry-After means load, and haste would only add to it."""
    world.want("a", A, 0, 3)
    world.create_done(world.creations[0])
    refuse(world)
    world.pass_time(0.05)
    refuse(world)
    world.pass_time(4.8)
    assert not world.fetches
    world.pass_time(0.3)
    assert world.fetches


def test_what_nobody_needs_soon_waits_as_long_as_the_store_says(world: World) -> None:
    world.hint(A, 0, 1)
    world.create_done(world.creations[0])
    refuse(world)
    world.pass_time(4.9)
    assert not world.fetches
    world.pass_time(0.2)
    assert world.fetches


def test_what_a_reader_asks_for_meanwhile_no_longer_waits(world: World) -> None:
    world.hint(A, 0, 1)
    world.create_done(world.creations[0])
    refuse(world)
    world.want("a", A, 0, 1)
    world.pass_time(0.05)
    assert world.fetches


def test_what_comes_near_meanwhile_no_longer_waits(world: World) -> None:
    """So it is there when its reader comes to it."""
    world.announce("a", "s", [Visit(A.content_id, 0, 1)] * (NEAR_VISITS + 50) + [Visit(B.content_id, 0, 1)])
    world.create_done(world.creations[0])
    world.fetch_done(world.fetches[0])
    world.create_done(world.creations[0])
    refuse(world)
    world.pass_time(0.1)
    assert not world.fetches
    world.advance("s", 51)
    world.pass_time(0.05)
    assert [fetch.object_id for fetch in world.fetches] == [B]


def test_haste_has_a_budget() -> None:
    hedging, taken = Hedging(), 0
    for _ in range(1000):
        hedging.landed(BLOCK_BYTES, 0.1, 0.03)
        taken += hedging.take_early_try()
    assert taken <= EARLY_BURST + EARLY_SHARE * 1000


def test_small_requests_count_as_parts_of_one() -> None:
    """A single block spends most of its time on the way to its first byte: as many of them as of large requests would leave the link half
    idle, just when the first batches wait for single blocks."""
    origins = Origins(64)
    limit = origins.of("s3://b/a").concurrency.limit
    for num_blocks, num in ((1, FULL_BLOCKS * limit), (16, limit)):
        for nth in range(num):
            assert origins.of("s3://b/a").has_room(is_demand=False), nth
            origins.started("s3://b/a", "", num_blocks, 1.0)
        assert not origins.of("s3://b/a").has_room(is_demand=False)
        for _ in range(num):
            origins.ended("s3://b/a", "", num_blocks, 1.0)
        assert origins.of("s3://b/a").load == 0
