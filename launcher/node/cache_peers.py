"""What a node's cache daemon is told of those on other nodes: the job's key, and where they are; as two files beside its socket.

The directory is this user's alone (cache_child.py), the key's file too, and it is removed as soon as the daemon has read it: on no command
line, in no environment and in no journal. The list is written anew, whole, whenever nodes come and go; the daemon looks at it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PeerTerms:
    """What makes the daemons of one job believe each other, and where this node's shall listen."""

    key: str = field(repr=False)
    addr: str
    """This node's, as the others reach it; the port is a free one."""

    def can_listen(self) -> bool:
        """Whether this machine has that address. (Behind address translation it has not, and a daemon that was told to listen there would
        not start.)"""
        try:
            socket.create_server((self.addr, 0), family=_family(self.addr)).close()
        except OSError:
            return False
        return True


class PeerFiles:
    """Both files of one daemon. Raises OSError when they cannot be written."""

    def __init__(self, base: str, terms: PeerTerms, addresses: Sequence[str]) -> None:
        """base: path without an ending, in a directory of this user's."""
        self._key_path, self._list_path = f"{base}.key", f"{base}.peers"
        self._addr = terms.addr
        _write(self._key_path, terms.key)
        self.tell(addresses)

    @property
    def arguments(self) -> list[str]:
        """For `python -m cache serve`."""
        host = f"[{self._addr}]" if ":" in self._addr else self._addr
        return ["--peers", f"file:{self._list_path}", "--peer-listen", f"{host}:0", "--peer-key-file", self._key_path]

    def tell(self, addresses: Sequence[str]) -> None:
        """These are the daemons of the job now, its own among them."""
        _write(self._list_path, "".join(f"{address}\n" for address in addresses))

    def key_was_read(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._key_path)

    def close(self) -> None:
        for path in (self._key_path, self._list_path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _write(path: str, text: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    part = f"{path}.part"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    os.rename(part, path)


def _family(addr: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in addr else socket.AF_INET
