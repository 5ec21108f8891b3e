"""The NCCL logs of one attempt's ranks on one node, read as they grow: which transport really carries the job.

NCCL falls back to TCP without a word. What its lines mean is decided in `launcher.fabric.nccl_log`; here the files are found and read, a
little each second, until they have said enough.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.gang.events import TransportSeen

if TYPE_CHECKING:
    from launcher.fabric.nccl_log import TransportEvidence

QUIET_S = 3.0
"""A communicator connects its channels within moments; what has been said for this long is told."""
MAX_FILE_BYTES = 8 * 2**20
"""Of each log. The lines that matter come first; who logs more traces each collective."""
_SIGNS = (b"Using network", b" via ", b"NCCL version", b"NET/", b"GPU Direct RDMA")


@dataclass(frozen=True)
class NcclPaths:
    """What NCCL writes of one attempt on one node. The run directory may be one for all nodes, so the node is in the names."""

    directory: str
    """The attempt's."""
    node_id: str

    @property
    def trace_prefix(self) -> str:
        """Of the collectives' traces; torch adds the rank."""
        return os.path.join(self.directory, "nccl_trace_rank_")

    @property
    def log_pattern(self) -> str | None:
        """NCCL puts the process's number for %p; None where the directory itself has a percent sign."""
        return None if "%" in self.directory else os.path.join(self.directory, f"nccl.{self._node}.%p.log")

    def logs(self) -> list[str]:
        """Those that are there."""
        return glob.glob(os.path.join(glob.escape(self.directory), f"nccl.{self._node}.*.log"))

    @property
    def _node(self) -> str:
        return re.sub(r"[^\w-]", "-", self.node_id)


@dataclass
class _File:
    """What of a log has been read."""

    offset: int = 0
    rest: bytes = b""
    telling: list[str] = field(default_factory=list)
    """Lines that `read_log` understands; the others are forgotten at once."""


class NcclLogs:
    """outputs: the ranks' own output, where NCCL writes if the user has set NCCL_DEBUG and no file."""

    def __init__(
        self,
        attempt: int,
        hostname: str,
        expected: str,
        paths: NcclPaths,
        outputs: Iterable[str],
        on_event: Callable[[TransportSeen], None],
    ) -> None:
        self._attempt = attempt
        self._hostname = hostname
        self._expected = expected
        self._paths = paths
        self._outputs = tuple(outputs)
        self._on_event = on_event
        self._files: dict[str, _File] = {}
        self._changed_at_s: float | None = None

    def look(self, now: float, is_last: bool = False) -> None:
        """Reads what has been added; tells what it proves once the files have been quiet for QUIET_S, or if this is the last look."""
        for path in (*self._paths.logs(), *self._outputs):
            if self._read(self._files.setdefault(path, _File()), path):
                self._changed_at_s = now
        if self._changed_at_s is not None and (is_last or now - self._changed_at_s >= QUIET_S):
            self._changed_at_s = None
            self._tell()

    def _read(self, file: _File, path: str) -> bool:
        """Whether anything came that tells something."""
        if file.offset >= MAX_FILE_BYTES:
            return False
        try:
            if os.stat(path).st_size <= file.offset:
                return False
            with open(path, "rb") as log:
                log.seek(file.offset)
                data = log.read(MAX_FILE_BYTES - file.offset)
        except OSError:  # removed, or on a disk that fails: there is no proof to be had
            return False
        file.offset += len(data)
        *lines, file.rest = (file.rest + data).split(b"\n")
        file.rest = file.rest[-4096:]
        found = [
            line.decode(errors="replace") for line in lines if b"NCCL" in line and any(sign in line for sign in _SIGNS)
        ]
        file.telling += found
        return bool(found)

    def _tell(self) -> None:
        from launcher.fabric.nccl_log import merged, read_log

        seen: TransportEvidence = merged(read_log(file.telling) for file in self._files.values())
        if seen.channels:
            self._on_event(
                TransportSeen(
                    self._attempt,
                    self._paths.node_id,
                    self._hostname,
                    self._expected,
                    seen.version,
                    seen.network,
                    tuple(sorted(seen.channels.items())),
                    seen.devices,
                    seen.without_gdr,
                )
            )
