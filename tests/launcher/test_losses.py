"""Nodes that are lost at the worst moments: while they wait as spares, when they are put in place, several at once, during a recovery."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.gang import machine
from launcher.gang.events import (
    AcquireNodes,
    Action,
    AttemptEnded,
    Fact,
    Finish,
    NodeJoined,
    NodeLost,
    NodesReady,
    OpenStore,
    RanksStarted,
    StartRanks,
    StopAttempt,
    StoreAddress,
    StoreOpened,
    Tick,
)
from launcher.gang.history import Rules
from launcher.gang.machine import Ended, Running, State
from launcher.spec import RestartBudget
from tests.launcher.test_machine import Scene, node


def with_spares(*names: str) -> Scene:
    """Two nodes that train, and these spares; no failure may be paid for."""
    scene = Scene(max_restarts=0)
    scene.feed(NodesReady((node("0"), node("1"), *(node(name) for name in names))))
    scene.run()
    return scene


def lost(*names: str) -> list[NodeLost]:
    return [NodeLost(name, "gone", 1.0) for name in names]


def test_a_spare_that_has_died_while_it_waited_is_not_counted_on() -> None:
    """Neither as a place for ranks nor as a reason to call the loss free."""
    scene = with_spares("2")
    scene.feed(*lost("2", "0"), AttemptEnded(0, "1"))
    assert "spare" not in scene.said()
    assert scene.only(Finish).reason == "no restart: --max-restarts is 0"  # type: ignore[attr-defined]


def test_a_spare_that_dies_when_it_is_put_in_place_is_replaced_by_the_next() -> None:
    """The node of rank 0, which shall host the store: nothing of this attempt runs anywhere yet."""
    scene = with_spares("2", "3")
    scene.feed(*lost("0"), AttemptEnded(0, "1"))
    assert scene.only(OpenStore) == OpenStore(1, "2")
    scene.feed(*lost("2"), AttemptEnded(1, "1"))
    assert scene.nodes() == ("3", "1")
    assert scene.only(OpenStore) == OpenStore(2, "3")
    assert scene.state.history.num_restarts == 0


def test_two_nodes_that_are_lost_at_once_cost_one_recovery() -> None:
    """All nodes here: nobody is left who could say that the attempt has ended, so nobody is waited for."""
    scene = with_spares("2", "3")
    scene.feed(*lost("0", "1"))
    assert scene.nodes() == ("2", "3")
    assert (scene.state.history.attempt, scene.state.history.num_restarts) == (1, 0)


def test_a_spare_that_dies_during_the_recovery_that_needs_it_makes_it_wait_for_another() -> None:
    scene = Scene(max_restarts=1)
    scene.feed(NodesReady((node("0"), node("1"), node("2"))))
    scene.run()
    scene.feed(*lost("0", "2"), AttemptEnded(0, "1"))
    assert scene.only(AcquireNodes) == AcquireNodes(keep=("1",))


def test_a_machine_that_comes_back_while_its_loss_is_dealt_with_is_a_node_of_its_own() -> None:
    """The cluster numbers each stay of a machine (`id#2`): the one that was lost stays lost."""
    scene = with_spares()
    scene.feed(NodeLost("0", "link cut", 1.0), NodeJoined(node("0#2")), AttemptEnded(0, "1"))
    assert scene.nodes() == ("0#2", "1")
    assert [type(action) for action in scene.feed(NodeLost("0", "told again, late", 2.0))] == []
    assert scene.state.history.num_restarts == 0


@dataclass
class Losses:
    """A gang of which only nodes are lost and only nodes come; everybody else does as told."""

    size: int
    state: State
    now: float = 0.0
    held: list[str] = field(default_factory=list)
    num_made: int = 0
    running: set[str] = field(default_factory=set)
    has_asked_for_store: bool = False
    to_end: set[str] = field(default_factory=set)

    def feed(self, fact: Fact) -> None:
        self.now += 0.01
        self.state, actions = machine.step(self.state, fact, self.now)
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case OpenStore():
                world = self.state.history.world
                assert world is not None
                assert set(world.node_ids()) <= set(self.held), "a lost node has ranks"
                self.running, self.to_end, self.has_asked_for_store = set(world.node_ids()), set(), True
            case StartRanks():
                self.has_asked_for_store = False
            case StopAttempt():
                self.to_end = set(self.running)

    def come(self) -> None:
        self.num_made += 1
        self.held.append(f"n{self.num_made}")
        self.feed(NodeJoined(node(self.held[-1])))

    def lose(self, node_id: str) -> None:
        self.held.remove(node_id)
        self.running.discard(node_id)
        self.to_end.discard(node_id)
        self.feed(NodeLost(node_id, "gone", self.now))

    def go_on(self) -> None:
        """One answer of those that are owed."""
        attempt, world = self.state.history.attempt, self.state.history.world
        assert world is not None
        if self.to_end:
            ended = min(self.to_end)
            self.to_end.discard(ended)
            self.running.discard(ended)
            self.feed(AttemptEnded(attempt, ended))
        elif self.has_asked_for_store:
            self.feed(StoreOpened(attempt, world.nodes[0].node_id, StoreAddress("10.0.0.1", 1)))
            for started in world.nodes:
                self.feed(RanksStarted(attempt, started.node_id, (1, 2), 0.0))
        else:
            self.feed(Tick())


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=30))
@settings(max_examples=300, deadline=None)
def test_while_enough_nodes_are_held_no_loss_ends_a_job_or_is_paid_for(
    size: int, num_spares: int, story: list[int | None]
) -> None:
    """Whoever is lost, and in whatever moment: a spare, one just put in place, several one after the other, in the midst of a recovery.
    `story`: None is one answer, a number is who is lost (9: a node comes instead)."""
    state, _ = machine.begin(Rules(RestartBudget(0), 5.0, size, size))
    gang = Losses(size, state)
    gang.held = [f"n{idx}" for idx in range(size + num_spares)]
    gang.num_made = len(gang.held)
    gang.feed(NodesReady(tuple(node(name) for name in gang.held)))
    for what in story:
        if what is None:
            gang.go_on()
        elif what == 9:
            gang.come()
        elif len(gang.held) > size:
            gang.lose(gang.held[what % len(gang.held)])
        assert not isinstance(gang.state, Ended), gang.state
        assert gang.state.history.num_restarts == 0
    for _ in range(20):
        gang.go_on()
    assert isinstance(gang.state, Running)
    world = gang.state.history.world
    assert world is not None
    assert len(world.nodes) == size
    assert set(world.node_ids()) <= set(gang.held)
