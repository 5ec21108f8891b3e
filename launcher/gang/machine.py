"""The gang's life as a state machine: `step(state, event, now) -> (state, actions)`. Pure; the controller performs the actions.

What it guarantees, whatever happens outside (tests/launcher/test_machine.py tries):
- ranks are started on all nodes of a world in one step, or on none;
- no attempt starts before every node has said that nothing of the last one is alive, or is lost itself;
- it ends, and the exit code is 0 if and only if every rank of the last attempt ended with 0.

States hold what they need; TRANSITIONS says which may follow which. News of older attempts is ignored: it may always arrive late.
An event that makes no sense is an error that tells the story so far, and changes nothing.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import EXIT_REFUSED, InvalidTransition
from launcher.gang import policy
from launcher.gang.events import (
    AcquireNodes,
    Action,
    Announce,
    AttemptEnded,
    AttemptPlan,
    Fact,
    Failure,
    Finish,
    NodeFailed,
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
    StoreOpened,
    Tick,
)
from launcher.gang.world import World, arrange
from launcher.spec import RestartBudget

STOP_MARGIN_S = 10.0
"""A node that has not ended an attempt this long after the grace is treated as lost."""
_STORY_LENGTH = 60
_SIGTERM, _SIGKILL = int(signal.SIGTERM), int(signal.SIGKILL)  # plain numbers, like what handlers are given


@dataclass(frozen=True)
class Rules:
    """What of the JobSpec the machine needs."""

    restarts: RestartBudget
    grace_s: float


@dataclass(frozen=True)
class History:
    """What is carried from state to state."""

    rules: Rules
    attempt: int = 0
    world: World | None = None
    attempt_began_s: float = 0.0
    num_quick: int = 0
    """Attempts in a row that failed early."""
    last_root: Failure | None = None
    story: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placing:
    """Waiting for nodes."""

    history: History

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case NodesReady(nodes=nodes):
                world = arrange(nodes, self.history.world)
                return _open_store(replace(self.history, world=world), now)
            case PlacementRefused(reason=reason, advice=advice):
                root = self.history.last_root
                told = f"{reason}. {advice}" if advice else reason
                return _end(self.history, policy.exit_code_of(root) if root else EXIT_REFUSED, told)
            case StopRequested(signum=signum):
                decision = policy.after_interrupt(signum)
                return _end(self.history, decision.exit_code, decision.reason)
            case NodeLost() | Tick():
                return stay(self)
        raise _unexpected(self, event)


@dataclass(frozen=True)
class OpeningStore:
    """Waiting for the port of the attempt's store."""

    history: History

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case StoreOpened(address=address):
                plan = AttemptPlan(self.history.attempt, _world(self.history), address)
                return Running(self.history), (StartRanks(plan),)
            case NodeFailed() | NodeLost():
                return _stop_failed(self.history, event, now, num_others=0)
            case StopRequested(signum=signum):
                return _stop_interrupted(self.history, signum, now)
            case Tick():
                return stay(self)
        raise _unexpected(self, event)


@dataclass(frozen=True)
class Running:
    """Ranks run. `succeeded` have ended with 0."""

    history: History
    succeeded: frozenset[int] = frozenset()

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case RankExited(rank=rank, status=status) if status.is_success:
                succeeded = self.succeeded | {rank}
                if len(succeeded) == _world(self.history).world_size:
                    stopping = Stopping(self.history, StopCause.SUCCESS, now + STOP_MARGIN_S)
                    return stopping, _kill_actions(stopping)
                return replace(self, succeeded=succeeded), ()
            case RankExited() | NodeFailed() | NodeLost():
                num_running = _world(self.history).world_size - len(self.succeeded)
                num_others = num_running - 1 if isinstance(event, RankExited) else num_running
                return _stop_failed(self.history, event, now, num_others)
            case StopRequested(signum=signum):
                return _stop_interrupted(self.history, signum, now)
            case RanksStarted() | Tick():
                return stay(self)
        raise _unexpected(self, event)


class StopCause(enum.Enum):
    """Why everything is told to stop."""

    SUCCESS = "every rank ended with 0"
    FAILURE = "something failed"
    SIGNAL = "a signal was sent to the launcher"


