"""Who is connected, and what they reported of themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from cache.daemon.control import Control
from cache.daemon.probe import PROBE_PREFIX
from cache.residency import messages as m

MAX_LISTED = 256


class Connection(Protocol):
    def nudge(self) -> None: ...


class Clients:
    """Who is connected. A client (a process) may have several connections; it has gone when the last of them closes."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._connections: dict[str, set[Connection]] = {}
        self._streams: dict[str, set[str]] = {}
        self._reports: dict[str, dict[str, float]] = {}
        self._totals: dict[str, float] = {}
        self._since: dict[str, tuple[int, float]] = {}
        """Process id (of its own namespace), and when it came."""
        control.on_held_evicted = self.nudge

    def came(self, client_id: str, session: Connection, *, pid: int = 0) -> None:
        self._connections.setdefault(client_id, set()).add(session)
        self._since.setdefault(client_id, (pid, time.monotonic()))

    def nudge(self, client_ids: Iterable[str]) -> None:
        """Tells readers that files which they hold were evicted, where they wait for us and would not look by themselves."""
        for client_id in client_ids:
            for session in self._connections.get(client_id, ()):
                session.nudge()

    def went(self, client_id: str, session: Connection) -> None:
        self._connections[client_id].discard(session)
        if self._connections[client_id]:
            return
        del self._connections[client_id]
        self._since.pop(client_id, None)
        for stream_id in self._streams.pop(client_id, set()):
            self._control.tell(m.StreamClosed(stream_id))
        for key, value in self._reports.pop(client_id, {}).items():
            self._totals[key] = self._totals.get(key, 0) + value
        self._control.tell(m.ClientGone(client_id))

    def stream_id(self, client_id: str, name: str) -> str:
        """The machine's name for a reader's stream: two readers may use the same name."""
        stream_id = f"{client_id}/{name}"
        self._streams.setdefault(client_id, set()).add(stream_id)
        return stream_id

    def report(self, client_id: str, stats: dict[str, float]) -> None:
        self._reports[client_id] = {str(key): value for key, value in stats.items() if isinstance(value, int | float)}

    def readers(self) -> dict[str, float]:
        """What all readers, present and gone, have reported: sums."""
        totals = dict(self._totals)
        for report in self._reports.values():
            for key, value in report.items():
                totals[key] = totals.get(key, 0) + value
        return {key: round(value, 6) for key, value in sorted(totals.items())}

    def account(self) -> dict[str, Any]:
        """Part of the daemon's status: how many there are, what all have reported, and those at work one by one (the first 256)."""
        now = time.monotonic()
        at_work = [client_id for client_id in self._connections if not client_id.startswith(PROBE_PREFIX)]
        return {
            "clients": len(at_work),
            "readers": self.readers(),
            "each_reader": [
                {
                    "client_id": client_id,
                    "pid": self._since[client_id][0],
                    "connected_s": round(now - self._since[client_id][1], 3),
                    "streams": len(self._streams.get(client_id, ())),
                    "stats": self._reports.get(client_id, {}),
                }
                for client_id in at_work[:MAX_LISTED]
            ],
        }

    @property
    def num_clients(self) -> int:
        """Reader processes; somebody who only asks how things are is none."""
        return sum(not client_id.startswith(PROBE_PREFIX) for client_id in self._connections)
