"""Capacity, and what evicted files that readers hold open take of it."""

from __future__ import annotations

from collections import Counter

import pytest

from cache.blocks import ExtentId
from cache.residency.budget import STALE_HOLD_S, UNKNOWN_READERS, Budget, Floor

X, Y = ExtentId("x", 0), ExtentId("y", 0)


def test_an_evicted_file_counts_until_its_last_reader_lets_go_and_the_disk_says_that_it_is_gone() -> None:
    budget = Budget(100, 10)
    budget.take(60)
    budget.haunt(X, 1, 60, Counter({"a": 2, "b": 1, UNKNOWN_READERS: 1}), now=5.0)
    assert (budget.free_bytes, budget.held_bytes, budget.num_files) == (40, 60, 1)
    assert not budget.let_go(X, 1, "a") and not budget.let_go(X, 1, "b")
    assert budget.free_bytes == 40
    assert budget.let_go(X, 1, "a"), "now the disk can be asked"
    assert not budget.let_go(X, 1, "a"), "and need not be twice"
    assert budget.free_bytes == 40
    assert not budget.let_go(X, 1, UNKNOWN_READERS)
    assert (budget.free_bytes, budget.held_bytes, budget.num_files) == (100, 0, 0)


def test_of_a_dead_reader_the_disk_is_asked_however_often_it_was_given_the_file() -> None:
    """Its socket is closed before the kernel has closed its files, and a child of it may live on with them."""
    budget = Budget(100, 10)
    for extent, holders in ((X, Counter({"dead": 3})), (Y, Counter({"dead": 1, "alive": 1}))):
        budget.take(30)
        budget.haunt(extent, 1, 30, holders + Counter({UNKNOWN_READERS: 1}), now=0.0)
    assert budget.forget_client("dead") == [(X, 1)] and budget.held_bytes == 60
    budget.let_go(X, 1, UNKNOWN_READERS)
    assert budget.held_bytes == 30 and list(budget.ghosts) == [(Y, 1)]
    budget.let_go(Y, 1, UNKNOWN_READERS)
    assert budget.held_bytes == 30, "the other one lives, and has it"
    assert budget.forget_client("alive") == [], "the disk has spoken already"
    assert budget.used_bytes == budget.num_files == 0


def test_letting_go_of_what_is_not_held_changes_nothing() -> None:
    """Messages may come twice, late, or from a reader that was never given the file."""
    budget = Budget(100, 10)
    budget.take(60)
    budget.haunt(X, 1, 60, Counter({"a": 1}), now=0.0)
    assert not budget.let_go(X, 2, "a") and not budget.let_go(Y, 1, "a") and not budget.let_go(X, 1, "stranger")
    assert budget.used_bytes == 60 and budget.ghosts[X, 1].holders == Counter({"a": 1})
    budget.let_go(X, 1, "a")
    budget.let_go(X, 1, "a")
    assert budget.used_bytes == 0


@pytest.mark.parametrize(("size", "max_files"), [(101, 10), (1, 0)])
def test_no_more_than_the_bound_can_be_taken(size: int, max_files: int) -> None:
    with pytest.raises(AssertionError):
        Budget(100, max_files).take(size)


def test_what_was_found_on_disk_counts_even_beyond_the_bound() -> None:
    """A capacity that was made smaller between two starts: the files are there all the same."""
    budget = Budget(100, 1)
    budget.adopt(80)
    assert not budget.is_exceeded
    budget.adopt(80)
    assert budget.free_bytes == -60 and budget.is_exceeded


def test_only_readers_at_work_are_expected_to_let_go_soon() -> None:
    budget = Budget(100, 10)
    for extent, since_s in ((X, 0.0), (Y, 1.5)):
        budget.take(30)
        budget.haunt(extent, 1, 30, Counter({"a": 1}), now=since_s)
    assert budget.expected_back(1.9) == (60, 2)
    assert budget.expected_back(STALE_HOLD_S) == (30, 1)
    assert budget.expected_back(9.0) == (0, 0)


def test_the_other_users_of_the_disk_keep_their_floor() -> None:
    """Bound = what we have + what is free − the floor: our own growth changes nothing in it, the others' growth does."""
    budget = Budget(1000, 100, keep_free=Floor(keep_bytes=200, keep_files=3))
    budget.take(400)
    budget.keep_free.seen(budget.used_bytes, 500, budget.num_files, 50)
    assert (budget.bound_bytes, budget.bound_files) == (700, 48)
    budget.take(300)
    assert budget.free_bytes == 0 and not budget.is_exceeded
    budget.keep_free.seen(budget.used_bytes, 100, budget.num_files, 1)
    assert budget.bound_bytes == 600 and budget.is_exceeded, "others took 100 of the floor: we give them back"
    assert budget.bound_files == 0
    budget.keep_free.seen(budget.used_bytes, 10**9, budget.num_files, None)
    assert (budget.bound_bytes, budget.bound_files) == (1000, 100), (
        "the capacity stays the bound; inodes are not counted here"
    )


def test_without_a_floor_the_capacity_alone_is_the_bound() -> None:
    budget = Budget(1000, 100)
    budget.keep_free.seen(0, 0, 0, 0)
    assert (budget.bound_bytes, budget.bound_files) == (1000, 100)