@dataclass(frozen=True)
class Stopping:
    """Everything is told to stop; waiting until nothing of the attempt is alive anywhere."""

    history: History
    cause: StopCause
    deadline_s: float
    failures: tuple[Failure, ...] = ()
    interrupted_by: int | None = None
    ended: frozenset[str] = frozenset()
    """Nodes on which nothing of the attempt is alive."""
    lost: frozenset[str] = frozenset()

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case RankExited(status=status) if not status.is_success:
                return self._collect(event), ()
            case NodeFailed():
                return self._collect(event), ()
            case AttemptEnded(node_id=node_id):
                return _conclude_if_over(replace(self, ended=self.ended | {node_id}), now)
            case NodeLost(node_id=node_id):
                return _conclude_if_over(replace(self._collect(event), lost=self.lost | {node_id}), now)
            case StopRequested(signum=signum):
                interrupted_by = signum if self.interrupted_by is None else self.interrupted_by
                deadline_s = min(self.deadline_s, now + STOP_MARGIN_S)
                hurried = replace(self, interrupted_by=interrupted_by, deadline_s=deadline_s)
                return hurried, (Announce("killing what is left at once"), *_kill_actions(hurried))
            case Tick() if now >= self.deadline_s:
                return self._give_up_on_silent_nodes(now)
            case RankExited() | RanksStarted() | StoreOpened() | Tick():
                return stay(self)
        raise _unexpected(self, event)

    def _collect(self, failure: Failure) -> Stopping:
        """Collateral of a failure is told to the user. After a success or a signal, what goes wrong on the way out harms nobody."""
        return replace(self, failures=(*self.failures, failure)) if self.cause is StopCause.FAILURE else self

    def _give_up_on_silent_nodes(self, now: float) -> Move:
        silent = self.waiting_for()
        reason = f"has not ended attempt {self.history.attempt} {STOP_MARGIN_S:g} s after its ranks had to be dead"
        after = replace(self, lost=self.lost | frozenset(silent))
        for node_id in silent:
            # No time of its own: it is a consequence, never the root.
            after = after._collect(NodeLost(node_id, reason, float("inf")))
        return _conclude_if_over(after, now)

    def waiting_for(self) -> tuple[str, ...]:
        return tuple(node_id for node_id in _world(self.history).node_ids() if node_id not in self.ended | self.lost)


@dataclass(frozen=True)
class BackingOff:
    """Waiting before the next attempt. Nothing runs."""

    history: History
    deadline_s: float
    lost: frozenset[str] = frozenset()

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case Tick() if now >= self.deadline_s:
                return _begin_again(self.history, self.lost, now)
            case NodeLost(node_id=node_id):
                return replace(self, lost=self.lost | {node_id}), ()
            case StopRequested(signum=signum):
                decision = policy.after_interrupt(signum)
                return _end(self.history, decision.exit_code, decision.reason)
            case Tick():
                return stay(self)
        raise _unexpected(self, event)


@dataclass(frozen=True)
class Ended:
    """The job is over."""

    history: History
    exit_code: int
    reason: str

    def on(self, event: Fact, now: float) -> Move:
        return stay(self)


State = Placing | OpeningStore | Running | Stopping | BackingOff | Ended
Move = tuple[State, Sequence[Action]]

TRANSITIONS: dict[type[State], frozenset[type[State]]] = {
    Placing: frozenset({OpeningStore, Ended}),
    # Past Stopping: when all nodes are lost at once, nothing is left to stop.
    OpeningStore: frozenset({Running, Stopping, BackingOff, Placing, Ended}),
    Running: frozenset({Stopping, BackingOff, OpeningStore, Placing, Ended}),
    Stopping: frozenset({BackingOff, OpeningStore, Placing, Ended}),
    BackingOff: frozenset({OpeningStore, Placing, Ended}),
    Ended: frozenset(),
}
"""Who may follow whom, besides staying."""


def begin(rules: Rules) -> Move:
    """The first state and its actions."""
    return Placing(History(rules)), (AcquireNodes(),)


def step(state: State, event: Fact, now: float) -> Move:
    """The next state, and what shall be done. `now` is monotonic seconds. Raises InvalidTransition and changes nothing."""
    if isinstance(event, NodeLost) and state.history.world and event.node_id not in state.history.world.node_ids():
        return stay(state)
    attempt = getattr(event, "attempt", None)
    if attempt is not None and attempt < state.history.attempt:
        return stay(state)
    if attempt is not None and attempt > state.history.attempt and not isinstance(state, Ended):
        raise _unexpected(state, event)
    after, actions = state.on(event, now)
    if after is state:
        return state, actions
    if type(after) is not type(state) and type(after) not in TRANSITIONS[type(state)]:
        raise _unexpected(state, event, f"to {type(after).__name__}")
    told = f"{now:.3f} {type(state).__name__} -- {describe(event)} --> {type(after).__name__}"
    history = replace(after.history, story=(*after.history.story, told)[-_STORY_LENGTH:])
    return replace(after, history=history), actions


def deadline_s(state: State) -> float | None:
    """When the state wants a Tick (monotonic); None: never."""
    return state.deadline_s if isinstance(state, Stopping | BackingOff) else None


def stay(state: State) -> Move:
    return state, ()


def describe(event: Fact) -> str:
    """One short line for the story."""
    names = ("attempt", "node_id", "rank", "status", "signum", "reason")
    details = [f"{name}={getattr(event, name)}" for name in names if hasattr(event, name)]
    return f"{type(event).__name__}({', '.join(details)})"


# --- moves that several states make -----------------------------------------------------------------------------------------------------


