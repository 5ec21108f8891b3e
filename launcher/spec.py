"""One description of a job, frozen and checked when it is built. Everything the user can ask for is here and nothing else decides it.

Built by `launcher.options` from flags and `PET_*` variables; printed, compared, journalled and (later) rendered as a manifest. It does not
know where the job runs: a Cluster does.
"""

from __future__ import annotations

import enum
import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.errors import SpecError

DEFAULT_SHUTDOWN_TIMEOUT_S = 30.0
DEFAULT_PLACE_TIMEOUT_S = 300.0
DEFAULT_GROW_DELAY_S = 30.0
DEFAULT_HEARTBEAT_TIMEOUT_S = 4.0
MIN_HEARTBEAT_TIMEOUT_S = 2.0
DEFAULT_MAX_PREEMPTIONS = 1000
DEFAULT_CRASH_LOOP = 10
MAX_PROCS_PER_NODE = 1024
"""No machine has so many accelerators; a mistyped number must not fill a shared machine with processes."""
BINDINGS = ("auto", "numa", "none")
"""What `--bind` takes."""
CACHE_PEERS = ("auto", "off")
"""What `--cache-peers` takes."""
DEFAULT_LINE_PREFIX = "[rank${rank}] "


class ProgramKind(enum.Enum):
    """How a rank's program is started."""

    SCRIPT = "script"
    """A Python file (or a directory or zip with `__main__.py`), as `python -u FILE` would run it."""
    MODULE = "module"
    """A Python module, as `python -u -m NAME` would run it."""
    EXECUTABLE = "executable"
    """Anything that can be executed, found on PATH (`--no-python`)."""


class StartMethod(enum.Enum):
    """How a rank's process is made (`--start-method`)."""

    FORK_SERVER = "forkserver"
    """Python programs are forked from a process that has imported torch; what cannot be forked is spawned."""
    SPAWN = "spawn"
    """A fresh interpreter for each."""


class ProgressDisplay(enum.Enum):
    """What is said of a job's progress while it runs (`--show-progress`)."""

    AUTO = "auto"
    """LIVE on a terminal, else PLAIN."""
    LIVE = "live"
    """One line at the bottom of the terminal, painted over; PLAIN where there is none."""
    PLAIN = "plain"
    """A sentence when its pace is known, when it trains again after a restart, and every few minutes."""
    OFF = "off"


class OnHang(enum.Enum):
    """What follows when a job does not get on (`--on-hang`)."""

    RESTART = "restart"
    """As after a failure: a new attempt, if the budget has one."""
    STOP = "stop"
    """The job ends."""
    REPORT = "report"
    """It is said, with stacks, and left alone."""


class SecondSignal(enum.Enum):
    """What a signal means that comes while ranks are being stopped for another (`--second-signal`)."""

    KILL = "kill"
    """Whatever is left is killed at once."""
    FORWARD = "forward"
    """Ranks get it too, if it is one that they have not had; the grace goes on from the first."""
    IGNORE = "ignore"
    """Nothing: the grace alone decides (for schedulers that repeat themselves)."""


class Stream(enum.IntFlag):
    """Standard streams of a rank, with torchrun's numbers (`-r 3` means both)."""

    NONE = 0
    STDOUT = 1
    STDERR = 2
    BOTH = 3


@dataclass(frozen=True)
class Program:
    """What each rank runs."""

    kind: ProgramKind
    target: str
    """File, module name or executable, as the user wrote it; relative paths are relative to `JobSpec.cwd`."""
    args: tuple[str, ...] = ()
    """Passed on untouched, except that `${local_rank}` becomes the local rank, as torchrun does."""
    python: str = ""
    """Interpreter for SCRIPT and MODULE. Empty: the one that runs the agent (PYTHON_EXEC, if the user set it, goes here)."""

    def __post_init__(self) -> None:
        if not self.target:
            raise SpecError("no program to run", advice="name a script: python -m launcher [options] train.py [args]")


