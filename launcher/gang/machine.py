"""The gang's life as a state machine: `step(state, event, now) -> (state, actions)`. Pure; the controller performs the actions.

What it guarantees, whatever happens outside (tests/launcher/test_machine.py tries):
- ranks are started on all nodes of a world in one step, or on none;
- no attempt starts before every node has said that nothing of the last one is alive, or is lost itself;
- it ends, and the exit code is 0 if and only if every rank of the last attempt ended with 0.

States hold what they need; TRANSITIONS says which may follow which. News of older attempts is ignored: it may always arrive late.
An event that makes no sense is an error that tells the story so far, and changes nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import InvalidTransition
from launcher.gang import policy, sayings
from launcher.gang.blame import blame
from launcher.gang.causes import died_of_us, is_secondhand, with_who_left_early
from launcher.gang.events import (
    AcquireNodes,
    Action,
    Announce,
    AttemptEnded,
    AttemptPlan,
    Fact,
    Failure,
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
    RankHung,
    RanksStarted,
    ReportCollateral,
    ReportFailure,
    StartRanks,
    StopAttempt,
    StopRequested,
    StoreOpened,
    Tick,
)
from launcher.gang.history import History, Rules, StopCause, drain_grace_s, note_failure, note_who_is_held, seat, unfit
from launcher.gang.world import NodeInfo, World
from launcher.spec import SecondSignal

STOP_MARGIN_S = 10.0
"""A node that has not ended an attempt this long after the grace is treated as lost."""
REPORT_PATIENCE_S = 1.0
"""How long the loss of a peer is not yet told: what the peer died of is the news, and it is on its way."""
_STORY_LENGTH = 60
_SIGTERM, _SIGKILL = int(signal.SIGTERM), int(signal.SIGKILL)  # plain numbers, like what handlers are given


@dataclass(frozen=True)
class Placing:
    """Waiting for nodes."""

    history: History
    joined: tuple[NodeInfo, ...] = ()
    """Nodes that came meanwhile; NodesReady need not name them (the others may be measured first)."""

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case NodesReady(nodes=nodes):
                return _open_store(seat(self.history, nodes, self.joined), now)
            case PlacementRefused(reason=reason, advice=advice):
                told = f"{reason}. {advice}" if advice else reason
                return _end(self.history, policy.after_refusal(self.history.last_root, self.history.is_saved), told)
            case StopRequested(signum=signum):
                return _end_interrupted(self.history, signum)
            case NodeJoined(node=node):
                return replace(self, joined=(*self.joined, node)), ()
            case NodeLost(node_id=node_id):
                return replace(self, joined=tuple(node for node in self.joined if node.node_id != node_id)), ()
            case NodeDraining() | Tick():
                return stay(self)  # a node that is told to leave is not among those that NodesReady will name
        raise _unexpected(self, event)


@dataclass(frozen=True)
class OpeningStore:
    """Waiting for the port of the attempt's store."""

    history: History

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case StoreOpened(address=address):
                plan = AttemptPlan(self.history.attempt, _world(self.history), address)
                return Running(self.history, grow_at_s=self.history.when_to_grow(now)), (StartRanks(plan),)
            case NodeFailed() | NodeLost():
                return _stop_failed(self.history, event, now, num_others=0)
            case NodeDraining():
                return _stop_preempted(self.history, event, now, good=0)
            case StopRequested(signum=signum):
                return _stop_interrupted(self.history, signum, now, good=0, num_running=0)
            case NodeJoined() | Tick():
                return stay(self)
        raise _unexpected(self, event)


