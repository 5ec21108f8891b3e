"""The promises of cache/residency/machine.py, one by one. (Generated histories: test_residency_model.py.)"""

from __future__ import annotations

import pytest

from cache.blocks import BLOCK_BYTES, EXTENT_BYTES, ExtentId, ObjectId
from cache.errors import AccessDenied, CapacityError, CorruptBlock, DiskError, ObjectChanged, OriginUnavailable
from cache.order.lookahead import Visit
from cache.residency import messages as m
from cache.residency.budget import STALE_HOLD_S
from cache.residency.health import FIRST_PAUSE_S
from cache.residency.patience import COOLING_S
from cache.residency.retry import RetryPolicy
from tests.models.residency_world import World

MIB = BLOCK_BYTES // 4
"""Of the little world of these tests, whose objects have three blocks: twelve of it."""

A = ObjectId("s3://b/a", '"1"', 3 * BLOCK_BYTES)
B = ObjectId("s3://b/b", '"1"', 3 * BLOCK_BYTES)
C = ObjectId("s3://b/c", '"1"', 3 * BLOCK_BYTES)
LONG = ObjectId("s3://b/long", '"1"', 2 * EXTENT_BYTES)


def whole(object_id: ObjectId) -> Visit:
    return Visit(object_id.content_id, 0, 3)


def read(world: World, client: str, object_id: ObjectId, *, hold: bool = False) -> None:
    """A reader asks for all of an object, and everything goes well."""
    world.open(client, object_id)
    request_id = world.want(client, object_id, 0, 3)
    world.run_until_quiet()
    assert world.answers[request_id].error is None
    if hold:
        world.hold_answered(request_id)
    world.settle(request_id)


def test_a_block_has_one_fetch_in_flight_however_many_wait() -> None:
    world = World(100 * MIB)
    requests = []
    for client in ("a", "b", "c"):
        world.open(client, A)
        requests.append(world.want(client, A, 0, 3))
    world.run_until_quiet()
    assert [world.num_fetches[A.content_id, block] for block in range(3)] == [1, 1, 1]
    assert [world.answers[rid].cause for rid in requests] == ["order unknown", "delayed hit", "delayed hit"]


def test_a_reader_of_the_first_block_does_not_wait_for_the_last() -> None:
    world = World(10_000 * MIB)
    world.open("a", LONG)
    first, all_of_it = world.want("a", LONG, 0, 1), world.want("a", LONG, 0, 40)
    world.create_done(world.creations[0])
    assert [(f.first, f.end) for f in world.fetches] == [(0, 16), (16, 32), (32, 40)]
    world.fetch_done(world.fetches[0])
    assert first in world.answers and all_of_it not in world.answers


def test_what_was_fetched_for_a_reader_stays_until_it_was_handed_over() -> None:
    """Else two readers with room for one would evict each other's blocks for ever, and neither would read one."""
    world = World(15 * MIB)
    for client, object_id in (("a", A), ("b", B)):
        world.open(client, object_id)
    first = world.want("a", A, 0, 3)
    world.create_done(world.creations[0])
    while world.fetches:
        world.fetch_done(world.fetches[0])
    world.want("b", B, 0, 3)
    assert first in world.answers and not world.creations, "B must wait"
    world.settle(first)
    assert [action.object_id for action in world.creations] == [B]


def test_who_no_longer_waits_holds_nothing_up() -> None:
    world = World(15 * MIB)
    for client, object_id in (("a", A), ("b", B)):
        world.open(client, object_id)
    world.settle(world.want("a", A, 0, 3))
    world.leave("a")
    second = world.want("b", B, 0, 3)
    world.run_until_quiet()
    assert world.answers[second].error is None


