"""Hosts the TCPStore of one attempt until it is killed. Run by path: `python -P store_host.py LISTEN_FD HOST PORT`.

The port is bound and listening before this process exists, so ranks may be started at once: their connections wait in the kernel's
backlog while torch is imported here and there at the same time. A process of its own, so that neither a dead rank nor the launcher's
restart takes the store with it, and fresh for each attempt, so that no key of an older attempt can be read.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    listen_fd, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listen_fd)
    while store:
        signal.pause()


if __name__ == "__main__":
    main()
