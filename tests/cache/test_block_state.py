"""The life of a block: what the table allows happens, everything else changes nothing."""

from __future__ import annotations

import itertools

import pytest

from cache.residency.blockstate import TRANSITIONS, BlockMove, BlockState, IllegalBlockMove, moved

S, M = BlockState, BlockMove
EVERYTHING = list(itertools.product(BlockState, BlockMove))


@pytest.mark.parametrize(("state", "move"), [pair for pair in EVERYTHING if pair not in TRANSITIONS])
def test_an_illegal_move_is_an_error_that_names_block_state_and_move(state: BlockState, move: BlockMove) -> None:
    before = dict(TRANSITIONS)
    with pytest.raises(IllegalBlockMove) as caught:
        moved(state, move, ("object", 3))
    assert "('object', 3)" in str(caught.value) and state.value in str(caught.value) and move.value in str(caught.value)
    assert before == TRANSITIONS


def test_a_block_becomes_readable_only_by_landing_or_by_being_found_sound() -> None:
    """Never a wrong byte: no other way leads from unreadable to readable."""
    ways = {move for (state, move), after in TRANSITIONS.items() if after.is_readable and not state.is_readable}
    assert ways == {M.LANDED, M.SOUND}
    assert {s for s, m in TRANSITIONS if m is M.SOUND and not s.is_readable} == {S.VERIFYING}


def test_what_was_found_on_disk_is_verified_before_it_is_read() -> None:
    after_found = moved(S.ABSENT, M.FOUND, "b")
    assert not after_found.is_readable
    assert {after for (state, _), after in TRANSITIONS.items() if state is after_found} == {S.VERIFYING, S.ABSENT}


def test_a_block_in_a_workers_hands_is_never_evicted() -> None:
    evictable = {state for state, move in TRANSITIONS if move is M.EVICT}
    assert not any(state.is_busy for state in evictable)


def test_every_state_leads_back_to_absent() -> None:
    """Whatever happens to a block, its place on the disk can come free."""
    leads_back = {S.ABSENT}
    for _ in BlockState:
        leads_back |= {state for (state, _), after in TRANSITIONS.items() if after in leads_back}
    assert leads_back == set(BlockState)
