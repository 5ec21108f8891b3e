"""A JobSpec as the command line that makes it again. Pure.

What a manifest runs is the command a person would type on the cluster: `python -m launcher --nnodes 16 … train.py --lr 0.1`. Reading that
line gives the same JobSpec back (a test holds this for generated specs), so a local run and a rendered one cannot drift apart. Which flag
says which field follows from their names: a field that is added to the spec with a flag of its name travels without a word here.

The line goes through a shell once, whatever the submission mode: KubeRay's submitter pastes it unquoted into a bash line, whose words
`ray job submit` joins again with `shlex.join`; in HTTPMode Ray's job supervisor hands it to a shell as it is.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from launcher.errors import SpecError
from launcher.options.table import BY_NAME
from launcher.spec import JobSpec, ProgramKind, Stream, StreamChoice

NOT_SAID = {
    "program": "it stands at the end of the line, and its interpreter is the image's",
    "min_nodes": "--nnodes comes first",
    "max_nodes": "--nnodes comes first",
    "nproc_per_node": "it comes second",
    "logs.show_all": "--show-ranks says it",
    "cache": "a sidecar, or the node's DaemonSet, is the daemon",
    "cwd": "the pods have their own",
    "env": "the pods carry the variables",
    "local_addr": "it is for one machine alone",
}
"""Fields of a JobSpec that no flag of the line carries, and why."""
FLAG_OF = {
    "resources.per_node": "resources",
    "run_id": "rdzv-id",
    "logs.line_prefix_template": "log-line-prefix-template",
    "logs.progress": "show-progress",
}
"""Fields whose flag has another name. Every other field is said by the flag of its own name, so one that is added needs nothing here."""
_UNITS = ("_s", "_bytes")


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
    for path, value, default in said(spec):
        if path == "logs.show_ranks" and spec.logs.show_all:
            words += ["--show-ranks", "all"]
        elif value != default:
            words += _words(path, value)
    return (*words, *_program_words(spec))


def said(spec: Any, parent: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, value and default of every field that a flag says: `("restarts.max_restarts", 3, 0)`."""
    for field in fields(spec):
        path, value = f"{parent}{field.name}", getattr(spec, field.name)
        if path in NOT_SAID:
            continue
        if is_dataclass(value) and not isinstance(value, StreamChoice):
            yield from said(value, f"{path}.")
        else:
            yield path, value, _default(field)


def flag_of(path: str) -> str | None:
    """The flag that says this field; None if there is none.

    >>> flag_of("restarts.max_restarts"), flag_of("shutdown_timeout_s"), flag_of("run_id"), flag_of("no_such_thing")
    ('max-restarts', 'shutdown-timeout', 'rdzv-id', None)
    """
    name = FLAG_OF.get(path) or path.rpartition(".")[2]
    stems = [name, *(name.removesuffix(unit) for unit in _UNITS)]
    return next((flag for flag in (stem.replace("_", "-") for stem in stems) if flag in BY_NAME), None)


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def _words(path: str, value: Any) -> list[str]:
    """One flag and its value. Raises SpecError for a field that has no flag: another job would run than was described."""
    flag = flag_of(path)
    if flag is None:
        raise SpecError(
            f"{path} = {value!r}: no flag of the launcher says this, so a cluster cannot be told",
            advice="leave it as it is by default",
        )
    if value is False and f"no-{flag}" in BY_NAME:
        return [f"--no-{flag}"]
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    text = _text(path, value)
    # A value that begins with a dash would be read as a flag.
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def _text(path: str, value: Any) -> str:
    """As `launcher.options.values` reads it."""
    match value:
        case None:
            return "none"
        case StreamChoice():
            each = [f"{rank}:{Stream(streams).value}" for rank, streams in value.by_local_rank]
            return ",".join(each) or str(value.everywhere.value)
        case enum.Enum():
            return str(value.value)
        case frozenset():
            return ",".join(map(str, sorted(value))) or "none"
        case Mapping():
            return _text(path, tuple(value.items()))
        case tuple():
            return ",".join(_item(item) for item in value)
        case float():
            return repr(value).removesuffix(".0")
    return str(value)


def _item(item: Any) -> str:
    if isinstance(item, tuple):
        name, amount = item
        return f"{name}={_text('', amount)}"
    # A comma within a text is doubled.
    return str(item).replace(",", ",,")


def _program_words(spec: JobSpec) -> list[str]:
    kind = {ProgramKind.SCRIPT: [], ProgramKind.MODULE: ["--module"], ProgramKind.EXECUTABLE: ["--no-python"]}
    # A program whose name begins with a dash would be read as a flag.
    end = ["--"] if spec.program.target.startswith("-") else []
    return [*kind[spec.program.kind], *end, spec.program.target, *spec.program.args]
