"""The gang's machine against a world that does whatever hypothesis likes: nodes die, ranks fail, signals come, news is late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import EXIT_CRASH_LOOP, EXIT_NODE_LOST, EXIT_REFUSED, EXIT_RESUMABLE, InvalidTransition
from launcher.exclusion import Cause
from launcher.gang import machine
from launcher.gang.events import (
    AcquireNodes,
    Action,
    Announce,
    AttemptEnded,
    AttemptPlan,
    BlameNode,
    ExceptionRecord,
    ExitStatus,
    Fact,
    Finish,
    LetGo,
    NodeDraining,
    NodeFailed,
    NodeJoined,
    NodeLost,
    NodesReady,
    OpenStore,
    PlacementRefused,
    RankExited,
    RanksStarted,
    ReportCollateral,
    ReportFailure,
    StartRanks,
    StopAttempt,
    StopRequested,
    StoreAddress,
    StoreOpened,
    Tick,
)
from launcher.gang.history import Rules
from launcher.gang.machine import BackingOff, Ended, OpeningStore, Placing, Running, State, Stopping
from launcher.gang.world import NodeInfo, World
from launcher.spec import RestartBudget, SecondSignal

SIGTERM, SIGKILL, SIGINT, SIGUSR1 = 15, 9, 2, 10


def node(name: str, num_ranks: int = 2) -> NodeInfo:
    return NodeInfo(name, f"host-{name}", f"10.0.0.{name}", num_ranks)


def rank_exited(plan: AttemptPlan, rank: int, status: ExitStatus, at_s: float = 0.0, **more: object) -> RankExited:
    member = plan.world.member(rank)
    return RankExited(plan.attempt, member.node.node_id, rank, member.local_rank, 1, status, at_s, **more)  # type: ignore[arg-type]


@dataclass
class Outside:
    """The world outside as the machine's promises see it: what runs where, what it was told, what it may say next."""

    draw: Callable[[st.SearchStrategy], object]
    min_nodes: int
    num_nodes: int
    num_ranks: int
    state: State
    now: float = 0.0
    num_made: int = 0
    held: dict[str, NodeInfo] = field(default_factory=dict)
    asked_for_nodes: bool = False
    asked_for_store: tuple[int, str] | None = None
    alive: dict[str, set[int]] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    """Attempt that each node has not ended."""
    told_to_stop: dict[str, int] = field(default_factory=dict)
    plan: AttemptPlan | None = None
    good_ranks: set[int] = field(default_factory=set)
    old_facts: list[Fact] = field(default_factory=list)
    latest: Fact | None = None
    was_cut_short: bool = False
    """A signal came or a node was lost before every rank had ended with 0."""

    def perform(self, actions: object) -> None:
        for action in actions:  # type: ignore[attr-defined]
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case AcquireNodes(keep=keep):
                assert not self.running, "nodes are asked for while an attempt is alive"
                self.held = {node_id: info for node_id, info in self.held.items() if node_id in keep}
                self.asked_for_nodes = True
            case OpenStore(attempt=attempt, node_id=node_id):
                assert not self.running, "an attempt begins while another is alive"
                assert node_id in self.held
                self.asked_for_store = (attempt, node_id)
                world = self.state.history.world
                assert world is not None
                assert set(world.node_ids()) <= set(self.held), "a node that is not held has ranks"
                assert self.min_nodes <= len(world.nodes) <= self.num_nodes
                self.running = dict.fromkeys(world.node_ids(), attempt)
                self.told_to_stop, self.good_ranks, self.was_cut_short = {}, set(), False
            case StartRanks(plan=plan):
                assert set(plan.world.node_ids()) == set(self.running), "a partial gang is started"
                assert set(self.running.values()) == {plan.attempt}, "two attempts are alive"
                assert not any(self.alive.values())
                self.plan = plan
                self.alive = {n: {m.rank for m in plan.world.members_of(n)} for n in plan.world.node_ids()}
            case StopAttempt(attempt=attempt, node_id=node_id, grace_s=grace_s, signum=signum):
                if grace_s > 0:
                    assert node_id not in self.told_to_stop, "a rank is sent a second signal that is not SIGKILL"
                    heard = self.latest.signum if isinstance(self.latest, StopRequested) else SIGTERM
                    assert signum == heard, "ranks are not sent what the launcher was sent"
                else:
                    assert signum == SIGKILL
                self.told_to_stop[node_id] = attempt
            case Finish(exit_code=exit_code):
                assert not self.running, "the job ends while an attempt is alive"
                if exit_code == 0:
                    assert self.all_good, "0 is said although not every rank ended with 0"
                else:
                    assert self.was_cut_short or not self.all_good, "every rank ended with 0, and it is not said"

    @property
    def all_good(self) -> bool:
        return self.plan is not None and len(self.good_ranks) == self.plan.world.world_size

    def feed(self, fact: Fact) -> None:
        self.now += 0.01
        self.old_facts.append(fact)
        self.latest = fact
        if isinstance(fact, StopRequested | NodeLost | NodeDraining) and not self.all_good:
            self.was_cut_short = True
        self.state, actions = machine.step(self.state, fact, self.now)
        self.perform(actions)

    def possible(self) -> list[Callable[[], Fact]]:
        """What may happen now; the ordinary more often, or no attempt would ever get far."""
        found: list[Callable[[], Fact]] = [self.stop_requested, Tick]
        if self.old_facts:
            found.append(lambda: self._stale())
        if self.asked_for_nodes:
            found += [self.nodes_ready] * 8 + [lambda: PlacementRefused("no room")]
        if self.asked_for_store and self.asked_for_store[1] in self.running:
            found += [self.store_opened] * 6 + [self.store_failed]
        if any(self.alive.values()):
            found += [self.rank_exits_well] * 4 + [self.rank_exits_badly] * 3
        if any(node_id in self.told_to_stop and not self.alive.get(node_id) for node_id in self.running):
            found += [self.attempt_ended] * 6
        if self.held and not self.asked_for_nodes:
            found += [self.node_lost] * 2 + [self.node_draining]
        if not self.asked_for_nodes and len(self.held) <= self.num_nodes:
            found += [self.node_joined] * 2
        return found

    def _stale(self) -> Fact:
        fact = self.draw(st.sampled_from(self.old_facts))
        attempt = getattr(fact, "attempt", None)
        if attempt is None or attempt >= self.state.history.attempt:
            return Tick()
        return fact  # type: ignore[return-value]

    def stop_requested(self) -> Fact:
        return StopRequested(self.draw(st.sampled_from([SIGINT, SIGTERM, SIGUSR1])))  # type: ignore[arg-type]

    def nodes_ready(self) -> Fact:
        while len(self.held) < self.num_nodes:
            self.num_made += 1
            self.held[f"n{self.num_made}"] = node(f"n{self.num_made}", self.num_ranks)
        self.asked_for_nodes = False
        return NodesReady(tuple(self.held.values()))

    def node_joined(self) -> Fact:
        self.num_made += 1
        info = self.held[f"n{self.num_made}"] = node(f"n{self.num_made}", self.num_ranks)
        return NodeJoined(info)

    def node_draining(self) -> Fact:
        node_id = self.draw(st.sampled_from(sorted(self.held)))
        return NodeDraining(node_id, "spot", self.draw(st.sampled_from([None, 1.0, 120.0])), self.now)  # type: ignore[arg-type]

    def store_opened(self) -> Fact:
        assert self.asked_for_store
        attempt, node_id = self.asked_for_store
        self.asked_for_store = None
        return StoreOpened(attempt, node_id, StoreAddress("10.0.0.1", 1234))

    def store_failed(self) -> Fact:
        assert self.asked_for_store
        attempt, node_id = self.asked_for_store
        self.asked_for_store = None
        return NodeFailed(attempt, node_id, "port taken", self.now)

    def _pick_alive(self) -> tuple[str, int]:
        node_id = self.draw(st.sampled_from(sorted(n for n, ranks in self.alive.items() if ranks)))
        rank = self.draw(st.sampled_from(sorted(self.alive[node_id])))  # type: ignore[index]
        self.alive[node_id].discard(rank)  # type: ignore[index, arg-type]
        return node_id, rank  # type: ignore[return-value]

    def rank_exits_well(self) -> Fact:
        """By itself, or because it was told to save and go: then its 0 does not say that the job is done."""
        node_id, rank = self._pick_alive()
        assert self.plan
        was_told = node_id in self.told_to_stop and bool(self.draw(st.booleans()))
        if not was_told:
            self.good_ranks.add(rank)
        return rank_exited(self.plan, rank, ExitStatus(code=0), self.now, was_told=was_told)

    def rank_exits_badly(self) -> Fact:
        _, rank = self._pick_alive()
        statuses = [
            ExitStatus(code=1),
            ExitStatus(code=EXIT_RESUMABLE),
            ExitStatus(code=255),
            ExitStatus(signum=9),
            ExitStatus(signum=15),
        ]
        status = self.draw(st.sampled_from(statuses))
        assert self.plan
        return rank_exited(self.plan, rank, status, self.now - self.draw(st.floats(0, 1)))  # type: ignore[arg-type, operator]

    def attempt_ended(self) -> Fact:
        ready = [n for n in self.running if n in self.told_to_stop and not self.alive.get(n)]
        node_id = self.draw(st.sampled_from(sorted(ready)))
        attempt = self.running.pop(node_id)  # type: ignore[call-overload]
        if self.asked_for_store and self.asked_for_store[1] == node_id:
            self.asked_for_store = None
        return AttemptEnded(attempt, node_id)  # type: ignore[arg-type]

    def node_lost(self) -> Fact:
        node_id = self.draw(st.sampled_from(sorted(self.held)))
        del self.held[node_id]  # type: ignore[arg-type]
        self.running.pop(node_id, None)  # type: ignore[call-overload]
        self.alive.pop(node_id, None)  # type: ignore[call-overload]
        return NodeLost(node_id, "gone", self.now)  # type: ignore[arg-type]

    def settle(self) -> None:
        """From now on everybody answers and nothing goes wrong any more, except that ranks that run forever are asked to stop."""
        for _ in range(200):
            if isinstance(self.state, Ended):
                return
            self.now = max(self.now, machine.deadline_s(self.state) or 0.0)
            if self.asked_for_nodes:
                self.feed(self.nodes_ready())
            elif self.asked_for_store and self.asked_for_store[1] in self.running:
                self.feed(self.store_opened())
            elif any(self.alive.values()):
                self.feed(self.rank_exits_well())
            elif any(n in self.told_to_stop and not self.alive.get(n) for n in self.running):
                self.feed(self.attempt_ended())
            else:
                self.feed(Tick())
        raise AssertionError(f"no end in sight: {self.state}")