@dataclass(frozen=True)
class Running:
    """Ranks run."""

    history: History
    good: int = 0
    """Ranks that have ended with 0, as bits: a set of thousands would be copied at every end."""
    grow_at_s: float | None = None
    """When the gang starts again with nodes that have joined."""

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case RankExited(rank=rank, status=status) if status.is_success:
                good = self.good | 1 << rank
                if good.bit_count() == _world(self.history).world_size:
                    stopping = Stopping(self.history, StopCause.SUCCESS, now + STOP_MARGIN_S, good=good)
                    return stopping, _kill_actions(stopping)
                return replace(self, good=good), ()
            case RankExited() | NodeFailed() | NodeLost() | RankHung():
                failure = with_who_left_early(event, self.good) if is_secondhand(event) else event
                num_others = self._num_running() - self.history.num_gone_with(event, self.good)
                return _stop_failed(self.history, failure, now, num_others)
            case NodeJoined():
                return replace(self, grow_at_s=self.history.when_to_grow(now)), ()
            case NodeDraining():
                return _stop_preempted(self.history, event, now, self.good)
            case StopRequested(signum=signum):
                return _stop_interrupted(self.history, signum, now, self.good, self._num_running())
            case Tick() if self.grow_at_s is not None and now >= self.grow_at_s:
                if self.history.can_grow() and not self.good:
                    return _stop_to_grow(self.history, now)
                return replace(self, grow_at_s=None), ()  # the spare is gone again, or the job is nearly done
            case RanksStarted() | Tick():
                return stay(self)
        raise _unexpected(self, event)

    def _num_running(self) -> int:
        return _world(self.history).world_size - self.good.bit_count()


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
    good: int = 0
    """Ranks that have ended with 0, as bits."""
    num_to_save: int = 0
    """Ranks that ran when they were told to stop."""
    num_saved: int = 0
    """Of these, those that have saved their state."""
    consequence: str = ""
    """To be said with the failure."""
    told: Failure | None = None
    """The failure that was reported; None: none yet."""
    report_due_s: float | None = None
    """What is known is only the loss of a peer: until then the failure behind it is waited for. None: it is told, or nothing is to tell."""

    def on(self, event: Fact, now: float) -> Move:
        match event:
            case RankExited() if self.cause.means_saved(event):
                return replace(self, num_saved=self.num_saved + 1), ()
            case RankExited(rank=rank, status=status) if status.is_success:
                return replace(self, good=self.good | 1 << rank), ()
            case RankExited() | NodeFailed():
                return self._take(event)
            case AttemptEnded(node_id=node_id):
                return _conclude_if_over(replace(self, ended=self.ended | {node_id}), now)
            case NodeLost(node_id=node_id):
                taken, told = self._take(event)
                after, more = _conclude_if_over(replace(taken, lost=self.lost | {node_id}), now)
                return after, (*told, *more)
            case StopRequested(signum=signum):
                return self._hurry(signum, now)
            case Tick() if self.report_due_s is not None and now >= self.report_due_s:
                return self.tell()
            case Tick() if now >= self.deadline_s:
                return self._give_up_on_silent_nodes(now)
            case RanksStarted() | StoreOpened() | RankHung() | NodeJoined() | NodeDraining() | Tick():
                return stay(self)
        raise _unexpected(self, event)

    @property
    def is_saved(self) -> bool:
        """Every rank that was told to stop has saved its state."""
        return 0 < self.num_to_save == self.num_saved

    def _take(self, failure: Failure) -> tuple[Stopping, Sequence[Action]]:
        """One more failure; told at once if it is what was waited for."""
        taken = replace(self, failures=(*self.failures, failure))
        if self.report_due_s is None or is_secondhand(failure) or died_of_us(failure, taken.failures[0]):
            return taken, ()
        return taken.tell()

    def tell(self) -> tuple[Stopping, Sequence[Action]]:
        """Reports what is the root cause so far."""
        root = policy.root_cause(self.failures)
        report = ReportFailure(self.history.attempt, root, self.consequence)
        return replace(self, told=root, report_due_s=None), (report,)

    def _hurry(self, signum: int, now: float) -> Move:
        rule, left_s = self.history.rules.second_signal, self.deadline_s - STOP_MARGIN_S - now
        noted = replace(self, interrupted_by=signum) if self.interrupted_by is None else self
        if self.cause in (StopCause.PREEMPTION, StopCause.GROWTH) and self.interrupted_by is None:
            # Ranks are saving already; whoever stops us now wants what they save as well. The next signal is the second one.
            return replace(noted, cause=StopCause.SIGNAL), (Announce(sayings.stopping_already(signum, rule)),)
        if rule is not SecondSignal.KILL and left_s > 0.0:
            sent = _stop_actions(self, signum, left_s, can_save=True) if rule is SecondSignal.FORWARD else ()
            return noted, (Announce(sayings.how_second_was_taken(signum, rule, left_s)), *sent)
        hurried = replace(noted, deadline_s=min(self.deadline_s, now + STOP_MARGIN_S))
        return hurried, (Announce("killing what is left at once"), *_kill_actions(hurried))

    def _give_up_on_silent_nodes(self, now: float) -> Move:
        silent = self.waiting_for()
        reason = f"has not ended attempt {self.history.attempt} {STOP_MARGIN_S:g} s after its ranks had to be dead"
        # No time of their own: they are a consequence, never the root.
        lost = tuple(NodeLost(node_id, reason, float("inf")) for node_id in silent)
        after = replace(self, lost=self.lost | frozenset(silent), failures=(*self.failures, *lost))
        state, actions = _conclude_if_over(after, now)
        return state, (*(LetGo(node_id) for node_id in silent), *actions)

    def waiting_for(self) -> tuple[str, ...]:
        over = self.ended | self.lost
        return tuple(node_id for node_id in _world(self.history).node_ids() if node_id not in over)


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
                return _end_interrupted(self.history, signum)
            case RankHung() | NodeJoined() | NodeDraining() | Tick():
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
    attempt = getattr(event, "attempt", None)
    if attempt is not None and attempt < state.history.attempt:
        return stay(state)
    if attempt is not None and attempt > state.history.attempt and not isinstance(state, Ended):
        raise _unexpected(state, event)
    after: State = state
    actions: Sequence[Action] = ()
    is_all = False
    if not isinstance(state, Placing | Ended):  # while nodes are asked for, what NodesReady will name is what is held
        history, actions, is_all = note_who_is_held(state.history, event)
        after = state if history is state.history else replace(state, history=history)
    if not is_all:
        after, more = after.on(event, now)
        actions = (*actions, *more)
    if after is state:
        return state, actions
    if type(after) is not type(state) and type(after) not in TRANSITIONS[type(state)]:
        raise _unexpected(state, event, f"to {type(after).__name__}")
    line = f"{now:.3f} {type(state).__name__} -- {sayings.describe(event)} --> {type(after).__name__}"
    history = replace(after.history, story=(*after.history.story, line)[-_STORY_LENGTH:])
    return replace(after, history=history), actions


