"""The node's side: an agent's host process, spoken to from inside a Ray actor.

Events leave by long-poll (`poll_events`), shown output by a second one (`poll_outputs`), each in a concurrency group of its own, so
neither waits for the other and both do not wait for commands. Output never goes through Ray's own log forwarding, which folds
equal lines (ray#37873).
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from launcher.cluster.ray import topology
from launcher.cluster.ray.lease import Lease, Terms
from launcher.cluster.ray.outbox import Outbox
from launcher.cluster.ray.parcel import unpack
from launcher.errors import NodeError
from launcher.gang.events import Event, LogChunk, Notice, Output
from launcher.gang.world import NodeInfo
from launcher.node.agent_host import PULSE
from launcher.spec import JobSpec

EVENT_GROUP = "events"
OUTPUT_GROUP = "outputs"

MAX_HELD_BYTES = 4 * 1024 * 1024
"""Shown output held on the node while the launcher's terminal is slow; beyond it the ranks' files are not read on."""
FAREWELL_S = 30.0
"""How long an actor whose agent has ended stays to say why, should the launcher ask again."""
WATCH_S = 0.1
CLOSE_S = 10.0
"""Longer than an agent takes to close; then its process is killed, and the guardians end the rest."""


@dataclass(frozen=True)
class Hello:
    """What an agent says of itself before it is given work."""

    node_id: str
    """Ray's, of the node on which this process runs."""
    railhead: str
    python: str
    hostname: str
    cwd: str | None
    """Directory in which ranks will run; None if the job's is not there."""
    nvlink_domain: str | None = None
    """Of the node's GPUs, as their driver tells it."""


