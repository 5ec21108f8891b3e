"""Notices that the head of the Ray cluster is gone, before Ray ends this process for it.

Without its head a cluster cannot start, place or kill anything, and each of Ray's processes ends itself when it has not found the head
again for a minute (`gcs_rpc_server_reconnect_timeout_s`): ours from C++, without a word. So the job ends first, and says why. A head
that is restarted in time (fault tolerance with Redis) is no reason to end anything: agents and launcher speak to each other without it.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
import time

import ray

from launcher.cluster.ports import EventSink
from launcher.gang.events import ClusterLost

LOOK_EVERY_S = 1.0
PATIENCE_S = 30.0
"""Half of Ray's own."""
_CONNECT_S = 2.0


class HeadWatch:
    """One thread that connects to the head's port now and then. address: HOST:PORT as Ray resolved it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = (host.strip("[]"), int(port))
        self._address = address
        self._patience_s = PATIENCE_S
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_lost = False
        """True: no call to Ray that needs the head will ever return."""

    def start(self, sink: EventSink) -> None:
        self._thread = threading.Thread(target=self._run, args=(sink,), name="head", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CONNECT_S + 1.0)

    def _run(self, sink: EventSink) -> None:
        heard_s = time.monotonic()
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                socket.create_connection(self._where, _CONNECT_S).close()
                heard_s = time.monotonic()
            except OSError as error:
                if time.monotonic() - heard_s >= self._patience_s:
                    self.is_lost = True
                    why = error.strerror or str(error)
                    sink.put(ClusterLost(f"the head of the Ray cluster at {self._address} is gone ({why})"))
                    return


_forgotten = threading.Event()


def forget_ray() -> None:
    """Lets this process end without a farewell to a head that cannot answer it."""
    _forgotten.set()
    with contextlib.suppress(Exception):
        atexit.unregister(ray.shutdown)


def is_forgotten() -> bool:
    """Whether this process must end without Python's own farewell (`launcher/__main__.py`)."""
    return _forgotten.is_set()