def deadline_s(state: State) -> float | None:
    """When the state wants a Tick (monotonic); None: never."""
    match state:
        case Stopping(deadline_s=deadline_s, report_due_s=report_due_s):
            return deadline_s if report_due_s is None else min(deadline_s, report_due_s)
        case BackingOff(deadline_s=deadline_s):
            return deadline_s
        case Running(grow_at_s=grow_at_s):
            return grow_at_s
    return None


def stay(state: State) -> Move:
    return state, ()


# --- moves that several states make -----------------------------------------------------------------------------------------------------


def _world(history: History) -> World:
    assert history.world is not None, "every state after Placing has a world"
    return history.world


def _open_store(history: History, now: float) -> Move:
    history = replace(history, attempt_began_s=now, is_saved=False)
    return OpeningStore(history), (OpenStore(history.attempt, _world(history).nodes[0].node_id),)


def _stop_actions(stopping: Stopping, signum: int, grace_s: float, can_save: bool) -> Sequence[Action]:
    attempt = stopping.history.attempt
    return tuple(StopAttempt(attempt, node_id, grace_s, signum, can_save) for node_id in stopping.waiting_for())


def _kill_actions(stopping: Stopping) -> Sequence[Action]:
    return _stop_actions(stopping, _SIGKILL, 0.0, can_save=False)


def _stop_failed(history: History, failure: Failure, now: float, num_others: int) -> Move:
    """`num_others`: ranks that run besides the one that failed."""
    grace_s = policy.grace_after(failure, history.rules.grace_s)
    lost = frozenset({failure.node_id}) if isinstance(failure, NodeLost) else frozenset()
    deadline_s = now + grace_s + STOP_MARGIN_S
    said = sayings.stopping_others(num_others, _SIGTERM, grace_s)
    stopping = Stopping(history, StopCause.FAILURE, deadline_s, (failure,), lost=lost, consequence=said)
    report: Sequence[Action] = ()
    if num_others and is_secondhand(failure):
        stopping = replace(stopping, report_due_s=now + REPORT_PATIENCE_S)
    else:
        stopping, report = stopping.tell()
    after, more = _conclude_if_over(stopping, now)
    return after, (*report, *_stop_actions(stopping, _SIGTERM, grace_s, can_save=False), *more)


def _stop_interrupted(history: History, signum: int, now: float, good: int, num_running: int) -> Move:
    grace_s = history.rules.grace_s
    deadline_s = now + grace_s + STOP_MARGIN_S
    stopping = Stopping(
        history, StopCause.SIGNAL, deadline_s, interrupted_by=signum, good=good, num_to_save=num_running
    )
    told = Announce(sayings.stopping_for_signal(signum, grace_s, history.rules.second_signal))
    return stopping, (told, *_stop_actions(stopping, signum, grace_s, can_save=True))


def _stop_preempted(history: History, event: NodeDraining, now: float, good: int) -> Move:
    return _stop_to_save(history, StopCause.PREEMPTION, drain_grace_s(event, history.rules.grace_s), now, good)


def _stop_to_grow(history: History, now: float) -> Move:
    return _stop_to_save(history, StopCause.GROWTH, history.rules.grace_s, now, good=0)


def _stop_to_save(history: History, cause: StopCause, grace_s: float, now: float, good: int) -> Move:
    """Nothing has failed: ranks may save before the next attempt."""
    num_running = _world(history).world_size - good.bit_count()
    stopping = Stopping(history, cause, now + grace_s + STOP_MARGIN_S, good=good, num_to_save=num_running)
    told = Announce(
        f"{cause.value}: stopping all ranks so that they can save ({sayings.how_stopped(_SIGTERM, grace_s)})"
    )
    return stopping, (told, *_stop_actions(stopping, _SIGTERM, grace_s, can_save=True))


