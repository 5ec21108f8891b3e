"""The thin loop: events in, `gang.machine.step`, actions out, everything journalled. It holds no judgement."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from launcher import messages, rundir
from launcher.checkup import Checkup
from launcher.cluster.ports import Clock, Cluster, Journal
from launcher.console import Console
from launcher.errors import EXIT_INTERNAL, LauncherError, NodeError
from launcher.exclusion import Verdict
from launcher.exclusion_file import NOWHERE, ExclusionFile
from launcher.failure_file import FailureFile
from launcher.gang import machine
from launcher.gang.events import (
    AcquireNodes,
    Action,
    Announce,
    AttemptEnded,
    BlameNode,
    CacheFailed,
    CacheServing,
    ClusterLost,
    Event,
    FabricFound,
    FabricSurveyed,
    Finish,
    LetGo,
    ModulesLearnt,
    NodeLost,
    Notice,
    OpenStore,
    Output,
    OutputEnded,
    PlacementWaiting,
    RankExited,
    RankHung,
    ReportCollateral,
    ReportFailure,
    StartRanks,
    StopAttempt,
    StopRequested,
    Tick,
    TransportSeen,
)
from launcher.gang.history import Rules
from launcher.gang.masking import masked_args
from launcher.gang.observations import NodeProgress, StacksTaken
from launcher.gang.world import World
from launcher.journal import FileJournal, JobBegan, JobEnded
from launcher.monitor import Monitor, Say, TakeStacks
from launcher.noting import ProgressNotes
from launcher.report.display import Display, Onlooker, Onlookers, is_coloured
from launcher.spec import JobSpec, host_and_port

if TYPE_CHECKING:
    from launcher.report.exporter import Exporter


DEPARTED_OUTPUT_S = 5.0
"""How long, after the job is over, the last output of nodes that had left it is waited for."""


class SystemClock:
    """The real time."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()


def run(
    spec: JobSpec,
    cluster: Cluster,
    exclusions: ExclusionFile | None = None,
    on_run_dir: Callable[[str], None] | None = None,
) -> int:
    """Runs the job to its end and returns the exit code of the command. Called once, from the main thread (it handles signals).

    Makes the run directory, prints its path, opens the cluster, closes it whatever happens. Raises LauncherError (with its
    `exit_code`) when nothing could be started; the caller prints it. exclusions: where nodes that fail are remembered. on_run_dir is told
    the absolute path.
    """
    clock = SystemClock()
    run_dir = rundir.create(spec, os.environ.get("RAILHEAD_RUNS"))
    rundir.write_spec(run_dir, spec)
    if on_run_dir is not None:
        on_run_dir(os.path.abspath(run_dir))
    console = Console(spec.line_prefix, is_coloured=is_coloured(os.environ))
    exporter = _exporter(spec, run_dir, cluster, console)
    display = Display(spec.logs.show_progress, console, os.environ)
    onlookers = Onlookers(display, *([exporter] if exporter else []))
    journal = FileJournal(os.path.join(run_dir, "journal.jsonl"), clock, console.say, onlookers.entry)
    controller = Controller(spec, cluster, run_dir, journal, console, clock, exclusions, onlookers)
    forget_signals = _handle_signals(spec.signals_to_handle, controller.events.put)
    try:
        return controller.run()
    finally:
        cluster.close()
        journal.close()
        if exporter is not None:
            exporter.close()
        console.close()
        forget_signals()


def _exporter(spec: JobSpec, run_dir: str, cluster: Cluster, console: Console) -> Exporter | None:
    """Raises SpecError for a port that is taken or a file that cannot be written, with nothing left of what was begun."""
    if not spec.metrics and not spec.metrics_file:
        return None
    from launcher.report.exporter import Exporter

    try:
        address = host_and_port("--metrics", spec.metrics) if spec.metrics else None
        return Exporter(run_dir, address, spec.metrics_file or None, console.say)
    except LauncherError:
        cluster.close()
        console.close()
        raise


def _handle_signals(names: tuple[str, ...], put: Callable[[Event], None]) -> Callable[[], None]:
    """From now on these signals are events; returns how to undo that. What was ignored at our start (nohup) stays ignored."""
    before = {}
    for name in names:
        signum = signal.Signals[name]
        if signal.getsignal(signum) is not signal.SIG_IGN:

            def handle(number: int, frame: FrameType | None) -> None:
                put(StopRequested(number))

            before[signum] = signal.signal(signum, handle)

    def undo() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    return undo


class _Sink:
    """Events to the loop, output to the terminal; knows whose output has all been handed on."""

    def __init__(self, events: queue.SimpleQueue[Event | OutputEnded], console: Console) -> None:
        self._events = events
        self._console = console

    def put(self, event: Event) -> None:
        self._events.put(event)

    def put_log(self, output: Output) -> None:
        if isinstance(output, OutputEnded):
            self._events.put(output)
        else:
            self._console.log(output)


