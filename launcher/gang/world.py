"""Which node has which ranks.

Ranks are contiguous per node, in node order: node 0 has 0 … n-1, node 1 the next. Nodes may have different numbers of ranks. A node that
survives into the next attempt keeps its place, so its ranks keep their numbers (and their checkpoint shards, and their place in the ring).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class NodeInfo:
    """A node that takes part, as the cluster describes it."""

    node_id: str
    """Unique and stable within the job; opaque."""
    hostname: str
    """What people call it; may repeat (several nodes on one machine)."""
    addr: str
    """Address at which other nodes reach it: MASTER_ADDR if it becomes node rank 0."""
    num_ranks: int
    """How many ranks it takes."""
    labels: tuple[tuple[str, str], ...] = ()
    """What the cluster says of where it stands (region, rack, NVLink domain), by the cluster's names."""


@dataclass(frozen=True)
class Member:
    """One rank's place."""

    rank: int
    local_rank: int
    node_rank: int
    node: NodeInfo


@dataclass(frozen=True)
class World:
    """The nodes of an attempt in order of node rank.

    >>> world = World((NodeInfo("a", "hosta", "10.0.0.1", 2), NodeInfo("b", "hostb", "10.0.0.2", 3)))
    >>> world.world_size, [member.rank for member in world.members_of("b")], world.member(3).local_rank
    (5, [2, 3, 4], 1)
    """

    nodes: tuple[NodeInfo, ...]

    @property
    def world_size(self) -> int:
        return len(self.members)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Indexed by rank."""
        first_ranks = [0, *accumulate(node.num_ranks for node in self.nodes)]
        return tuple(
            Member(first + local_rank, local_rank, node_rank, node)
            for node_rank, (first, node) in enumerate(zip(first_ranks, self.nodes, strict=False))
            for local_rank in range(node.num_ranks)
        )

    def member(self, rank: int) -> Member:
        return self.members[rank]

    def members_of(self, node_id: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.node.node_id == node_id)

    def node_ids(self) -> tuple[str, ...]:
        return tuple(node.node_id for node in self.nodes)


def arrange(available: Sequence[NodeInfo], previous: World | None = None) -> World:
    """The world over `available`: who was there before keeps its node rank, newcomers take the places that were left, in the order given.

    When there are fewer nodes than before, the rest close ranks in their old order.

    >>> a, b, c, d = (NodeInfo(x, x, x, 1) for x in "abcd")
    >>> arrange([d, c, a], previous=World((a, b, c))).node_ids()
    ('a', 'd', 'c')
    """
    by_id = {node.node_id: node for node in available}
    old_ids = previous.node_ids() if previous else ()
    newcomers = [node for node in available if node.node_id not in old_ids]
    places = [by_id.get(node_id) for node_id in old_ids]
    filled = [node if node is not None else (newcomers.pop(0) if newcomers else None) for node in places]
    return World(tuple(node for node in [*filled, *newcomers] if node is not None))
