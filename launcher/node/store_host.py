"""Hosts the TCPStore of one attempt until it is killed. Run by path: `python -P store_host.py LISTEN_FD HOST PORT [whole]`.

The port is bound and listening before this process exists, so ranks may be started at once: their connections wait in the kernel's
backlog while torch is imported here and there at the same time. A process of its own, so that neither a dead rank nor the launcher's
restart takes the store with it, and fresh for each attempt, so that no key of an older attempt can be read.

The store is C++; of torch's Python nothing is needed. So only the extension module is loaded, under two empty packages: 0.5 s of CPU
instead of 2.2 s (torch 2.13), which the ranks that start at the same moment get instead. Where that does not work, it starts over with
the whole of torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import types
from typing import Any


def store_class(*, whole: bool) -> Any:
    """torch's TCPStore; `whole` False: without the rest of torch, in a process that uses nothing else of it."""
    if not whole:
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        torch, distributed = types.ModuleType("torch"), types.ModuleType("torch.distributed")
        torch.__spec__, torch.__path__ = spec, list(spec.submodule_search_locations)
        distributed.__path__ = []
        sys.modules.update({"torch": torch, "torch.distributed": distributed})
        extension = importlib.import_module("torch._C")
        assert extension._c10d_init()
        return importlib.import_module("torch._C._distributed_c10d").TCPStore
    return importlib.import_module("torch.distributed").TCPStore


def main() -> None:
    listen_fd, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    whole = sys.argv[4:] == ["whole"]
    try:
        store_type = store_class(whole=whole)
    except Exception:
        if whole:
            raise
        os.execv(sys.executable, [sys.executable, "-P", *sys.argv, "whole"])
    store = store_type(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listen_fd)
    while store:
        signal.pause()


if __name__ == "__main__":
    main()
