"""The cache daemon of this node, as a child: started with the agent, told of once it serves, drained at the end.

A failing cache is a slower cache: whatever goes wrong here is said loudly and the ranks go on without. The contract with the daemon
(its options, the one JSON line, its exit codes) is in docs/ARCHITECTURE.md; the launcher imports nothing of the package `cache`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.gang.events import CacheFailed, CacheServing, Event
from launcher.node.cache_peers import PeerFiles, PeerTerms
from launcher.node.failure import last_lines
from launcher.node.guarded import Exited, Gone, Report, StartFailed, execute
from launcher.node.runtime_dir import private_directory
from launcher.spec import CacheOptions

ANNOUNCE_TIMEOUT_S = 20.0
"""A daemon that verifies a large cache after a crash may take seconds; one that says nothing for this long is not going to."""
DRAIN_S = 2.0
"""SIGTERM drains the daemon within this, by contract."""


def socket_path(cache_dir: str) -> str:
    """Where the daemon of this directory shall listen. Short, because Unix socket paths end at 107 bytes; private to the user.

    Of this process alone: if another daemon serves the directory already, our path becomes a link to its socket.
    """
    base = private_directory()
    name = hashlib.sha256(os.path.realpath(cache_dir).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return os.path.join(base, f"{name}-{os.getpid()}.sock")


class CacheChild:
    """The daemon and what is known of it. Owned by the agent's loop, which registers `guarded.socket` and `announce_fd`."""

    def __init__(
        self,
        options: CacheOptions,
        node_id: str,
        cwd: str,
        base_env: Mapping[str, str],
        log_path: str,
        on_event: Callable[[Event], None],
        peer_terms: PeerTerms | None = None,
        peers: Sequence[str] = (),
    ) -> None:
        """peer_terms: None: it has no peers. peers: those that are known already. Raises OSError when it cannot even be started."""
        self._node_id = node_id
        self._on_event = on_event
        self._log_path = log_path
        self.has_announced = False
        self.is_over = False
        self._is_stopping = False
        self._was_told_to_stop = False
        self._already_running = False
        self._received = b""
        self.deadline_s = time.monotonic() + ANNOUNCE_TIMEOUT_S
        # Expanded here, on the node: `$SLURM_TMPDIR/cache` and `~` differ from node to node.
        self._dir = os.path.abspath(os.path.join(cwd, os.path.expanduser(os.path.expandvars(options.dir))))
        self.socket = socket_path(self._dir)
        self._peer_files: PeerFiles | None = None
        if peer_terms is not None:
            self._peer_files = PeerFiles(self.socket.removesuffix(".sock"), peer_terms, peers)
        self._log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.announce_fd, write_fd = os.pipe()
        os.set_blocking(self.announce_fd, False)
        try:
            argv, env = self._command(options, base_env)
            self.guarded = execute(argv, env, cwd, write_fd, self._log_fd)
        except BaseException:
            os.close(self.announce_fd)
            if self._peer_files is not None:
                self._peer_files.close()
            raise
        finally:
            os.close(write_fd)
            os.close(self._log_fd)

    def _command(self, options: CacheOptions, base_env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        # -P: a `cache.py` in the user's directory is not our daemon. Our own packages' directory is named instead, because the launcher
        # may run from a checkout that is not installed.
        packages = str(Path(__file__).parents[2])
        python_path = os.pathsep.join(filter(None, [packages, base_env.get("PYTHONPATH", "")]))
        program = options.program or (sys.executable, "-P", "-m", "cache")
        argv = [*program, "serve", "--dir", self._dir, "--capacity", options.capacity]
        argv += ["--socket", self.socket, "--announce", "--exit-with-parent"]
        argv += self._peer_files.arguments if self._peer_files is not None else []
        return argv, {**base_env, "PYTHONPATH": python_path}

    def read_announcement(self) -> bool:
        """To be called when `announce_fd` is readable; False when it has ended (unregister it)."""
        try:
            data = os.read(self.announce_fd, 1 << 16)
        except BlockingIOError:
            return True
        self._received += data
        line, newline, _ = self._received.partition(b"\n")
        if newline and not self.has_announced:
            self._announced(line)
        if self.has_announced:
            self._received = b""
        return bool(data)

    def _announced(self, line: bytes) -> None:
        try:
            said = json.loads(line)
            event = CacheServing(
                self._node_id,
                str(said["socket"]),
                int(said["pid"]),
                bool(said["already_running"]),
                int(said["resident_bytes"]),
                int(said["capacity_bytes"]),
                str(said.get("peer_address") or ""),
            )
        except (ValueError, KeyError, TypeError):
            self._fail(f"the cache daemon announced itself with something else than the agreed line: {line[:200]!r}")
            return
        self.has_announced = True
        if self._peer_files is not None:
            self._peer_files.key_was_read()
        self._already_running = event.already_running
        if event.socket != self.socket:
            # Ranks may have been started with our path already; it leads them to the daemon that serves the directory.
            with contextlib.suppress(OSError):
                os.unlink(self.socket)
            with contextlib.suppress(OSError):
                os.symlink(event.socket, self.socket)
        self._on_event(event)

    def handle(self, report: Report) -> None:
        """One report of the daemon's guardian."""
        match report:
            case StartFailed(reason=reason):
                self._fail(f"the cache daemon could not be started: {reason}")
            case Exited(status=status):
                if not (self._already_running or self._is_stopping):
                    # Its last words may still be in the pipe.
                    with contextlib.suppress(OSError):
                        self.read_announcement()
                if not (self._already_running or self._is_stopping):
                    # What it printed last explains its refusal to start; of one that worked it is only its last news.
                    words = last_lines(self._log_path, 5) if not self.has_announced else ""
                    self._fail(f"the cache daemon ended with {status}" + (f": {words}" if words else ""))
            case Gone():
                self.is_over = True

    def tell_peers(self, addresses: Sequence[str]) -> None:
        """These are the job's daemons now."""
        if self._peer_files is not None:
            with contextlib.suppress(OSError):  # no room: it goes on with those that it knows
                self._peer_files.tell(addresses)

    @property
    def has_served(self) -> bool:
        """It was a daemon of ours that worked: it announced itself, and nobody has told it to stop."""
        return self.has_announced and not self._already_running and not self._was_told_to_stop

    def check_deadline(self, now: float) -> None:
        """Gives up a daemon that has not announced itself in time."""
        if not self.has_announced and not self.is_over and now >= self.deadline_s:
            self._fail(
                f"the cache daemon did not say within {ANNOUNCE_TIMEOUT_S:g} s that it serves (see {self._log_path})"
            )
            self.guarded.stop(0.0)

    def stop(self) -> None:
        """Drains it, unless it was there before us."""
        self._is_stopping = self._was_told_to_stop = True
        if not self.is_over:
            self.guarded.stop(DRAIN_S)

    def close(self) -> None:
        """After it is over: gives back descriptors and the link to another daemon's socket."""
        os.close(self.announce_fd)
        self.guarded.close()
        with contextlib.suppress(OSError):
            os.unlink(self.socket)
        if self._peer_files is not None:
            self._peer_files.close()

    def _fail(self, reason: str) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._on_event(CacheFailed(self._node_id, reason))
