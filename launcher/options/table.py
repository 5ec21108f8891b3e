"""The flags of the command: one row each, from which the parser, `--help`, the notes and the tests are made.

Every flag of torchrun is here under its own name (torch/distributed/run.py, `get_args_parser`), so a command line that torchrun takes is
taken. A row whose flag has no work to do here carries a `note`, printed once when the flag is given: accepted, never silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.spec import (
    DEFAULT_CRASH_LOOP,
    DEFAULT_GROW_DELAY_S,
    DEFAULT_HEARTBEAT_TIMEOUT_S,
    DEFAULT_MAX_PREEMPTIONS,
    DEFAULT_PLACE_TIMEOUT_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
)

RUN = "What to run"
SIZE = "How many ranks"
PLACE = "Where"
FAILURE = "Failures and stopping"
OUTPUT = "Output"
CACHE = "Data cache"
TORCHRUN = "Taken for torchrun's sake"
OTHER = "Other"
GROUPS = (RUN, SIZE, PLACE, FAILURE, OUTPUT, CACHE, OTHER, TORCHRUN)


@dataclass(frozen=True)
class Option:
    """One flag."""

    name: str
    """Long name with dashes; `_` in place of `-` is the same flag."""
    group: str
    help: str
    metavar: str = ""
    """What the value is called in `--help`. Empty: a switch that takes no value."""
    short: str = ""
    """One letter, without the dash."""
    from_env: bool = True
    """Read from `PET_<NAME>` when it is not on the command line, as torchrun does for nearly all of its flags."""
    note: str = ""
    """Why the flag has nothing to do here."""
    silent_value: str = ""
    """The value at which the flag asks for what happens here anyway, so nothing need be said."""
    is_ours: bool = False
    """True: torchrun does not have it."""

    @property
    def is_switch(self) -> bool:
        return not self.metavar

    @property
    def key(self) -> str:
        """The name in Python's spelling.

        >>> Option("nproc-per-node", SIZE, "…", "N").key
        'nproc_per_node'
        """
        return self.name.replace("-", "_")

    @property
    def env_name(self) -> str:
        """The variable that stands for the flag; empty if none does."""
        return f"PET_{self.key.upper()}" if self.from_env else ""


_RAY_MEETS = "on one machine there is nobody to meet, and with --address Ray knows the nodes"

OPTIONS: tuple[Option, ...] = (
    Option("module", RUN, "TARGET is a Python module, started as `python -m` would.", short="m"),
    Option("no-python", RUN, "TARGET is a program of any kind, executed as it is."),
    Option("run-path", RUN, "Run TARGET by runpy.run_path. Scripts are run that way anyhow."),
    Option(
        "start-method",
        RUN,
        "spawn: each rank is a fresh interpreter. forkserver (or fork): Python ranks are forked from a process that has "
        "imported torch, once for the node; what differs is in docs/launcher.md. [forkserver]",
        "spawn|fork|forkserver",
    ),
    Option("nnodes", SIZE, "Nodes, exactly N or between MIN and MAX. [1]", "N|MIN:MAX"),
    Option(
        "nproc-per-node",
        SIZE,
        "Ranks on each node. gpu, cpu: one for each there is. auto: gpu if there is one, else cpu. [1]",
        "N|auto|gpu|cpu|xpu",
    ),
    Option(
        "address",
        PLACE,
        "A Ray cluster: HOST:PORT of its head, or auto for the one this machine belongs to. "
        "Without it RAY_ADDRESS counts, and a job that Ray submitted uses its own cluster. "
        "Else everything runs on this machine, without Ray.",
        "ADDRESS",
        is_ours=True,
    ),
    Option("standalone", PLACE, "Run on this machine, even if RAY_ADDRESS is set."),
    Option("cpus-per-proc", PLACE, "CPUs that Ray sets aside for each rank. [1]", "N", is_ours=True),
    Option(
        "gpus-per-proc",
        PLACE,
        "GPUs that Ray sets aside for each rank. [1 if the nodes have them, else 0]",
        "N",
        is_ours=True,
    ),
    Option("resources", PLACE, "Other resources of Ray that each node must give.", "NAME=N,…", is_ours=True),
    Option(
        "carry-env",
        PLACE,
        "Variables that go along to the nodes, besides those of the usual libraries (NCCL_…, TORCH…, HF_…, WANDB_…); AWS_* is a name, too.",
        "NAME,…",
        is_ours=True,
    ),
    Option(
        "place-timeout",
        PLACE,
        "How long to wait for resources that others hold, or that an autoscaler may add. "
        f"What can never fit is refused at once. [{DEFAULT_PLACE_TIMEOUT_S:g}]",
        "SECONDS",
        is_ours=True,
    ),
    Option(
        "preflight",
        PLACE,
        "Measure first: who reaches whom, full-size packets, all-reduce, processors. "
        "Slow nodes are named, and left out where the job can do without.",
        is_ours=True,
    ),
    Option(
        "spare-nodes",
        PLACE,
        "Nodes beyond --nnodes that are held warm, to take a lost node's place at once. [0]",
        "N",
        is_ours=True,
    ),
    Option(
        "grow-delay",
        PLACE,
        "With --nnodes MIN:MAX: start again with nodes that joined, when none has for so long. "
        f"[{DEFAULT_GROW_DELAY_S:g}]",
        "SECONDS",
        is_ours=True,
    ),
    Option(
        "exclude",
        PLACE,
        "Hosts to leave out, besides those that are remembered; none: use all, remembered or not.",
        "HOST,…|none",
        is_ours=True,
    ),
    Option(
        "exclude-file",
        PLACE,
        "Where nodes that were lost twice, broke or were slow are remembered for a day; none: nowhere. "
        "[~/.local/state/railhead/excluded-nodes.json]",
        "FILE|none",
        is_ours=True,
    ),
    Option("max-restarts", FAILURE, "When a rank fails, stop all and start again, at most N times. [0]", "N"),
    Option(
        "max-preemptions",
        FAILURE,
        f"The same for nodes that are told to leave, which spends none of the above. [{DEFAULT_MAX_PREEMPTIONS}]",
        "N",
        is_ours=True,
    ),
    Option(
        "crash-loop",
        FAILURE,
        f"End when N attempts in a row failed without progress, whatever is left of the above; 0: never. [{DEFAULT_CRASH_LOOP}]",
        "N",
        is_ours=True,
    ),
    Option(
        "heartbeat-timeout",
        FAILURE,
        f"A node that is silent for so long is lost; it ends its ranks before. [{DEFAULT_HEARTBEAT_TIMEOUT_S:g}]",
        "SECONDS",
        is_ours=True,
    ),
    Option(
        "shutdown-timeout",
        FAILURE,
        f"Time that stopped ranks have until SIGKILL. [TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else {DEFAULT_SHUTDOWN_TIMEOUT_S:g}]",
        "SECONDS",
    ),
    Option(
        "hang-timeout",
        FAILURE,
        "How long a job may stand still until it is taken for hung. auto: learnt from its own steps. off: it is not watched. [auto]",
        "auto|off|SECONDS",
        is_ours=True,
    ),
    Option(
        "on-hang",
        FAILURE,
        "What follows: restart (as after a failure, within --max-restarts), stop, or report and leave it alone. [restart]",
        "restart|stop|report",
        is_ours=True,
    ),
    Option(
        "signals-to-handle",
        FAILURE,
        "Signals that stop the job; ranks get the same one. [SIGTERM,SIGINT,SIGHUP,SIGQUIT]",
        "NAME,…",
    ),
    Option(
        "second-signal",
        FAILURE,
        "What one means that comes while ranks are being stopped: kill at once, forward it to them, or ignore it. [kill]",
        "kill|forward|ignore",
        is_ours=True,
    ),
    Option("log-dir", OUTPUT, "Where the run directory is made. [$RAILHEAD_RUNS, else ./railhead-runs]", "DIR"),
    Option(
        "show-ranks", OUTPUT, "Ranks whose output is shown here: all, none, or like 0,8-15. [0]", "RANKS", is_ours=True
    ),
    Option(
        "show-progress",
        OUTPUT,
        "What is said of steps, speed and time left: live, one line at the bottom of a terminal; "
        "plain, a sentence every five minutes; off. [auto: live on a terminal, else plain]",
        "auto|live|plain|off",
        is_ours=True,
    ),
    Option(
        "metrics",
        OUTPUT,
        "Serve metrics of the job for Prometheus at http://HOST:PORT/metrics; port 0: a free one.",
        "HOST:PORT",
        is_ours=True,
    ),
    Option("metrics-file", OUTPUT, "Write them here every 10 s, for node_exporter.", "FILE.prom", is_ours=True),
    Option(
        "redirects",
        OUTPUT,
        "Streams that go to the file only: 1 stdout, 2 stderr, 3 both; or by local rank, 0:1,1:2.",
        "STREAMS",
        "r",
    ),
    Option("tee", OUTPUT, "Streams that go to the file and are shown here, written like -r.", "STREAMS", "t"),
    Option("local-ranks-filter", OUTPUT, "Show only these local ranks of each node.", "N,…"),
    Option(
        "log-line-prefix-template",
        OUTPUT,
        "What stands before a shown line; ${role_name}, ${rank} and ${local_rank} are replaced. "
        "[$TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE, else [rank${rank}] ]",
        "TEXT",
    ),
    Option("duplicate-stdout-filters", OUTPUT, "Lines with one of these also go to filtered_stdout.log.", "TEXT,…"),
    Option("duplicate-stderr-filters", OUTPUT, "The same for filtered_stderr.log.", "TEXT,…"),
    Option(
        "cache-dir",
        CACHE,
        "Keep data on this local disk of each node: a cache daemon runs beside the ranks.",
        "DIR",
        is_ours=True,
    ),
    Option("cache-capacity", CACHE, "How much it may keep on a node, for example 200GiB.", "SIZE", is_ours=True),
    Option(
        "cache-peers",
        CACHE,
        "Whether the nodes' daemons fetch from each other, so that each byte leaves the object store once: auto, on a Ray "
        "cluster; off. [auto]",
        "auto|off",
        is_ours=True,
    ),
    Option("role", OTHER, "ROLE_NAME of the ranks. [default]", "NAME"),
    Option("rdzv-id", OTHER, "TORCHELASTIC_RUN_ID of the ranks. [a fresh one]", "ID"),
    Option("master-port", OTHER, "Port of the ranks' store. [a free one, fresh for each attempt]", "PORT"),
    Option(
        "master-addr", OTHER, "MASTER_ADDR on this machine. With --address: that of the first node. [127.0.0.1]", "HOST"
    ),
    Option("local-addr", OTHER, "The same.", "HOST"),
    Option("virtual-local-rank", OTHER, "Every rank sees LOCAL_RANK=0 and only its own GPU."),
    Option(
        "bind",
        PLACE,
        "Bind ranks to CPUs and memory: auto, beside their GPU where a node has several memory nodes; "
        "numa, also without GPUs; none. [auto]",
        "auto|numa|none",
        is_ours=True,
    ),
    Option("rdzv-backend", TORCHRUN, "", "NAME", note=_RAY_MEETS),
    Option("rdzv-endpoint", TORCHRUN, "", "HOST:PORT", note=_RAY_MEETS),
    Option("rdzv-conf", TORCHRUN, "", "KEY=VALUE,…", note=_RAY_MEETS),
    Option("node-rank", TORCHRUN, "", "N", note="one command starts all nodes here, and numbers them itself"),
    Option("monitor-interval", TORCHRUN, "", "SECONDS", note="the end of a rank is noticed at once, without polling"),
    Option("print-completion", TORCHRUN, "", "SHELL", from_env=False, note="there is no completion script"),
    Option("event-log-handler", TORCHRUN, "", "NAME", note="events are in journal.jsonl of the run directory"),
    Option(
        "logs-specs",
        TORCHRUN,
        "",
        "NAME",
        from_env=False,
        note="log files are laid out by this launcher; see --log-dir",
    ),
    Option(
        "numa-binding",
        PLACE,
        "torchrun's flag for --bind numa. exclusive and core-complex bind to the memory node too, no finer.",
        "node|socket|exclusive|core-complex",
        from_env=False,
    ),
)

BY_NAME = {option.name: option for option in OPTIONS}
BY_SHORT = {option.short: option for option in OPTIONS if option.short}