@given(st.data(), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(0, 3), st.integers(0, 60))
@settings(max_examples=400, deadline=None)
def test_whatever_happens_no_partial_gang_no_two_attempts_and_a_true_end(
    data: st.DataObject, min_nodes: int, num_more: int, num_ranks: int, max_restarts: int, num_steps: int
) -> None:
    """Checked at every action by Outside: a gang is whole, alone, and 0 is said if and only if every rank ended with 0."""
    num_nodes = min_nodes + num_more
    rules = Rules(RestartBudget(max_restarts), 5.0, min_nodes, num_nodes, grow_delay_s=0.03)
    state, actions = machine.begin(rules)
    outside = Outside(data.draw, min_nodes, num_nodes, num_ranks, state)
    outside.perform(actions)
    for _ in range(num_steps):
        if isinstance(outside.state, Ended):
            break
        outside.feed(data.draw(st.sampled_from(outside.possible()))())
    outside.settle()
    assert isinstance(outside.state, Ended)
    assert outside.state.history.num_restarts <= max_restarts


class Scene:
    """A machine of two nodes with two ranks each, moved by hand."""

    def __init__(
        self,
        max_restarts: int = 0,
        grace_s: float = 30.0,
        min_nodes: int = 2,
        max_nodes: int = 2,
        second_signal: SecondSignal = SecondSignal.KILL,
        **budget: int,
    ) -> None:
        self.now = 100.0
        restarts = RestartBudget(max_restarts, **budget)
        rules = Rules(restarts, grace_s, min_nodes, max_nodes, second_signal=second_signal)
        self.state, self.actions = machine.begin(rules)

    def feed(self, *facts: Fact) -> list[Action]:
        for fact in facts:
            self.state, self.actions = machine.step(self.state, fact, self.now)
        return list(self.actions)

    def run(self, attempt: int = 0) -> AttemptPlan:
        if isinstance(self.state, Placing):
            self.feed(NodesReady((node("0"), node("1"))))
        actions = self.feed(StoreOpened(attempt, "0", StoreAddress("10.0.0.0", 1000 + attempt)))
        plan = next(action.plan for action in actions if isinstance(action, StartRanks))
        self.feed(RanksStarted(attempt, "0", (1, 2), 0.0), RanksStarted(attempt, "1", (3, 4), 0.0))
        return plan

    def nodes(self) -> tuple[str, ...]:
        world = self.state.history.world
        assert world is not None
        return world.node_ids()

    def said(self) -> str:
        return "; ".join(action.text for action in self.actions if isinstance(action, Announce))

    def end_attempt(self, attempt: int = 0) -> list[Action]:
        return self.feed(AttemptEnded(attempt, "0"), AttemptEnded(attempt, "1"))

    def only(self, kind: type) -> object:
        found = [action for action in self.actions if isinstance(action, kind)]
        assert len(found) == 1, self.actions
        return found[0]


