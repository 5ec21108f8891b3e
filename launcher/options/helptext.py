"""`--help`, made from the table of flags."""

from __future__ import annotations

import textwrap

from launcher.options.table import GROUPS, OPTIONS, TORCHRUN, Option

_HEAD = """\
usage: python -m launcher [flags] TARGET [arguments of TARGET …]

Runs one training program as a gang of ranks, on this machine or on the nodes of a Ray cluster. It takes
torchrun's flags, in both spellings (--nproc-per-node, --nproc_per_node), and what runs under torchrun runs here.

  python -m launcher --nproc-per-node 2 train.py --lr 0.1
  python -m launcher --nnodes 16 --nproc-per-node 8 --address auto train.py --lr 0.1
"""

_TAIL = """\
About a run: python -m launcher status | report, each with --help.

On Kubernetes: python -m launcher render | submit | status | logs | stop | list, each with --help.

Every flag can be given as a variable PET_<NAME>, like PET_NNODES=2; the command line wins.

The command ends with 0 if and only if every rank ended with 0; else with the code of the rank that failed first (128 + number for a
signal), 2 for a mistake in the command, 69 if the nodes cannot be had, 70 for a fault of the launcher, 75 for a lost node, 130 or 143 after
SIGINT or SIGTERM.
"""

_INDENT = 34


def help_text(width: int) -> str:
    """The whole help for a terminal of this width."""
    width = max(60, min(width, 120))
    rows = {group: [_row(option, width) for option in OPTIONS if option.group == group] for group in GROUPS}
    groups = [f"{group}:\n" + "\n".join(lines) + "\n" for group, lines in rows.items()]
    tail = "\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in _TAIL.strip().split("\n\n"))
    return "\n".join([_HEAD, *groups, tail])


def _row(option: Option, width: int) -> str:
    short = f"-{option.short}, " if option.short else "    "
    flag = f"  {short}--{option.name}" + (f" {option.metavar}" if option.metavar else "")
    words = f"No effect: {option.note}." if option.group == TORCHRUN else option.help
    lines = textwrap.wrap(words, width - _INDENT, break_on_hyphens=False)
    if len(flag) < _INDENT - 1:
        lines[0] = flag.ljust(_INDENT) + lines[0]
        return "\n".join([lines[0], *(" " * _INDENT + line for line in lines[1:])])
    return "\n".join([flag, *(" " * _INDENT + line for line in lines)])
