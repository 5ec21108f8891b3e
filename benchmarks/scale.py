"""How long does the launcher take to plan, start and restart a gang of a thousand nodes?

    python -m benchmarks.scale                          # 1,024 nodes of 8 ranks; writes benchmarks/results/
    python -m benchmarks.scale --nodes 64 --dry         # prints only
    python -m benchmarks.scale --profile                # where the time goes

The real controller, machine, journal and console; the nodes are simulated: each answers every command at once, in the same process. So
what is measured is the launcher's own part, from the moment at which it knows to the moment at which the last node has been told:

- plan: from the tables of the cluster to the decision that the gang fits, and its order;
- start: from `NodesReady` until the last node has been told to start its ranks;
- reaction: from a rank's exit until the last node has been told to stop;
- again: from the last node's `AttemptEnded` until the last node has been told to start (after every rank has ended, told by an event each);
- loss: the same reaction, for a node that is lost, and `loss, again` with a spare in its place;
- environment: what one agent needs to work out the environment of its ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import resource
import shlex
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import hardware, versions
from launcher.cluster.ports import EventSink
from launcher.cluster.ray.parcel import Packer, unpack
from launcher.console import Console
from launcher.controller import Controller, SystemClock
from launcher.gang import rank_env
from launcher.gang.events import (
    AttemptEnded,
    AttemptPlan,
    ExitStatus,
    NodeLost,
    NodesReady,
    OutputEnded,
    RankExited,
    RanksStarted,
    StoreAddress,
    StoreOpened,
)
from launcher.gang.offers import CPU, GPU, GangRequest, NodeOffer
from launcher.gang.placement import Placement, place
from launcher.gang.rank_env import RankPlaces
from launcher.gang.world import NodeInfo, World
from launcher.journal import FileJournal
from launcher.spec import JobSpec, Program, ProgramKind, RestartBudget

RESULT = Path(__file__).parent / "results" / "scale_2cores_202611.md"
PATIENCE_S = 600.0
RANKS_PER_NODE = 8
PHASES = (
    "plan",
    "start",
    "reaction",
    "every rank has ended",
    "again",
    "loss",
    "loss, again",
    "environment",
    "plan, packed",
)


@dataclass
class Told:
    """Which nodes have been told something of an attempt, and when the first and the last of them were."""

    num_expected: int
    num: int = 0
    at_s: float = 0.0
    is_all: threading.Event = field(default_factory=threading.Event)

    def one_more(self) -> None:
        self.num += 1
        if self.num == self.num_expected:
            self.at_s = time.perf_counter()
            self.is_all.set()


class SimulatedNode:
    """A node's agent that answers at once."""

    def __init__(self, info: NodeInfo, cluster: SimulatedCluster) -> None:
        self.info = info
        self.is_lost = False
        self._cluster = cluster
        self._plan: AttemptPlan | None = None

    def open_store(self, attempt: int) -> None:
        self._cluster.sink.put(StoreOpened(attempt, self.info.node_id, StoreAddress(self.info.addr, 29500)))

    def start_ranks(self, plan: AttemptPlan) -> None:
        self._plan = plan
        pids = tuple(range(1000, 1000 + self.info.num_ranks))
        self._cluster.sink.put(RanksStarted(plan.attempt, self.info.node_id, pids, time.time()))
        self._cluster.started[plan.attempt].one_more()

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        self._cluster.stopped[attempt].one_more()

    def share_cache(self, addresses: tuple[str, ...]) -> None:
        pass

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        pass

    def end_all(self, attempt: int, but: int = -1) -> None:
        """Its ranks die of the signal, then nothing is alive."""
        assert self._plan is not None
        sink = self._cluster.sink
        for member in self._plan.world.members_of(self.info.node_id):
            if member.rank != but:
                sink.put(rank_exited(attempt, self.info, member.rank, member.local_rank, signal.SIGTERM))
        sink.put(AttemptEnded(attempt, self.info.node_id))
        sink.put_log(OutputEnded(attempt, self.info.node_id))


class SimulatedCluster:
    """Nodes are entries in a table."""

    description = "a simulated cluster"

    def __init__(self, num_nodes: int, num_spares: int) -> None:
        infos = [node_info(idx) for idx in range(num_nodes + num_spares)]
        self.nodes = {info.node_id: SimulatedNode(info, self) for info in infos}
        self.sink: EventSink
        self.is_open = threading.Event()
        self.started = {attempt: Told(num_nodes) for attempt in range(3)}
        self.stopped = {0: Told(num_nodes), 1: Told(num_nodes - 1), 2: Told(num_nodes)}

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        self.sink = sink

    def acquire(self, keep: tuple[str, ...]) -> None:
        self.is_open.set()

    def node(self, node_id: str) -> SimulatedNode:
        return self.nodes[node_id]

    def let_go(self, node_id: str) -> None:
        self.nodes[node_id].is_lost = True

    def close(self) -> None:
        pass