def test_success_of_all_ranks_ends_with_zero() -> None:
    scene = Scene()
    plan = scene.run()
    for rank in range(4):
        assert isinstance(scene.state, Running)
        scene.feed(rank_exited(plan, rank, ExitStatus(code=0)))
    assert [a.grace_s for a in scene.actions if isinstance(a, StopAttempt)] == [0.0, 0.0]
    assert scene.end_attempt() == [Finish(0, "every rank ended with 0")]


@pytest.mark.parametrize(("status", "exit_code"), [(ExitStatus(code=3), 3), (ExitStatus(signum=11), 139)])
def test_the_exit_code_is_that_of_the_rank_that_failed(status: ExitStatus, exit_code: int) -> None:
    scene = Scene()
    plan = scene.run()
    actions = scene.feed(rank_exited(plan, 2, status))
    assert isinstance(actions[0], ReportFailure), "the failure is told before anything else"
    stops = [action for action in actions if isinstance(action, StopAttempt)]
    assert stops == [StopAttempt(0, "0", 30.0, SIGTERM), StopAttempt(0, "1", 30.0, SIGTERM)]
    scene.feed(rank_exited(plan, 0, ExitStatus(signum=SIGTERM)), rank_exited(plan, 1, ExitStatus(code=77)))
    scene.end_attempt()
    assert scene.only(Finish).exit_code == exit_code  # type: ignore[attr-defined]


def test_the_root_cause_is_the_earliest_exception_not_the_first_to_be_told() -> None:
    """Rank 0 dies of "connection closed by peer" while rank 3, which closed it, is still writing its traceback."""
    scene = Scene()
    plan = scene.run()
    peer_lost = ExceptionRecord("RuntimeError", "Connection closed by peer", "…", at_s=50.002)
    cause = ExceptionRecord("ValueError", "it broke", "…", at_s=50.000)
    scene.feed(rank_exited(plan, 0, ExitStatus(code=1), at_s=50.01, exception=peer_lost))
    scene.feed(rank_exited(plan, 3, ExitStatus(code=4), at_s=50.02, exception=cause))
    scene.end_attempt()
    report = scene.only(ReportCollateral)
    assert (report.root.rank, report.is_new_root) == (3, True)  # type: ignore[attr-defined]
    assert [failure.rank for failure in report.collateral] == [0]  # type: ignore[attr-defined]
    assert scene.only(Finish).exit_code == 4  # type: ignore[attr-defined]


