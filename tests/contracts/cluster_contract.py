"""What every cluster promises (launcher/cluster/ports.py), as a class of tests over a `house`: fake, this machine, Ray.

A subclass gives the fixture `house`. The programs are words (`succeed`, `fail 3`, `die 9`, `print TEXT`, `wait`, `stubborn`)
that each house turns into something that its cluster can run.
"""

from __future__ import annotations

import queue
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from launcher.cluster.ports import Cluster
from launcher.errors import LauncherError
from launcher.gang.events import (
    AttemptEnded,
    AttemptPlan,
    Event,
    ExitStatus,
    LogChunk,
    NodesReady,
    Output,
    OutputEnded,
    PlacementRefused,
    RankExited,
    RanksStarted,
    StoreOpened,
)
from launcher.gang.world import World, arrange
from launcher.spec import JobSpec, LogOptions, Program, ProgramKind

T = TypeVar("T")
DEADLINE_S = 60.0
"""Only a broken cluster ever waits this long."""

PROGRAM = """
import os, signal, sys, time
word, *args = sys.argv[1:]
if word == "fail": sys.exit(int(args[0]))
if word == "die": os.kill(os.getpid(), int(args[0]))
if word == "print": print(*args)
if word == "stubborn": signal.signal(signal.SIGTERM, signal.SIG_IGN)
if word in ("wait", "stubborn"):
    print("ready", flush=True)
    time.sleep(600)
"""


