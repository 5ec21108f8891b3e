"""A Ray cluster of two raylets on this machine for tests, in a process of its own, started once for each xdist worker.

In a process of its own because `ray.init` and `ray.shutdown` in a test must not meddle with the cluster's books, and because the process
can be ended with all that it started, by its pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from launcher.node.guardian import descendants_of

_SERVE = """
import sys
from ray.cluster_utils import Cluster
first = {"num_cpus": 4, "env_vars": {"RAILHEAD_TEST_NODE": "first"}}
cluster = Cluster(initialize_head=True, head_node_args={**first, "include_dashboard": False})
cluster.add_node(num_cpus=4, resources={"second": 1}, env_vars={"RAILHEAD_TEST_NODE": "second"})
print(cluster.address, flush=True)
for line in sys.stdin:
    resource, _, rack = line.strip().partition(" ")
    labels = {"topology.kubernetes.io/rack": rack} if rack else {}
    node = cluster.add_node(num_cpus=2, resources={resource: 1}, labels=labels)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
cluster.shutdown()
"""
NODES = 2
CPUS_PER_NODE = 4
"""As Ray counts them; it reserves nothing of the machine."""


@dataclass(frozen=True)
class RayUnderTest:
    """A running cluster: 2 nodes of 4 CPUs; one has the resource `second`. RAILHEAD_TEST_NODE is `first` or `second` there: both
    are on one machine, so what must differ between nodes (a cache directory) is told apart by it."""

    address: str
    server: subprocess.Popen[str]

    def add_node(self, resource: str, rack: str = "") -> int:
        """One more node, of 2 CPUs and with this resource, for a test to kill; the process id of its raylet."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(f"{resource} {rack}\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


def kill_node(raylet_pid: int) -> None:
    """The whole machine at once: the raylet and all that it started, frozen first so that nobody sees another die. (A raylet that dies
    alone takes its node's ranks with it only when Ray says so, after 10 s and more.) Does nothing if it is dead already."""
    pids = [raylet_pid, *descendants_of(raylet_pid)]
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def ray_environment() -> dict[str, str]:
    """The environment of whoever talks to the test's cluster: no cluster of the user's, no token, no reports."""
    hidden = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("PET_")}
    # Nodes that a test loses must not be remembered for the jobs of whoever runs the tests.
    return {**kept, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PET_EXCLUDE_FILE": "none"}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayUnderTest]:
    """Two raylets; about 6 s."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ray_environment(), text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with server.stdin, server.stdout:
        address = server.stdout.readline().strip()
        assert address, "the Ray cluster of the tests did not start"
        yield RayUnderTest(address, server)
        server.stdin.close()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