LOST_PEER = ExceptionRecord("RuntimeError", "[/w/gloo/pair.cc:1] Connection closed by peer", "…", at_s=50.0)


def test_the_loss_of_a_peer_is_held_back_until_what_the_peer_died_of_is_known() -> None:
    """gloo's complaint is quicker than the news of the crash, and must not be the first line on the terminal."""
    scene = Scene()
    plan = scene.run()
    actions = scene.feed(rank_exited(plan, 0, ExitStatus(code=1), at_s=50.0, exception=LOST_PEER))
    assert not any(isinstance(action, ReportFailure) for action in actions)
    assert any(isinstance(action, StopAttempt) for action in actions), "the others are stopped at once all the same"
    scene.feed(rank_exited(plan, 2, ExitStatus(signum=SIGTERM), at_s=50.1))
    (report,) = scene.feed(rank_exited(plan, 3, ExitStatus(signum=11), at_s=50.2))
    assert isinstance(report, ReportFailure)
    assert report.failure.rank == 3  # type: ignore[union-attr]
    scene.end_attempt()
    collateral = scene.only(ReportCollateral)
    assert (collateral.root.rank, collateral.is_new_root) == (3, False)  # type: ignore[attr-defined]
    assert scene.only(Finish).exit_code == 139  # type: ignore[attr-defined]


def test_the_loss_of_a_peer_is_told_after_a_second_if_nothing_else_comes() -> None:
    scene = Scene()
    plan = scene.run()
    scene.feed(rank_exited(plan, 3, ExitStatus(code=0)))
    scene.feed(rank_exited(plan, 0, ExitStatus(code=1), at_s=50.0, exception=LOST_PEER))
    due_s = machine.deadline_s(scene.state)
    assert due_s == scene.now + machine.REPORT_PATIENCE_S
    scene.now = due_s
    (report,) = scene.feed(Tick())
    assert isinstance(report, ReportFailure)
    assert report.failure.cause == "rank 3 had ended with exit code 0 before that"  # type: ignore[union-attr]
    assert machine.deadline_s(scene.state) > due_s + 1  # type: ignore[operator]


def test_the_loss_of_a_peer_is_told_at_once_when_nothing_else_can_come() -> None:
    scene = Scene()
    plan = scene.run()
    scene.feed(rank_exited(plan, 0, ExitStatus(code=1), at_s=50.0, exception=LOST_PEER))
    scene.end_attempt()
    assert scene.only(ReportFailure).failure.rank == 0  # type: ignore[attr-defined]


def test_a_rank_that_we_stopped_is_never_the_root_cause_even_if_its_clock_is_behind() -> None:
    scene = Scene()
    plan = scene.run()
    scene.feed(rank_exited(plan, 0, ExitStatus(code=5), at_s=50.0))
    scene.feed(rank_exited(plan, 2, ExitStatus(signum=SIGTERM), at_s=10.0))
    scene.end_attempt()
    assert scene.only(Finish).exit_code == 5  # type: ignore[attr-defined]


def test_a_restart_waits_for_every_node_and_starts_a_fresh_store_for_all_ranks() -> None:
    scene = Scene(max_restarts=1)
    plan = scene.run()
    scene.feed(rank_exited(plan, 1, ExitStatus(code=1)))
    scene.feed(AttemptEnded(0, "0"))
    assert isinstance(scene.state, Stopping), "node 1 may still have ranks"
    scene.feed(AttemptEnded(0, "1"))
    assert scene.only(OpenStore) == OpenStore(1, "0")
    again = scene.run(attempt=1)
    assert (again.attempt, again.world) == (1, plan.world)
    assert again.store != plan.store


def test_ranks_fail_until_the_budget_is_spent() -> None:
    scene = Scene(max_restarts=2)
    for attempt in range(3):
        scene.now += 100
        plan = scene.run(attempt)
        scene.now += 100
        scene.feed(rank_exited(plan, 0, ExitStatus(code=9)))
        scene.end_attempt(attempt)
    assert scene.only(Finish) == Finish(9, "no restart left: --max-restarts 2 are spent")


def test_attempts_that_fail_at_once_wait_longer_and_longer() -> None:
    scene = Scene(max_restarts=10)
    delays = []
    for attempt in range(4):
        plan = scene.run(attempt)
        scene.feed(rank_exited(plan, 0, ExitStatus(code=1)))
        scene.end_attempt(attempt)
        if isinstance(scene.state, BackingOff):
            delays.append(scene.state.deadline_s - scene.now)
            assert scene.feed(Tick()) == [], "a tick before the time does nothing"
            scene.now = scene.state.deadline_s
            scene.feed(Tick())
        assert isinstance(scene.state, OpeningStore)
    assert delays == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(("signum", "exit_code"), [(SIGINT, 130), (SIGTERM, 143), (SIGUSR1, 138)])
