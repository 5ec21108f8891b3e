"""A NodeAgent in a process of its own, for a parent that is no place for one (a Ray worker), spoken to over two sockets.

`python -P -m launcher.node.agent_host CONTROL_FD OUTPUT_FD [LIFELINE_FD]`.

Why not in the Ray worker itself: when a worker exits, Ray sends SIGKILL
to the worker's children. Those would be our guardians, and at the same moment the agent to which they leave their wards is gone, so
what ranks had started lived on (seen with Ray 2.60). Here Ray kills this process, and the guardians see that and end everything. Forking
is also better done in a process without gRPC's threads.

Control: pickled commands come in, pickled events go out. Output: pickled LogChunks go out; when nobody reads them the socket fills, and
the agent stops reading the ranks' files. The end of the control socket means that the parent is gone: everything is ended. So does the
end of the lease that the parent renews (`cluster/ray/lease.py`): it may be frozen, or the launcher out of reach. The lifeline is a
listening socket that we only hold: whoever is connected to it learns of our end from the kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from launcher.gang.events import Event, NodeDraining, Output
from launcher.gang.world import NodeInfo
from launcher.node.agent import NodeAgent
from launcher.spec import JobSpec

_WATCH_S = 0.1
_EXIT_LEASE_ENDED = 3

PULSE = "pulse"
"""Answer to each lease: this process is not frozen. (It does not pass through the agent's loop.)"""

Command = tuple[str, tuple[Any, ...]]
"""Name of a method of AgentHost, and its arguments."""


class AgentHost:
    """Serves one agent until it is told to close or the parent is gone."""

    def __init__(self, control: Connection, outputs: Connection) -> None:
        self._control = control
        self._outputs = outputs
        self._lock = threading.Lock()
        self._agent: NodeAgent | None = None
        self._node_id = ""
        self._lease_ends_s: float | None = None

    def serve(self) -> None:
        """Carries out commands until the end."""
        try:
            while True:
                name, args = self._control.recv()
                if name == "close":
                    return
                if name == "lease":
                    self._lease(*args)
                    with self._lock:
                        _send(self._control, PULSE)
                elif name == "begin":
                    self._begin(*args)
                elif self._agent is not None:
                    getattr(self._agent, name)(*args)
        except (EOFError, OSError):
            return  # the parent is gone
        finally:
            if self._agent is not None:
                self._agent.close()

    def _begin(
        self, node: NodeInfo, spec: JobSpec, run_dir: str, base_env: Mapping[str, str], cache_key: str | None = None
    ) -> None:
        self._node_id = node.node_id
        self._agent = NodeAgent(node, spec, run_dir, base_env, self._send_event, self._send_output, cache_key)

    def _lease(self, ends_s: float) -> None:
        if self._lease_ends_s is None:
            threading.Thread(target=self._keep_lease, name="lease", daemon=True).start()
        self._lease_ends_s = ends_s

    def _keep_lease(self) -> None:
        """At its end ranks may be running elsewhere, so there is no time to be polite: the guardians see our death and end everything."""
        while self._lease_ends_s is None or time.monotonic() < self._lease_ends_s:
            time.sleep(_WATCH_S)
        os._exit(_EXIT_LEASE_ENDED)

    def told_to_leave(self) -> None:
        """SIGTERM: whoever runs this machine (a pod that is deleted, a shutdown) wants it back."""
        if self._node_id:
            self._send_event(NodeDraining(self._node_id, "its agent was sent SIGTERM", None, time.time()))

    def _send_event(self, event: Event) -> None:
        # The parent reads events at once into a queue of its own, so this does not block for long.
        with self._lock:
            _send(self._control, event)

    def _send_output(self, output: Output) -> None:
        _send(self._outputs, output)


def _send(connection: Connection, message: object) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more; `serve` learns it too
        connection.send(message)


def main() -> None:
    # The parent says when to stop; a Ctrl-C in a terminal that started the node is not meant for us.
    # (A handler, not SIG_IGN, which the ranks would inherit.)
    signal.signal(signal.SIGINT, lambda *_: None)
    # Ray blocks SIGINT in its processes, and ranks would inherit that: no KeyboardInterrupt would ever come.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    host = AgentHost(Connection(int(sys.argv[1])), Connection(int(sys.argv[2])))
    # On a thread of its own: the handler may have interrupted the very thread that holds the lock for sending.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=host.told_to_leave, daemon=True).start())
    for fd in sys.argv[3:]:
        os.set_inheritable(int(fd), False)
    host.serve()
    # Threads that still wait for a reader of output would keep us.
    os._exit(0)


if __name__ == "__main__":
    main()
