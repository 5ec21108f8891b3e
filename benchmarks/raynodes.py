"""A small real Ray cluster whose machines can be broken: each node a keeper process of its own, with its raylet below it.

With root each node is in a network namespace with one link, which can be cut without a word; else all are on loopback, and only
processes can be killed. Node 0 is the head: it has no CPUs for ranks, and commands are run there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import namespaces
from launcher.node.guardian import descendants_of

HEAD_PORT = 6399

# It reaps its children, as `ray start --block` and any init do: a raylet that stays as a zombie is alive to Ray's workers.
_KEEPER = """
import json, sys, threading
from ray._private.node import Node
from ray._private.parameter import RayParams
given = json.loads(sys.argv[1])
is_head, keeps_zombies = given.pop("is_head"), given.pop("keeps_zombies")
defaults = dict(num_gpus=0, object_store_memory=80 * 2**20, min_worker_port=0, max_worker_port=0, include_dashboard=False,
                include_log_monitor=False, node_manager_port=0, dashboard_agent_listen_port=None)
node = Node(RayParams(**{**defaults, **given}), head=is_head, shutdown_at_exit=False, spawn_reaper=False)
processes = {name: [info.process.pid for info in infos] for name, infos in node.all_processes.items()}
print(json.dumps({"address": node.gcs_address, "node_id": node.node_id, "processes": processes}), flush=True)
if not keeps_zombies:
    for infos in node.all_processes.values():
        for info in infos:
            threading.Thread(target=info.process.wait, daemon=True).start()
sys.stdin.read()
node.kill_all_processes(check_alive=False, allow_graceful=False)
"""


@dataclass(frozen=True)
class RayNode:
    """One node of the cluster."""

    idx: int
    keeper: subprocess.Popen[str]
    node_id: str
    processes: Mapping[str, Sequence[int]]

    @property
    def raylet(self) -> int:
        return self.processes["raylet"][0]

    @property
    def gcs(self) -> int:
        """The cluster's head proper. Only on node 0."""
        return self.processes["gcs_server"][0]

    def pids(self) -> list[int]:
        """Everything that runs there."""
        return [self.keeper.pid, *descendants_of(self.keeper.pid)]

    def signal_all(self, *signums: int) -> None:
        """Each signal to everything there, one after the other."""
        pids = self.pids()
        for signum in signums:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def kill(self) -> None:
        """The whole machine at once: frozen first, so that nobody there sees another die. Does nothing if it is dead already."""
        if self.keeper.poll() is None:
            self.signal_all(signal.SIGSTOP, signal.SIGKILL)
            self.keeper.wait()


@dataclass
class RayNodes:
    """The cluster. `network`: None where namespaces cannot be made."""

    network: namespaces.Network | None
    directory: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Beside the usual, in the environment of all nodes."""
    nodes: list[RayNode] = field(default_factory=list)
    address: str = ""

    def add(self, num_cpus: int, keeps_zombies: bool = False) -> RayNode:
        """One more node; blocks until its raylet runs (the cluster learns of it a moment later). keeps_zombies: like a container whose
        first process is a shell that waits for something else.

        One after the other: nodes that share a session directory and start at the same time step on each other's files (Ray 2.60)."""
        idx = len(self.nodes)
        if self.network is not None:
            self.network.add_node()
        given: dict[str, Any] = {
            "is_head": idx == 0,
            "keeps_zombies": keeps_zombies,
            "num_cpus": num_cpus,
            "node_ip_address": self._addr(idx),
        }
        if idx:
            given["gcs_address"] = self.address
        else:
            given |= {"gcs_server_port": HEAD_PORT if self.network else 0, "temp_dir": self.directory}
        command = self.inside(idx, sys.executable, "-c", _KEEPER, json.dumps(given))
        with open(self._log(idx), "w") as log:
            keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment(), **self.env},
                text=True,
            )
        assert keeper.stdout is not None
        line = keeper.stdout.readline()
        if not line:
            close(keeper)
            raise RuntimeError(f"node {idx} did not start: {Path(self._log(idx)).read_text()[-3000:]}")
        told = json.loads(line)
        self.address = self.address or told["address"]
        node = RayNode(idx, keeper, told["node_id"], told["processes"])
        self.nodes.append(node)
        return node

    def _log(self, idx: int) -> str:
        return os.path.join(self.directory, f"node{idx}.log")

    def running(self) -> list[RayNode]:
        """Nodes that are not killed, without the head."""
        return [node for node in self.nodes[1:] if node.keeper.poll() is None]

    def of_process(self, pids: Sequence[int]) -> RayNode:
        """The node below whose keeper a process runs, by the process and its ancestors."""
        return next(node for node in self.nodes if node.keeper.pid in pids)

    def inside(self, idx: int, *command: str) -> list[str]:
        """The command as it is run on a node."""
        if self.network is None:
            return list(command)
        return ["ip", "netns", "exec", self.network.namespace(idx), *command]

    def cut(self, idx: int) -> None:
        """From now on nothing reaches the node or leaves it, and nobody is told."""
        assert self.network is not None, "links can be cut only in namespaces"
        # Not "down": the node's own interface keeps its carrier, as behind a dead switch.
        self.network.at_switch("ip", "link", "set", f"p{idx}", "nomaster")

    def mend(self, idx: int) -> None:
        """The link carries again."""
        assert self.network is not None
        self.network.at_switch("ip", "link", "set", f"p{idx}", "master", "br0")

    def close(self) -> None:
        """Ends everything."""
        for node in reversed(self.nodes):
            node.kill()
            close(node.keeper)

    def _addr(self, idx: int) -> str:
        return self.network.address(idx) if self.network else "127.0.0.1"


def close(keeper: subprocess.Popen[str]) -> None:
    """The keeper is dead, or dies of this."""
    keeper.kill()
    keeper.wait()
    for pipe in (keeper.stdin, keeper.stdout):
        if pipe is not None:
            pipe.close()


def environment() -> dict[str, str]:
    """Of whoever talks to the cluster: no cluster of the user's, no token, no reports, no memory of lost nodes."""
    hidden = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("PET_")}
    return {**kept, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PET_EXCLUDE_FILE": "none"}


@contextlib.contextmanager
def ray_nodes(
    num_workers: int, num_cpus: int = 2, in_namespaces: bool = True, env: Mapping[str, str] | None = None
) -> Iterator[RayNodes]:
    """A head without CPUs and `num_workers` nodes; more may be added. env: for all of them, beside the usual."""
    with contextlib.ExitStack() as stack:
        # Short: Ray's sockets lie below it, and their paths may have 107 bytes.
        directory = tempfile.mkdtemp(prefix="rhray-", dir="/tmp")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        has_namespaces = in_namespaces and namespaces.why_not() is None
        network = stack.enter_context(namespaces.network(0)) if has_namespaces else None
        cluster = RayNodes(network, directory, env or {})
        stack.callback(cluster.close)
        cluster.add(0)
        for _ in range(num_workers):
            cluster.add(num_cpus)
        yield cluster