def test_an_interrupt_is_handed_on_with_grace_and_a_second_one_kills(signum: int, exit_code: int) -> None:
    """As under torchrun, so that Ctrl-C is a KeyboardInterrupt in the script."""
    scene = Scene(max_restarts=3)
    plan = scene.run()
    stops = [action for action in scene.feed(StopRequested(signum)) if isinstance(action, StopAttempt)]
    assert stops == [StopAttempt(0, "0", 30.0, signum, True), StopAttempt(0, "1", 30.0, signum, True)]
    stops = [action for action in scene.feed(StopRequested(SIGTERM)) if isinstance(action, StopAttempt)]
    assert stops == [StopAttempt(0, "0", 0.0, SIGKILL), StopAttempt(0, "1", 0.0, SIGKILL)]
    for rank in range(4):
        scene.feed(rank_exited(plan, rank, ExitStatus(signum=SIGKILL)))
    scene.end_attempt()
    assert scene.only(Finish).exit_code == exit_code  # type: ignore[attr-defined]


def test_sigterm_is_143_even_if_every_rank_then_ends_with_zero() -> None:
    """Training that was cut short and saved its checkpoint is not training that is done."""
    scene = Scene()
    plan = scene.run()
    scene.feed(StopRequested(SIGTERM))
    for rank in range(4):
        scene.feed(rank_exited(plan, rank, ExitStatus(code=0)))
    scene.end_attempt()
    assert scene.only(Finish).exit_code == 143  # type: ignore[attr-defined]


def test_a_signal_while_a_failure_is_being_cleaned_up_means_no_restart() -> None:
    scene = Scene(max_restarts=5)
    plan = scene.run()
    scene.feed(rank_exited(plan, 1, ExitStatus(code=6)), StopRequested(SIGTERM))
    scene.end_attempt()
    assert scene.only(Finish) == Finish(6, "no restart: SIGTERM was sent to the launcher")


def test_a_lost_node_is_replaced_and_the_survivor_keeps_its_ranks() -> None:
    scene = Scene(max_restarts=1)
    scene.run()
    scene.feed(NodeLost("0", "gone", 1.0))
    scene.feed(AttemptEnded(0, "1"))
    assert scene.only(AcquireNodes) == AcquireNodes(keep=("1",))
    scene.feed(NodesReady((node("1"), node("2"))))
    world = scene.state.history.world
    assert world is not None
    assert world.node_ids() == ("2", "1"), "node 1 was node rank 1 and still is"


def test_a_spare_takes_the_lost_nodes_place_at_once_and_at_no_cost() -> None:
    """Nobody is asked for nodes: the spare is held, its agent up. That is what it was reserved for, so it costs no restart."""
    scene = Scene(max_restarts=0)
    scene.feed(NodesReady((node("0"), node("1"), node("2"))))
    assert scene.nodes() == ("0", "1"), "no more than --nnodes have ranks"
    scene.run()
    scene.feed(NodeLost("0", "gone", 1.0), AttemptEnded(0, "1"))
    assert scene.nodes() == ("2", "1"), "the survivor keeps its place, and so its ranks"
    assert scene.only(OpenStore) == OpenStore(1, "2"), "also where the node of rank 0 and its store were lost"
    assert scene.state.history.num_restarts == 0


def test_a_gang_that_may_be_smaller_goes_on_at_once_and_grows_later_at_no_cost() -> None:
    scene = Scene(max_restarts=1, min_nodes=1)
    scene.run()
    scene.feed(NodeLost("0", "gone", 1.0), AttemptEnded(0, "1"))
    assert scene.nodes() == ("1",)
    assert "1 nodes instead of 2" in scene.said()
    scene.feed(StoreOpened(1, "1", StoreAddress("10.0.0.1", 1)), RanksStarted(1, "1", (1, 2), 0.0))
    scene.feed(NodeJoined(node("2")))
    scene.now += 20
    assert scene.feed(Tick()) == [], "others may come as well"
    scene.now = machine.deadline_s(scene.state) or 0.0
    stops = [action for action in scene.feed(Tick()) if isinstance(action, StopAttempt)]
    assert stops == [StopAttempt(1, "1", 30.0, SIGTERM, can_save=True)]
    scene.feed(AttemptEnded(1, "1"))
    assert scene.nodes() == ("1", "2")
    assert (scene.state.history.num_restarts, scene.state.history.num_stuck) == (1, 0), "the loss, not the join"


def test_a_failure_is_the_moment_to_take_in_who_has_joined() -> None:
    scene = Scene(max_restarts=1, min_nodes=1)
    scene.feed(NodesReady((node("0"),)))
    scene.feed(StoreOpened(0, "0", StoreAddress("10.0.0.0", 1)), NodeJoined(node("1")))
    plan = AttemptPlan(0, World((node("0"),)), StoreAddress("10.0.0.0", 1))
    scene.feed(rank_exited(plan, 1, ExitStatus(code=1)), AttemptEnded(0, "0"))
    assert scene.nodes() == ("0", "1")


