"""The run directory: where a job's journal, logs and records lie. Unique by time and chance, never reused.

railhead-runs/20261123-190301-5f3a/
  spec.json                    what was asked for
  journal.jsonl                what happened
  attempt_0/rank_3/stdout.log  stderr.log  error.json  environment.json
  attempt_0/store.log, cache_HOST.log
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time

from launcher.errors import SpecError
from launcher.gang.masking import masked, masked_args
from launcher.journal import to_json
from launcher.spec import JobSpec

DEFAULT_BASE = "railhead-runs"


def create(spec: JobSpec, runs_variable: str | None) -> str:
    """Makes the directory and returns its path. `runs_variable` is $RAILHEAD_RUNS.

    In `--log-dir`, else in $RAILHEAD_RUNS, else in `railhead-runs` below the working directory, or, where that cannot be written, below
    the temporary directory. Raises SpecError when a place that the user has named cannot be used.
    """
    asked = spec.logs.log_dir or runs_variable
    try:
        return _create_below(asked or DEFAULT_BASE)
    except OSError as error:
        if asked:
            raise SpecError(
                f"the run directory cannot be made in {asked}: {error.strerror}",
                advice="name another place with --log-dir, or in RAILHEAD_RUNS",
            ) from error
    return _create_below(os.path.join(tempfile.gettempdir(), f"{DEFAULT_BASE}-{os.getuid()}"))


def _create_below(base: str) -> str:
    is_new = not os.path.isdir(base)
    os.makedirs(base, exist_ok=True)
    if is_new:
        # Runs are nobody's source code.
        with contextlib.suppress(OSError), open(os.path.join(base, ".gitignore"), "x") as file:
            file.write("*\n")
    while True:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(base, name))
            break
    _point_latest_at(base, name)
    return os.path.join(base, name)


def _point_latest_at(base: str, name: str) -> None:
    """`latest` in the same directory, replaced in one step; a convenience, so it may fail."""
    link = os.path.join(base, f".latest-{name}")
    with contextlib.suppress(OSError):
        os.symlink(name, link)
        os.replace(link, os.path.join(base, "latest"))


def write_spec(run_dir: str, spec: JobSpec) -> None:
    """`spec.json`, secrets masked; best effort."""
    data = to_json(spec)
    data["env"] = masked(spec.env)
    data["program"]["args"] = masked_args(spec.program.args)
    with contextlib.suppress(OSError), open(os.path.join(run_dir, "spec.json"), "w") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
