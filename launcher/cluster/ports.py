"""The doors between the controller and the world: where nodes come from, what a node can be told, time, the journal.

`cluster/local.py`, `cluster/ray.py` and `tests/fakes/cluster.py` implement Cluster and NodeHandle; all pass
tests/contracts/test_cluster_contract.py.

The conversation is one-way on both sides, so that the controller's loop never waits: commands return at once, whatever comes of them
arrives as an event in the sink.
"""

from __future__ import annotations

from typing import Protocol

from launcher.gang.events import AttemptPlan, Event, Output
from launcher.spec import JobSpec


class EventSink(Protocol):
    """Where a cluster puts what happens. Any thread may call it."""

    def put(self, event: Event) -> None:
        """Hands over one event. Never blocks. Events of one node keep their order."""
        ...

    def put_log(self, output: Output) -> None:
        """Hands over shown output: LogChunks, then for each node and ended attempt one OutputEnded. Blocks while the terminal is slow:
        that is the back-pressure, and the caller stops reading the rank's file until it returns. Call it from a thread that nothing else
        waits for, never from one that delivers events."""
        ...


class NodeHandle(Protocol):
    """One acquired node. No method blocks or raises; what fails becomes NodeFailed or NodeLost."""

    def open_store(self, attempt: int) -> None:
        """Answered by StoreOpened or NodeFailed."""
        ...

    def start_ranks(self, plan: AttemptPlan) -> None:
        """Starts this node's ranks of the plan. Answered by RanksStarted or NodeFailed, later by a RankExited for each rank started."""
        ...

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        """Sends `signum` to each rank's main process alone, after the grace SIGKILL to all that is left (0: at once, and no `signum`).
        Unless they `can_save`, ranks that use `launcher.preemption` get SIGKILL at once: they would wait for ranks that are dead.
        Answered by exactly one AttemptEnded (after every RankExited), or NodeLost. A second call before that sends no `signum` again, it
        can only shorten the grace. On the logs' road an OutputEnded follows, when all shown output of the attempt has been handed on."""
        ...

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        """Looks where the ranks that are alive here stand. Answered by StacksTaken, or not at all if none is alive. `is_final`: with
        native frames as well, in files."""
        ...


class Cluster(Protocol):
    """Where nodes come from."""

    description: str
    """For people: `this machine`, `Ray cluster at 10.0.0.1:6379`."""

    def open(self, spec: JobSpec, run_dir: str, sink: EventSink) -> None:
        """Once, first. Raises LauncherError when there is no such cluster. `run_dir` exists on the launcher's machine; on other nodes the
        cluster makes one of the same path where it can."""
        ...

    def acquire(self, keep: tuple[str, ...]) -> None:
        """Asks for min_nodes to max_nodes nodes with an agent on each, all or none, keeping those named and letting go of all others.
        Returns at once. Answered by any number of PlacementWaiting, then NodesReady (all held nodes; the order is the order of node ranks
        for newcomers, stable from attempt to attempt) or PlacementRefused, after which nothing is held.

        From then on, until there are max_nodes and spare_nodes of them, further nodes come with NodeJoined as they can be had, each under
        an id that no node had before; and a held node that is told to leave is a NodeDraining, once."""
        ...

    def node(self, node_id: str) -> NodeHandle:
        """The handle of a node named in the last NodesReady. Also for lost nodes: their commands then do nothing."""
        ...

    def let_go(self, node_id: str) -> None:
        """Ends, without grace and without waiting for it, whatever runs on this node, which is not ours any more: nothing of it enters the
        sink from now on. Returns at once."""
        ...

    def close(self) -> None:
        """Ends whatever is still alive on the nodes, without grace, and gives everything back. Blocks, at most some seconds; idempotent;
        also after a failed `open`, and while `acquire` is under way (it is abandoned). After it returns nothing enters the sink."""
        ...


class Clock(Protocol):
    """Time. The only source of it for controller and machine."""

    def monotonic_s(self) -> float:
        """For deadlines. Never goes back."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, for people and for comparing nodes."""
        ...


class Journal(Protocol):
    """The job's memory: every event and action, in order."""

    def record(self, entry: object) -> None:
        """Appends one dataclass under its class name. Never raises: a full disk is said once and the job goes on."""
        ...

    def close(self) -> None: ...
