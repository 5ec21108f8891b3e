"""Which failures say something about a node, and not about the program: those are remembered, also for later jobs.

Blamed: a node that was lost or whose agent could not do its part, and a rank that died with the words of broken hardware. Not blamed: an
exception of the program, a signal (a kill for memory may be anybody's fault), a node that had been told to leave, and words that a wrong
program can cause as well (a device-side assert, an illegal address, out of memory).
"""

from __future__ import annotations

import re

from launcher.exclusion import Cause
from launcher.gang.events import BlameNode, Failure, NodeFailed, NodeLost, RankExited, RankHung
from launcher.gang.history import History

_MAX_REASON = 160

_BROKEN_HARDWARE = re.compile(
    r"uncorrectable (?:ECC|NVLink|memory)"
    r"|double[- ]bit ECC"
    r"|GPU has fallen off the bus"
    r"|fell off the bus"
    r"|cudaErrorECCUncorrectable|cudaErrorNvlinkUncorrectable|cudaErrorHardwareStackError"
    r"|hardware stack error"
    r"|Xid[^\n]{0,40}\b(?:48|63|64|74|79|92|94|95|119|120|121|140)\b"
    r"|Unable to determine the device handle for"
    r"|system not yet initialized|cudaErrorSystemNotReady"
    r"|Input/output error",
    re.IGNORECASE,
)
"""Words of CUDA and of the NVIDIA driver (Xid numbers: ECC 48, 63, 64, 92, 94, 95, 140; NVLink 74; bus 79; firmware 119 to 121), and
EIO of a disk. https://docs.nvidia.com/deploy/xid-errors/"""


def blame(history: History, root: Failure) -> BlameNode | None:
    """What the root cause of a failed attempt says about its node; None: nothing."""
    node = history.world.node(root.node_id) if history.world else None
    if node is None or root.node_id in history.draining:
        return None
    match root:
        case NodeLost(reason=reason) | NodeFailed(reason=reason):
            return BlameNode(node.hostname, Cause.LOST, _short(reason))
        case RankExited():
            words = broken_hardware(root)
            return BlameNode(node.hostname, Cause.HARDWARE, _short(words)) if words else None
        case RankHung():
            return None  # a lock of the program holds up a job more often than a node does


def broken_hardware(failure: RankExited) -> str:
    """The line in which the rank's last words speak of broken hardware; empty if none does."""
    text = failure.exception.message if failure.exception else failure.last_lines
    return next((line.strip() for line in text.splitlines() if _BROKEN_HARDWARE.search(line)), "")


def _short(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= _MAX_REASON else f"{first[: _MAX_REASON - 1]}…"
