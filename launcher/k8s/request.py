"""What a person asks for, as it was given: flags and a job file over each other, each value with the place that it came from. Pure.

The manifest is a function of the command line and the job file: variables of this terminal are not in it, unless `--env NAME` asks for one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from launcher.errors import SpecError
from launcher.k8s.flags import BY_NAME, FLAGS
from launcher.k8s.jobfile import RUN_KEY, read_job_file
from launcher.options.parse import CommandLine, Given, find_option, parse
from launcher.options.table import BY_NAME as LAUNCHER_FLAGS
from launcher.options.table import BY_SHORT

T = TypeVar("T")
NOT_HERE = {
    "address": "the job gets a Ray cluster of its own",
    "standalone": "the job runs on Kubernetes",
    "carry-env": "give variables with --env",
    "cache-dir": "the pod's volume is the cache's directory; --cache-capacity is its size",
}
_FRONTS = (("torchrun",), ("python", "-m", "launcher"), ("python", "-m", "torch.distributed.run"), ("python",))


@dataclass(frozen=True)
class Request:
    """Flags as they were given, Kubernetes' apart from the launcher's."""

    kube: Mapping[str, tuple[Given, ...]] = field(default_factory=dict)
    line: CommandLine = field(default_factory=CommandLine)
    wants_help: bool = False

    def texts(self, name: str) -> tuple[Given, ...]:
        return self.kube.get(name, ())

    def text(self, name: str) -> str | None:
        """As it was given last."""
        given = self.texts(name)
        return given[-1].value if given else None

    def with_value(self, name: str, value: str) -> Request:
        return replace(self, kube={**self.kube, name: (Given(value, f"--{name}"),)})

    def has(self, name: str) -> bool:
        given = self.texts(name)
        return bool(given) and given[-1].value == "true"

    def get(self, name: str, default: Any) -> Any:
        """The flag's value, or the default. A bad one is an error that shows it as it was written, with its line in a job file."""
        given = self.texts(name)
        if not given:
            return default
        return value_of(given[-1], BY_NAME[name].parse)

    def all(self, name: str) -> tuple[Any, ...]:
        return tuple(value_of(given, BY_NAME[name].parse) for given in self.texts(name))


def cut(argv: Sequence[str], also: Mapping[str, bool] | None = None) -> Request:
    """Cut a command line. `also`: flags of the command itself, name → is it a switch; they come back among `kube`."""
    kube: dict[str, tuple[Given, ...]] = {}
    theirs: list[str] = []
    rest, extra = list(argv), dict(also or {})
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return Request(wants_help=True)
        if token == "--" or not token.startswith("-") or token == "-":
            rest = [token, *rest]
            break
        written, equals, value = token.partition("=")
        name = written[2:].replace("_", "-") if token.startswith("--") else ""
        if name in BY_NAME or name in extra:
            is_switch = extra[name] if name in extra else BY_NAME[name].is_switch
            if not is_switch and not equals:
                if not rest:
                    raise SpecError(
                        f"{written} needs a value, and the command line ends", advice=f"write {written} VALUE"
                    )
                value = rest.pop(0)
            _add(kube, name, Given((value or "true") if is_switch else value, written))
            continue
        _check_known(token, written)
        theirs.append(token)
        if not equals and rest and _takesvalue_of(token):
            theirs.append(rest.pop(0))
    return Request(kube, parse([*theirs, *rest], {}))


def with_job_file(request: Request, text: str, path: str) -> Request:
    """The request over what the job file says: a flag replaces the file's value of the same name."""
    known = [flag.name for flag in FLAGS if flag.name != "file"] + [
        name for name in LAUNCHER_FLAGS if name not in NOT_HERE
    ]
    lists = [flag.name for flag in FLAGS if flag.is_repeated]
    kube: dict[str, tuple[Given, ...]] = {}
    given: dict[str, Given] = {}
    words: list[str] = []
    for entry in read_job_file(text, path, known, lists):
        source = Given(entry.value, f"{path}:{entry.line}: {entry.key}")
        if entry.key == RUN_KEY:
            words.append(entry.value)
        elif entry.key in BY_NAME:
            _add(kube, entry.key, source)
        elif LAUNCHER_FLAGS[entry.key].is_switch:
            given[entry.key] = replace(source, value="1" if entry.value == "true" else "0")
        else:
            given[entry.key] = source
    run = parse(_without_front(words), {})
    line = request.line
    has_program = line.target is not None
    return Request(
        {**kube, **{name: _over(name, kube.get(name, ()), given) for name, given in request.kube.items()}},
        CommandLine(
            {**given, **run.given, **line.given},
            line.target if has_program else run.target,
            line.args if has_program else run.args,
        ),
    )


def located(error: SpecError, request: Request) -> SpecError:
    """An error that names a flag whose value came from a job file, with the line of the first of them in front."""
    for name in re.findall(r"--([a-z][a-z-]+)", error.message):
        given = request.texts(name)
        source = given[-1].source if given else request.line.given[name].source if name in request.line.given else ""
        place = re.match(r"(.+:\d+): ", source)
        if place:
            return SpecError(f"{place[1]}: {error.message}", advice=error.advice)
    return error


def _without_front(words: Sequence[str]) -> list[str]:
    """`torchrun … train.py`, `python train.py`: the launcher is what starts it here."""
    plain = ["python" if word in ("python3", "python") and idx == 0 else word for idx, word in enumerate(words)]
    for front in _FRONTS:
        if tuple(plain[: len(front)]) == front:
            return list(words[len(front) :])
    return list(words)


def _over(name: str, of_file: tuple[Given, ...], of_flags: tuple[Given, ...]) -> tuple[Given, ...]:
    """A flag replaces the file's value; what adds up (`--env`) comes after it, so that of one name the flag's counts."""
    return (*of_file, *of_flags) if name in BY_NAME and BY_NAME[name].is_repeated else of_flags


def _add(kube: dict[str, tuple[Given, ...]], name: str, given: Given) -> None:
    is_repeated = name in BY_NAME and BY_NAME[name].is_repeated
    kube[name] = (*kube.get(name, ()), given) if is_repeated else (given,)


def _check_known(token: str, written: str) -> None:
    """Suggests over both tables; the launcher's own parser knows only its own."""
    if not token.startswith("--"):
        return
    try:
        find_option(written)
    except SpecError as error:
        name = written[2:].replace("_", "-")
        close = difflib.get_close_matches(name, [*BY_NAME, *LAUNCHER_FLAGS], n=1, cutoff=0.5)
        if error.message.startswith("no such flag") and close:
            raise SpecError(error.message, advice=f"did you mean --{close[0]}? --help lists all") from error
        raise


def _takesvalue_of(token: str) -> bool:
    if token.startswith("--"):
        return not find_option(token).is_switch
    option = BY_SHORT.get(token[1:2])
    return option is not None and not option.is_switch and len(token) == 2


def value_of(given: Given, parse_text: Callable[[str], T]) -> T:
    try:
        return parse_text(given.value)
    except ValueError as error:
        raise SpecError(f"{given}: expected {error}") from error
