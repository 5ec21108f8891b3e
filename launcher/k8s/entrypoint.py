"""A JobSpec as the command line that makes it again. Pure.

What a manifest runs is the command a person would type on the cluster: `python -m launcher --nnodes 16 … train.py --lr 0.1`. Reading that
line gives the same JobSpec back (a test holds this for generated specs), so a local run and a rendered one cannot drift apart.

The line goes through a shell once, whatever the submission mode: KubeRay's submitter pastes it unquoted into a bash line, whose words
`ray job submit` joins again with `shlex.join`; in HTTPMode Ray's job supervisor hands it to a shell as it is.
"""

from __future__ import annotations

import shlex

from launcher.errors import SpecError
from launcher.spec import (
    DEFAULT_PLACE_TIMEOUT_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    JobSpec,
    LogOptions,
    ProgramKind,
    Stream,
    StreamChoice,
)


def entrypoint(spec: JobSpec) -> str:
    """The RayJob's `entrypoint`: one line, each word quoted for the shell.

    >>> from launcher.spec import Program
    >>> entrypoint(JobSpec(Program(ProgramKind.SCRIPT, "train.py", ("--note", "it's $5; ok"))))
    'python -m launcher --address auto --nnodes 1 --nproc-per-node 1 train.py --note \\'it\\'"\\'"\\'s $5; ok\\''
    """
    line = shlex.join(("python", "-m", "launcher", "--address", "auto", *launcher_arguments(spec)))
    if "\n" in line or "\r" in line or "\0" in line:
        raise SpecError(
            f"an argument of the program holds a line break: {line!r}",
            advice="KubeRay's submitter keeps the entrypoint on one line; put long texts in a file or a variable (--env)",
        )
    return line


def launcher_arguments(spec: JobSpec) -> tuple[str, ...]:
    """Flags, program and its arguments.

    Neither the node cache nor variables are among them: on Kubernetes a sidecar is the daemon, and the pods carry the variables.
    """
    nodes = f"{spec.min_nodes}" if spec.min_nodes == spec.max_nodes else f"{spec.min_nodes}:{spec.max_nodes}"
    words = ["--nnodes", nodes, "--nproc-per-node", str(spec.nproc_per_node)]

    def add(flag: str, value: object, default: object) -> None:
        if value != default:
            words.extend(_flag(flag, _number(value)))

    need = spec.resources
    add("cpus-per-proc", need.cpus_per_proc, None)
    add("gpus-per-proc", need.gpus_per_proc, None)
    if need.per_node:
        words += _flag("resources", ",".join(f"{name}={_number(amount)}" for name, amount in need.per_node))
    add("max-restarts", spec.restarts.max_restarts, 0)
    words += _log_words(spec.logs)
    add("role", spec.role, "default")
    add("rdzv-id", spec.run_id, "none")
    add("master-port", spec.master_port, None)
    if spec.virtual_local_rank:
        words.append("--virtual-local-rank")
    add("shutdown-timeout", spec.shutdown_timeout_s, DEFAULT_SHUTDOWN_TIMEOUT_S)
    add("place-timeout", spec.place_timeout_s, DEFAULT_PLACE_TIMEOUT_S)
    add("signals-to-handle", ",".join(spec.signals_to_handle), ",".join(JobSpec.signals_to_handle))
    return (*words, *_program_words(spec))


def _program_words(spec: JobSpec) -> list[str]:
    kind = {ProgramKind.SCRIPT: [], ProgramKind.MODULE: ["--module"], ProgramKind.EXECUTABLE: ["--no-python"]}
    # A program whose name begins with a dash would be read as a flag.
    end = ["--"] if spec.program.target.startswith("-") else []
    return [*kind[spec.program.kind], *end, spec.program.target, *spec.program.args]


def _log_words(logs: LogOptions) -> list[str]:
    words = []
    if logs.log_dir is not None:
        words += _flag("log-dir", logs.log_dir)
    if logs.show_all:
        words += ["--show-ranks", "all"]
    elif logs.show_ranks is not None:
        words += ["--show-ranks", ",".join(map(str, sorted(logs.show_ranks))) or "none"]
    for flag, choice in (("redirects", logs.redirects), ("tee", logs.tee)):
        if choice:
            words += [f"--{flag}", _streams(choice)]
    if logs.local_ranks_filter:
        words += ["--local-ranks-filter", ",".join(map(str, sorted(logs.local_ranks_filter)))]
    if logs.line_prefix_template is not None:
        words.append(f"--log-line-prefix-template={logs.line_prefix_template}")
    for flag, texts in (
        ("duplicate-stdout-filters", logs.duplicate_stdout_filters),
        ("duplicate-stderr-filters", logs.duplicate_stderr_filters),
    ):
        if texts:
            words.append(f"--{flag}=" + ",".join(text.replace(",", ",,") for text in texts))
    return words


def _streams(choice: StreamChoice) -> str:
    if choice.by_local_rank:
        return ",".join(f"{rank}:{Stream(streams).value}" for rank, streams in choice.by_local_rank)
    return str(choice.everywhere.value)


def _flag(name: str, value: str) -> list[str]:
    """A value that begins with a dash would be read as a flag."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _number(value: object) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