def test_a_node_that_joins_a_full_gang_is_a_spare_and_its_loss_stops_nobody() -> None:
    scene = Scene()
    scene.run()
    scene.feed(NodeJoined(node("2")))
    assert scene.said() == "spare node host-2 is ready"
    assert machine.deadline_s(scene.state) is None
    assert [type(action) for action in scene.feed(NodeLost("2", "gone", 1.0))] == [Announce]
    assert isinstance(scene.state, Running)


def test_a_spare_that_comes_while_the_gang_is_measured_is_not_forgotten() -> None:
    """A preflight holds NodesReady back, and names only the nodes that it has measured."""
    scene = Scene()
    scene.feed(NodeJoined(node("2")), NodeJoined(node("3")), NodeLost("3", "gone", 1.0))
    scene.feed(NodesReady((node("0"), node("1"))))
    assert [spare.node_id for spare in scene.state.history.spares] == ["2"]


def preempted(scene: Scene, code: int) -> list[Action]:
    """Node 0 is drained while the gang runs, and all four ranks end with this code."""
    plan = scene.run()
    actions = scene.feed(NodeDraining("0", "spot notice", 120.0, 1.0))
    stops = [action for action in actions if isinstance(action, StopAttempt)]
    assert stops == [StopAttempt(0, node_id, 115.0, SIGTERM, can_save=True) for node_id in ("0", "1")]
    for rank in range(4):
        scene.feed(rank_exited(plan, rank, ExitStatus(code=code)))
    return scene.end_attempt()


def test_a_preempted_node_is_left_after_all_have_saved_and_spends_no_restart() -> None:
    scene = Scene(max_restarts=0)
    scene.feed(NodesReady((node("0"), node("1"), node("2"))))
    preempted(scene, EXIT_RESUMABLE)
    assert "all 4 ranks have saved" in scene.said()
    assert scene.nodes() == ("2", "1")
    assert (scene.state.history.num_restarts, scene.state.history.num_preemptions) == (0, 1)
    assert not [action for action in scene.feed(NodeLost("0", "as announced", 2.0)) if isinstance(action, BlameNode)]


@pytest.mark.parametrize("was_told", [True, False])
def test_ranks_that_end_with_zero_on_being_told_to_leave_are_not_done(was_told: bool) -> None:
    """A handler that saves and exits with 0 would else make a job that was half done look finished, on any drained node. Ranks that
    ended by themselves meanwhile, or that use launcher.preemption and say 79 when they have saved, are done."""
    scene = Scene()
    plan = scene.run()
    scene.feed(NodeDraining("0", "spot notice", 120.0, 1.0))
    for rank in range(4):
        scene.feed(rank_exited(plan, rank, ExitStatus(code=0), was_told=was_told))
    scene.end_attempt()
    if not was_told:
        assert scene.only(Finish).exit_code == 0  # type: ignore[attr-defined]
        return
    assert scene.only(AcquireNodes) == AcquireNodes(keep=("1",))
    scene.feed(PlacementRefused("no nodes"))
    assert scene.only(Finish).exit_code == EXIT_RESUMABLE, "so that whoever ran the command runs it again"  # type: ignore[attr-defined]


def test_growth_does_not_end_a_job_whose_ranks_save_and_end_with_zero() -> None:
    scene = Scene(min_nodes=1)
    scene.feed(NodesReady((node("0"),)))
    scene.feed(StoreOpened(0, "0", StoreAddress("10.0.0.0", 1)), NodeJoined(node("1")))
    scene.now = machine.deadline_s(scene.state) or 0.0
    scene.feed(Tick())
    plan = AttemptPlan(0, World((node("0"),)), StoreAddress("10.0.0.0", 1))
    scene.feed(*(rank_exited(plan, rank, ExitStatus(code=0), was_told=True) for rank in range(2)))
    scene.feed(AttemptEnded(0, "0"))
    assert scene.nodes() == ("0", "1")


def test_without_a_spare_a_preempted_gang_waits_for_a_node_and_ends_resumable_if_none_comes() -> None:
    scene = Scene()
    preempted(scene, EXIT_RESUMABLE)
    assert scene.only(AcquireNodes) == AcquireNodes(keep=("1",))
    scene.feed(PlacementRefused("no nodes"))
    assert scene.only(Finish).exit_code == EXIT_RESUMABLE  # type: ignore[attr-defined]


def test_preemptions_have_a_budget_of_their_own() -> None:
    scene = Scene(max_preemptions=0)
    preempted(scene, EXIT_RESUMABLE)
    assert scene.only(Finish).exit_code == EXIT_RESUMABLE  # type: ignore[attr-defined]


def test_a_rank_that_fails_while_it_saves_is_told_and_the_job_goes_on() -> None:
    scene = Scene()
    scene.feed(NodesReady((node("0"), node("1"), node("2"))))
    preempted(scene, 1)
    assert scene.only(ReportFailure).failure.status == ExitStatus(code=1)  # type: ignore[attr-defined]
    assert isinstance(scene.state, OpeningStore)


