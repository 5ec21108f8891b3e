"""What the gang's machine carries from state to state: the rules, the world, who is held in reserve and who is about to leave.

A *spare* is a node that is held, with its agent up, and has no ranks: it is used when another is lost, or when the world may grow.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import EXIT_RESUMABLE
from launcher.gang import policy
from launcher.gang.events import (
    Action,
    Announce,
    Fact,
    Failure,
    LetGo,
    NodeDraining,
    NodeFailed,
    NodeJoined,
    NodeLost,
    RankExited,
    RankHung,
)
from launcher.gang.sayings import in_time
from launcher.gang.world import NodeInfo, World, arrange
from launcher.spec import DEFAULT_GROW_DELAY_S, RestartBudget, SecondSignal

DRAIN_MARGIN_S = 5.0
"""Ranks are killed so long before a draining node's deadline: their end must be known before the node is gone."""


class StopCause(enum.Enum):
    """Why everything is told to stop."""

    SUCCESS = "every rank ended with 0"
    FAILURE = "something failed"
    SIGNAL = "a signal was sent to the launcher"
    PREEMPTION = "nodes were told to leave"
    GROWTH = "nodes have joined"

    def means_saved(self, exited: RankExited) -> bool:
        """Whether this end of a rank, while all are stopped, says that it has saved its state and is not done. A 0 does when the job is to
        go on elsewhere and the rank was told so: its own handler has saved. (After a signal to the launcher it says nothing: that is
        128 + n, as of any program.)"""
        if exited.status.is_success:
            return exited.was_told and self in (StopCause.PREEMPTION, StopCause.GROWTH)
        return exited.status.code == EXIT_RESUMABLE and self is not StopCause.FAILURE


@dataclass(frozen=True)
class Rules:
    """What of the JobSpec the machine needs."""

    restarts: RestartBudget
    grace_s: float
    min_nodes: int = 1
    max_nodes: int = 1
    grow_delay_s: float = DEFAULT_GROW_DELAY_S
    second_signal: SecondSignal = SecondSignal.KILL


