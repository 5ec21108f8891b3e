"""The attempt's store on node rank 0: a port that listens at once, and a host process that takes it over."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import NodeError
from launcher.gang.events import StoreAddress
from launcher.node.forking import ForkServer
from launcher.node.guarded import GuardedProcess, execute

_HOST_PROGRAM = str(Path(__file__).with_name("store_host.py"))
_BACKLOG = 4096
"""Every rank of the gang may be waiting for the host to come up; the kernel caps this at net.core.somaxconn."""


def bind(host: str, port: int | None) -> tuple[socket.socket, StoreAddress]:
    """A listening socket at `host`; `port` None: any free one. Raises NodeError when it is taken or the address is not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise NodeError(
            f"cannot listen at {host}, {f'port {port}' if port else 'any port'}, for the gang's store: {error.strerror or error}",
            advice="leave out --master-port for a free one"
            if port
            else "--master-addr must be an address of this node",
        ) from error
    return listener, StoreAddress(host, listener.getsockname()[1])


def start_host(
    listener: socket.socket,
    address: StoreAddress,
    base_env: Mapping[str, str],
    log_fd: int,
    server: ForkServer | None = None,
) -> GuardedProcess:
    """Starts the process that serves it; `server`, if it has torch, saves the import. The caller closes its own `listener` then.
    Raises OSError."""
    fd = listener.fileno()
    # It needs torch's store and nothing else: no GPU, no thread pool, no site customisation of a rank.
    env = {**base_env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if server is not None and server.has_torch:
        afresh = [sys.executable, "-P", _HOST_PROGRAM, "FD", address.host, str(address.port)]
        job = {
            "kind": "store",
            "host": address.host,
            "port": address.port,
            "title": " ".join(afresh),
            "argv_afresh": afresh,
            "note_file": os.devnull,
        }
        return server.fork(job, env, os.sep, log_fd, log_fd, keep_fds=(fd,))
    argv = [sys.executable, "-P", _HOST_PROGRAM, str(fd), address.host, str(address.port)]
    return execute(argv, env, os.sep, log_fd, log_fd, keep_fds=(fd,))