def node_info(idx: int) -> NodeInfo:
    """Like a node of a Kubernetes cluster: long ids and names, a rack."""
    rack = ("topology.kubernetes.io/rack", f"rack-{idx // 16:03d}")
    address = f"10.{idx // 65536}.{idx // 256 % 256}.{idx % 256}"
    return NodeInfo(f"{idx:056x}#{idx}", f"training-worker-group-{idx:05d}", address, RANKS_PER_NODE, (rack,))


def rank_exited(attempt: int, info: NodeInfo, rank: int, local_rank: int, signum: int) -> RankExited:
    directory = f"/runs/job/attempt_{attempt}/rank_{rank}"
    logs = (f"{directory}/stdout.log", f"{directory}/stderr.log")
    return RankExited(
        attempt, info.node_id, rank, local_rank, 1000 + local_rank, ExitStatus(signum=signum), time.time(), *logs
    )


def run(num_nodes: int, directory: str) -> dict[str, float]:
    """Seconds of each phase, of one run; the controller in a thread of its own, as events come from others."""
    took = {"plan": plan_s(num_nodes)}
    program = Program(ProgramKind.SCRIPT, "train.py")
    budget = RestartBudget(max_restarts=10)
    spec = JobSpec(
        program, num_nodes, num_nodes, RANKS_PER_NODE, restarts=budget, spare_nodes=1, shutdown_timeout_s=60.0
    )
    cluster = SimulatedCluster(num_nodes, 1)
    run_dir = tempfile.mkdtemp(dir=directory)
    clock = SystemClock()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    console = Console(spec.line_prefix, nowhere, nowhere)
    journal = FileJournal(os.path.join(run_dir, "journal.jsonl"), clock, console.say)
    controller = Controller(spec, cluster, run_dir, journal, console, clock)
    thread = threading.Thread(target=controller.run, name="controller")
    thread.start()
    try:
        _drive(cluster, num_nodes, took)
    finally:
        thread.join(PATIENCE_S)
        journal.close()
        console.close()
        os.close(nowhere)
    return took


def _drive(cluster: SimulatedCluster, num_nodes: int, took: dict[str, float]) -> None:
    nodes = list(cluster.nodes.values())
    world = World(tuple(node.info for node in nodes[:num_nodes]))
    assert cluster.is_open.wait(PATIENCE_S)
    began_s = time.perf_counter()
    cluster.sink.put(NodesReady(tuple(node.info for node in nodes)))
    took["start"] = _until(cluster.started[0], began_s)

    failed = world.member(world.world_size // 2)
    began_s = time.perf_counter()
    cluster.sink.put(rank_exited(0, failed.node, failed.rank, failed.local_rank, signal.SIGKILL))
    took["reaction"] = _until(cluster.stopped[0], began_s)

    began_s = time.perf_counter()
    for node in nodes[1:num_nodes]:
        node.end_all(0, but=failed.rank)
    _settle(cluster)
    took["every rank has ended"] = time.perf_counter() - began_s
    began_s = time.perf_counter()
    nodes[0].end_all(0, but=failed.rank)
    took["again"] = _until(cluster.started[1], began_s)

    began_s = time.perf_counter()
    cluster.sink.put(NodeLost(nodes[1].info.node_id, "the power failed", time.time()))
    took["loss"] = _until(cluster.stopped[1], began_s)
    for node in nodes[2:num_nodes]:
        node.end_all(1)
    _settle(cluster)
    began_s = time.perf_counter()
    nodes[0].end_all(1)
    took["loss, again"] = _until(cluster.started[2], began_s)

    plan = AttemptPlan(2, World(tuple(node.info for node in nodes[:num_nodes])), StoreAddress("10.0.0.1", 29500))
    took["environment"] = environment_s(plan)
    took["plan, packed"] = packed_s(plan)
    for node in [*nodes[:1], *nodes[2:]]:
        for member in node._plan.world.members_of(node.info.node_id) if node._plan else ():
            where = (2, node.info.node_id, member.rank, member.local_rank, 1000 + member.local_rank)
            cluster.sink.put(RankExited(*where, ExitStatus(code=0), time.time()))
    assert cluster.stopped[2].is_all.wait(PATIENCE_S), "the job does not end"
    for node in [*nodes[:1], *nodes[2:]]:
        cluster.sink.put(AttemptEnded(2, node.info.node_id))
        cluster.sink.put_log(OutputEnded(2, node.info.node_id))


def _until(told: Told, began_s: float) -> float:
    assert told.is_all.wait(PATIENCE_S), f"only {told.num} of {told.num_expected} nodes were told"
    return told.at_s - began_s


def _settle(cluster: SimulatedCluster) -> None:
    """Until the controller has dealt with all events."""
    events = cluster.sink._events  # type: ignore[attr-defined]
    while not events.empty():
        time.sleep(0.001)
    time.sleep(0.02)


def plan_s(num_nodes: int) -> float:
    """From Ray's tables to the decision and the world's order."""
    amounts = {CPU: 64.0, GPU: float(RANKS_PER_NODE)}
    offers = [
        NodeOffer(f"{idx:056x}", f"training-worker-group-{idx:05d}", amounts, amounts) for idx in range(num_nodes + 1)
    ]
    request = GangRequest(num_nodes, num_nodes, RANKS_PER_NODE, {CPU: 1.0, GPU: 1.0})
    began_s = time.perf_counter()
    answer = place(request, offers, [], may_join=False)
    took_s = time.perf_counter() - began_s
    assert isinstance(answer, Placement), answer
    return took_s


def environment_s(plan: AttemptPlan) -> float:
    """One agent's part: its copy of the plan, and the environment of its ranks."""
    data = Packer().pack(plan)
    spec = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), nproc_per_node=RANKS_PER_NODE)
    began_s = time.perf_counter()
    mine = unpack(data)
    for member in mine.world.members_of(mine.world.nodes[-1].node_id):
        rank_env.settings(spec, mine, member, RankPlaces("/runs/job", "/runs/job/error.json"), {})
    return time.perf_counter() - began_s