def test_bytes_that_a_dead_reader_had_count_until_the_disk_says_that_nobody_has_them() -> None:
    """Evicted before his death or after it: his kernel may still be closing them, and a child of his may read on."""
    for evicts_first in (True, False):
        world = World(15 * MIB)
        read(world, "a", A, hold=True)
        world.open("b", B)
        if not evicts_first:
            world.leave("a")
        request_id = world.want("b", B, 0, 3)
        if evicts_first:
            world.leave("a")
        assert world.machine.budget.held_bytes > 12 * MIB and not world.creations
        world.unknown_readers_let_go(world.looks[0])
        assert world.machine.budget.held_bytes == 0 and len(world.creations) == 1
        world.run_until_quiet()
        assert world.answers[request_id].error is None


def test_bytes_that_readers_hold_count_until_they_let_go() -> None:
    world = World(15 * MIB)
    read(world, "a", A, hold=True)
    world.open("b", B)
    request_id = world.want("b", B, 0, 3)
    assert world.machine.budget.held_bytes > 12 * MIB and not world.creations, "evicted, but its bytes are not free"
    (key,) = [key for key, holders in world.holders.items() if holders]
    world.release(key, "a")
    assert world.machine.budget.held_bytes > 12 * MIB and not world.creations, "the disk has not said that it is gone"
    world.unknown_readers_let_go(key)
    assert world.machine.budget.held_bytes == 0 and len(world.creations) == 1
    world.run_until_quiet()
    assert world.answers[request_id].error is None


def test_a_reader_that_never_lets_go_sends_the_others_to_the_origin_after_a_while() -> None:
    world = World(15 * MIB)
    read(world, "idle", A, hold=True)
    world.open("b", B)
    request_id = world.want("b", B, 0, 3)
    world.pass_time(STALE_HOLD_S - 0.1)
    assert request_id not in world.answers
    world.pass_time(0.2)
    assert isinstance(world.answers[request_id].error, CapacityError)
    world.leave("idle")
    world.run_until_quiet()
    assert world.machine.budget.used_bytes == 0


def test_an_extent_that_can_never_fit_is_refused_at_once_and_not_fetched_ahead() -> None:
    world = World(15 * MIB)
    world.open("a", LONG)
    world.open("a", A)
    request_id = world.want("a", LONG, 0, 1)
    assert isinstance(world.answers[request_id].error, CapacityError)
    world.announce("a", "s", [Visit(LONG.content_id, 0, 16), whole(A)])
    world.run_until_quiet()
    assert world.readable(A) == {0, 1, 2}, "it must not stand before what fits"


def test_an_extent_in_a_workers_hands_stays_even_if_a_person_asks_for_its_eviction() -> None:
    world = World(100 * MIB)
    world.open("a", A)
    world.want("a", A, 0, 3)
    world.evict(A)
    world.create_done(world.creations[0])
    world.evict(A)
    assert world.files
    world.run_until_quiet()


def test_a_prefetch_never_displaces_what_is_needed_sooner() -> None:
    world = World(15 * MIB)
    for object_id in (A, B):
        world.open("a", object_id)
    world.announce("a", "s", [whole(A), whole(B)])
    world.run_until_quiet()
    assert world.readable(A) and not world.readable(B)
    world.advance("s", 1)
    world.run_until_quiet()
    assert world.readable(B) and not world.readable(A), "now A is behind the reader"


def test_the_farthest_use_goes_first() -> None:
    world = World(28 * MIB)
    for object_id in (A, B, C):
        world.open("a", object_id)
    world.announce("a", "s", [whole(A), whole(B), whole(A), whole(A), whole(C), whole(B)])
    world.run_until_quiet()
    world.advance("s", 2)
    world.want("a", C, 0, 3)
    world.run_until_quiet()
    assert world.readable(A) == {0, 1, 2} and world.readable(B) == set()


def test_a_long_order_does_not_take_the_space_before_it_can_be_filled() -> None:
    """Files under way are bounded like blocks: else a window of a thousand shards would evict everything at once."""
    world = World(10_000 * MIB, max_in_flight=4, demand_reserve=1)
    objects = [ObjectId(f"s3://b/{idx}", '"1"', BLOCK_BYTES) for idx in range(50)]
    for object_id in objects:
        world.open("a", object_id)
    world.announce("a", "s", [Visit(object_id.content_id, 0, 1) for object_id in objects])
    assert len(world.creations) == 3
    world.run_until_quiet()
    assert sum(world.num_fetches.values()) == 50