class Recorder:
    """An EventSink that remembers, and waits for what a test wants to see."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.output: list[Output] = []
        self._arrived: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._arrived.put((True, event))

    def put_log(self, output: Output) -> None:
        self._arrived.put((False, output))

    def wait(self, claim: Callable[[], T]) -> T:
        """Takes in what arrives until the claim holds; its value."""
        while not (value := claim()):
            try:
                is_event, item = self._arrived.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise AssertionError(f"nothing came for {DEADLINE_S:g} s; so far: {self.events}") from None
            (self.events if is_event else self.output).append(item)
        return value

    def wait_for(self, kind: type[T], count: int = 1) -> list[T]:
        return self.wait(lambda: found if len(found := self.of(kind)) >= count else [])

    def wait_for_output(self, text: bytes, count: int = 1) -> bytes:
        return self.wait(lambda: self.text() if self.text().count(text) >= count else b"")

    def of(self, kind: type[T]) -> list[T]:
        return [item for item in [*self.events, *self.output] if isinstance(item, kind)]

    def text(self) -> bytes:
        return b"".join(chunk.data for chunk in self.of(LogChunk))

    def is_empty(self) -> bool:
        return self._arrived.empty()


class House:
    """One kind of cluster, ready to be opened. Real ones run PROGRAM; `num_nodes` is how many nodes it can give."""

    num_nodes = 2
    is_real = True

    def __init__(self, make: Callable[[], Cluster], directory: Path, num_nodes: int = 2) -> None:
        self.num_nodes = num_nodes
        self.sink = Recorder()
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self._script = directory / "program.py"
        self._script.write_text(PROGRAM)
        self.cluster = make()

    def spec(self, *words: str, num_nodes: int | None = None) -> JobSpec:
        num_nodes = self.num_nodes if num_nodes is None else num_nodes
        program = Program(ProgramKind.SCRIPT, str(self._script), words, sys.executable)
        if not self.is_real:
            program = Program(ProgramKind.SCRIPT, words[0], words[1:])
        cwd = str(self._script.parent)
        logs = LogOptions(show_all=True)
        return JobSpec(program, num_nodes, num_nodes, nproc_per_node=2, logs=logs, cwd=cwd, place_timeout_s=5)

    def begin(self, *words: str) -> World:
        """Opens the cluster and gets its nodes."""
        self.cluster.open(self.spec(*words), str(self.run_dir), self.sink)
        self.cluster.acquire(())
        return arrange(self.sink.wait_for(NodesReady)[0].nodes)

    def start(self, world: World, attempt: int = 0) -> AttemptPlan:
        """Opens the store, starts all ranks, waits until they run."""
        self.cluster.node(world.nodes[0].node_id).open_store(attempt)
        store = self.sink.wait_for(StoreOpened, attempt + 1)[attempt]
        plan = AttemptPlan(attempt, world, store.address)
        for node_id in world.node_ids():
            self.cluster.node(node_id).start_ranks(plan)
        self.sink.wait_for(RanksStarted, len(world.nodes) * (attempt + 1))
        return plan

    def stop(
        self, world: World, attempt: int = 0, grace_s: float = 30.0, signum: signal.Signals = signal.SIGTERM
    ) -> None:
        for node_id in world.node_ids():
            self.cluster.node(node_id).stop_attempt(attempt, grace_s, signum)

    def ended(self, attempt: int = 0) -> list[str]:
        return sorted(event.node_id for event in self.sink.of(AttemptEnded) if event.attempt == attempt)


class ClusterContract:
    """The promises. Names are the claims."""

    def test_nodes_are_as_many_as_asked_each_with_its_ranks(self, house: House) -> None:
        world = house.begin("succeed")
        assert len(set(world.node_ids())) == house.num_nodes
        assert [node.num_ranks for node in world.nodes] == [2] * house.num_nodes

    def test_every_rank_is_started_once_and_its_end_is_told_once(self, house: House) -> None:
        world = house.begin("succeed")
        house.start(world)
        exits = house.sink.wait_for(RankExited, world.world_size)
        assert sorted(event.rank for event in exits) == list(range(world.world_size))
        assert {event.status for event in exits} == {ExitStatus(code=0)}
        assert all(world.member(event.rank).node.node_id == event.node_id for event in exits)

    @pytest.mark.parametrize(
        ("words", "status"), [(("fail", "3"), ExitStatus(code=3)), (("die", "9"), ExitStatus(signum=9))]
    )
    def test_the_way_a_rank_ended_is_told(self, house: House, words: tuple[str, ...], status: ExitStatus) -> None:
        world = house.begin(*words)
        house.start(world)
        exits = house.sink.wait_for(RankExited, world.world_size)
        assert {event.status for event in exits} == {status}

    def test_stopping_ends_every_rank_and_is_answered_once_by_each_node_after_their_ends(self, house: House) -> None:
        """The machine starts the next attempt on AttemptEnded: one that came early would let two attempts overlap."""
        world = house.begin("wait")
        house.start(world)
        house.stop(world)
        house.sink.wait_for(AttemptEnded, house.num_nodes)
        kinds = [type(event) for event in house.sink.events if isinstance(event, RankExited | AttemptEnded)]
        for node_id in world.node_ids():
            of_node = [e for e in house.sink.events if getattr(e, "node_id", "") == node_id]
            ends = [type(e) for e in of_node if isinstance(e, RankExited | AttemptEnded)]
            assert ends == [RankExited, RankExited, AttemptEnded]
        assert kinds.count(AttemptEnded) == house.num_nodes
        assert {event.status for event in house.sink.of(RankExited)} == {ExitStatus(signum=15)}

    def test_ranks_get_the_signal_that_was_asked_for(self, house: House) -> None:
        """Ctrl-C shall be a KeyboardInterrupt on every node, also where the cluster's own processes block SIGINT, as Ray's do."""
        world = house.begin("wait")
        house.start(world)
        if house.is_real:
            house.sink.wait_for_output(b"ready\n", world.world_size)
        house.stop(world, signum=signal.SIGINT)
        house.sink.wait_for(AttemptEnded, house.num_nodes)
        assert {event.status for event in house.sink.of(RankExited)} == {ExitStatus(signum=signal.SIGINT)}
        if house.is_real:
            exceptions = [event.exception for event in house.sink.of(RankExited)]
            assert {exception.type_name for exception in exceptions if exception} == {"KeyboardInterrupt"}

    def test_ranks_that_ignore_sigterm_are_killed_when_hurried(self, house: House) -> None:
        world = house.begin("stubborn")
        house.start(world)
        if house.is_real:
            house.sink.wait_for_output(b"ready\n", world.world_size)
        house.stop(world, grace_s=3600)
        house.stop(world, grace_s=0)
        house.sink.wait_for(AttemptEnded, house.num_nodes)
        assert {event.status for event in house.sink.of(RankExited)} == {ExitStatus(signum=9)}
        assert house.ended() == sorted(world.node_ids())

    def test_an_attempt_that_never_began_is_ended_at_once(self, house: House) -> None:
        world = house.begin("succeed")
        house.stop(world, attempt=0)
        house.sink.wait_for(AttemptEnded, house.num_nodes)
        assert house.ended() == sorted(world.node_ids())

    def test_all_shown_output_comes_before_its_end_is_told(self, house: House) -> None:
        world = house.begin("print", "hello")
        house.start(world)
        house.sink.wait_for(RankExited, world.world_size)
        house.stop(world)
        house.sink.wait_for(OutputEnded, house.num_nodes)
        assert house.sink.text() == b"hello\n" * world.world_size
        last: dict[str, type] = {}
        for item in house.sink.output:
            node_id = item.node_id if isinstance(item, OutputEnded) else world.member(item.rank).node.node_id
            last[node_id] = type(item)
        assert set(last.values()) == {OutputEnded}

    def test_each_attempt_has_a_store_of_its_own(self, house: House) -> None:
        """A store that is kept over restarts keeps keys of dead ranks."""
        world = house.begin("wait")
        addresses = []
        for attempt in range(2):
            addresses.append(house.start(world, attempt).store)
            house.stop(world, attempt, grace_s=0)
            house.sink.wait_for(AttemptEnded, house.num_nodes * (attempt + 1))
        assert addresses[0] != addresses[1]
        assert addresses[0].host == addresses[1].host == world.nodes[0].addr

    def test_nodes_that_are_kept_stay_the_same(self, house: House) -> None:
        world = house.begin("succeed")
        house.cluster.acquire(world.node_ids())
        again = house.sink.wait_for(NodesReady, 2)[1]
        assert arrange(again.nodes, world) == world

    def test_more_nodes_than_there_are_is_refused(self, house: House) -> None:
        spec = house.spec("succeed", num_nodes=house.num_nodes + 7)
        try:
            house.cluster.open(spec, str(house.run_dir), house.sink)
            house.cluster.acquire(())
        except LauncherError as error:
            message, advice = error.message, error.advice
        else:
            refused = house.sink.wait_for(PlacementRefused)[0]
            message, advice = refused.reason, refused.advice
        assert str(house.num_nodes + 7) in message
        assert advice

    def test_closing_ends_what_runs_and_silences_the_sink(self, house: House) -> None:
        world = house.begin("wait")
        house.start(world)
        house.cluster.close()
        house.cluster.close()
        house.sink.wait(lambda: house.sink.is_empty() or None)
        heard = len(house.sink.events)
        house.stop(world)
        assert house.sink.is_empty(), "a closed cluster spoke"
        assert len(house.sink.events) == heard

    def test_elastic_requests_take_what_is_there(self, house: House) -> None:
        spec = replace(house.spec("succeed"), min_nodes=1, max_nodes=house.num_nodes + 1)
        house.cluster.open(spec, str(house.run_dir), house.sink)
        house.cluster.acquire(())
        nodes = house.sink.wait_for(NodesReady)[0].nodes
        assert 1 <= len(nodes) <= house.num_nodes