def _world(history: History) -> World:
    assert history.world is not None, "every state after Placing has a world"
    return history.world


def _open_store(history: History, now: float) -> Move:
    history = replace(history, attempt_began_s=now)
    return OpeningStore(history), (OpenStore(history.attempt, _world(history).nodes[0].node_id),)


def _stop_actions(stopping: Stopping, signum: int) -> Sequence[Action]:
    """With the grace that the user gave."""
    attempt, grace_s = stopping.history.attempt, stopping.history.rules.grace_s
    return tuple(StopAttempt(attempt, node_id, grace_s, signum) for node_id in stopping.waiting_for())


def _kill_actions(stopping: Stopping) -> Sequence[Action]:
    attempt = stopping.history.attempt
    return tuple(StopAttempt(attempt, node_id, 0.0, _SIGKILL) for node_id in stopping.waiting_for())


def _how_stopped(signum: int, grace_s: float) -> str:
    """`SIGTERM, SIGKILL after 30 s`."""
    return f"{signal.Signals(signum).name}, SIGKILL after {grace_s:g} s" if grace_s else "SIGKILL"


def _stop_failed(history: History, failure: Failure, now: float, num_others: int) -> Move:
    """`num_others`: ranks that run besides the one that failed."""
    grace_s = history.rules.grace_s
    lost = frozenset({failure.node_id}) if isinstance(failure, NodeLost) else frozenset()
    deadline_s = now + grace_s + STOP_MARGIN_S
    stopping = Stopping(history, StopCause.FAILURE, deadline_s, (failure,), lost=lost)
    grace = _how_stopped(_SIGTERM, grace_s)
    others = {0: "", 1: f"stopping the other rank ({grace})"}
    consequence = others.get(num_others, f"stopping the other {num_others} ranks ({grace})")
    after, more = _conclude_if_over(stopping, now)
    return after, (ReportFailure(history.attempt, failure, consequence), *_stop_actions(stopping, _SIGTERM), *more)


def _stop_interrupted(history: History, signum: int, now: float) -> Move:
    grace_s = history.rules.grace_s
    stopping = Stopping(history, StopCause.SIGNAL, now + grace_s + STOP_MARGIN_S, interrupted_by=signum)
    name = signal.Signals(signum).name
    told = Announce(f"{name}: stopping all ranks ({_how_stopped(signum, grace_s)}; a second signal kills at once)")
    return stopping, (told, *_stop_actions(stopping, signum))


def _conclude_if_over(stopping: Stopping, now: float) -> Move:
    if stopping.waiting_for():
        return stopping, ()
    if stopping.cause is StopCause.FAILURE:
        return _conclude_failure(stopping, now)
    if stopping.cause is StopCause.SIGNAL:
        assert stopping.interrupted_by is not None
        decision = policy.after_interrupt(stopping.interrupted_by)
        return _end(stopping.history, decision.exit_code, decision.reason)
    return _end(stopping.history, 0, stopping.cause.value)


def _conclude_failure(stopping: Stopping, now: float) -> Move:
    history, failures = stopping.history, stopping.failures
    root = policy.root_cause(failures)
    collateral = tuple(failure for failure in failures if failure is not root)
    report = ReportCollateral(history.attempt, root, root is not failures[0], collateral)
    quick = policy.is_quick(now - history.attempt_began_s)
    history = replace(history, num_quick=history.num_quick + 1 if quick else 0, last_root=root)
    decision = policy.after_failure(
        history.rules.restarts, history.attempt, history.num_quick, root, stopping.interrupted_by
    )
    if isinstance(decision, policy.GiveUp):
        state, actions = _end(history, decision.exit_code, decision.reason)
    else:
        state, actions = _restart(history, decision, stopping.lost, now)
    return state, (report, *actions)


def _restart(history: History, decision: policy.Restart, lost: frozenset[str], now: float) -> Move:
    told = Announce(decision.reason)
    if decision.delay_s > 0:
        return BackingOff(history, now + decision.delay_s, lost), (told,)
    state, actions = _begin_again(history, lost, now)
    return state, (told, *actions)


def _begin_again(history: History, lost: frozenset[str], now: float) -> Move:
    history = replace(history, attempt=history.attempt + 1)
    if not lost:
        return _open_store(history, now)
    keep = tuple(node_id for node_id in _world(history).node_ids() if node_id not in lost)
    return Placing(history), (AcquireNodes(keep),)


def _end(history: History, exit_code: int, reason: str) -> Move:
    return Ended(history, exit_code, reason), (Finish(exit_code, reason),)


def _unexpected(state: State, event: Fact, whither: str = "") -> InvalidTransition:
    story = "\n  ".join(state.history.story) or "(nothing yet)"
    return InvalidTransition(
        f"{type(state).__name__} cannot take {describe(event)} {whither}".rstrip() + f"; the story so far:\n  {story}",
        advice="this is a fault in the launcher: please report it with the journal of the run",
    )
