"""What a person's command line means: the job, where it runs, and what has to be said about it. Pure: nothing is looked up here.

`--nproc-per-node auto` needs the machine or the cluster, so a spec leaves here with 1 rank per node and the wish beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from launcher.errors import SpecError
from launcher.options import values
from launcher.options.carry import carried_environment
from launcher.options.parse import CommandLine, Given
from launcher.options.table import OPTIONS
from launcher.spec import (
    DEFAULT_CRASH_LOOP,
    DEFAULT_GROW_DELAY_S,
    DEFAULT_HEARTBEAT_TIMEOUT_S,
    DEFAULT_MAX_PREEMPTIONS,
    DEFAULT_PLACE_TIMEOUT_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    CacheOptions,
    JobSpec,
    LogOptions,
    OnHang,
    Program,
    ProgramKind,
    Resources,
    RestartBudget,
    StreamChoice,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Intent:
    """A command line, understood."""

    spec: JobSpec
    """The job; with one rank per node where `procs_wish` is set."""
    procs_wish: str | None
    """`auto`, `gpu` or `cpu`, or None if a number was given."""
    address: str | None
    """The Ray cluster; None: this machine, without Ray."""
    notes: tuple[str, ...]
    """One line each, for flags that do nothing here."""


def understand(line: CommandLine, environ: Mapping[str, str], cwd: str, fresh_id: str = "none") -> Intent:
    """Raises SpecError for whatever cannot be meant, with what to do. `fresh_id` names the run if `--rdzv-id` does not."""
    address = choose_address(line, environ)
    min_nodes, max_nodes = read(line, "nnodes", values.parse_nodes, (1, 1))
    if address is None and min_nodes > 1:
        raise _no_cluster_for(line, min_nodes, max_nodes)
    notes = [
        *_notes_of_table(line),
        *_notes_of_place(line, address, min_nodes, max_nodes),
        *_notes_of_binding(line),
    ]
    one: int | str = 1
    asked: tuple[str, ...] = read(line, "carry-env", values.parse_texts, ())
    procs = read(line, "nproc-per-node", values.parse_procs, one)
    spec = JobSpec(
        program=read_program(line, environ),
        min_nodes=min_nodes,
        max_nodes=max_nodes if address is not None else 1,
        nproc_per_node=procs if isinstance(procs, int) else 1,
        resources=Resources(
            cpus_per_proc=read(line, "cpus-per-proc", values.parse_amount, None),
            gpus_per_proc=read(line, "gpus-per-proc", values.parse_amount, None),
            per_node=read(line, "resources", values.parse_resources, ()),
        ),
        restarts=RestartBudget(
            read(line, "max-restarts", values.parse_count, 0),
            read(line, "max-preemptions", values.parse_count, DEFAULT_MAX_PREEMPTIONS),
            read(line, "crash-loop", values.parse_count, DEFAULT_CRASH_LOOP),
        ),
        logs=_read_logs(line, environ),
        cache=_read_cache(line),
        cwd=cwd,
        env=carried_environment(environ, asked) if address is not None else {},
        start_method=read(line, "start-method", values.parse_start_method, JobSpec.start_method),
        role=line.text("role") or "default",
        run_id=line.text("rdzv-id") or fresh_id,
        local_addr=(line.text("local-addr") or line.text("master-addr")) if address is None else None,
        master_port=read(line, "master-port", values.parse_port, None),
        virtual_local_rank=line.has("virtual-local-rank"),
        bind=_read_binding(line),
        preflight=line.has("preflight"),
        shutdown_timeout_s=read(line, "shutdown-timeout", values.parse_amount, _default_grace_s(environ)),
        on_hang=read(line, "on-hang", values.parse_on_hang, OnHang.RESTART),
        hang_timeout_s=read(line, "hang-timeout", values.parse_hang_timeout, None),
        place_timeout_s=read(line, "place-timeout", values.parse_amount, DEFAULT_PLACE_TIMEOUT_S),
        spare_nodes=read(line, "spare-nodes", values.parse_count, 0) if address is not None else 0,
        grow_delay_s=read(line, "grow-delay", values.parse_amount, DEFAULT_GROW_DELAY_S),
        heartbeat_timeout_s=read(line, "heartbeat-timeout", values.parse_amount, DEFAULT_HEARTBEAT_TIMEOUT_S),
        exclude=read(line, "exclude", values.parse_texts, ()),
        exclude_file=line.text("exclude-file") or "",
        metrics=line.text("metrics") or "",
        metrics_file=line.text("metrics-file") or "",
        signals_to_handle=read(line, "signals-to-handle", values.parse_signals, JobSpec.signals_to_handle),
        second_signal=read(line, "second-signal", values.parse_second_signal, JobSpec.second_signal),
    )
    if address is not None:
        notes += _notes_of_credentials(environ, spec.env)
    if isinstance(procs, int):
        _check_shown_ranks(spec)
    return Intent(spec, procs if isinstance(procs, str) else None, address, tuple(notes))


def read(line: CommandLine, name: str, parse: Callable[[str], T], default: T) -> T:
    """The flag's value, or the default. A bad value is an error that shows it as it was written."""
    given = line.given.get(name)
    return default if given is None else _value(given, parse)


