"""The far future of a job, computed: it must agree with the order that its readers follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blocks import EXTENT_BYTES, ExtentId, ObjectId
from cache.daemon import wire
from cache.order.batches import Cursor
from cache.order.lookahead import Lookahead, Visit
from cache.order.outline import Part, Table, spans
from cache.order.prospect import Outline, Prospect
from cache.order.schedule import Schedule, parse_shuffle


def table_of(sizes: list[int], sample_bytes: int = 1000) -> Table:
    objects = tuple(ObjectId(f"s3://data/{i}", '"1"', max(1, n * sample_bytes)) for i, n in enumerate(sizes))
    return Table(
        objects, tuple(Part(i, 0, o.size_bytes, n) for i, (o, n) in enumerate(zip(objects, sizes, strict=True)))
    )


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=12),
    shuffle=st.sampled_from(["full", "sequential", "windowed:1", "windowed:3"]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    world_size=st.sampled_from([1, 2]),
)
def test_every_sample_is_used_within_the_span_of_its_extent(
    sizes: list[int], shuffle: str, seed: int, epoch: int, world_size: int
) -> None:
    """An extent that is thought to be behind its last use would be evicted while it is read."""
    table = table_of(sizes)
    schedule = Schedule(table.part_sizes, 2, seed, parse_shuffle(shuffle))
    found = spans(table, schedule, epoch, ranks=[0], world_size=world_size)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    batches = schedule.batches(Cursor(epoch, 0), rank=0, world_size=world_size)
    used = set()
    for place, samples in batches:
        if place.epoch != epoch:
            break
        for shard in shard_of[samples].tolist():
            used.add(shard)
            assert found.first[shard] < place.step + 1 and found.last[shard] > place.step - 0.5
    if world_size == 1:
        assert {row for row in range(len(sizes)) if math.isfinite(found.first[row])} >= used


def test_where_samples_are_objects_a_full_shuffle_is_known_to_the_step() -> None:
    table = table_of([1] * 40)
    schedule = Schedule(table.part_sizes, 4, 7, parse_shuffle("full"))
    for epoch in range(2):
        found = spans(table, schedule, epoch, ranks=[0], world_size=1)
        for place, samples in schedule.batches(Cursor(epoch, 0)):
            if place.epoch != epoch:
                break
            assert (found.first[samples] == place.step).all() and (found.last[samples] == place.step + 1).all()


def test_a_large_object_read_as_stored_is_used_extent_by_extent() -> None:
    table = Table((ObjectId("s3://data/0", '"1"', 4 * EXTENT_BYTES),), (Part(0, 0, 4 * EXTENT_BYTES, 400),))
    found = spans(table, Schedule((400,), 10, 0, parse_shuffle("sequential")), 0, ranks=[0], world_size=1)
    assert found.first.tolist() == [0, 10, 20, 30]


def test_the_next_use_of_what_is_read_lies_in_the_next_epoch_from_where_nothing_is_announced_any_more() -> None:
    table = table_of([2] * 8)
    schedule = Schedule(table.part_sizes, 2, 3, parse_shuffle("windowed:1"))
    lookahead = Lookahead()
    prospect = Prospect(lookahead)
    order = [
        int(sample) // 2
        for epoch in range(2)
        for step in range(8)
        for sample in schedule.global_batch(Cursor(epoch, step))
    ]
    lookahead.announce("rank0", [Visit(table.objects[shard].content_id, 0, 1) for shard in order[:4]])
    prospect.outline("rank0", Outline(table, schedule, 0, 1, first_step=0, first_visit=0, visits_per_step=2.0))
    for group, epoch in prospect.wanted_epochs("rank0"):
        prospect.computed(group.number, epoch, spans(table, schedule, epoch, ranks=group.ranks, world_size=1))
    for shard in range(8):
        expected = next(place for place in range(4, len(order)) if order[place] == shard)
        assert prospect.next_use(ExtentId(table.objects[shard].content_id, 0)) == expected
    assert list(prospect.wanted_epochs("rank0")) == [], "each is asked for once"
    prospect.close("rank0")
    assert prospect.groups == []


def test_an_outline_comes_over_the_wire_as_it_was_told() -> None:
    objects, parts = [("s3://b/0", '"e"', 10)], [(0, 0, 10, 3)]
    assert wire.unpack_outlined(wire.pack_outlined(objects, parts)) == (objects, parts)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"objects": [], "parts": []}',
        b'{"objects": [["u", "e", 5]], "parts": [[1, 0, 5, 1]]}',
        b'{"objects": [["u", "e", 5]], "parts": [[0, 0, 6, 1]]}',
        b'{"objects": [["u", "e", 5]], "parts": [[0, 0, 5, -1]]}',
        b'{"objects": [["u", "e"]], "parts": [[0, 0, 5, 1]]}',
    ],
)
def test_an_outline_that_does_not_hold_together_is_refused(body: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.unpack_outlined(body)
