"""Daemons that find each other by the name of a headless service, resolved by a real DNS server that fails in all the ways there are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.daemon import CacheDaemon, wait_until
from tests.integration.test_cache_peers import members

PORT = 7070
ENTER = ("--user", "--map-root-user", "--net", "--mount")
ASKS_OFTEN = (
    "import cache.daemon.discovery as d, cache.daemon.peers as p; d.RESOLVE_EVERY_S = p.HELLO_EVERY_S = 0.1; "
    "from cache.cli import main; main()"
)
"""The daemon as it is, but for the time between two questions and two greetings, which no test should wait for."""


def why_not() -> str | None:
    """Why no namespaces can be made here; None: they can."""
    if not all(shutil.which(program) for program in ("unshare", "nsenter", "ip", "mount")):
        return "needs unshare, nsenter, ip and mount"
    if find_spec("dnslib") is None:
        return "needs dnslib: pip install -e .[dev]"
    made = subprocess.run(["unshare", *ENTER, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return made.stderr.strip() or "unshare failed" if made.returncode else None


class Service:
    """A name that resolves to what `says` was told last."""

    def __init__(self, pid: int, zone: Path) -> None:
        self._pid, self._zone = pid, zone

    def says(self, answer: list[str] | str) -> None:
        new = self._zone.with_suffix(".new")
        new.write_text(json.dumps(answer))
        new.rename(self._zone)

    def daemon(self, address: str) -> CacheDaemon:
        enter = ("nsenter", f"--target={self._pid}", "--user", "--preserve-credentials", "--net", "--mount")
        options = ("--peers", f"dns:cache-peers.test:{PORT}", "--peer-listen", f"{address}:{PORT}")
        return CacheDaemon(options=options, command=(*enter, sys.executable, "-c", ASKS_OFTEN))


@contextmanager
def service(tmp_path: Path) -> Iterator[Service]:
    zone = tmp_path / "zone"
    zone.write_text("[]")
    command = ["unshare", *ENTER, sys.executable, "-m", "tests.integration.dns_server", str(zone), str(tmp_path / "rc")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield Service(server.pid, zone)
        server.stdin.close()  # type: ignore[union-attr]


def has_greeted_since(daemon: CacheDaemon, num_rounds: int) -> bool:
    return bool(daemon.status()["peers"]["rounds"] > num_rounds)


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_members_follow_the_name_and_stay_while_it_cannot_be_resolved(tmp_path: Path) -> None:
    """Kubernetes' DNS is away now and then; a cluster that fell apart each time would fetch everything as many times as it has nodes."""
    addresses = ["127.0.0.1", "127.0.0.2"]
    with service(tmp_path) as name, ExitStack() as stack:
        name.says("NXDOMAIN")  # a service without a pod that is ready
        one, two = [stack.enter_context(name.daemon(address)) for address in addresses]
        assert (members(one), members(two)) == (1, 1)
        wait_until(lambda: "cannot be resolved" in one.log, "it is said that the name cannot be resolved")

        name.says(addresses)
        wait_until(lambda: (members(one), members(two)) == (2, 2), "who is named is a member")

        for failure in ("SERVFAIL", "NXDOMAIN", "silence"):
            name.says(failure)
            wait_until(lambda: not one.status()["peers"]["is_resolved"], f"{failure} is noticed")
            at_first = one.status()["peers"]["rounds"]
            wait_until(partial(has_greeted_since, one, at_first), f"peers are greeted during {failure}")
            assert (members(one), members(two)) == (2, 2), failure
            name.says(addresses)
            wait_until(lambda: one.status()["peers"]["is_resolved"], "the name is resolved again")

        name.says(addresses[:1])
        wait_until(lambda: members(one) == 1, "who has left is forgotten, though it lives")