def _value(given: Given, parse: Callable[[str], T]) -> T:
    try:
        return parse(given.value)
    except ValueError as error:
        raise SpecError(f"{given}: expected {error}") from error


def _default_grace_s(environ: Mapping[str, str]) -> float:
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    if name not in environ:
        return DEFAULT_SHUTDOWN_TIMEOUT_S
    return _value(Given(environ[name], name), values.parse_amount)


# What to run.


def read_program(line: CommandLine, environ: Mapping[str, str]) -> Program:
    """The program of each rank. Whether it is there is for the shell to see."""
    if line.target is None or line.target == "":
        raise SpecError(
            "no script to run",
            advice="write python -m launcher [flags] train.py [arguments of train.py]; --help lists the flags",
        )
    is_module, no_python = line.has("module"), line.has("no-python") and not line.has("run-path")
    if is_module and no_python:
        raise SpecError(
            "--module and --no-python cannot both hold", advice="a module is run by python; leave one of them out"
        )
    if is_module and line.has("run-path"):
        raise SpecError("--module and --run-path cannot both hold", advice="leave one of them out")
    kind = ProgramKind.MODULE if is_module else ProgramKind.EXECUTABLE if no_python else ProgramKind.SCRIPT
    return Program(kind, line.target, line.args, "" if no_python else environ.get("PYTHON_EXEC", ""))


# Where.


def choose_address(line: CommandLine, environ: Mapping[str, str]) -> str | None:
    """The Ray cluster's address, or None for this machine.

    >>> choose_address(CommandLine(), {"RAY_ADDRESS": "10.0.0.1:6379"})
    '10.0.0.1:6379'
    """
    asked = line.given.get("address")
    if line.has("standalone"):
        if asked is not None:
            raise SpecError(
                f"--standalone means this machine, and {asked} names a cluster", advice="leave one of them out"
            )
        return None
    given = asked or (Given(environ["RAY_ADDRESS"], "RAY_ADDRESS=") if environ.get("RAY_ADDRESS") else None)
    if given is None or given.value == "local":
        return None
    if given.value == "":
        raise SpecError(f"{given.source} is empty", advice="give HOST:PORT of the cluster's head, or auto")
    if "://" in given.value:
        raise SpecError(
            f"{given.source} {given.value}: ranks are started from within the cluster, which this address does not reach into",
            advice="submit the command: ray job submit --address http://HEAD:8265 --working-dir . -- python -m launcher …, "
            "or run it on a machine of the cluster with --address auto",
        )
    return given.value


def _no_cluster_for(line: CommandLine, min_nodes: int, max_nodes: int) -> SpecError:
    span = f"{min_nodes}" if min_nodes == max_nodes else f"{min_nodes}:{max_nodes}"
    by_hand = [line.given[name].source for name in ("node-rank", "master-addr", "rdzv-endpoint") if name in line.given]
    joining = f" Starting each node by hand ({', '.join(by_hand)}) is torchrun's way." if by_hand else ""
    why = (
        "--standalone was given" if line.has("standalone") else "neither --address nor RAY_ADDRESS names a Ray cluster"
    )
    return SpecError(
        f"--nnodes {span} asks for {min_nodes} nodes, and {why}.{joining}",
        advice="one command starts all nodes: run `ray start --head` on one, `ray start --address HEAD:6379` on the others, "
        "then this once with --address HEAD:6379. On this machine alone: --nnodes 1",
    )


def _read_binding(line: CommandLine) -> str:
    """`--bind`, or torchrun's flag for it."""
    theirs = read(line, "numa-binding", values.parse_numa_binding, None)
    ours = read(line, "bind", values.parse_binding, None)
    if ours is not None and theirs is not None and ours != "numa":
        raise SpecError(
            f"{line.given['bind']} and {line.given['numa-binding']} contradict each other",
            advice="leave one of them out",
        )
    return ours or ("numa" if theirs is not None else "auto")


# Output and cache.


