"""Which cache daemons of a job there are, told to all of its nodes: so that each byte leaves the object store once.

Each node's daemon says where it listens (CacheServing), over Ray like everything between nodes; the list of all goes back to each node
whenever it changes. They believe each other by a key that is made here for this run, and goes to the nodes in the call that begins an
agent: it is in no spec, no journal and on no command line.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from launcher.gang.events import CacheFailed, CacheServing, Event, NodeLost
from launcher.spec import JobSpec


class CachePeers:
    """tell: hands the list to every held node; must not block. Any thread may call."""

    def __init__(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        self._key = secrets.token_hex(32)
        self._tell = tell
        self._addresses: dict[str, str] = {}
        # Held while telling, so that no node hears an old list after a new one.
        self._lock = threading.Lock()

    def key_for(self, spec: JobSpec) -> str | None:
        """The key; None where the job's daemons are not to have peers, or there can be no other node."""
        is_shared = spec.cache is not None and spec.cache.peers == "auto" and spec.max_nodes > 1
        return self._key if is_shared else None

    def heard(self, event: Event) -> None:
        match event:
            case CacheServing(node_id=node_id, peer_address=address):
                self._know(node_id, address)
            case CacheFailed(node_id=node_id) | NodeLost(node_id=node_id):
                self._know(node_id, "")
            case _:
                pass

    def gone(self, node_id: str) -> None:
        """The node is held no longer."""
        self._know(node_id, "")

    def _know(self, node_id: str, address: str) -> None:
        with self._lock:
            if self._addresses.get(node_id, "") == address:
                return
            if address:
                self._addresses[node_id] = address
            else:
                del self._addresses[node_id]
            self._tell(tuple(sorted(self._addresses.values())))
