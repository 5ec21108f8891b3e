"""Which node has which ranks, before and after nodes come and go."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import journal, messages, spec
from launcher.gang import events, masking, world
from launcher.gang.world import NodeInfo, World, arrange
from launcher.node import lines

names = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


def nodes(letters: list[str]) -> list[NodeInfo]:
    return [NodeInfo(letter, letter, letter, 1 + ord(letter) % 3) for letter in letters]


@given(names)
def test_ranks_are_contiguous_per_node_and_cover_the_world(letters: list[str]) -> None:
    made = arrange(nodes(letters))
    assert [member.rank for member in made.members] == list(range(made.world_size))
    for node_rank, info in enumerate(made.nodes):
        members = made.members_of(info.node_id)
        assert [member.local_rank for member in members] == list(range(info.num_ranks))
        assert {member.node_rank for member in members} == {node_rank}
        ranks = [member.rank for member in members]
        assert ranks == list(range(ranks[0], ranks[0] + info.num_ranks))


@given(names, names)
def test_survivors_keep_their_node_rank_when_the_gang_is_as_large_as_before(
    before: list[str], after: list[str]
) -> None:
    """Their checkpoint shards and their place in the ring stay where they are."""
    old = arrange(nodes(before))
    new = arrange(nodes(after), old)
    assert sorted(new.node_ids()) == sorted(after)
    survivors = [letter for letter in before if letter in after]
    if len(after) >= len(before):
        assert all(new.node_ids().index(s) == old.node_ids().index(s) for s in survivors)
    assert [n for n in new.node_ids() if n in survivors] == survivors, "survivors changed their order"


def test_no_nodes_make_an_empty_world() -> None:
    assert arrange([]) == World(())


@pytest.mark.parametrize("module", [events, journal, lines, masking, messages, spec, world])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0