def _conclude_if_over(stopping: Stopping, now: float) -> Move:
    if stopping.waiting_for():
        return stopping, ()
    history = replace(stopping.history, is_saved=stopping.is_saved)
    match stopping.cause:
        case StopCause.FAILURE:
            return _conclude_failure(stopping, now)
        case StopCause.SIGNAL:
            assert stopping.interrupted_by is not None
            return _end_interrupted(history, stopping.interrupted_by)
        case StopCause.PREEMPTION | StopCause.GROWTH:
            if stopping.good.bit_count() == _world(history).world_size:
                return _end(history, 0, StopCause.SUCCESS.value)
            return _conclude_pause(replace(stopping, history=history), now)
        case StopCause.SUCCESS:
            return _end(history, 0, stopping.cause.value)


def _conclude_failure(stopping: Stopping, now: float) -> Move:
    said: list[Action] = []
    if stopping.told is None:
        stopping, told = stopping.tell()
        said += told
    history, failures = stopping.history, stopping.failures
    root = policy.root_cause(failures)
    collateral = tuple(failure for failure in failures if failure is not root)
    said.append(ReportCollateral(history.attempt, root, root is not stopping.told, collateral))
    said += [blamed] if (blamed := blame(history, root)) else []
    lost, let_go = unfit(history, root, stopping.lost)
    history = note_failure(history, failures, root, now)
    # A spare is there for lost nodes; a gang that still has all its nodes, or cannot be whole again, pays as after any failure.
    is_free = isinstance(root, NodeLost) and len(history.usable(stopping.lost)) >= history.size
    decision = policy.after_failure(
        history.rules.restarts, history.num_restarts, history.num_stuck, root, stopping.interrupted_by, is_free
    )
    if isinstance(decision, policy.GiveUp):
        state, actions = _end(history, decision.exit_code, decision.reason)
    else:
        paid = history if is_free else replace(history, num_restarts=history.num_restarts + 1)
        state, actions = _restart(paid, decision, lost, now)
        actions = (*let_go, *actions)
    return state, (*said, *actions)


def _conclude_pause(stopping: Stopping, now: float) -> Move:
    """After a preemption or for growth: what could not be saved is said, then the next attempt."""
    history = stopping.history
    saved = sayings.how_many_saved(stopping.num_saved, stopping.num_to_save)
    said: list[Action] = [Announce(saved)] if saved else []
    told = [failure for failure in stopping.failures if policy.is_worth_telling(failure)]
    if told:
        said.append(
            ReportFailure(history.attempt, policy.root_cause(told), "that was while ranks were stopped to save")
        )
    if stopping.cause is StopCause.GROWTH:
        decision: policy.Decision = policy.Restart(0.0, "restart with more nodes, at no cost to --max-restarts")
    else:
        decision = policy.after_preemption(history.rules.restarts, history.num_preemptions, history.is_saved)
        history = replace(history, num_preemptions=history.num_preemptions + 1)
    if isinstance(decision, policy.GiveUp):
        state, actions = _end(history, decision.exit_code, decision.reason)
    else:
        state, actions = _restart(history, decision, stopping.lost, now)
    return state, (*said, *actions)


def _restart(history: History, decision: policy.Restart, lost: frozenset[str], now: float) -> Move:
    told = Announce(decision.reason)
    if decision.delay_s > 0:
        return BackingOff(history, now + decision.delay_s, lost), (told,)
    state, actions = _begin_again(history, lost, now)
    return state, (told, *actions)


def _begin_again(history: History, lost: frozenset[str], now: float) -> Move:
    """With what is held if that is enough, at once; else more nodes are asked for."""
    usable = history.usable(lost)
    history = replace(history, attempt=history.attempt + 1)
    if len(usable) < history.rules.min_nodes:
        return Placing(history), (AcquireNodes(tuple(node.node_id for node in usable)),)
    before, history = history.size, seat(history, usable)
    state, actions = _open_store(history, now)
    if history.size == before:
        return state, actions
    return state, (Announce(f"going on with {history.size} nodes instead of {before}"), *actions)


def _end_interrupted(history: History, signum: int) -> Move:
    decision = policy.after_interrupt(signum, history.is_saved)
    return _end(history, decision.exit_code, decision.reason)


def _end(history: History, exit_code: int, reason: str) -> Move:
    return Ended(history, exit_code, reason), (Finish(exit_code, reason),)


def _unexpected(state: State, event: Fact, whither: str = "") -> InvalidTransition:
    return sayings.illegal_move(type(state).__name__, event, whither, state.history.story)
