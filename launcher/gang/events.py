"""What happened (facts, in the past tense) and what shall be done (actions, as imperatives): all that passes between machine and shell.

Facts come from a cluster or its node agents, through an EventSink, into `gang.machine.step`. Actions come out of it and are carried out by
the controller. All are frozen, picklable (they cross machines) and journalled under their class name. `at_s` is wall-clock time of the node
where the fact happened, so that failures on different nodes can be put in order (as well as the nodes' clocks agree).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from launcher.errors import EXIT_SIGNAL_BASE
from launcher.exclusion import Cause
from launcher.gang.observations import NodeProgress, StacksTaken
from launcher.gang.world import NodeInfo, World
from launcher.spec import Stream

NOT_JOURNALLED = {"journal": False}
"""For fields that are long and kept elsewhere."""

# --- values ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: by an exit code or by a signal, exactly one of them set."""

    code: int | None = None
    signum: int | None = None

    def __post_init__(self) -> None:
        assert (self.code is None) != (self.signum is None), f"an exit status is a code or a signal, not {self}"

    @property
    def is_success(self) -> bool:
        return self.code == 0

    @property
    def exit_code(self) -> int:
        """What a shell would say: the code, or 128 + signal number.

        >>> ExitStatus(code=3).exit_code, ExitStatus(signum=9).exit_code
        (3, 137)
        """
        return self.code if self.code is not None else EXIT_SIGNAL_BASE + (self.signum or 0)

    def __str__(self) -> str:
        """
        >>> str(ExitStatus(code=3)), str(ExitStatus(signum=9))
        ('exit code 3', 'signal 9 (SIGKILL)')
        """
        if self.signum is None:
            return f"exit code {self.code}"
        try:
            return f"signal {self.signum} ({signal.Signals(self.signum).name})"
        except ValueError:
            return f"signal {self.signum}"


@dataclass(frozen=True)
class ExceptionRecord:
    """The Python exception that ended a rank, as the rank's runner (or torch's `@record`) wrote it down."""

    type_name: str
    message: str
    traceback: str
    """As the interpreter would print it, with all chained causes; ends with a newline."""
    at_s: float


@dataclass(frozen=True)
class StoreAddress:
    """Where the attempt's TCPStore listens: MASTER_ADDR and MASTER_PORT."""

    host: str
    port: int


@dataclass(frozen=True)
class AttemptPlan:
    """All that an agent needs to start its ranks of one attempt, besides the JobSpec that it has."""

    attempt: int
    world: World
    store: StoreAddress


# --- facts that move the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodesReady:
    """The cluster holds these nodes for us, all of the gang's, and an agent answers on each."""

    nodes: tuple[NodeInfo, ...]


@dataclass(frozen=True)
class PlacementRefused:
    """The request cannot be met: never, or not before the deadline."""

    reason: str
    advice: str = ""


@dataclass(frozen=True)
class StoreOpened:
    """The store's port is bound and listening; it answers as soon as its host is up."""

    attempt: int
    node_id: str
    address: StoreAddress


@dataclass(frozen=True)
class RanksStarted:
    """All ranks of this node run. `pids` in order of local rank."""

    attempt: int
    node_id: str
    pids: tuple[int, ...]
    at_s: float


@dataclass(frozen=True)
class RankExited:
    """A rank's main process ended, well or badly."""

    attempt: int
    node_id: str
    rank: int
    local_rank: int
    pid: int
    status: ExitStatus
    at_s: float
    stdout_log: str = ""
    """Paths on the node; where the rank's whole output is."""
    stderr_log: str = ""
    exception: ExceptionRecord | None = None
    last_lines: str = ""
    """The end of standard error, for a rank that left no exception (a signal, a program that is not Python)."""
    cause: str = ""
    """What the node knows besides: that the kernel killed it for memory, where in native code it crashed, which thread raised."""
    out_of_memory: bool = False
    """The kernel killed it, or a process of its own, because memory ran out."""
    steps: int | None = None
    """Optimizer steps that it made in this attempt. None: none that we saw (no optimizer, or not one step)."""
    was_told: bool = False
    """It was told to stop, with time to save, before it ended, and does not use `launcher.preemption`, which says what its end means."""


