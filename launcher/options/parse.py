"""A command line cut into flags, the program, and the program's own arguments; nothing is interpreted here.

It reads as torchrun's argparse parser does (the tests compare them): both spellings, unique abbreviations, `--flag value` and
`--flag=value`, `-r3` and `-r 3`, and everything after the program belongs to the program, whatever it looks like. argparse itself is not
used because it answers a misspelt flag with a word about something else: for `--nproc 2` Python 3.11 finds the two spellings of
one flag ambiguous, and for `--nprocs 2 train.py` it takes `2` for the script.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import SpecError
from launcher.options.table import BY_NAME, BY_SHORT, OPTIONS, Option

_NEGATIVE_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")


@dataclass(frozen=True)
class Given:
    """A flag's value as it was given, and where."""

    value: str
    """Raw text; "1" or "0" for a switch."""
    source: str
    """As the person wrote it: `--nproc_per_node`, `-r` or `PET_NNODES`."""

    def __str__(self) -> str:
        return f"{self.source}={self.value}" if self.source.startswith("PET_") else f"{self.source} {self.value}"


@dataclass(frozen=True)
class CommandLine:
    """A command line, cut."""

    given: Mapping[str, Given] = field(default_factory=dict)
    """By the flag's name. The last one on the command line wins, and all of them over the environment."""
    target: str | None = None
    """The program; None if there is none."""
    args: tuple[str, ...] = ()
    wants_help: bool = False
    wants_version: bool = False

    def text(self, name: str) -> str | None:
        """The flag's value, None if it was not given."""
        given = self.given.get(name)
        return given.value if given else None

    def has(self, name: str) -> bool:
        """True if the switch is on."""
        return self.text(name) == "1"


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> CommandLine:
    """Cut `argv` (without the program's own name); flags that it lacks come from `PET_*` in `environ`.

    >>> line = parse(["--nproc_per_node=2", "-r3", "train.py", "--lr", "-r"], {"PET_NNODES": "4"})
    >>> {name: str(given) for name, given in line.given.items()}
    {'nnodes': 'PET_NNODES=4', 'nproc-per-node': '--nproc_per_node 2', 'redirects': '-r 3'}
    >>> line.target, line.args
    ('train.py', ('--lr', '-r'))
    """
    given = _from_environment(environ)
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            break
        if token in ("-h", "--help"):
            return CommandLine(wants_help=True)
        if token == "--version":
            return CommandLine(wants_version=True)
        if not token.startswith("-") or token == "-":
            rest.insert(0, token)
            break
        if token.startswith("--"):
            _take_long(token, rest, given)
        else:
            _take_short(token, rest, given)
    target = rest.pop(0) if rest else None
    return CommandLine(given, target, tuple(rest))


def _from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    given = {}
    for option in OPTIONS:
        if not option.env_name or option.env_name not in environ:
            continue
        value = environ[option.env_name]
        if option.is_switch and value.strip() not in ("0", "1"):
            raise SpecError(
                f"{option.env_name}={value}: this variable is a switch", advice="set it to 1 or 0, or unset it"
            )
        given[option.name] = Given(value.strip() if option.is_switch else value, option.env_name)
    return given


def _take_long(token: str, rest: list[str], given: dict[str, Given]) -> None:
    written, equals, value = token.partition("=")
    option = find_option(written)
    if option.is_switch:
        if equals:
            raise SpecError(f"{token}: {written} takes no value", advice=f"write {written} alone")
        given[option.name] = Given("1", written)
    else:
        given[option.name] = Given(value if equals else _next_value(written, option, rest), written)


def _take_short(token: str, rest: list[str], given: dict[str, Given]) -> None:
    """`-r3`, `-r 3`, `-r=3`, and switches in front of another letter as in `-mr3`."""
    letters = token[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in BY_SHORT:
            raise _unknown(token)
        option, written = BY_SHORT[letter], f"-{letter}"
        if option.is_switch:
            given[option.name] = Given("1", written)
        else:
            value = letters.removeprefix("=") if letters else _next_value(written, option, rest)
            given[option.name] = Given(value, written)
            return


def _next_value(written: str, option: Option, rest: list[str]) -> str:
    """The token after a flag, if it can be a value: a flag's name cannot, a negative number can (argparse's rule)."""
    if not rest:
        raise SpecError(
            f"{written} needs a value ({option.metavar}), and the command line ends", advice=_how(written, option)
        )
    if rest[0].startswith("-") and rest[0] != "-" and not _NEGATIVE_NUMBER.match(rest[0]):
        raise SpecError(
            f"{written} needs a value ({option.metavar}), and {rest[0]} follows",
            advice=f"{_how(written, option)}; a value that begins with a dash is written {written}=VALUE",
        )
    return rest.pop(0)


def _how(written: str, option: Option) -> str:
    return f"write {written} {option.metavar}"


def find_option(written: str) -> Option:
    """The flag of this name, in either spelling, or of which this is the only abbreviation. Raises SpecError with a suggestion.

    >>> find_option("--nproc_per_node").name, find_option("--nproc").name
    ('nproc-per-node', 'nproc-per-node')
    """
    name = written[2:].replace("_", "-")
    if name in BY_NAME:
        return BY_NAME[name]
    candidates = [option for option in OPTIONS if option.name.startswith(name)]
    # An abbreviation that was unique under torchrun stays so: flags of our own give way.
    theirs = [option for option in candidates if not option.is_ours]
    if len(candidates) == 1 or len(theirs) == 1:
        return (theirs or candidates)[0]
    if candidates:
        names = " or ".join(f"--{option.name}" for option in candidates)
        raise SpecError(f"{written} is short for more than one flag", advice=f"write {names}")
    raise _unknown(written)


def _unknown(written: str) -> SpecError:
    name = written.lstrip("-").replace("_", "-")
    close = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.45)
    hint = f"did you mean --{close[0]}? " if close else ""
    return SpecError(
        f"no such flag: {written}",
        advice=f"{hint}Flags of the script go after the script; --help lists those of the launcher",
    )
