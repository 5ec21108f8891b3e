"""Runs the suite, and looks a second time at the few tests that failed: alone, so that neither a neighbour on the two cores nor its
own worker's history can be the cause. Fails if any fails again, or if more than `MOST` failed; names those that passed only
alone, since each of them is a fault of the test or of the product that is to be mended (docs/decisions/0098)."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAST_FAILED = ROOT / ".pytest_cache/v/cache/lastfailed"
MOST = 3
SOME_FAILED = 1  # pytest's exit code; the others (interrupted, wrong usage, no tests) are handed on as they are


def failed_tests(last_failed: Path) -> list[str]:
    """The tests that pytest remembers as failed; none if it remembers nothing."""
    try:
        # xdist puts the group behind the name: `test_a.py::test_b[c]@ray`.
        return sorted(re.sub(r"@\w+$", "", name) for name in json.loads(last_failed.read_text()))
    except FileNotFoundError:
        return []


def main(arguments: list[str]) -> int:
    LAST_FAILED.unlink(missing_ok=True)  # failures of earlier runs are not this run's
    pytest = [sys.executable, "-m", "pytest"]
    code = subprocess.run([*pytest, "-n", "2", "--dist", "loadgroup", *arguments], cwd=ROOT).returncode
    failed = failed_tests(LAST_FAILED)
    if code != SOME_FAILED or not 0 < len(failed) <= MOST:
        return code
    print(f"\nA second look, alone, at what failed: {', '.join(failed)}", flush=True)
    again = subprocess.run([*pytest, "-n", "0", *failed], cwd=ROOT).returncode
    if again == 0:
        print(f"\nPassed only alone, to be mended all the same: {', '.join(failed)}", flush=True)
    return again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