def test_a_reader_that_waits_comes_before_every_prefetch() -> None:
    world = World(10_000 * MIB, max_in_flight=2, demand_reserve=1)
    world.open("a", LONG)
    world.open("b", A)
    world.announce("a", "s", [Visit(LONG.content_id, 0, 16)])
    world.create_done(world.creations[0])
    world.want("b", A, 0, 1)
    world.create_done(world.creations[0])
    assert [(f.object_id, f.is_demand) for f in world.fetches] == [(LONG, False), (A, True)]


def test_a_block_found_on_disk_is_read_back_before_it_is_readable() -> None:
    world = World(100 * MIB)
    world.found(A, 0, 5, [0, 1])
    world.open("a", A)
    request_id = world.want("a", A, 0, 2)
    world.table_done(world.tables[0])
    assert len(world.checks) == 1 and world.readable(A) == set() and request_id not in world.answers
    world.check_done(world.checks[0])
    assert world.answers[request_id].generation == 5
    assert not world.num_fetches[A.content_id, 0] and not world.num_fetches[A.content_id, 1]


def test_a_rotten_block_is_fetched_again_and_never_published() -> None:
    world = World(100 * MIB)
    world.found(A, 0, 5, [0])
    world.open("a", A)
    request_id = world.want("a", A, 0, 1)
    world.table_done(world.tables[0])
    world.check_done(world.checks[0], is_sound=False)
    assert world.readable(A) == set()
    world.run_until_quiet()
    assert world.answers[request_id].error is None and world.num_fetches[A.content_id, 0] == 1
    assert world.machine.counters.rotten_blocks == 1


def test_what_a_reader_waited_for_is_said_as_what_one_can_do_about_it() -> None:
    """Nobody had said that it would be read; it was announced and the origin was too slow; it is being verified after a restart."""
    world = World(10_000 * MIB)
    world.found(LONG, 0, 5, [0])
    world.open("a", A)
    world.open("a", LONG)
    world.announce("a", "s", [Visit(A.content_id, 0, 1)])
    requests = [
        world.want("a", A, 0, 1),
        world.want("a", A, 2, 3),
        world.want("a", LONG, 0, 1),
        world.want("b", LONG, 0, 2),
    ]
    world.run_until_quiet()
    assert [world.answers[request].cause for request in requests] == ["origin", "order unknown", "disk", "disk"]


def test_a_check_of_a_file_from_before_reads_its_table_first() -> None:
    """`verify` after a restart: what nobody has opened yet is compared as well, not passed over as sound."""
    world = World(100 * MIB)
    world.found(A, 0, 5, [0, 1])
    request_id = world.check("p", ExtentId(A.content_id, 0))
    other_id = world.check("q", ExtentId(A.content_id, 0))
    world.leave("q")
    world.table_done(world.tables[0])
    assert [(c.first, c.end) for c in world.checks] == [(0, 2)] and request_id not in world.answers
    world.check_done(world.checks[0], is_sound=False)
    assert world.answers[request_id].cause == "2 rotten" and other_id not in world.answers
    world.run_until_quiet()


def test_a_check_of_a_file_whose_table_cannot_be_read_says_so() -> None:
    world = World(100 * MIB)
    world.found(A, 0, 5, [0, 1])
    request_id = world.check("p", ExtentId(A.content_id, 0))
    world.table_done(world.tables[0], CorruptBlock("torn"))
    assert "rotten" in world.answers[request_id].cause and world.machine.num_extents == 0