@pytest.mark.parametrize("rule", [SecondSignal.FORWARD, SecondSignal.IGNORE])
def test_what_a_second_signal_means_can_be_chosen(rule: SecondSignal) -> None:
    """Some schedulers send SIGUSR1 before SIGTERM, or SIGTERM again and again; a checkpoint that takes a minute must not die of it."""
    scene = Scene(second_signal=rule)
    scene.run()
    scene.feed(StopRequested(SIGUSR1))
    scene.now += 10.0
    sent = scene.feed(StopRequested(SIGTERM))
    stops = [action for action in sent if isinstance(action, StopAttempt)]
    if rule is SecondSignal.FORWARD:
        assert [(stop.signum, stop.grace_s, stop.can_save) for stop in stops] == [(SIGTERM, 20.0, True)] * 2
        assert "handed on to the ranks, which are killed in 20 s" in scene.said()
    else:
        assert stops == []
        assert "ignored" in scene.said()
    assert machine.deadline_s(scene.state) == 100.0 + 30.0 + machine.STOP_MARGIN_S, "the grace goes on from the first"
    scene.end_attempt()
    assert isinstance(scene.state, Ended)
    assert scene.state.exit_code == 128 + SIGUSR1


def test_a_signal_to_the_launcher_while_ranks_save_is_not_the_second_one() -> None:
    """A scheduler may drain the node and stop the launcher in the same breath; what is being saved shall be whole."""
    scene = Scene()
    plan = scene.run()
    scene.feed(NodeDraining("0", "spot notice", None, 1.0))
    assert not [action for action in scene.feed(StopRequested(SIGTERM)) if isinstance(action, StopAttempt)]
    for rank in range(4):
        scene.feed(rank_exited(plan, rank, ExitStatus(code=EXIT_RESUMABLE)))
    scene.end_attempt()
    assert scene.only(Finish).exit_code == EXIT_RESUMABLE  # type: ignore[attr-defined]


def test_a_crash_loop_ends_with_its_own_code_whatever_is_left_of_the_budget() -> None:
    scene = Scene(max_restarts=100, crash_loop=3)
    for attempt in range(3):
        plan = scene.run(attempt)
        scene.feed(rank_exited(plan, 0, ExitStatus(code=1)))
        scene.end_attempt(attempt)
        if isinstance(scene.state, BackingOff):
            scene.now = scene.state.deadline_s
            scene.feed(Tick())
    assert scene.only(Finish).exit_code == EXIT_CRASH_LOOP  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("steps", "lived_s", "is_loop"),
    [
        ([5, 9, 7, 4], 1.0, False),  # short attempts that go on from a checkpoint
        ([5, 5, 5, 5], 1.0, True),  # the same bad batch again and again
        ([5, None, None, None], 600.0, True),  # it has trained once, and since then it only loads
        ([None] * 4, 600.0, False),  # no optimizer that we can see
        ([7, 7, 7, 7], 600.0, False),  # ten minutes are worth a checkpoint
    ],
)
def test_a_crash_loop_is_judged_by_the_steps_made(steps: list[int | None], lived_s: float, is_loop: bool) -> None:
    """Failing soon is not failing for nothing, and living long is not getting on."""
    scene = Scene(max_restarts=100, crash_loop=3)
    for attempt, made in enumerate(steps):
        plan = scene.run(attempt)
        scene.now += lived_s
        scene.feed(rank_exited(plan, 0, ExitStatus(code=1), steps=made))
        scene.end_attempt(attempt)
        if isinstance(scene.state, BackingOff):
            scene.now = scene.state.deadline_s
            scene.feed(Tick())
    assert isinstance(scene.state, Ended) == is_loop


@pytest.mark.parametrize(
    ("last_lines", "cause"),
    [
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", Cause.HARDWARE),
        ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus", Cause.HARDWARE),
        ("CUDA error: device-side assert triggered", None),
        ("torch.OutOfMemoryError: CUDA out of memory", None),
        ("NVRM: Xid (PCI:0000:3b:00): 13, Graphics Exception", None),
    ],
)
def test_only_what_a_program_cannot_cause_is_blamed_on_the_node(last_lines: str, cause: Cause | None) -> None:
    """A node that is left out because of somebody's index error is an hour of a person's work."""
    scene = Scene(max_restarts=1)
    plan = scene.run()
    scene.feed(rank_exited(plan, 3, ExitStatus(code=1), last_lines=f"Traceback …\n{last_lines}"))
    blamed = [action for action in scene.end_attempt() if isinstance(action, BlameNode)]
    assert [(action.host, action.cause) for action in blamed] == ([("host-1", cause)] if cause else [])


def test_a_lost_node_is_blamed() -> None:
    scene = Scene(max_restarts=1)
    scene.run()
    scene.feed(NodeLost("1", "gone", 1.0), AttemptEnded(0, "0"))
    assert scene.only(BlameNode) == BlameNode("host-1", Cause.LOST, "gone")


def test_losing_a_node_without_a_restart_left_has_its_own_exit_code() -> None:
    scene = Scene()
    scene.run()
    scene.feed(NodeLost("1", "gone", 1.0), AttemptEnded(0, "0"))
    assert scene.only(Finish).exit_code == EXIT_NODE_LOST  # type: ignore[attr-defined]


