"""`python -m launcher status RUN` and `report RUN`: read the journal, show what it says."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import EXIT_OK, SpecError
from launcher.report import find
from launcher.report.data import report_data
from launcher.report.find import Found
from launcher.report.goodput import goodput
from launcher.report.page import page
from launcher.report.state import State, state_of
from launcher.report.text import report_text, status_text

_KUBERNETES_FLAGS = ("--namespace", "-n", "--context")
_HELP = {
    "status": """\
usage: python -m launcher status [RUN] [--json]
       python -m launcher status JOB [--namespace NAME] [--context NAME] [--json]

Says where a run stands: what it does, how far and how fast it is, which failures it has seen.

RUN  the id (like 20261125-141615-d875) or the directory of a run of this launcher, latest, or nothing for the last one begun here.
JOB  any other name: a job that was submitted to Kubernetes. A directory in the working directory is written ./NAME.
""",
    "report": """\
usage: python -m launcher report [RUN] [--json | --html FILE]

The whole account of a run, also of one in progress or one whose launcher was killed: goodput (start, steps, data wait, hang, restart,
other; they add up to all of its time), attempts, failures, nodes.

RUN          the id (like 20261125-141615-d875) or the directory of a run, latest, or nothing for the last one begun here
--json       for programs; the schema is in docs/launcher.md
--html FILE  one page with plots, which needs no network; - for standard output
""",
}


def means_kubernetes(argv: Sequence[str]) -> bool:
    """Whether `status ARGV` asks about a job on Kubernetes. Decided by the words alone, never by what lies on the disk.

    >>> means_kubernetes(["my-job"]), means_kubernetes(["-n", "team"]), means_kubernetes([]), means_kubernetes(["./my-job"])
    (True, True, False, False)
    """
    if any(word.partition("=")[0] in _KUBERNETES_FLAGS for word in argv):
        return True
    names = [word for word in argv if not word.startswith("-")]
    return bool(names) and not find.is_run(names[0])


@dataclass(frozen=True)
class _Asked:
    run: str | None
    as_json: bool
    html: str | None
    wants_help: bool


def status(argv: Sequence[str]) -> int:
    """Where a run stands; 0 whatever it is."""
    asked = _read(argv, "status")
    if asked.wants_help:
        return _say(_HELP["status"])
    found = _found(asked)
    state, silent_s, until_s = _now(found)
    good = goodput(found.run, until_s)
    if asked.as_json:
        return _say(json.dumps(report_data(found.run, state, good), indent=2))
    _warn(found)
    return _say(status_text(found.run, state, good.total_s, silent_s))


def report(argv: Sequence[str]) -> int:
    """The account of a run; 0 whatever became of it."""
    asked = _read(argv, "report")
    if asked.wants_help:
        return _say(_HELP["report"])
    found = _found(asked)
    state, _, until_s = _now(found)
    good = goodput(found.run, until_s)
    if asked.as_json:
        return _say(json.dumps(report_data(found.run, state, good), indent=2))
    _warn(found)
    if asked.html is not None:
        return _write_page(asked.html, page(found.run, state, good))
    return _say(report_text(found.run, state, good))


def _write_page(path: str, html: str) -> int:
    if path == "-":
        return _say(html)
    try:
        Path(path).write_text(html, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--html {path}: {error.strerror}", advice="name a file that can be written") from error
    return _say(f"written to {path}")


def _found(asked: _Asked) -> Found:
    return find.read(find.find(asked.run, os.environ, os.getcwd()))


def _now(found: Found) -> tuple[State, float, float | None]:
    """State, seconds since the last entry, and until when (since its beginning) the run is accounted for."""
    run = found.run
    silent_s = max(0.0, time.time() - run.last_wall_s)
    state = state_of(run, find.is_alive(run), silent_s)
    return state, silent_s, None if state.is_over else run.last_s + silent_s


def _warn(found: Found) -> None:
    if found.is_cut and found.run.ending is None:
        _note("the journal's last line was not finished: its writer was killed while it wrote, or writes just now")
    elif found.num_unreadable:
        _note(
            f"{found.num_unreadable} of the journal's lines cannot be read (a full disk, or a newer version); what follows lacks them"
        )


def _note(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr)


def _read(argv: Sequence[str], command: str) -> _Asked:
    names: list[str] = []
    as_json, html, wants_help = False, None, False
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            wants_help = True
        elif word == "--json":
            as_json = True
        elif flag == "--html" and command == "report":
            if not equals and not words:
                raise SpecError(
                    "--html needs a file", advice="write --html report.html, or --html - for standard output"
                )
            html = value if equals else words.pop(0)
        elif word.startswith("-"):
            known = (
                "--json and --html FILE"
                if command == "report"
                else "--json; for jobs on Kubernetes --namespace and --context"
            )
            raise SpecError(f"no such flag: {word}", advice=f"there are {known}")
        else:
            names.append(word)
    if len(names) > 1:
        raise SpecError(f"{command} wants one run, and {len(names)} are given", advice="leave it out for the last one")
    if command == "report" and names and not find.is_run(names[0]):
        raise SpecError(
            f"{names[0]} is not the id of a run, which looks like 20261125-141615-d875",
            advice=f"for a directory here write ./{names[0]}; where a job on Kubernetes stands says `status {names[0]}`",
        )
    if as_json and html is not None:
        raise SpecError("--json and --html are two reports", advice="ask twice")
    return _Asked(names[0] if names else None, as_json, html, wants_help)


def _say(text: str) -> int:
    print(text.rstrip())
    return EXIT_OK