@dataclass(frozen=True)
class NodeFailed:
    """An agent could not do its part in this attempt: start a process, open the port, keep the store's host alive."""

    attempt: int
    node_id: str
    reason: str
    at_s: float


@dataclass(frozen=True)
class AttemptEnded:
    """Answer to StopAttempt, exactly one: no process of the attempt is alive on this node. (Its last output may still be on its way,
    behind a slow terminal: see OutputEnded.)"""

    attempt: int
    node_id: str


@dataclass(frozen=True)
class NodeLost:
    """A node is gone: its agent has died or has not been heard of in time. Nothing more will be heard of it."""

    node_id: str
    reason: str
    at_s: float


@dataclass(frozen=True)
class NodeJoined:
    """One more node is held and its agent answers: a spare, until the gang has use for it."""

    node: NodeInfo


@dataclass(frozen=True)
class NodeDraining:
    """A held node was told to leave (a spot notice, a drain by the cluster, SIGTERM to its pod). It still works."""

    node_id: str
    reason: str
    deadline_in_s: float | None
    """It is gone after so many seconds; None: nobody says when."""
    at_s: float


@dataclass(frozen=True)
class RankHung:
    """The job does not get on, and will not: `gang.health` has decided so. Its ranks are alive."""

    attempt: int
    node_id: str
    rank: int | None
    """Whose doing it is; None: nobody stands out."""
    reason: str
    at_s: float
    may_restart: bool = True
    """False: the user wants the job ended (`--on-hang stop`)."""


@dataclass(frozen=True)
class StopRequested:
    """The launcher's own process was sent this signal."""

    signum: int


@dataclass(frozen=True)
class Tick:
    """Time has passed: the deadline that the state had asked for is reached."""


Fact = (
    NodesReady
    | PlacementRefused
    | StoreOpened
    | RanksStarted
    | RankExited
    | NodeFailed
    | AttemptEnded
    | NodeLost
    | NodeJoined
    | NodeDraining
    | RankHung
    | StopRequested
    | Tick
)

# --- notices: journalled and shown, but the machine does not move -----------------------------------------------------------------------


@dataclass(frozen=True)
class PlacementWaiting:
    """The request could be met later (autoscaler, other jobs); why we wait and until when. Repeat it calmly."""

    reason: str
    deadline_in_s: float


@dataclass(frozen=True)
class CacheServing:
    """A cache daemon serves this node's ranks."""

    node_id: str
    socket: str
    pid: int
    already_running: bool
    resident_bytes: int
    capacity_bytes: int
    peer_address: str = ""
    """Where the daemons of other nodes reach it, HOST:PORT; empty: they do not."""


@dataclass(frozen=True)
class CacheFailed:
    """No cache on this node (any more): its ranks read the origin directly."""

    node_id: str
    reason: str


@dataclass(frozen=True)
class FabricSurveyed:
    """A node has looked at its GPUs, its network and its limits (`launcher.fabric`)."""

    node_id: str
    facts: str = field(metadata=NOT_JOURNALLED)
    """As JSON, for `launcher.fabric.codec`; empty if there are none. Kept in the run directory, so not in the journal."""
    user_env: tuple[tuple[str, str], ...] = field(default=(), metadata=NOT_JOURNALLED)
    """What of the ranks' inherited environment bears on the fabric."""
    took_s: float = 0.0
    problem: str = ""
    """Why there are no facts."""


@dataclass(frozen=True)
class TransportSeen:
    """What the NCCL logs of a node's ranks prove about the network that carries this attempt. Again when more is seen."""

    attempt: int
    node_id: str
    hostname: str
    expected: str
    """What the node's hardware promises: infiniband, roce, efa, socket."""
    version: str | None
    network: str | None
    channels: tuple[tuple[str, int], ...]
    """Channels of all ranks by how they are connected: ("NET/IB/GDRDMA", 32), ("P2P", 64)."""
    devices: tuple[str, ...] = ()
    without_gdr: tuple[str, ...] = ()
    """RDMA devices for which GPUDirect is off."""