def _read_logs(line: CommandLine, environ: Mapping[str, str]) -> LogOptions:
    show = line.text("show-ranks")
    words = {"all": None, "none": frozenset[int]()}
    return LogOptions(
        log_dir=line.text("log-dir"),
        show_ranks=words[show] if show in words else read(line, "show-ranks", values.parse_ranks, None),
        show_all=show == "all",
        redirects=read(line, "redirects", values.parse_streams, StreamChoice()),
        tee=read(line, "tee", values.parse_streams, StreamChoice()),
        # torchrun takes an empty filter for no filter
        local_ranks_filter=read(line, "local-ranks-filter", values.parse_ranks, None)
        if line.text("local-ranks-filter")
        else None,
        line_prefix_template=line.text("log-line-prefix-template")
        or environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        duplicate_stdout_filters=read(line, "duplicate-stdout-filters", values.parse_texts, ()),
        duplicate_stderr_filters=read(line, "duplicate-stderr-filters", values.parse_texts, ()),
        show_progress=read(line, "show-progress", values.parse_progress, LogOptions.show_progress),
    )


def _read_cache(line: CommandLine) -> CacheOptions | None:
    directory, capacity = line.text("cache-dir"), line.text("cache-capacity")
    peers = read(line, "cache-peers", values.parse_cache_peers, "auto")
    if directory is None and capacity is None:
        return None
    if not directory or not capacity:
        missing = (
            "--cache-capacity (how much, like 200GiB)"
            if directory
            else "--cache-dir (a directory on each node's local disk)"
        )
        raise SpecError(
            f"a cache needs a directory and a capacity; {missing} is missing", advice="give both, or neither"
        )
    return CacheOptions(directory, read(line, "cache-capacity", values.parse_size, capacity), peers=peers)


# What has to be said.


def _notes_of_table(line: CommandLine) -> list[str]:
    """One line for all flags with the same reason: `--rdzv-backend c10d --rdzv-endpoint …` is how many commands begin."""
    by_reason: dict[str, list[str]] = {}
    for option in OPTIONS:
        given = line.given.get(option.name)
        if option.note and given is not None and given.value != option.silent_value:
            by_reason.setdefault(option.note, []).append(str(given))
    return [f"{', '.join(flags)}: no effect; {reason}" for reason, flags in by_reason.items()]


_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT_KEY")


def _notes_of_credentials(environ: Mapping[str, str], carried: Mapping[str, str]) -> list[str]:
    """Credentials stay here unless asked for (nodes often have better ones); that they do is the first thing to know of a 403."""
    return [
        f"{name} is set here and does not go along to the nodes; --carry-env '{name.split('_')[0]}_*' takes it there"
        for name in _CREDENTIALS
        if environ.get(name) and name not in carried
    ][:1]


def _notes_of_binding(line: CommandLine) -> list[str]:
    given = line.given.get("numa-binding")
    if given is None or given.value in ("node", "socket"):
        return []
    return [f"{given}: ranks are bound to the memory node of their GPU, and share its CPUs; no finer"]


def _check_shown_ranks(spec: JobSpec) -> None:
    """Raises SpecError for ranks that the largest world does not have: nothing would be shown, and nobody would know why."""
    num_ranks = spec.max_nodes * spec.nproc_per_node
    beyond = sorted(rank for rank in spec.logs.show_ranks or () if rank >= num_ranks)
    if beyond:
        raise SpecError(
            f"--show-ranks names rank {beyond[0]}, and there are {num_ranks} ranks",
            advice=f"ranks are numbered from 0 to {num_ranks - 1}",
        )


def _notes_of_place(line: CommandLine, address: str | None, min_nodes: int, max_nodes: int) -> list[str]:
    if address is not None:
        reason = "no effect with a cluster; the first node's address is MASTER_ADDR"
        notes = [f"{line.given[name]}: {reason}" for name in ("master-addr", "local-addr") if name in line.given]
        if min_nodes < max_nodes and "max-restarts" not in line.given:
            notes.append(
                f"{line.given['nnodes']}: without --max-restarts a lost node ends the job instead of shrinking it"
            )
        return notes
    notes = []
    if max_nodes > 1:
        notes.append(
            f"{line.given['nnodes']}: one node, this machine, because no Ray cluster is named (--address, RAY_ADDRESS)"
        )
    reason = "no effect on this machine alone; it is for a Ray cluster"
    ray_only = (
        *("cpus-per-proc", "gpus-per-proc", "resources", "carry-env", "place-timeout"),
        *("spare-nodes", "grow-delay", "heartbeat-timeout", "exclude", "exclude-file"),
    )
    return notes + [f"{line.given[name]}: {reason}" for name in ray_only if name in line.given]