def test_what_is_pinned_is_not_evicted_for_others_and_gives_way_to_the_bound_alone() -> None:
    pinned, other = (ObjectId(f"s3://{name}/0", '"1"', 3 * BLOCK_BYTES) for name in ("keep", "other"))
    world = World(30 * MIB)
    world.step(m.PinsChanged(("s3://keep",)))
    world.open("a", A)
    for object_id in (pinned, other):
        world.open("a", object_id)
        world.want("a", object_id, 0, 3)
        world.run_until_quiet()
        for request_id in list(world.unsettled):
            world.settle(request_id)
    world.want("a", A, 0, 1)
    world.run_until_quiet()
    here = [extent.content_id for extent in world.machine.residents.extents]
    assert pinned.content_id in here and other.content_id not in here, "though it was used longer ago"
    world.evict(pinned)
    assert world.machine.on_disk_bytes(pinned.content_id)
    for request_id in list(world.unsettled):
        world.settle(request_id)
    world.set_capacity(0)
    assert not world.machine.on_disk_bytes(pinned.content_id)


def test_a_file_whose_table_cannot_be_read_is_made_anew() -> None:
    world = World(100 * MIB)
    world.found(A, 0, 5, [0])
    world.open("a", A)
    request_id = world.want("a", A, 0, 1)
    world.table_done(world.tables[0], CorruptBlock("torn"))
    world.run_until_quiet()
    assert world.answers[request_id].generation > 5


def test_a_check_that_somebody_asks_for_keeps_to_the_limit_and_its_extent_stays() -> None:
    world = World(10_000 * MIB, max_in_flight=4)
    world.open("a", LONG)
    world.want("a", LONG, 0, 256)
    world.run_until_quiet()
    for request_id in list(world.unsettled):
        world.settle(request_id)
    request_id = world.check("a", ExtentId(LONG.content_id, 0))
    assert len(world.checks) == 4
    world.evict(LONG)
    assert world.files
    world.run_until_quiet()
    assert world.answers[request_id].cause == "sound"


@pytest.mark.parametrize("error", [AccessDenied("no"), ObjectChanged("new"), CapacityError("disk")])
def test_what_cannot_succeed_is_told_at_once_to_everybody_who_waits(error: AccessDenied) -> None:
    world = World(100 * MIB)
    world.open("a", A)
    requests = [world.want("a", A, 0, 1), world.want("a", A, 0, 3)]
    world.create_done(world.creations[0])
    world.fetch_done(world.fetches[0], error)
    assert [world.answers[rid].error for rid in requests] == [error, error]
    world.run_until_quiet()


def test_what_may_succeed_later_is_tried_with_growing_pauses_and_then_given_up() -> None:
    world = World(100 * MIB)
    world.open("a", A)
    request_id = world.want("a", A, 0, 3)
    world.create_done(world.creations[0])
    for _ in range(RetryPolicy().max_attempts - 1):
        world.fetch_done(world.fetches[0], OriginUnavailable("away"))
        assert not world.fetches and request_id not in world.answers
        deadline_s = world.machine.next_deadline_s()
        assert deadline_s is not None
        world.pass_time(deadline_s - world.now)
    world.fetch_done(world.fetches[0], OriginUnavailable("away"))
    assert isinstance(world.answers[request_id].error, OriginUnavailable)
    assert world.machine.next_deadline_s() is None


def test_a_disk_that_refuses_files_is_left_in_peace_for_a_while() -> None:
    world = World(100 * MIB)
    for object_id in (A, B):
        world.open("a", object_id)
    first = world.want("a", A, 0, 3)
    world.create_done(world.creations[0], DiskError("disk full", kind="full"))
    second = world.want("a", B, 0, 3)
    assert str(world.answers[first].error) == str(world.answers[second].error) == "disk full"
    assert not world.creations and not world.files
    world.pass_time(FIRST_PAUSE_S + COOLING_S)
    assert world.num_probes == 1, "it is probed first"
    world.want("a", A, 0, 3)
    assert not world.creations
    world.probe_done()
    world.want("a", B, 0, 3)
    assert len(world.creations) == 1