@dataclass(frozen=True)
class Resources:
    """What one rank needs of its node. Only a Ray cluster reserves anything; on this machine they are checked, not reserved."""

    cpus_per_proc: float | None = None
    """CPUs per rank. None: the cluster's own default (Ray: 1)."""
    gpus_per_proc: float | None = None
    """GPUs per rank. None: one if the nodes have GPUs and the user asked for ranks per GPU, else none; the cluster decides."""
    per_node: tuple[tuple[str, float], ...] = ()
    """Other resources by name, per node: `(("rdma", 1.0),)`."""

    def __post_init__(self) -> None:
        for name, value in (
            ("cpus_per_proc", self.cpus_per_proc),
            ("gpus_per_proc", self.gpus_per_proc),
            *self.per_node,
        ):
            if value is not None and value < 0:
                raise SpecError(f"{name} = {value:g} is negative", advice="give 0 or more")


@dataclass(frozen=True)
class RestartBudget:
    """How often the gang may start again. Policy that spends it: `gang/policy.py`."""

    max_restarts: int = 0
    """Restarts after failures of ranks or loss of nodes, over the whole job (torchrun's `--max-restarts`). A lost node that a spare
    replaces costs none, nor does a node that joins."""
    max_preemptions: int = DEFAULT_MAX_PREEMPTIONS
    """Restarts because nodes were told to leave. Generous: on spot machines it is the ordinary course of things."""
    crash_loop: int = DEFAULT_CRASH_LOOP
    """So many attempts in a row that failed without progress end the job, whatever is left of the budget. 0: never."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-restarts", self.max_restarts),
            ("--max-preemptions", self.max_preemptions),
            ("--crash-loop", self.crash_loop),
        ):
            if value < 0:
                raise SpecError(f"{flag} {value} is negative", advice="give 0 or more")


@dataclass(frozen=True)
class StreamChoice:
    """torchrun's `-r` and `-t`: one value for all local ranks, or a value for each (`0:1,1:2`); local ranks not named have NONE."""

    everywhere: Stream = Stream.NONE
    by_local_rank: tuple[tuple[int, Stream], ...] = ()

    def of(self, local_rank: int) -> Stream:
        """
        >>> StreamChoice(by_local_rank=((1, Stream.BOTH),)).of(1).name, StreamChoice(Stream.STDOUT).of(7).name
        ('BOTH', 'STDOUT')
        """
        return dict(self.by_local_rank).get(local_rank, self.everywhere)

    def __bool__(self) -> bool:
        return self != StreamChoice()


@dataclass(frozen=True)
class LogOptions:
    """Where output goes. Every rank always writes its own two files; these options say what the terminal shows as well."""

    log_dir: str | None = None
    """Directory in which the run directory is made (`--log-dir`). None: $RAILHEAD_RUNS, else `railhead-runs` in the working directory."""
    show_ranks: frozenset[int] | None = None
    """Global ranks on the terminal; None: rank 0, or what torchrun's options below say if any of them is given. See `show_all`."""
    show_all: bool = False
    """All ranks on the terminal."""
    redirects: StreamChoice = StreamChoice()
    """torchrun's `-r`: these streams go to the file only."""
    tee: StreamChoice = StreamChoice()
    """torchrun's `-t`: these go to the file and the terminal."""
    local_ranks_filter: frozenset[int] | None = None
    """torchrun's `--local-ranks-filter`: of each node, only these local ranks on the terminal."""
    line_prefix_template: str | None = None
    """Prefix of terminal lines, a `string.Template` over role_name, rank, local_rank. None: `[rank${rank}] `."""
    duplicate_stdout_filters: tuple[str, ...] = ()
    """Lines of standard output that contain one of these are also written to `filtered_stdout.log` of the attempt."""
    duplicate_stderr_filters: tuple[str, ...] = ()
    show_progress: ProgressDisplay = ProgressDisplay.AUTO

    def shown(self, rank: int, local_rank: int) -> Stream:
        """Which streams of this rank the terminal shows.

        Without any option: global rank 0. With one of torchrun's, torchrun's rule: what is not redirected, or is teed, of the local ranks
        that the filter lets through.

        >>> LogOptions().shown(rank=0, local_rank=0).name, LogOptions().shown(rank=1, local_rank=1).name
        ('BOTH', 'NONE')
        >>> LogOptions(redirects=StreamChoice(Stream.STDOUT)).shown(rank=5, local_rank=1).name
        'STDERR'
        """
        if self.show_all:
            return Stream.BOTH
        if self.show_ranks is not None:
            return Stream.BOTH if rank in self.show_ranks else Stream.NONE
        if not (self.redirects or self.tee or self.local_ranks_filter is not None):
            return Stream.BOTH if rank == 0 else Stream.NONE
        if self.local_ranks_filter is not None and local_rank not in self.local_ranks_filter:
            return Stream.NONE
        return (Stream.BOTH & ~self.redirects.of(local_rank)) | self.tee.of(local_rank)