class AgentActor:
    """Created by the launcher on its bundle. All methods are called by Ray."""

    def __init__(self) -> None:
        self._host: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None
        self._events: Outbox[Event] = Outbox()
        self._outputs: Outbox[Output] = Outbox(MAX_HELD_BYTES)
        self._is_gone = False
        self._lease: Lease | None = None
        self._num_answers = 0
        self._has_begun = threading.Event()
        self._why_ended = ""
        self._asked_s: float | None = None
        """Monotonic; since when the agent's process has owed an answer."""
        self._has_pulse = False

    def hello(self, cwd: str, use_own_cwd: bool) -> Hello:
        """Who is here. `use_own_cwd`: Ray has put the job's files where this process runs (`runtime_env` with a working directory)."""
        chosen = os.getcwd() if use_own_cwd else cwd
        there = chosen if Path(chosen).is_dir() else None
        node_id = ray.get_runtime_context().get_node_id()
        host = socket.gethostname()
        return Hello(node_id, installed_version(), platform.python_version(), host, there, topology.nvlink_domain())

    def begin(self, node: NodeInfo, spec: JobSpec, run_dir: str, cwd: str, cache_key: str | None = None) -> int:
        """Starts the agent's host process and the agent in it. Returns the port on which that process can be seen to live: 0 for none."""
        made, notice = _make_run_dir(run_dir)
        if notice:
            self._events.put(Notice(notice, node.node_id))
        base_env = user_environment(os.environ, _initial_environment())
        self._lease = Lease(Terms(spec.heartbeat_timeout_s), time.monotonic())
        port = self._start_host(base_env, node.addr)
        self._send("begin", node, replace(spec, cwd=cwd), made, base_env, cache_key)
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()
        raylet = raylet_of(os.environ, os.getppid())
        if raylet:
            threading.Thread(target=self._watch_raylet, args=(raylet,), name="raylet", daemon=True).start()
        self._has_begun.set()
        return port

    def open_store(self, attempt: int) -> None:
        self._send("open_store", attempt)

    def start_ranks(self, parcel: bytes) -> None:
        self._send("start_ranks", unpack(parcel))

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        self._send("stop_attempt", attempt, grace_s, signum, can_save)

    def share_imports(self, names: tuple[str, ...]) -> None:
        self._send("share_imports", names)

    def share_cache(self, addresses: tuple[str, ...]) -> None:
        self._send("share_cache", addresses)

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        self._send("take_stacks", attempt, look, is_final)

    def close(self) -> None:
        """Ends everything on this node; blocks until it is done."""
        self._send("close")
        if self._host is not None:
            try:
                self._host.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self._host.kill()
                self._host.wait()

    def poll_events(self, num_arrived: int, last_heard: int, timeout_s: float) -> tuple[int, list[Event]]:
        """The number of this answer, and events after the first `num_arrived`; none after `timeout_s`: the heartbeat. `last_heard`: number
        of the last answer that the launcher has heard (0: of none). Raises NodeError when the agent is gone and has nothing left to say."""
        self._num_answers += 1
        # Polls come on another road than commands, and may overtake `begin`.
        if not self._has_begun.wait(timeout_s) or self._lease is None:
            return self._num_answers, []
        self._lease.heard(last_heard)
        self._tell_lease()
        events = self._events.take(num_arrived, timeout_s)
        if self._is_gone and not events:
            raise NodeError(self._why_gone())
        self._lease.answered(self._num_answers, time.monotonic())
        return self._num_answers, events

    def poll_outputs(self, num_arrived: int, timeout_s: float) -> list[Output]:
        """Shown output after the first `num_arrived` pieces; empty after `timeout_s`."""
        return self._outputs.take(num_arrived, timeout_s)

    def _start_host(self, base_env: Mapping[str, str], addr: str) -> int:
        control, theirs = socket.socketpair()
        outputs, their_outputs = socket.socketpair()
        lifeline, port = _listen(addr)
        fds = [theirs.fileno(), their_outputs.fileno(), *([lifeline.fileno()] if lifeline else [])]
        # -P: the directory in which Ray runs may hold a module that is called like one of ours
        command = [sys.executable, "-P", "-m", "launcher.node.agent_host", *map(str, fds)]
        with theirs, their_outputs, lifeline or contextlib.nullcontext():
            self._host = subprocess.Popen(
                command, pass_fds=fds, env=base_env, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._control = Connection(control.detach())
        for target, fd in ((self._read_events, self._control), (self._read_outputs, Connection(outputs.detach()))):
            threading.Thread(target=target, args=(fd,), name=target.__name__, daemon=True).start()
        return port

    def _send(self, name: str, *args: Any) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):  # the process is gone, and the reading thread says so
                self._control.send((name, args))

    def _read_events(self, control: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = control.recv()
                if message == PULSE:
                    self._asked_s, self._has_pulse = None, True
                else:
                    self._events.put(message)
        self._is_gone = True
        self._events.close()

    def _read_outputs(self, outputs: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                output = outputs.recv()
                self._outputs.put(output, len(output.data) if isinstance(output, LogChunk) else 0)

    def _tell_lease(self) -> None:
        """The agent's process keeps it itself, so that it holds also while this one is frozen."""
        assert self._lease is not None
        self._asked_s = self._asked_s or time.monotonic()
        self._send("lease", self._lease.ends_s)

    def _why_gone(self) -> str:
        where = socket.gethostname()
        if self._why_ended:
            return self._why_ended
        if self._lease is not None and time.monotonic() >= self._lease.ends_s:
            return f"the agent on {where} heard nothing from the launcher in time and ended its ranks"
        return f"the agent's process on {where} has ended"

    def _watch_raylet(self, pid: int) -> None:
        """Without its raylet Ray takes the node for dead, and ends us: in a second where somebody reaps the raylet, else (a container
        whose first process is a shell) when its head has missed it for 14 s. So the ranks end now, and start elsewhere."""
        try:
            raylet = os.pidfd_open(pid)
        except OSError:
            return  # it is gone, and Ray ends us; or this kernel has no pidfd, and Ray's word has to do
        try:
            select.select([raylet], [], [])
        finally:
            os.close(raylet)
        self._why_ended = f"the raylet on {socket.gethostname()} has died"
        if self._host is not None:
            self._host.kill()

    def _is_frozen(self) -> bool:
        """Whether the agent's process does not answer, though we do: nobody would hear of the end of its ranks."""
        assert self._lease is not None
        asked_s = self._asked_s
        # Before its first answer it is being started, which takes long on a busy machine; then the lease is all.
        return self._has_pulse and asked_s is not None and time.monotonic() - asked_s > self._lease.terms.lease_s

    def _watch_lease(self) -> None:
        assert self._lease is not None
        assert self._host is not None
        while time.monotonic() < self._lease.ends_s and not self._is_frozen():
            time.sleep(WATCH_S)
        if self._is_frozen():
            patience_s = self._lease.terms.lease_s
            self._why_ended = f"the agent's process on {socket.gethostname()} has not answered for {patience_s:g} s"
        # It has ended itself at the same moment, unless it is frozen; its guardians see either.
        self._host.kill()
        self._host.wait()
        time.sleep(FAREWELL_S)
        os._exit(1)


def _listen(addr: str) -> tuple[socket.socket | None, int]:
    """A port that the kernel keeps open as long as the agent's process lives; nobody ever accepts what comes there. (None, 0) where the
    address cannot be listened on: then the end of the process is learnt from Ray, later."""
    try:
        listener = socket.create_server((addr, 0), family=socket.AF_INET6 if ":" in addr else socket.AF_INET, backlog=4)
    except OSError:
        return None, 0
    return listener, listener.getsockname()[1]


def raylet_of(env: Mapping[str, str], parent: int) -> int | None:
    """The process id of this worker's raylet, if it is sure: what Ray says must be our parent (in a container of our own it is not).

    >>> raylet_of({"RAY_RAYLET_PID": "7"}, 7), raylet_of({"RAY_RAYLET_PID": "7"}, 1), raylet_of({}, 7)
    (7, None, None)
    """
    told = env.get("RAY_RAYLET_PID", "")
    return parent if told == str(parent) else None


def installed_version() -> str:
    """The version of the installed distribution; both sides must have the same, for they exchange pickles."""
    return version("railhead")


def _make_run_dir(run_dir: str) -> tuple[str, str]:
    """The run directory on this node, and a notice if it had to be another one."""
    try:
        os.makedirs(run_dir, exist_ok=True)
    except OSError as error:
        other = tempfile.mkdtemp(prefix="railhead-run-")
        where = socket.gethostname()
        return other, f"{run_dir} cannot be made on {where} ({error.strerror}); logs of its ranks are there in {other}"
    return run_dir, ""


# What Ray puts into the environment of its workers for itself. A rank is not a worker of Ray, and would for example count
# OMP_NUM_THREADS=8 as the user's wish.
_RAYS_OWN = ("SPT_NOENV", "RAY_JOB_ID", "RAY_RAYLET_PID")
_RAYS_LATER = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")


def user_environment(now: Mapping[str, str], initial: Mapping[str, str]) -> dict[str, str]:
    """The environment that the node and the user gave this process: `now` without what Ray added for itself.

    >>> user_environment({"PATH": "/bin", "OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "0"}, {"PATH": "/bin"})
    {'PATH': '/bin', 'CUDA_VISIBLE_DEVICES': '0'}
    >>> user_environment({"OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4"})
    {'OMP_NUM_THREADS': '4'}
    """
    added = {name for name in _RAYS_LATER if name not in initial}
    return {name: value for name, value in now.items() if name not in added and name not in _RAYS_OWN}


def _initial_environment() -> dict[str, str]:
    pairs = Path("/proc/self/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
