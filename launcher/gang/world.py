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

    @cached_property
    def _first_ranks(self) -> tuple[int, ...]:
        return (0, *accumulate(node.num_ranks for node in self.nodes))

    @property
    def world_size(self) -> int:
        return self._first_ranks[-1]

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Indexed by rank."""
        return tuple(
            Member(first + local_rank, local_rank, node_rank, node)
            for node_rank, (first, node) in enumerate(zip(self._first_ranks, self.nodes, strict=False))
            for local_rank in range(node.num_ranks)
        )

    @cached_property
    def _node_ranks(self) -> dict[str, int]:
        return {node.node_id: node_rank for node_rank, node in enumerate(self.nodes)}

    def member(self, rank: int) -> Member:
        return self.members[rank]

    def has(self, node_id: str) -> bool:
        """Whether the node has ranks here."""
        return node_id in self._node_ranks

    def node(self, node_id: str) -> NodeInfo | None:
        """The node of this name, if it has ranks here."""
        return self.nodes[self._node_ranks[node_id]] if node_id in self._node_ranks else None

    def members_of(self, node_id: str) -> tuple[Member, ...]:
        """In order of local rank. No walk over the world: every node asks, and there may be a thousand of them."""
        node_rank = self._node_ranks.get(node_id)
        if node_rank is None:
            return ()
        first = self._first_ranks[node_rank]
        return self.members[first : first + self.nodes[node_rank].num_ranks]

    def node_ids(self) -> tuple[str, ...]:
        return tuple(node.node_id for node in self.nodes)


def arrange(available: Sequence[NodeInfo], previous: World | None = None, max_nodes: int | None = None) -> World:
    """The world over `available`, at most `max_nodes` of them: who was there before keeps its node rank, newcomers take the places that
    were left, in the order given.

    When there are fewer nodes than before, the rest close ranks in their old order.

    >>> a, b, c, d = (NodeInfo(x, x, x, 1) for x in "abcd")
    >>> arrange([d, c, a], previous=World((a, b, c))).node_ids()
    ('a', 'd', 'c')
    >>> arrange([a, b, c], max_nodes=2).node_ids()
    ('a', 'b')
    """
    by_id = {node.node_id: node for node in available}
    places = [by_id.get(node.node_id) for node in previous.nodes] if previous else []
    num_survivors = sum(node is not None for node in places)
    newcomers = [node for node in available if previous is None or not previous.has(node.node_id)]
    room = len(newcomers) if max_nodes is None else max(0, max_nodes - num_survivors)
    coming = iter(newcomers[:room])
    filled = [node if node is not None else next(coming, None) for node in places]
    return World(tuple(node for node in [*filled, *coming] if node is not None))
