"""The command line that benchmarks over some objects of one store share: how many objects, how often, and where the page goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.seaweed import WeedMissing

Results = TypeVar("Results")

QUICK_OBJECTS = 16


def main(
    argv: Sequence[str],
    *,
    module: str,
    about: str | None,
    repeats: int,
    objects: int,
    run: Callable[[int, int], Results],
    report: Callable[[Results, int, int, str], str],
) -> None:
    """`run` takes the number of objects and of repeats; `report` what it gave, both numbers and the command, and returns the page. Written
    beside the page: what `run` gave, as JSON. `repeats`, `objects`: defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_OBJECTS} objects, one repeat: does it run?")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--objects", type=int, default=objects)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args(argv)
    num_objects, num_repeats = (QUICK_OBJECTS, 1) if options.quick else (options.objects, options.repeats)
    try:
        results = run(num_objects, num_repeats)
    except WeedMissing as e:
        parser.exit(2, f"{e}\n")
    page = report(results, num_objects, num_repeats, f"python -m {module} {' '.join(argv)}".strip())
    print(page)
    if options.result is not None:
        options.result.write_text(page)
        options.result.with_suffix(".json").write_text(json.dumps(results, indent=1))