@dataclass(frozen=True)
class History:
    """What is carried from state to state."""

    rules: Rules
    attempt: int = 0
    world: World | None = None
    spares: tuple[NodeInfo, ...] = ()
    """Held beside the world, in the order in which they came."""
    draining: frozenset[str] = frozenset()
    """Held nodes that were told to leave; no later attempt runs on them."""
    attempt_began_s: float = 0.0
    num_restarts: int = 0
    """Spent of --max-restarts."""
    num_preemptions: int = 0
    """Spent of --max-preemptions."""
    num_stuck: int = 0
    """Attempts in a row that failed without progress."""
    steps_before: int | None = None
    """Optimizer steps of the last attempt that failed; None: none were seen."""
    has_stepped: bool = False
    """Some attempt was seen to make steps."""
    last_root: Failure | None = None
    is_saved: bool = False
    """The last attempt ended because its ranks had saved their state, and nothing has run since."""
    story: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Nodes in the world."""
        return len(self.world.nodes) if self.world else 0

    def has(self, node_id: str) -> bool:
        """Whether the node has ranks in this world."""
        return self.world is not None and self.world.has(node_id)

    def usable(self, lost: frozenset[str]) -> tuple[NodeInfo, ...]:
        """Held nodes on which the next attempt may run: survivors first, in their order, then spares."""
        held = (*(self.world.nodes if self.world else ()), *self.spares)
        return tuple(node for node in held if node.node_id not in lost and node.node_id not in self.draining)

    def when_to_grow(self, now: float) -> float | None:
        return now + self.rules.grow_delay_s if self.can_grow() else None

    def num_gone_with(self, failure: Failure, good: int) -> int:
        """Ranks that ran and have gone with it, or hold up the others. good: those that had ended well before, as bits."""
        if isinstance(failure, NodeLost) and self.world is not None:
            return sum(not good >> member.rank & 1 for member in self.world.members_of(failure.node_id))
        return (
            1 if isinstance(failure, RankExited) or (isinstance(failure, RankHung) and failure.rank is not None) else 0
        )

    def can_grow(self) -> bool:
        """Whether a spare could have ranks that the world has no place for now."""
        fresh = [node for node in self.spares if node.node_id not in self.draining]
        return bool(fresh) and 0 < self.size < self.rules.max_nodes


def note_failure(history: History, failures: Sequence[Failure], root: Failure, now: float) -> History:
    """What a failed attempt, over now, leaves in the books."""
    steps = max((failure.steps or 0 for failure in failures if isinstance(failure, RankExited)), default=0) or None
    has_stepped = history.has_stepped or steps is not None
    lived_s = now - history.attempt_began_s
    got_on = policy.made_progress(lived_s, root, steps, history.steps_before, has_stepped=has_stepped)
    num_stuck = 0 if got_on else history.num_stuck + 1
    return replace(history, num_stuck=num_stuck, steps_before=steps, has_stepped=has_stepped, last_root=root)


def unfit(before: History, root: Failure, lost: frozenset[str]) -> tuple[frozenset[str], Sequence[Action]]:
    """Nodes that the next attempt must do without, and what is done about those that are new among them: a node whose agent could not do
    its part (the store's port, a rank's process) twice in a row, where there are enough others. `before`: the books before this failure."""
    last = before.last_root
    if not isinstance(root, NodeFailed) or not isinstance(last, NodeFailed) or last.node_id != root.node_id:
        return lost, ()
    without = lost | {root.node_id}
    if root.node_id in lost or len(before.usable(without)) < before.rules.min_nodes:
        return lost, ()
    told = Announce(f"node {_host(before, root.node_id)} could not do its part twice in a row: going on without it")
    return without, (told, LetGo(root.node_id))


def seat(history: History, nodes: Sequence[NodeInfo], joined: Sequence[NodeInfo] = ()) -> History:
    """A world over these nodes, at most `max_nodes` of them; the others, and those that have joined, are spares. Survivors keep their
    places."""
    world = arrange(nodes, history.world, history.rules.max_nodes)
    here = {node.node_id: node for node in (*nodes, *joined)}
    spares = tuple(node for node_id, node in here.items() if not world.has(node_id))
    return replace(history, world=world, spares=spares, draining=history.draining & here.keys())


def note_who_is_held(history: History, event: Fact) -> tuple[History, Sequence[Action], bool]:
    """What an event means for who is held, whatever the machine's state: the books, what is said of it, and whether that is all (it
    concerns no rank). A node that was lost never comes back under the same id."""
    match event:
        case NodeJoined(node=node):
            if _host(history, node.node_id):
                return history, (), True
            after = replace(history, spares=(*history.spares, node))
            return after, (Announce(_told_of_joining(history, node)),), False
        case NodeDraining(node_id=node_id, reason=reason):
            host = _host(history, node_id)
            if not host or node_id in history.draining:
                return history, (), True
            after = replace(history, draining=history.draining | {node_id})
            told = Announce(f"node {host} is to leave: {reason}{in_time(event)}")
            return after, (told,), not history.has(node_id)
        case NodeLost(node_id=node_id, reason=reason) if not history.has(node_id):
            host = _host(history, node_id)
            spares = tuple(spare for spare in history.spares if spare.node_id != node_id)
            after = replace(history, spares=spares, draining=history.draining - {node_id})
            return after, (Announce(f"spare node {host} lost: {reason}"),) if host else (), True
    return history, (), False


def _host(history: History, node_id: str) -> str:
    """What people call a held node; empty if it is not held."""
    node = history.world.node(node_id) if history.world else None
    if node is not None:
        return node.hostname
    return next((spare.hostname for spare in history.spares if spare.node_id == node_id), "")


def _told_of_joining(history: History, node: NodeInfo) -> str:
    if history.size >= history.rules.max_nodes:
        return f"spare node {node.hostname} is ready"
    after = f"unless others join, the gang starts again with it in {history.rules.grow_delay_s:g} s"
    return f"node {node.hostname} has joined; {after}"


def drain_grace_s(event: NodeDraining, grace_s: float) -> float:
    """How long ranks may take to save: all that the node has left but a margin, or the usual grace where nobody says when it goes.

    >>> drain_grace_s(NodeDraining("n", "spot", 120.0, 0.0), 30.0), drain_grace_s(NodeDraining("n", "", None, 0.0), 30.0)
    (115.0, 30.0)
    """
    if event.deadline_in_s is None:
        return grace_s
    return max(event.deadline_in_s / 2, event.deadline_in_s - DRAIN_MARGIN_S)