@dataclass(frozen=True)
class CacheOptions:
    """The cache daemon that each node runs for its ranks (`--cache-dir`, `--cache-capacity`)."""

    dir: str
    """Directory on the node's local disk."""
    capacity: str
    """As `python -m cache serve --capacity` reads it, for example `200GiB`."""
    program: tuple[str, ...] = ()
    """What to run instead of `python -m cache`; for tests and wrappers."""
    peers: str = "auto"
    """Whether the nodes' daemons fetch from each other (`--cache-peers`), one of CACHE_PEERS. `auto`: where there may be several."""


@dataclass(frozen=True)
class JobSpec:
    """What the user asked for."""

    program: Program
    min_nodes: int = 1
    max_nodes: int = 1
    """`--nnodes 2` is (2, 2); `--nnodes 2:4` is (2, 4): at least 2, up to 4 if there are as many."""
    nproc_per_node: int = 1
    """Ranks per node. `auto`, `gpu` and `cpu` are worked out before a JobSpec is built."""
    resources: Resources = Resources()
    restarts: RestartBudget = RestartBudget()
    logs: LogOptions = LogOptions()
    cache: CacheOptions | None = None
    cwd: str = "."
    """Working directory of the ranks, the same path on every node."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set for every rank over the agent's own environment (on Ray: what the user asked to carry over). torchrun's own variables win."""
    start_method: StartMethod = StartMethod.FORK_SERVER
    role: str = "default"
    run_id: str = "none"
    """TORCHELASTIC_RUN_ID (`--rdzv-id`)."""
    local_addr: str | None = None
    """MASTER_ADDR on one machine, instead of 127.0.0.1 (`--local-addr`, `--master-addr`)."""
    master_port: int | None = None
    """Port of the store, the same for every attempt. None: a fresh free port for each (nothing old can answer there)."""
    virtual_local_rank: bool = False
    """Every rank sees LOCAL_RANK=0 and only its own GPU (`--virtual-local-rank`)."""
    bind: str = "auto"
    """What ranks are bound to (`--bind`), one of BINDINGS. `auto`: to the CPUs and the memory beside their GPU, where a node has several
    memory nodes and every rank a GPU of its own. `numa`: also without GPUs, spread over the memory nodes. `none`: nothing."""
    preflight: bool = False
    """Measure the nodes and the network between them before the first attempt, and leave out who is slow (`--preflight`)."""
    shutdown_timeout_s: float = DEFAULT_SHUTDOWN_TIMEOUT_S
    """Between the signal to the ranks and SIGKILL (torchrun's default)."""
    on_hang: OnHang = OnHang.RESTART
    hang_timeout_s: float | None = None
    """How long a job may stand still. None: learnt from its own steps (`gang/health.py`). inf: it is not watched for that."""
    place_timeout_s: float = DEFAULT_PLACE_TIMEOUT_S
    """How long to wait for resources that may still come (an autoscaler, another job's end). What can never fit is refused at once."""
    signals_to_handle: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    """On these the launcher stops the gang and ends with 128 + number."""
    second_signal: SecondSignal = SecondSignal.KILL
    spare_nodes: int = 0
    """Nodes beyond `max_nodes` that are held warm, without ranks, to take the place of a lost one."""
    grow_delay_s: float = DEFAULT_GROW_DELAY_S
    """A world smaller than `max_nodes` restarts with nodes that have joined when none has for so long: several often come together."""
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_S
    """A node that has not answered for so long is lost; its agent ends its ranks before (cluster/ray/lease.py)."""
    exclude: tuple[str, ...] = ()
    """Hosts on which no agent is started; `("none",)`: none, not even those that are remembered."""
    metrics: str = ""
    """HOST:PORT at which the launcher serves its metrics. Empty: it does not."""
    metrics_file: str = ""
    """Where it writes them, for node_exporter's textfile collector. Empty: nowhere."""
    exclude_file: str = ""
    """Where bad nodes are remembered across jobs; `none`: nowhere. Empty: below the user's state directory."""

    @property
    def may_start_again(self) -> bool:
        """Whether another attempt may follow a failure, or a change of the nodes.

        >>> JobSpec(Program(ProgramKind.SCRIPT, "train.py"), spare_nodes=1).may_start_again
        True
        """
        return self.restarts.max_restarts > 0 or self.max_nodes > self.min_nodes or self.spare_nodes > 0

    def line_prefix(self, rank: int, local_rank: int) -> str:
        """What stands before each line of this rank on the terminal.

        >>> JobSpec(Program(ProgramKind.SCRIPT, "train.py")).line_prefix(3, 1)
        '[rank3] '
        """
        template = string.Template(self.logs.line_prefix_template or DEFAULT_LINE_PREFIX)
        return template.safe_substitute(role_name=self.role, rank=rank, local_rank=local_rank)

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise SpecError(
                f"--nnodes {self.min_nodes}:{self.max_nodes} is not 1 <= MIN <= MAX",
                advice="for example --nnodes 2 or --nnodes 2:4",
            )
        if self.nproc_per_node < 1:
            raise SpecError(
                f"--nproc-per-node {self.nproc_per_node}: a node needs at least one rank",
                advice="give 1 or more, or auto",
            )
        if self.nproc_per_node > MAX_PROCS_PER_NODE:
            raise SpecError(
                f"--nproc-per-node {self.nproc_per_node}: more than {MAX_PROCS_PER_NODE} ranks on one node are taken for a slip",
                advice="it is the number of ranks on each node, usually one per GPU",
            )
        if self.spare_nodes < 0:
            raise SpecError(f"--spare-nodes {self.spare_nodes} is negative", advice="give 0 or more")
        if self.grow_delay_s < 0:
            raise SpecError(f"--grow-delay {self.grow_delay_s:g} is negative", advice="0 grows at once")
        if self.heartbeat_timeout_s < MIN_HEARTBEAT_TIMEOUT_S:
            raise SpecError(
                f"--heartbeat-timeout {self.heartbeat_timeout_s:g}: nodes are asked a few times a second, and a busy one may take longer",
                advice=f"give {MIN_HEARTBEAT_TIMEOUT_S:g} or more",
            )
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise SpecError(
                f"--master-port {self.master_port} is not a port",
                advice="give 1 to 65535, or leave it out for a free one",
            )
        if self.metrics:
            host_and_port("--metrics", self.metrics)
        if self.bind not in BINDINGS:
            raise SpecError(f"--bind {self.bind}: expected {', '.join(BINDINGS)}")
        if self.hang_timeout_s is not None and not self.hang_timeout_s >= 1:
            raise SpecError(
                f"--hang-timeout {self.hang_timeout_s:g} is less than a second",
                advice="give seconds (well above the longest step), auto or off",
            )
        if self.shutdown_timeout_s < 0:
            raise SpecError(f"--shutdown-timeout {self.shutdown_timeout_s:g} is negative", advice="0 kills at once")


def host_and_port(flag: str, text: str) -> tuple[str, int]:
    """Raises SpecError.

    >>> host_and_port("--metrics", "0.0.0.0:9400"), host_and_port("--metrics", "[::]:0")
    (('0.0.0.0', 9400), ('::', 0))
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SpecError(f"{flag} {text}: not an address", advice="write HOST:PORT, like 127.0.0.1:9400")
    return host.removeprefix("[").removesuffix("]"), int(port)
