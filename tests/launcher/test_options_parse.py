"""A command line is cut as torchrun cuts it; what torchrun would misread or misreport gets a clear word."""

from __future__ import annotations

import os
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.options.helptext import help_text
from launcher.options.parse import find_option, parse
from launcher.options.table import BY_SHORT, OPTIONS


@pytest.fixture(scope="module")
def torchrun_actions() -> dict[str, tuple[str, ...]]:
    """torchrun's flags with their spellings, from the installed torch."""
    from torch.distributed.run import get_args_parser

    return {action.dest: tuple(action.option_strings) for action in get_args_parser()._actions if action.option_strings}


def test_every_flag_of_torchrun_is_in_the_table_in_every_spelling(torchrun_actions: dict[str, tuple[str, ...]]) -> None:
    """A release of torch with a new flag makes this fail, which is how we learn of it."""
    for dest, spellings in torchrun_actions.items():
        if dest == "help":
            continue
        for spelling in spellings:
            option = find_option(spelling) if spelling.startswith("--") else BY_SHORT[spelling[1]]
            assert option.key == dest, spelling


def test_flags_take_a_value_where_torchruns_do() -> None:
    from torch.distributed.run import get_args_parser

    theirs = {action.dest: action.nargs == 0 for action in get_args_parser()._actions if action.option_strings}
    ours = {option.key: option.is_switch for option in OPTIONS if not option.is_ours and option.key in theirs}
    assert ours == {dest: is_switch for dest, is_switch in theirs.items() if dest != "help"}


def test_variables_have_torchruns_names() -> None:
    """A flag reads PET_<NAME> exactly where torchrun's does."""
    from torch.distributed.argparse_util import check_env, env
    from torch.distributed.run import get_args_parser

    actions = {action.dest: isinstance(action, env | check_env) for action in get_args_parser()._actions}
    for option in OPTIONS:
        if option.key in actions:
            assert bool(option.env_name) == actions[option.key], option.name


# The reference model is torchrun's own parser. Spellings that argparse of Python 3.11 finds ambiguous are not generated.

_VALUES = {
    "nnodes": ["1", "2", "1:4"],
    "nproc-per-node": ["1", "8", "auto", "gpu"],
    "max-restarts": ["0", "3"],
    "rdzv-id": ["job", "a b"],
    "rdzv-conf": ["timeout=3,x=4"],
    "rdzv-endpoint": ["host:29500"],
    "log-dir": ["/tmp/logs", "with space"],
    "redirects": ["0", "3", "0:1,1:2"],
    "tee": ["1"],
    "node-rank": ["0", "-1"],
    "master-port": ["29501"],
    "monitor-interval": ["0.5"],
    "role": ["trainer"],
    "local-ranks-filter": ["0,1"],
}
_SWITCHES = ["module", "standalone", "no-python", "run-path", "virtual-local-rank"]


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    if draw(st.booleans()):
        name = draw(st.sampled_from(_SWITCHES))
        if name == "module" and draw(st.booleans()):
            return ["-m"]
        return [f"--{_spelled(draw, name)}"]
    name = draw(st.sampled_from(sorted(_VALUES)))
    value = draw(st.sampled_from(_VALUES[name]))
    short = {"redirects": "-r", "tee": "-t"}.get(name)
    if short and draw(st.booleans()):
        return draw(st.sampled_from([[short, value], [f"{short}{value}"], [f"{short}={value}"]]))
    flag = f"--{_spelled(draw, name)}"
    return draw(st.sampled_from([[flag, value], [f"{flag}={value}"]]))


def _spelled(draw: st.DrawFn, name: str) -> str:
    return draw(st.sampled_from([name, name.replace("-", "_")]))


