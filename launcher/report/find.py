"""From what a person calls a run to its journal: an id, a directory, or nothing for the last one. Reads the disk; holds no judgement."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import SpecError
from launcher.journal import parse_line
from launcher.report.record import RunRecord
from launcher.rundir import DEFAULT_BASE

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
LATEST = "latest"


def is_run(word: str) -> bool:
    """Whether a word names a run of this launcher, whatever is on the disk; else it names a job on Kubernetes.

    >>> [is_run(word) for word in ("20261125-141615-d875", "latest", "./x", "runs/x", "resnet-50")]
    [True, True, True, True, False]
    """
    return RUN_ID.fullmatch(word) is not None or word == LATEST or "/" in word or word in (".", "..")


@dataclass(frozen=True)
class Found:
    """A run's journal, read."""

    directory: str
    run: RunRecord
    num_unreadable: int
    """Lines that could not be understood."""
    is_cut: bool
    """The last line has no end: its writer was killed while it wrote, or writes just now."""


def find(word: str | None, environ: Mapping[str, str], cwd: str) -> str:
    """The run's directory. Raises SpecError, naming where it was looked for."""
    if word is not None and ("/" in word or word in (".", "..")):
        return _checked(Path(cwd, word), word)
    bases = _bases(environ, cwd)
    for base in bases:
        path = base / (word or LATEST)
        if path.is_dir():
            return _checked(path.resolve(), word or LATEST)
    looked = ", ".join(str(base) for base in bases)
    what = f"no run {word}" if word else "no run yet"
    raise SpecError(
        f"{what} in {looked}",
        advice="name its directory: the launcher prints it first (with --log-dir it lies elsewhere)",
    )


def _bases(environ: Mapping[str, str], cwd: str) -> list[Path]:
    named = environ.get("RAILHEAD_RUNS")
    return [*([Path(cwd, named)] if named else []), Path(cwd, DEFAULT_BASE), _fallback_base()]


def _fallback_base() -> Path:
    return Path(tempfile.gettempdir(), f"{DEFAULT_BASE}-{os.getuid()}")


def _checked(path: Path, word: str) -> str:
    if not path.is_dir():
        raise SpecError(
            f"no such run directory: {path}", advice="paths are taken from the directory in which the command runs"
        )
    if not (path / "journal.jsonl").is_file():
        raise SpecError(
            f"{path} has no journal.jsonl: it is not the directory of a run",
            advice="give the one that the launcher printed first",
        )
    return str(path)


def read(directory: str) -> Found:
    """Whatever the journal holds. Raises SpecError when not one line of it can be read."""
    path = os.path.join(directory, "journal.jsonl")
    run, num_bad, line = RunRecord(), 0, b""
    try:
        with open(path, "rb") as file:
            for line in file:
                entry = parse_line(line)
                if entry is not None:
                    run.see(entry)
                elif line.strip():
                    num_bad += 1
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    is_cut = bool(line) and not line.endswith(b"\n")
    if not run.num_entries:
        what = f"{num_bad} lines, none of them readable" if num_bad else "empty"
        raise SpecError(
            f"{path} is {what}: nothing is known of this run",
            advice="was the disk full, or the launcher killed as it began? The ranks' logs lie beside it, in attempt_0",
        )
    run.run_dir = directory
    return Found(directory, run, num_bad, is_cut)


def is_alive(run: RunRecord) -> bool | None:
    """Whether the launcher of a run lives; None: it ran on another machine, or where is not known.

    A process that began after the journal's first line is not it, whatever its number.
    """
    if run.pid is None or run.hostname != socket.gethostname():
        return None
    try:
        stat = Path(f"/proc/{run.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot_s = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
        )
    except (OSError, StopIteration, ValueError, IndexError):
        return False
    began_s = boot_s + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return stat[0] != "Z" and began_s <= run.began_wall_s + 2.0
