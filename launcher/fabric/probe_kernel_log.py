"""What the kernel's log says of the GPUs: NVIDIA's Xid events, where the log may be read (root, or kernel.dmesg_restrict=0)."""

from __future__ import annotations

import contextlib
import os
import re

from launcher.fabric.facts import Xid
from launcher.fabric.probe_gpus import bus_id
from launcher.fabric.root import Root

MAX_BYTES = 8 << 20
"""The ring buffer of a large machine; nobody waits for more."""

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)(?:, ([^\n\\]*))?")


def read_xids(root: Root) -> tuple[Xid, ...] | None:
    """Since boot, in order; None if the log cannot be read."""
    text = _live() if root.is_live else root.text("dev/kmsg")
    return None if text is None else parse_xids(text)


def parse_xids(text: str) -> tuple[Xid, ...]:
    """
    >>> parse_xids("3,9,1,-;NVRM: Xid (PCI:0000:0F:00): 79, pid=12, GPU has fallen off the bus.")
    (Xid(code=79, pci='0000:0f:00.0', text='pid=12, GPU has fallen off the bus.'),)
    """
    return tuple(Xid(int(code), _address(pci), words.strip()) for pci, code, words in _XID.findall(text))


def _address(pci: str) -> str | None:
    return bus_id(pci if "." in pci else f"{pci}.0")


def _live() -> str | None:
    """The kernel gives one record for each read; a full ring buffer overwrites the oldest while we read (EPIPE), which is no end."""
    try:
        log_fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    parts, size = [], 0
    try:
        while size < MAX_BYTES:
            with contextlib.suppress(BrokenPipeError):
                part = os.read(log_fd, 8192)
                if not part:
                    break
                parts.append(part)
                size += len(part)
    except OSError:  # EAGAIN: there is no more
        pass
    finally:
        os.close(log_fd)
    return b"".join(parts).decode("utf-8", "replace")
