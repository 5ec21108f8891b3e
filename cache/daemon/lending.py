"""The control process's side of lending: may this be asked for, and where do the blocks lie once they are here?

Only what can come from an object store is fetched for others: whoever has the key can make this node read an object of a store that its own
credentials open, at a pinned etag, and nothing else. Not a local file, not a web address of this machine or of its metadata service.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cache.blocks import BLOCKS_PER_EXTENT, ExtentId, ObjectId, extent_of, run_span
from cache.daemon.peerauth import Nonces
from cache.errors import CacheError, PeerError
from cache.residency import messages as m

if TYPE_CHECKING:
    from cache.daemon.control import Control

STORES = ("s3", "gs", "az", "abfs", "abfss")
WEB = ("http", "https")


def may_be_fetched(url: str, *, on_loopback: bool) -> bool:
    """Whether this node reads such a url for another. `on_loopback`: all peers are on this machine (so are their origins, in tests).

    >>> may_be_fetched("s3://b/k", on_loopback=False), may_be_fetched("file:///etc/passwd", on_loopback=True)
    (True, False)
    >>> may_be_fetched("http://169.254.169.254/latest", on_loopback=True), may_be_fetched("http://127.0.0.1/x", on_loopback=False)
    (False, False)
    """
    parts = urlsplit(url)
    if parts.scheme in STORES:
        return True
    if parts.scheme not in WEB or not parts.hostname or "@" in parts.netloc:
        return False
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(parts.hostname)
        return not (address.is_link_local or address.is_unspecified) and (on_loopback or not address.is_loopback)
    return on_loopback or parts.hostname.rstrip(".") not in ("localhost", "metadata", "metadata.google.internal")


@dataclass(frozen=True)
class Loan:
    worker_pid: int
    client_id: str
    fd: int | None

    @property
    def path(self) -> str:
        """For the worker to open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


class Lending:
    """Answers the questions of this daemon's workers about what other nodes ask them. From the event loop."""

    def __init__(self, control: Control, node_id: str, *, on_loopback: bool) -> None:
        self._control = control
        self._node_id = node_id
        self._on_loopback = on_loopback
        self._nonces = Nonces()
        self._loans: dict[int, Loan] = {}
        """What is being sent. Each is a reader of its own to the machine: with its end all that it opened and held is let go of. So what
        has left the disk is forgotten, however many objects the others ask for in the course of months."""
        self._next_loan = itertools.count(1)

    async def answer(self, worker_pid: int, request: dict[str, Any]) -> dict[str, Any]:
        """Raises CacheError."""
        match request["op"]:
            case "ping":
                return {}
            case "hello":
                self._require_new(request)
                return {"about": self._about()}
            case "lend":
                self._require_new(request)
                return await self._lend(worker_pid, request)
            case "lent":
                self._ended(int(request["hold"]))
                return {}
            case op:
                raise CacheError(f"a worker asked for {op!r}")

    def worker_gone(self, pid: int) -> None:
        """It held files that it was about to send."""
        for number, loan in list(self._loans.items()):
            if loan.worker_pid == pid:
                self._ended(number)

    def _about(self) -> str:
        control = self._control
        return json.dumps(
            {
                "node_id": self._node_id,
                "daemon_id": control.daemon_id,
                "capacity_bytes": control.residency.budget.capacity_bytes,
            }
        )

    def _require_new(self, request: dict[str, Any]) -> None:
        if not self._nonces.is_new(request["nonce"], float(request["expires_s"]), time.time()):
            raise PeerError("this request was made before", reason="refused")

    async def _lend(self, worker_pid: int, request: dict[str, Any]) -> dict[str, Any]:
        object_id = ObjectId(request["url"], request["etag"], request["size_bytes"])
        first, end = int(request["first"]), int(request["end"])
        if not may_be_fetched(object_id.url, on_loopback=self._on_loopback):
            raise PeerError("no node reads such a url for another", reason="refused")
        extent = ExtentId(object_id.content_id, extent_of(first))
        if extent_of(end - 1) != extent.extent_idx:
            raise PeerError("blocks of two extents", reason="refused")
        control, loan = self._control, next(self._next_loan)
        client_id = f"loan/{loan}"
        control.tell(m.ObjectOpened(client_id, object_id))

        def hand_over(answer: m.Answer) -> dict[str, Any]:
            control.tell(m.ExtentHeld(client_id, extent, answer.generation))
            path = control.directory.extent_path(extent, answer.generation)
            # Opened here, while it cannot be evicted: on a full disk it may be by the time the worker gets to it, and then it was refused.
            fd = None
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            lent = self._loans[loan] = Loan(worker_pid, client_id, fd)
            start_byte, end_byte = run_span(object_id.size_bytes, first, end)
            control.residency.counters.lent_bytes += end_byte - start_byte
            return {
                "path": lent.path if fd is not None else str(path),
                "extent_idx": extent.extent_idx,
                "slot": first % BLOCKS_PER_EXTENT,
                "hold": loan,
            }

        try:
            return await control.want(client_id, object_id.content_id, first, end, hand_over, for_peer=True)
        finally:
            if loan not in self._loans:
                control.tell(m.ClientGone(client_id))

    def _ended(self, loan: int) -> None:
        found = self._loans.pop(loan, None)
        if found is not None:
            if found.fd is not None:
                os.close(found.fd)
            self._control.tell(m.ClientGone(found.client_id))
