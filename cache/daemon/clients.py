"""Who is connected, and what they reported of themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from cache.daemon.control import Control
from cache.daemon.probe import PROBE_PREFIX
from cache.residency import messages as m


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
        control.on_held_evicted = self.nudge

    def came(self, client_id: str, session: Connection) -> None:
        self._connections.setdefault(client_id, set()).add(session)

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

    @property
    def num_clients(self) -> int:
        """Reader processes; somebody who only asks how things are is none."""
        return sum(not client_id.startswith(PROBE_PREFIX) for client_id in self._connections)