class Controller:
    """One job. `run` is called once."""

    def __init__(
        self,
        spec: JobSpec,
        cluster: Cluster,
        run_dir: str,
        journal: Journal,
        console: Console,
        clock: Clock,
        exclusions: ExclusionFile | None = None,
        display: Onlooker | None = None,
    ) -> None:
        self.events: queue.SimpleQueue[Event | OutputEnded] = queue.SimpleQueue()
        """SimpleQueue, because signal handlers put into it."""
        self._spec = spec
        self._cluster = cluster
        self._run_dir = run_dir
        self._journal = journal
        self._console = console
        self._clock = clock
        self._ended: set[tuple[int, str]] = set()
        self._output_ended: set[tuple[int, str]] = set()
        self._num_attempts = 0
        self._failures = FailureFile(run_dir, console.say)
        self._checkup = Checkup(spec, run_dir, self.events.put)
        self._notes = ProgressNotes()
        self._display = display
        self._exclusions = exclusions or ExclusionFile(NOWHERE, clock.wall_s)
        self._monitor = Monitor(spec, run_dir)

    def run(self) -> int:
        """To the end of the job; returns the exit code."""
        began_s = self._clock.monotonic_s()
        description = self._cluster.description
        self._journal.record(
            JobBegan(self._run_dir, description, tuple(masked_args(sys.argv)), os.getpid(), socket.gethostname())
        )
        self._console.say(messages.began(_asked(self._spec), description, self._run_dir))
        ended = self._to_the_end()
        duration_s = self._clock.monotonic_s() - began_s
        self._journal.record(JobEnded(ended.exit_code, ended.reason, self._num_attempts, duration_s))
        self._failures.ended(ended.exit_code, ended.reason)
        self._console.say(
            messages.summary(ended.exit_code, ended.reason, duration_s, self._num_attempts, self._run_dir)
        )
        return ended.exit_code

    def _loop(self) -> machine.Ended:
        spec = self._spec
        rules = Rules(
            spec.restarts,
            spec.shutdown_timeout_s,
            spec.min_nodes,
            spec.max_nodes,
            spec.grow_delay_s,
            spec.second_signal,
        )
        self._state, actions = machine.begin(rules)
        self._perform(actions)
        while not isinstance(self._state, machine.Ended):
            event = self._next_event()
            if isinstance(event, OutputEnded):
                self._output_ended.add((event.attempt, event.node_id))
                continue
            if isinstance(event, ModulesLearnt):
                continue  # the cluster's business, where it has several nodes
            if isinstance(event, NodeProgress | StacksTaken):
                self._look(event)
                continue
            self._journal.record(event)
            if isinstance(event, FabricSurveyed):
                self._checkup.surveyed(event)
                continue
            if isinstance(event, TransportSeen):
                self._checkup.transport(event)
                continue
            if isinstance(event, ClusterLost):
                raise NodeError(event.reason, advice="all ranks are stopped; start the cluster again, then the job")
            if isinstance(event, PlacementWaiting | CacheServing | CacheFailed | FabricFound | Notice):
                self._console.say(messages.notice(event, self._state.history.world))
                continue
            if isinstance(event, RankExited):
                self._monitor.exited(event)
            if isinstance(event, AttemptEnded):
                self._ended.add((event.attempt, event.node_id))
            if isinstance(event, NodeLost):
                self._expect_no_output_of(event.node_id)
            # What is reported happened in the world before the step; after it another one may have begun already.
            world = self._state.history.world
            self._state, actions = machine.step(self._state, event, self._clock.monotonic_s())
            self._perform(actions, world)
        return self._state

    def _look(self, event: NodeProgress | StacksTaken) -> None:
        """What is seen of ranks comes every second, so the journal gets less of it."""
        if isinstance(event, StacksTaken):
            self._journal.record(event)
        else:
            self._notes.see(event)
        for effect in self._monitor.see(event, self._clock.monotonic_s()):
            match effect:
                case TakeStacks(attempt=attempt, look=look, is_final=is_final):
                    world = self._state.history.world
                    for node_id in world.node_ids() if world else ():
                        self._cluster.node(node_id).take_stacks(attempt, look, is_final)
                case Say(text=text):
                    self._console.say(text)
                case RankHung():
                    self.events.put(effect)
                case _:
                    self._journal.record(effect)
        self._notes.stragglers, self._notes.hung = self._monitor.health.stragglers, self._monitor.health.hung
        self._note_progress()

    def _note_progress(self, *, is_last: bool = False) -> None:
        now = self._clock.monotonic_s()
        progress = self._notes.progress if is_last else self._notes.look(now)
        if progress is None:
            return
        if self._notes.is_due(progress, now) or is_last:
            self._journal.record(progress)
        if self._display is not None:
            self._display.progress(progress, now)

    def _next_event(self) -> Event | OutputEnded:
        deadline_s = machine.deadline_s(self._state)
        if deadline_s is None:
            return self.events.get()
        try:
            return self.events.get(timeout=max(0.0, deadline_s - self._clock.monotonic_s()))
        except queue.Empty:
            return Tick()

    def _to_the_end(self) -> machine.Ended:
        try:
            self._cluster.open(self._spec, self._run_dir, _Sink(self.events, self._console))
            ended = self._loop()
            self._wait_for_output()
            self._checkup.close()
            return ended
        except LauncherError as error:
            self._journal.record(JobEnded(error.exit_code, str(error), self._num_attempts, 0.0))
            self._failures.ended(error.exit_code, str(error))
            raise
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            self._journal.record(JobEnded(EXIT_INTERNAL, text, self._num_attempts, 0.0))
            self._failures.ended(EXIT_INTERNAL, text)
            raise LauncherError(
                f"a fault in the launcher itself, all ranks are stopped:\n{text}",
                advice=f"please report it with {self._run_dir}",
            ) from error

    def _perform(self, actions: Sequence[Action], world: World | None = None) -> None:
        if any(isinstance(action, StopAttempt) for action in actions):
            self._note_progress(is_last=True)
        for action in actions:
            self._journal.record(action)
            match action:
                case AcquireNodes(keep=keep):
                    self._cluster.acquire(keep)
                case OpenStore(attempt=attempt, node_id=node_id):
                    self._num_attempts += 1
                    self._cluster.node(node_id).open_store(attempt)
                case StartRanks(plan=plan):
                    for node_id in plan.world.node_ids():
                        self._cluster.node(node_id).start_ranks(plan)
                    self._checkup.started(plan.world)
                    self._notes.begin(plan.attempt, plan.world, self._clock.monotonic_s())
                    self._monitor.begin(plan.attempt, plan.world)
                case LetGo(node_id=node_id):
                    self._expect_no_output_of(node_id)
                    self._cluster.let_go(node_id)
                case StopAttempt(attempt, node_id, grace_s, signum, can_save):
                    self._notes.stop()
                    self._monitor.stop()
                    self._cluster.node(node_id).stop_attempt(attempt, grace_s, signum, can_save)
                case Announce(text=text):
                    self._console.say(text)
                case ReportFailure(attempt=attempt, failure=failure, consequence=consequence):
                    self._failures.told(attempt, failure, consequence, world)
                    self._console.say(messages.failure_report(failure, world))
                    if consequence:
                        self._console.say(consequence)
                case ReportCollateral(attempt, root, is_new_root, collateral):
                    self._failures.concluded(attempt, root, collateral, world)
                    text = messages.collateral_report(root, is_new_root, collateral, world)
                    if text:
                        self._console.say(text)
                case BlameNode(host=host, cause=cause, reason=reason):
                    trouble = self._exclusions.remember([Verdict(host, reason, self._clock.wall_s(), cause)])
                    if trouble:
                        self._console.say(trouble)
                case Finish():
                    pass  # the loop sees the state; what is released is released in `run`

    def _wait_for_output(self) -> None:
        """What ranks have written last stands before the summary, however slow the terminal; a signal says not to wait. Nodes that left the
        gang (drained, given back) may have gone with theirs: those get a moment only."""
        world = self._state.history.world
        held = set(world.node_ids()) if world is not None else set()
        departed_until_s = self._clock.monotonic_s() + DEPARTED_OUTPUT_S
        while pending := self._ended - self._output_ended:
            left_s = (
                None if any(node_id in held for _, node_id in pending) else departed_until_s - self._clock.monotonic_s()
            )
            try:
                event = self.events.get(timeout=None if left_s is None else max(0.0, left_s))
            except queue.Empty:
                break
            match event:
                case OutputEnded(attempt=attempt, node_id=node_id):
                    self._output_ended.add((attempt, node_id))
                case NodeLost(node_id=lost):
                    self._expect_no_output_of(lost)
                case StopRequested():
                    return
        self._console.end_output()
        while not self._console.flush(0.2):
            if not self.events.empty() and isinstance(self.events.get(), StopRequested):
                return

    def _expect_no_output_of(self, lost: str) -> None:
        """The node is lost, and with it what it still had to show of attempts that had ended there."""
        self._ended = {(attempt, node_id) for attempt, node_id in self._ended if node_id != lost}


def _asked(spec: JobSpec) -> str:
    """`8 ranks`, `16 ranks (2 nodes of 8)`."""
    low, high, each = spec.min_nodes, spec.max_nodes, spec.nproc_per_node
    if high == 1:
        return f"{each} rank{'s' if each > 1 else ''}"
    nodes = f"{low} nodes" if low == high else f"{low} to {high} nodes"
    ranks = f"{low * each} ranks" if low == high else f"{low * each} to {high * each} ranks"
    return f"{ranks} ({nodes} of {each})"
