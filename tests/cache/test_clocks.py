"""The machine's clock may be stepped (NTP, a suspended VM, a person) without anything of the cache noticing."""

from __future__ import annotations

import ast
from pathlib import Path

CACHE = Path(__file__).parents[2] / "cache"

MAY_READ_THE_CLOCK = {
    "daemon/blockfetch.py": "Retry-After as a date, by the origin's clock",
    "daemon/fetches.py": "requests to peers are signed for a minute",
    "daemon/lending.py": "and believed for it",
    "daemon/peers.py": "and believed for it",
    "daemon/peerserver.py": "and believed for it",
    "origin/s3fs_origin.py": "expiry of credentials, which is a date",
    "origin/aws_profile.py": "expiry of credentials, which is a date; a stepped clock delays a look, and refused keys are read anew anyway",
    "origin/obstore_origin.py": "If-Unmodified-Since",
    "cli.py": "the time of a line in the log",
    "client/records.py": "the name of one start of a job, which its ranks agree on",
}


WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}


def _reads_the_wall_clock(tree: ast.AST) -> bool:
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return any((ast.unparse(node.value), node.attr) in WALL_CLOCKS for node in called)


def test_no_deadline_lease_or_rate_of_the_cache_is_measured_with_a_clock_that_can_be_stepped() -> None:
    """A step of an hour back would have let nothing time out for an hour; one forward would have everything time out at once."""
    files = [path for path in CACHE.rglob("*.py") if _reads_the_wall_clock(ast.parse(path.read_text()))]
    unexpected = {str(path.relative_to(CACHE)) for path in files} - set(MAY_READ_THE_CLOCK)
    assert not unexpected, f"time.monotonic() is the clock of deadlines: {unexpected}"