def test_a_node_that_does_not_end_its_attempt_in_time_is_given_up() -> None:
    """Progress or an end: a hung machine must not hold the others for ever."""
    scene = Scene()
    plan = scene.run()
    scene.feed(rank_exited(plan, 0, ExitStatus(code=1)), AttemptEnded(0, "0"))
    deadline_s = machine.deadline_s(scene.state)
    assert deadline_s == scene.now + 30.0 + machine.STOP_MARGIN_S
    scene.now = deadline_s
    scene.feed(Tick())
    assert scene.only(LetGo) == LetGo("1"), "its ranks may be alive, and the next attempt's are elsewhere"
    assert scene.only(Finish).exit_code == 1  # type: ignore[attr-defined]
    assert "1" in [failure.node_id for failure in scene.only(ReportCollateral).collateral]  # type: ignore[attr-defined]


def test_a_node_that_cannot_do_its_part_twice_in_a_row_is_left_for_a_spare() -> None:
    """Else every restart of the budget is spent on it: a node whose port or disk is gone, whose address is wrong."""
    scene = Scene(max_restarts=5)
    scene.feed(NodesReady((node("0"), node("1"))), NodeJoined(node("2")))
    for attempt in range(2):
        scene.feed(NodeFailed(attempt, "0", "cannot listen", float(attempt)))
        scene.end_attempt(attempt)
    assert scene.only(LetGo) == LetGo("0")
    scene.now += 20.0
    scene.feed(Tick())
    assert scene.nodes() == ("2", "1"), "the survivor keeps its ranks"


def test_a_node_that_nobody_can_replace_is_tried_again() -> None:
    scene = Scene(max_restarts=5)
    scene.feed(NodesReady((node("0"), node("1"))))
    for attempt in range(2):
        scene.feed(NodeFailed(attempt, "0", "cannot listen", float(attempt)))
        assert not [action for action in scene.end_attempt(attempt) if isinstance(action, LetGo)]
        if isinstance(scene.state, BackingOff):
            scene.now += 20.0
            scene.feed(Tick())
    assert scene.nodes() == ("0", "1")


def test_a_store_that_cannot_be_opened_fails_the_attempt_before_any_rank_runs() -> None:
    scene = Scene()
    scene.feed(NodesReady((node("0"), node("1"))))
    scene.feed(NodeFailed(0, "0", "port 80 is taken", 1.0))
    report = scene.only(ReportFailure)
    assert report.consequence == "", "there is no rank to be stopped"  # type: ignore[attr-defined]
    scene.end_attempt()
    assert scene.only(Finish).exit_code == EXIT_NODE_LOST  # type: ignore[attr-defined]


def test_a_refused_placement_starts_nothing_and_has_its_own_exit_code() -> None:
    scene = Scene()
    assert scene.feed(PlacementRefused("4 GPUs asked, 2 there")) == [Finish(EXIT_REFUSED, "4 GPUs asked, 2 there")]


def test_late_news_of_an_older_attempt_changes_nothing() -> None:
    scene = Scene(max_restarts=1)
    plan = scene.run()
    scene.feed(rank_exited(plan, 0, ExitStatus(code=1)))
    scene.end_attempt()
    scene.run(attempt=1)
    before = scene.state
    assert scene.feed(rank_exited(plan, 3, ExitStatus(code=1))) == []
    assert scene.state == before


SOME_PLAN = AttemptPlan(0, World((node("0"), node("1"))), StoreAddress("10.0.0.0", 1))


@pytest.mark.parametrize(
    ("steps", "fact"),
    [
        (0, StoreOpened(0, "0", StoreAddress("h", 1))),
        (0, AttemptEnded(0, "0")),
        (1, rank_exited(SOME_PLAN, 0, ExitStatus(code=0))),
        (1, NodesReady((node("0"),))),
        (2, AttemptEnded(0, "0")),
        (2, StoreOpened(0, "0", StoreAddress("h", 1))),
        (2, PlacementRefused("late")),
        (2, rank_exited(AttemptPlan(7, SOME_PLAN.world, SOME_PLAN.store), 0, ExitStatus(code=0))),
    ],
)
def test_an_event_that_makes_no_sense_changes_nothing_and_tells_the_story(steps: int, fact: Fact) -> None:
    scene = Scene()
    path: list[Fact] = [NodesReady((node("0"), node("1"))), StoreOpened(0, "0", StoreAddress("10.0.0.0", 1))]
    scene.feed(*path[:steps])
    before = scene.state
    with pytest.raises(InvalidTransition) as caught:
        scene.feed(fact)
    assert scene.state == before
    assert type(fact).__name__ in caught.value.message
    for told in path[:steps]:
        assert type(told).__name__ in caught.value.message, "the story so far is missing"


def test_every_transition_of_the_table_names_states_that_exist_and_only_ended_is_final() -> None:
    final = [state for state, successors in machine.TRANSITIONS.items() if not successors]
    assert final == [Ended]
    assert {s for successors in machine.TRANSITIONS.values() for s in successors} <= set(machine.TRANSITIONS)


def test_the_picture_in_the_architecture_is_that_of_the_table() -> None:
    """Pictures that are drawn by hand are wrong after the second change."""
    document = (Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md").read_text()
    arrows = [
        f"    {a.__name__} --> {b}" for a, bs in machine.TRANSITIONS.items() for b in sorted(s.__name__ for s in bs)
    ]
    picture = "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> Placing", *arrows, "    Ended --> [*]", "```"])
    assert picture in document, f"put this into docs/ARCHITECTURE.md:\n{picture}"
