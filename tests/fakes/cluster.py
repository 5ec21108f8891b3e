"""A cluster in memory: nodes and ranks are entries in a table, and every answer comes within the call that asked for it.

It passes tests/contracts/cluster_contract.py like the real ones, so what the controller does on it, it does on them. Ranks behave as the
program's target says: `succeed`, `fail N`, `die SIGNUM`, `print TEXT` (and end with 0), `wait` (until a signal), `stubborn` (until
SIGKILL). A `behave` callable may say something else for each attempt and rank.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from launcher.cluster.ports import EventSink
from launcher.errors import RequestRefused
from launcher.gang.events import (
    AttemptEnded,
    AttemptPlan,
    ExitStatus,
    LogChunk,
    NodeFailed,
    NodeLost,
    NodesReady,
    OutputEnded,
    RankExited,
    RanksStarted,
    StoreAddress,
    StoreOpened,
)
from launcher.gang.observations import RankStack, StacksTaken
from launcher.gang.world import Member, NodeInfo
from launcher.spec import JobSpec, Stream

Behave = Callable[[int, Member], str]
"""attempt, member → one of the words above."""


class FakeNode:
    """A node's agent. `commands` is what it was told, in order."""

    def __init__(self, info: NodeInfo, cluster: FakeCluster) -> None:
        self.info = info
        self.commands: list[str] = []
        self.is_lost = False
        self.is_deaf = False
        """It takes commands and never answers: a machine that hangs."""
        self._cluster = cluster
        self._alive: dict[int, tuple[int, Member, str]] = {}
        self._has_store = False
        self._ended: set[int] = set()
        self._pending_stop: int | None = None

    @property
    def alive_ranks(self) -> set[int]:
        return set(self._alive)

    def alive_ranks_end(self) -> None:
        """Without a word: nobody listens to this node any more."""
        self._alive.clear()

    def open_store(self, attempt: int) -> None:
        self.commands.append(f"open_store {attempt}")
        if not self._answers():
            return
        self._has_store = True
        self._cluster.put(
            StoreOpened(attempt, self.info.node_id, StoreAddress(self.info.addr, self._cluster.next_port()))
        )

    def start_ranks(self, plan: AttemptPlan) -> None:
        self.commands.append(f"start_ranks {plan.attempt}")
        if not self._answers():
            return
        members = plan.world.members_of(self.info.node_id)
        if any(self._cluster.behave(plan.attempt, member) == "unstartable" for member in members):
            self._cluster.put(NodeFailed(plan.attempt, self.info.node_id, "no processes left", self._cluster.now()))
            return
        for member in members:
            self._alive[member.rank] = (plan.attempt, member, self._cluster.behave(plan.attempt, member))
        pids = tuple(1000 + member.rank for member in members)
        self._cluster.put(RanksStarted(plan.attempt, self.info.node_id, pids, self._cluster.now()))
        for rank, (_, _, behaviour) in sorted(self._alive.items()):
            self._run(rank, behaviour)

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        self.commands.append(f"stop_attempt {attempt} {grace_s:g} {signal.Signals(signum).name}")
        if not self._answers() or attempt in self._ended:
            return
        for rank, (_, _, behaviour) in sorted(self._alive.items()):
            if grace_s == 0:
                self.exit(rank, ExitStatus(signum=int(signal.SIGKILL)))
            elif behaviour != "stubborn":
                self.exit(rank, ExitStatus(signum=int(signum)))
        if not self._alive:
            self._ended.add(attempt)
            self._has_store = False
            self._cluster.put(AttemptEnded(attempt, self.info.node_id))
            if self.info.node_id not in self._cluster.keep_output:
                self._cluster.put_log(OutputEnded(attempt, self.info.node_id))

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        self.commands.append(f"take_stacks {attempt} {look}" + (" final" if is_final else ""))
        if self._answers() and self._alive:
            stacks = tuple(RankStack(rank, (f"{word} (train.py:1)",)) for rank, (_, _, word) in self._alive.items())
            self._cluster.put(StacksTaken(attempt, self.info.node_id, look, stacks, is_final))

    def exit(self, rank: int, status: ExitStatus) -> None:
        """The rank ends; a test's way to let something happen."""
        attempt, member, _ = self._alive.pop(rank)
        where = (attempt, self.info.node_id, rank, member.local_rank, 1000 + rank)
        logs = (f"/run/rank_{rank}/stdout.log", f"/run/rank_{rank}/stderr.log")
        self._cluster.put(RankExited(*where, status, self._cluster.now(), *logs))

    def _run(self, rank: int, behaviour: str) -> None:
        word, _, argument = behaviour.partition(" ")
        member = self._alive[rank][1]
        match word:
            case "print":
                if self._cluster.spec.logs.shown(rank, member.local_rank):
                    data = argument.encode() + b"\n"
                    self._cluster.put_log(LogChunk(rank, member.local_rank, Stream.STDOUT, data))
                self.exit(rank, ExitStatus(code=0))
            case "succeed":
                self.exit(rank, ExitStatus(code=0))
            case "fail":
                self.exit(rank, ExitStatus(code=int(argument)))
            case "die":
                self.exit(rank, ExitStatus(signum=int(argument)))

    def _answers(self) -> bool:
        return not (self.is_lost or self.is_deaf or self._cluster.is_closed)


class FakeCluster:
    description = "a fake cluster"

    def __init__(self, num_nodes: int = 2, behave: Behave | None = None) -> None:
        self.nodes: dict[str, FakeNode] = {}
        self.is_closed = False
        self._num_nodes = num_nodes
        self._num_made = 0
        self.keep_output: set[str] = set()
        """Nodes from which what ranks wrote last does not come."""
        self._behave = behave
        self._port = 30000
        self._now_s = 1_000_000.0

    def behave(self, attempt: int, member: Member) -> str:
        if self._behave is not None:
            return self._behave(attempt, member)
        return " ".join([self.spec.program.target, *self.spec.program.args])

    def now(self) -> float:
        """Every fact a millisecond after the one before."""
        self._now_s += 0.001
        return self._now_s

    def next_port(self) -> int:
        self._port += 1
        return self._port

    def put(self, event: object) -> None:
        if not self.is_closed:
            self._sink.put(event)  # type: ignore[arg-type]

    def put_log(self, output: LogChunk | OutputEnded) -> None:
        if not self.is_closed:
            self._sink.put_log(output)

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        if spec.min_nodes > self._num_nodes:
            raise RequestRefused(f"{spec.min_nodes} nodes asked for, {self._num_nodes} there", advice="ask for fewer")
        self.spec, self._sink = spec, sink

    def acquire(self, keep: tuple[str, ...]) -> None:
        self.nodes = {node_id: node for node_id, node in self.nodes.items() if node_id in keep}
        while len(self.nodes) < min(self._num_nodes, self.spec.max_nodes):
            node_id = f"node{self._num_made}"
            self._num_made += 1
            info = NodeInfo(node_id, f"host-{node_id}", f"10.0.0.{self._num_made}", self.spec.nproc_per_node)
            self.nodes[node_id] = FakeNode(info, self)
        self.put(NodesReady(tuple(node.info for node in self.nodes.values())))

    def node(self, node_id: str) -> FakeNode:
        return self.nodes[node_id]

    def let_go(self, node_id: str) -> None:
        self.nodes[node_id].is_lost = True
        self.nodes[node_id].alive_ranks_end()

    def lose(self, node_id: str) -> None:
        """The node goes down with all that runs on it."""
        self.nodes[node_id].is_lost = True
        self.put(NodeLost(node_id, "the power failed", self.now()))

    def close(self) -> None:
        self.is_closed = True