scripts = st.sampled_from(["train.py", "dir/my train.py", "pkg.mod"])
arguments = st.lists(
    st.sampled_from(["--lr", "0.1", "-r", "--nnodes", "--", "-x=1", "", "a b", "--standalone", "-1", "ü"]), max_size=5
)
variables = st.dictionaries(
    st.sampled_from(["PET_NNODES", "PET_NPROC_PER_NODE", "PET_RDZV_ID", "PET_STANDALONE", "PET_MODULE"]),
    st.just("1"),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(flags(), max_size=5), scripts, arguments, variables)
def test_reads_as_torchrun_reads(
    tokens: list[list[str]], script: str, args: list[str], environ: dict[str, str]
) -> None:
    """Drop-in is decided here: the same words mean the same flags, the same script, the same arguments.

    One exception is ours by choice: argparse up to Python 3.12 eats a `--` right behind the script, we pass it on.
    """
    from torch.distributed.run import parse_args

    argv = [*(token for flag in tokens for token in flag), script, *args]
    ours = parse(argv, environ)
    with mock.patch.dict(os.environ, environ, clear=True):
        theirs = vars(parse_args(argv))
    assert ours.target == theirs["training_script"]
    assert ours.args == tuple(args)
    if args[:1] != ["--"]:
        assert list(ours.args) == theirs["training_script_args"]
    for option in OPTIONS:
        if option.is_ours or option.key not in theirs:
            continue
        if option.is_switch:
            assert ours.has(option.name) == theirs[option.key], option.name
        elif option.name in ours.given:
            value = theirs[option.key]
            assert str(ours.text(option.name)) == str(value), option.name


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--nproc", "nproc-per-node"),
        ("--max", "max-restarts"),
        ("--rdzv_e", "rdzv-endpoint"),
        ("--mon", "monitor-interval"),
        ("--res", "resources"),
    ],
)
def test_an_abbreviation_that_only_one_flag_has_is_that_flag(written: str, meant: str) -> None:
    assert find_option(written).name == meant


def test_torchruns_abbreviations_win_over_our_own_flags() -> None:
    """`--re` means --redirects under torchrun; that --resources exists here too may not change it."""
    assert find_option("--re").name == "redirects"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nprocs", "2", "train.py"], ["no such flag: --nprocs", "did you mean --nproc-per-node?"]),
        (
            ["--nproc_per_nod=2x", "--nproc-pre-node", "2", "t.py"],
            ["--nproc-pre-node", "did you mean --nproc-per-node?"],
        ),
        (["-q", "train.py"], ["no such flag: -q"]),
        (["--rdzv", "x", "train.py"], ["--rdzv is short for more than one flag", "--rdzv-id or --rdzv-backend"]),
        (["--max-restarts"], ["--max-restarts needs a value (N), and the command line ends"]),
        (
            ["--log-dir", "--standalone", "t.py"],
            ["--log-dir needs a value (DIR), and --standalone follows", "--log-dir=VALUE"],
        ),
        (["--standalone=yes", "t.py"], ["--standalone takes no value"]),
    ],
)
def test_a_mistake_is_named_with_what_to_write(argv: list[str], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        parse(argv, {})
    for word in words:
        assert word in str(caught.value)


def test_a_bad_variable_is_named_as_a_variable() -> None:
    with pytest.raises(SpecError, match="PET_STANDALONE=yes: this variable is a switch"):
        parse(["t.py"], {"PET_STANDALONE": "yes"})


def test_the_command_line_wins_over_the_environment_and_the_last_over_the_first() -> None:
    line = parse(["--nnodes", "2", "--nnodes=3", "t.py"], {"PET_NNODES": "4"})
    assert line.text("nnodes") == "3"


def test_two_dashes_end_the_flags() -> None:
    line = parse(["--standalone", "--", "train.py", "--", "-r"], {})
    assert (line.target, line.args) == ("train.py", ("--", "-r"))


@pytest.mark.parametrize("width", [20, 80, 100, 200])
def test_help_names_every_flag_and_fits_the_terminal(width: int) -> None:
    text = help_text(width)
    for option in OPTIONS:
        assert f"--{option.name}" in text
    too_long = [line for line in text.splitlines() if len(line) > max(width, 113)]
    assert not too_long
