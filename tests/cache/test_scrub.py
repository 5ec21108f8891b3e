"""Reading back what is here: everything once per round, no faster than allowed, never in a reader's way."""

from __future__ import annotations

import random

from cache.blocks import BLOCK_BYTES, BLOCKS_PER_FETCH, EXTENT_BYTES, ExtentId, ObjectId
from cache.errors import DiskError
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.health import Health
from cache.residency.scrub import IDLE_WAIT_S, Scrubber
from tests.models.residency_world import World

MIB = 2**20
BIG = ObjectId("s3://b/big", '"1"', EXTENT_BYTES + 3 * BLOCK_BYTES)
SMALL = ObjectId("s3://b/small", '"1"', 10)


def test_every_block_comes_once_per_round_at_the_given_pace() -> None:
    there = {ExtentId("a", idx): list(range(256 * idx, 256 * idx + 40)) for idx in range(3)}
    scrubber = Scrubber(BLOCK_BYTES, random.Random(1))
    for _ in range(3):
        seen: list[int] = []
        now = scrubber.next_s()
        while len(seen) < 120:
            assert scrubber.is_due(now) and not scrubber.is_due(now - 0.001)
            taken = scrubber.take(lambda: there, there.get, now)
            assert taken is not None and taken[1] is not None and len(taken[1]) <= BLOCKS_PER_FETCH
            seen += taken[1]
            assert scrubber.next_s() == now + len(taken[1]), "one block a second"
            now = scrubber.next_s()
        assert sorted(seen) == sorted(block for blocks in there.values() for block in blocks)
    assert scrubber.num_rounds == 3


def test_nothing_to_read_back_is_no_busy_loop() -> None:
    scrubber = Scrubber(BLOCK_BYTES, random.Random(1))
    assert scrubber.take(list, lambda extent: [], 5.0) is None
    assert scrubber.take(lambda: [ExtentId("a", 0)], lambda extent: [], 5.0) is None
    assert scrubber.next_s() == 5.0 + IDLE_WAIT_S


def test_a_rate_of_zero_is_never() -> None:
    assert not Scrubber(0, random.Random(1)).is_due(1e9)


def filled(*objects: ObjectId) -> World:
    world = World(300 * MIB)
    for object_id in objects:
        world.open("a", object_id)
        world.announce("a", f"a/{object_id.url}", [_visit(object_id)])
    world.run_until_quiet()
    return world


def _visit(object_id: ObjectId) -> Visit:
    return Visit(object_id.content_id, 0, -(-object_id.size_bytes // BLOCK_BYTES))


def scrub(world: World) -> None:
    world.now += 10.0
    world.step(m.ScrubDue())


def test_a_block_is_read_back_past_the_page_cache_while_readers_go_on_reading_it() -> None:
    world = filled(SMALL)
    scrub(world)
    assert [(check.first, check.end, check.from_device) for check in world.checks] == [(0, 1, True)]
    assert world.readable(SMALL) == {0}
    world.check_done(world.checks[0])
    assert world.machine.counters.scrubbed_blocks == 1 and world.readable(SMALL) == {0}


def test_a_rotten_block_leaves_its_readers_and_comes_again_when_wanted() -> None:
    """What rots on the disk while the daemon runs is found without anybody asking for it."""
    world = filled(SMALL)
    scrub(world)
    world.check_done(world.checks[0], is_sound=False)
    assert world.readable(SMALL) == set() and world.machine.counters.rotten_blocks == 1
    request_id = world.want("a", SMALL, 0, 1)
    world.run_until_quiet()
    assert world.answers[request_id].error is None and world.num_fetches[SMALL.content_id, 0] == 2


def test_it_waits_while_readers_need_the_disk() -> None:
    world = filled(SMALL)
    world.open("a", BIG)
    world.want("a", BIG, 0, 4)
    world.create_done(world.creations[0])
    scrub(world)
    assert not world.checks


def test_it_waits_while_the_disk_is_not_well() -> None:
    world = filled(SMALL)
    world.step(m.DiskTroubled(DiskError("slow", kind="slow")))
    assert world.machine.health.state is Health.SUSPICIOUS
    scrub(world)
    assert not world.checks


def test_what_was_found_at_the_start_is_verified_before_anybody_wants_it() -> None:
    world = World(300 * MIB)
    world.found(SMALL, 0, 7, [0])
    scrub(world)
    assert len(world.tables) == 1 and not world.checks
    world.table_done(world.tables[0])
    scrub(world)
    world.check_done(world.checks[0])
    assert world.readable(SMALL) == {0} and world.num_fetches == {}


def test_what_a_reader_could_not_read_is_looked_at_at_once() -> None:
    world = filled(SMALL)
    world.step(m.ExtentSuspected(ExtentId(SMALL.content_id, 0)))
    world.step(m.ExtentSuspected(ExtentId(SMALL.content_id, 0)))
    assert len(world.checks) == 1
    world.check_done(world.checks[0], is_sound=False, error=DiskError("I/O error", kind="io"))
    assert world.readable(SMALL) == set() and world.machine.health.state is Health.SUSPICIOUS


def test_a_disk_that_cannot_be_read_is_out_of_service_until_a_probe_and_each_block_have_passed() -> None:
    """Readers are led to it no more, in place of an error or SIGBUS per read; after that nothing is served unverified."""
    world = filled(SMALL, BIG)
    extent = ExtentId(BIG.content_id, 0)
    world.step(m.ExtentSuspected(extent))
    for check in world.checks[:3]:
        world.check_done(check, is_sound=False, error=DiskError("I/O error", kind="io"))
    assert world.machine.health.state is Health.OUT_OF_SERVICE
    while world.checks:
        world.check_done(world.checks[0])
    assert world.readable(SMALL) == world.readable(BIG) == set()
    refused = world.want("a", SMALL, 0, 1)
    assert isinstance(world.answers[refused].error, DiskError)
    deadline_s = world.machine.next_deadline_s()
    assert deadline_s is not None
    world.pass_time(deadline_s - world.now)
    world.probe_done()
    served = world.want("a", SMALL, 0, 1)
    assert [check.first for check in world.checks] == [0], "it is compared first"
    world.check_done(world.checks[0])
    assert world.answers[served].error is None and world.num_fetches[SMALL.content_id, 0] == 1


def test_a_file_that_somebody_removed_is_made_anew() -> None:
    world = filled(SMALL)
    world.step(m.ExtentSuspected(ExtentId(SMALL.content_id, 0)))
    world.check_done(world.checks[0], is_sound=False, error=DiskError("removed", kind="lost"))
    assert world.machine.counters.lost_extents == 1 and world.machine.health.state is Health.OK
    request_id = world.want("a", SMALL, 0, 1)
    world.run_until_quiet()
    assert world.answers[request_id].error is None and world.num_fetches[SMALL.content_id, 0] == 2