def test_a_smaller_capacity_is_reached_as_files_come_free() -> None:
    world = World(100 * MIB)
    for object_id in (A, B, C):
        read(world, "a", object_id)
    world.check("a", ExtentId(A.content_id, 0))
    world.set_capacity(9 * MIB)
    assert set(world.current) == {ExtentId(A.content_id, 0)}, "what can go goes, though it is not enough"
    world.run_until_quiet()
    assert world.files == {}


def test_a_request_for_what_is_not_known_or_not_there_is_an_error_with_advice() -> None:
    world = World(100 * MIB)
    for object_id, end in ((A, 1), (A, 4)):
        request_id = world.want("a", object_id, end - 1, end)
        error = world.answers[request_id].error
        assert error is not None and "open the object first" in error.advice
        world.open("a", A)


def test_time_does_not_go_back_even_if_the_clock_does() -> None:
    world = World(100 * MIB)
    world.open("a", A)
    world.want("a", A, 0, 1)
    world.create_done(world.creations[0])
    world.now -= 50
    world.fetch_done(world.fetches[0], OriginUnavailable("away"))
    deadline_s = world.machine.next_deadline_s()
    assert deadline_s is not None and deadline_s > 100.0


def test_a_prefetch_that_is_needed_at_once_brings_no_more_than_what_is_needed() -> None:
    """Under a full shuffle every batch touches another block of everything: whole megabytes would be waited for."""
    world = World(10_000 * MIB)
    world.open("a", LONG)
    world.announce("a", "s", [Visit(LONG.content_id, block, block + 2) for block in (100, 40, 200, 41, 42, 43)])
    world.create_done(world.creations[0])
    assert [(f.first, f.end) for f in world.fetches[:3]] == [(100, 102), (40, 42), (200, 202)]


def test_a_prefetch_far_ahead_brings_its_neighbours_if_somebody_will_read_them() -> None:
    world = World(10_000 * MIB, max_in_flight=2, demand_reserve=0)
    world.open("a", LONG)
    near = [Visit(LONG.content_id, 255, 256)] * 1200
    world.announce("a", "s", [*near, *(Visit(LONG.content_id, block, block + 1) for block in (37, *range(33, 47)))])
    world.create_done(world.creations[0])
    assert [(f.first, f.end) for f in world.fetches] == [(255, 256), (33, 47)], "not 32 and 47: nobody announced them"


def test_a_miss_without_a_known_order_brings_what_lies_beside_it_afterwards() -> None:
    world = World(10_000 * MIB)
    world.open("a", LONG)
    world.want("a", LONG, 20, 21)
    world.create_done(world.creations[0])
    assert [(f.first, f.end, f.is_demand) for f in world.fetches] == [(20, 21, True), (16, 20, False), (21, 32, False)]


def test_blocks_that_failed_together_are_tried_again_together() -> None:
    world = World(10_000 * MIB)
    world.open("a", LONG)
    world.want("a", LONG, 0, 16)
    world.create_done(world.creations[0])
    world.fetch_done(world.fetches[0], OriginUnavailable("away"))
    deadline_s = world.machine.next_deadline_s()
    assert deadline_s is not None
    world.pass_time(deadline_s - world.now)
    assert [(f.first, f.end) for f in world.fetches] == [(0, 16)]


def test_what_is_needed_late_does_not_overtake_what_waits_for_its_file() -> None:
    """Files are made one after the other: the first would have all requests, and the first batch wait behind what is read last."""
    world = World(10_000 * MIB, max_in_flight=4, demand_reserve=0)
    for object_id in (LONG, B):
        world.open("a", object_id)
    first, late = Visit(LONG.content_id, 0, 1), Visit(LONG.content_id, 200, 201)
    world.announce("a", "s", [first, Visit(B.content_id, 0, 1), *[first] * 100, late])
    world.create_done(world.creations[0])
    assert [(f.object_id, f.first) for f in world.fetches] == [(LONG, 0)]
    world.create_done(world.creations[0])
    assert [(f.object_id, f.first) for f in world.fetches] == [(LONG, 0), (B, 0), (LONG, 200)]