@dataclass(frozen=True)
class FabricFound:
    """Something is wrong with the machines or the network between them; the page in the run directory says more."""

    severity: str
    """WARNING or ERROR."""
    id: str
    hosts: tuple[str, ...]
    evidence: str
    cure: str


@dataclass(frozen=True)
class ModulesLearnt:
    """A rank of this node has imported these installed modules."""

    node_id: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Notice:
    """Something that a person should read once, in a sentence, with its advice. `node_id` None: the launcher itself."""

    text: str
    node_id: str | None = None


Notices = PlacementWaiting | CacheServing | CacheFailed | FabricFound | Notice


@dataclass(frozen=True)
class ClusterLost:
    """What the nodes came from is gone: nothing can be started or replaced any more. The job ends; there is nothing to decide."""

    reason: str


Event = Fact | Notices | ModulesLearnt | FabricSurveyed | TransportSeen | NodeProgress | StacksTaken | ClusterLost


@dataclass(frozen=True)
class LogChunk:
    """Output of a rank that the terminal shows: whole lines, or pieces that end in a carriage return; never part of a UTF-8 character.

    The last chunk of a stream may lack its newline. Not an Event: it is not journalled, and it is subject to back-pressure.
    """

    rank: int
    local_rank: int
    stream: Stream
    """STDOUT or STDERR."""
    data: bytes


@dataclass(frozen=True)
class OutputEnded:
    """Comes last on the logs' road, after the last LogChunk of this attempt from this node. Not an Event, for the same reason."""

    attempt: int
    node_id: str


Output = LogChunk | OutputEnded

# --- actions --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AcquireNodes:
    """Ask the cluster for nodes. `keep` are held already and shall stay. Answered by NodesReady (the kept ones included)
    or PlacementRefused."""

    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenStore:
    """On this node, bind a port and host a fresh TCPStore. Answered by StoreOpened or NodeFailed."""

    attempt: int
    node_id: str


@dataclass(frozen=True)
class StartRanks:
    """On every node of the plan at once; answered by RanksStarted or NodeFailed from each."""

    plan: AttemptPlan


@dataclass(frozen=True)
class LetGo:
    """Of this node, at once: it is taken for lost though its agent may live, and what runs there must not go on."""

    node_id: str


@dataclass(frozen=True)
class StopAttempt:
    """On this node, send `signum` to the attempt's ranks, after `grace_s` SIGKILL to all that is left of it; again with a shorter grace:
    hurry. Without grace, SIGKILL is all that they get.

    Answered by exactly one AttemptEnded, also if the node never started anything.
    """

    attempt: int
    node_id: str
    grace_s: float
    signum: int
    """What the launcher was sent itself, so that Ctrl-C is a KeyboardInterrupt in the script; SIGTERM after a failure."""
    can_save: bool = False
    """True: all ranks live, so those that use `launcher.preemption` may agree on a step and save. False: one has failed, there is nobody
    to agree with, and those are killed at once, for they do not die of the signal."""


@dataclass(frozen=True)
class Announce:
    """Tell the user (and the journal): a decision with its reason."""

    text: str


@dataclass(frozen=True)
class ReportFailure:
    """Tell the user, at once, that the attempt has failed, by this."""

    attempt: int
    failure: Failure
    consequence: str
    """What happens now, in a sentence; empty when nothing has to."""


@dataclass(frozen=True)
class ReportCollateral:
    """Tell the user, once everything has stopped, what else ended badly; and the root cause, if it is not what was reported first."""

    attempt: int
    root: Failure
    is_new_root: bool
    collateral: tuple[Failure, ...]


@dataclass(frozen=True)
class BlameNode:
    """Remember, also for later jobs, that this node is to blame."""

    host: str
    cause: Cause
    reason: str


@dataclass(frozen=True)
class Finish:
    """The job is over; release everything and end with this code."""

    exit_code: int
    reason: str


Action = (
    AcquireNodes
    | OpenStore
    | StartRanks
    | StopAttempt
    | LetGo
    | Announce
    | ReportFailure
    | ReportCollateral
    | BlameNode
    | Finish
)
Failure = RankExited | NodeFailed | NodeLost | RankHung
"""What can make an attempt fail. All have `at_s`."""
