"""What an owner remembers of the others' requests: nothing, once it has answered them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cache.blocks import BLOCK_BYTES, ExtentId, ObjectId
from cache.daemon.control import Control
from cache.daemon.lending import Lending
from cache.errors import AccessDenied, CacheError
from cache.residency import messages as m
from cache.residency.budget import INDEX_BYTES_PER_EXTENT
from cache.residency.machine import Residency
from cache.store.format import LABEL_BYTES
from tests.models.residency_world import World

FILE_BYTES = LABEL_BYTES + BLOCK_BYTES + INDEX_BYTES_PER_EXTENT
ROOM = 3


class Node:
    """Stands in for the control process, over the real machine in the model of its world; its disk and origin work at once."""

    def __init__(self) -> None:
        self.world = World(ROOM * FILE_BYTES)
        self.lending = Lending(cast(Control, self), "node", on_loopback=True)
        self.directory = self
        self.error: CacheError | None = None
        """What the origin answers."""
        self._nonces = itertools.count()

    @property
    def residency(self) -> Residency:
        return self.world.machine

    def extent_path(self, extent: ExtentId, generation: int) -> Path:
        return Path(f"{extent.content_id}.{generation}")

    def tell(self, event: m.Event) -> None:
        match event:
            case m.ObjectOpened(client_id, object_id):
                self.world.open(client_id, object_id)
            case m.ExtentHeld(client_id, extent, generation):
                self.world.hold((extent, generation), client_id)
            case m.ClientGone(client_id):
                self.world.leave(client_id)
            case _:
                raise AssertionError(event)

    async def want(
        self,
        client_id: str,
        content_id: str,
        first: int,
        end: int,
        hand_over: Callable[[m.Answer], dict[str, Any]],
        *,
        for_peer: bool,
    ) -> dict[str, Any]:
        world = self.world
        request_id = world.want(client_id, world.objects[content_id], first, end)
        try:
            self.disk_says_what_is_gone()
            while world.creations:
                world.create_done(world.creations[0])
            while world.fetches:
                world.fetch_done(world.fetches[0], self.error)
            answer = world.answers[request_id]
            if answer.error is not None:
                raise answer.error
            return hand_over(answer)
        finally:
            world.settle(request_id)

    def lend(self, object_id: ObjectId, worker_pid: int = 1) -> int:
        """The loan's number."""
        request = {"op": "lend", "url": object_id.url, "etag": object_id.etag, "size_bytes": object_id.size_bytes}
        request |= {"first": 0, "end": 1, "nonce": f"n{next(self._nonces)}", "expires_s": 4e9}
        return int(asyncio.run(self.lending.answer(worker_pid, request))["hold"])

    def lent(self, loan: int) -> None:
        asyncio.run(self.lending.answer(1, {"op": "lent", "hold": loan}))
        self.disk_says_what_is_gone()

    def disk_says_what_is_gone(self) -> None:
        while self.world.looks:
            self.world.unknown_readers_let_go(self.world.looks[0])


def an_object(number: int) -> ObjectId:
    return ObjectId(f"s3://b/{number}", '"1"', BLOCK_BYTES)


def test_an_owner_forgets_what_it_lent_once_that_has_left_its_disk() -> None:
    """A node of a cluster is asked for objects for months, most of which its own jobs never open. (It remembered every one of them.)"""
    node = Node()
    for number in range(100):
        node.lent(node.lend(an_object(number)))
        assert node.residency.num_objects <= ROOM + 1
    assert node.residency.num_extents == ROOM and node.residency.budget.held_bytes == 0


def test_one_loan_ends_without_the_others_of_the_same_file() -> None:
    node, one = Node(), an_object(1)
    first, second = node.lend(one), node.lend(one)
    node.lent(first)
    node.lent(first)
    node.world.evict(one)
    assert node.residency.budget.held_bytes == FILE_BYTES, "the second is still being sent"
    node.lent(second)
    assert (node.residency.budget.used_bytes, node.residency.num_objects) == (0, 0)


def test_what_could_not_be_lent_is_forgotten_too() -> None:
    node = Node()
    node.error = AccessDenied("no")
    with pytest.raises(AccessDenied):
        node.lend(an_object(1))
    node.world.run_until_quiet()
    node.world.evict(an_object(1))
    assert node.residency.num_objects == 0


def test_what_is_evicted_before_the_worker_opens_it_is_sent_all_the_same(tmp_path: Path) -> None:
    """A node whose disk is full evicts all the time. (Its peers were refused, and read the origin: the most frequent reason by far.)"""
    node, file = Node(), tmp_path / "extent"
    file.write_bytes(b"what was lent")
    node.extent_path = lambda extent, generation: file  # type: ignore[method-assign]
    request = {"op": "lend", "url": "s3://b/1", "etag": '"1"', "size_bytes": BLOCK_BYTES, "first": 0, "end": 1}
    lent = asyncio.run(node.lending.answer(1, {**request, "nonce": "n", "expires_s": 4e9}))
    node.world.evict(an_object(1))
    file.unlink()
    assert Path(lent["path"]).read_bytes() == b"what was lent"
    node.lent(lent["hold"])
    assert not Path(lent["path"]).exists(), "and its space is given back"


def test_what_a_dead_worker_was_sending_is_let_go_of() -> None:
    node, one = Node(), an_object(1)
    node.lend(one, worker_pid=7)
    node.lending.worker_gone(8)
    node.world.evict(one)
    assert node.residency.budget.held_bytes == FILE_BYTES
    node.lending.worker_gone(7)
    node.disk_says_what_is_gone()
    assert (node.residency.budget.used_bytes, node.residency.num_objects) == (0, 0)