def packed_s(plan: AttemptPlan) -> float:
    """What is sent to each node over Ray, made ready for all of them."""
    packer = Packer()
    began_s = time.perf_counter()
    for _ in plan.world.nodes:
        packer.pack(plan)
    return time.perf_counter() - began_s


def render(
    found: list[dict[str, float]], num_nodes: int, command: str, load: str, peak_mib: float, journal: str
) -> str:
    """The report in Markdown."""
    rows = []
    for phase in PHASES:
        times = sorted(run[phase] for run in found)
        rows.append(f"| {phase} | {statistics.median(times):.3f} | {times[0]:.3f} to {times[-1]:.3f} |")
    return (
        f"# {num_nodes} nodes of {RANKS_PER_NODE} ranks\n\n"
        "Question: how much of a start and of a restart of a large gang is the launcher's own part?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('railhead',))}\n"
        f"- Command: `{command}`; {len(found)} runs, medians, and least to most. Nodes are simulated, in the launcher's process and at no "
        "cost; what Ray needs for its messages is not in it.\n"
        f"- Memory: {peak_mib:.0f} MiB at most, for launcher and simulated nodes together.\n\n"
        "| phase | seconds | spread |\n|---|---|---|\n" + "\n".join(rows) + f"\n\n{journal}"
    )


LEGEND = """\
- **plan**: the decision that the gang fits, from the tables of the cluster
- **start**: from `NodesReady` until the last node was told to start its ranks (the store's port and the order of the ranks are in it)
- **reaction**: from a rank's exit until the last node was told to stop
- **every rank has ended**: all other ranks tell their exit, all nodes but one that nothing is alive: what is done with those events
- **again**: from the last of them until the last node was told to start
- **loss**, **loss, again**: the same for a node that is lost, with a spare
- **environment**: one agent's part: reading the plan, the environment of its ranks
- **plan, packed**: what goes over Ray, made ready for every node
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print the result, do not write it")
    parser.add_argument("--profile", action="store_true", help="one run; print where the launcher's time goes")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        if args.profile:
            with _profile():
                print(run(args.nodes, directory))
            return
        found = []
        for number in range(args.runs):
            found.append(run(args.nodes, directory))
            told = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in found[-1].items())
            print(f"run {number}: {told}", flush=True)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    command = shlex.join(["python", "-m", "benchmarks.scale", *sys.argv[1:]])
    text = render(found, args.nodes, command, f"{before:.1f}, {os.getloadavg()[0]:.1f}", peak_mib, LEGEND)
    print(text)
    if not args.dry:
        RESULT.write_text(text)
        print(f"written to {RESULT}")


@contextlib.contextmanager
def _profile() -> Iterator[None]:
    """Of all threads: the controller is not the main one."""
    profiler = cProfile.Profile()
    threading.setprofile(lambda *_: profiler.enable())
    try:
        yield
    finally:
        threading.setprofile(None)
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(35)


if __name__ == "__main__":
    main()
