"""The queue of blocks that readers wait for: an ordered set, looked at extent by extent."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.blocks import BLOCKS_PER_EXTENT, EXTENT_BYTES, ObjectId, extent_of
from cache.residency import pump
from cache.residency.demand import Demand
from cache.residency.waiting import BlockKey
from tests.models.residency_world import World

KEYS = st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1, 2, BLOCKS_PER_EXTENT, BLOCKS_PER_EXTENT + 1]))
MOVES = st.lists(st.tuples(st.sampled_from(["add", "add_first", "discard"]), KEYS), max_size=40)


@given(MOVES)
def test_it_is_a_set_whose_extents_keep_the_order_of_their_first_block(moves: list[tuple[str, BlockKey]]) -> None:
    demand = Demand()
    model: list[list[BlockKey]] = []  # of each extent, in order
    for move, key in moves:
        mine = next((blocks for blocks in model if _place(blocks[0]) == _place(key)), None)
        was_there = mine is not None and key in mine
        if move == "discard":
            assert demand.discard(key) == was_there
            if mine is not None and was_there:
                mine.remove(key)
        else:
            getattr(demand, move)(key)
            if mine is None:
                model.append(mine := [])
            if move == "add_first":
                model.remove(mine)
                model.insert(0, mine)
                if was_there:
                    mine.remove(key)
                mine.insert(0, key)
            elif not was_there:
                mine.append(key)
        model = [blocks for blocks in model if blocks]
        assert [demand.of(extent) for extent in demand.extents()] == model
        assert list(demand) == [key for blocks in model for key in blocks]
        assert len(demand) == sum(map(len, model))
        assert (key in demand) == any(key in blocks for blocks in model)


def _place(key: BlockKey) -> tuple[str, int]:
    return key[0], extent_of(key[1])


def test_a_long_queue_is_not_looked_through_block_by_block_at_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preload waits for thousands of blocks; looking at each of them whenever one lands took most of the control process's time."""
    looked: Counter[str] = Counter()
    has_room = pump._has_room

    def counted(*args: object, **named: object) -> bool:
        looked["blocks"] += 1
        return has_room(*args, **named)  # type: ignore[arg-type]

    world = World(16 * EXTENT_BYTES)
    objects = [ObjectId(f"s3://b/{idx}", '"1"', EXTENT_BYTES) for idx in range(8)]
    for object_id in objects:
        world.open("preload", object_id)
        world.want("preload", object_id, 0, BLOCKS_PER_EXTENT)
    while world.creations:
        world.create_done(world.creations[0])
    monkeypatch.setattr(pump, "_has_room", counted)
    world.fetch_done(world.fetches[0])
    assert 0 < looked["blocks"] < 10 * len(objects)
