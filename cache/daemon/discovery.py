"""At which addresses other daemons may be: a fixed list, what a name resolves to, what a file says now."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from cache.daemon.peerconfig import PeerConfig, parse_peer_address
from cache.errors import CacheConfigError

RESOLVE_EVERY_S = 5.0
FIRST_ANSWER_S = 2.0
"""How long the first round waits for a resolver. Later ones never do: one that hangs (10 s and more) must not hold up the greetings."""

FILE_LOOK_S = 0.1
"""How often the list in a file is looked at (one stat): a node that joins must not fetch for a second what others have."""

Address = tuple[str, int]


class Discovery:
    """`say(about, text)`: a trouble, to be logged once. From the event loop."""

    def __init__(self, config: PeerConfig, say: Callable[[Address, str], None]) -> None:
        self._config, self._say = config, say
        self._resolved: frozenset[Address] = frozenset()
        self._resolved_s = float("-inf")
        self._resolving: asyncio.Task[None] | None = None
        self.is_resolved = config.service is None
        """The name was resolved when that was tried last."""
        self._listed: frozenset[Address] = frozenset()
        self._file_seen: tuple[int, ...] | None = None

    async def addresses(self) -> tuple[Address, ...]:
        """All that are known now. What cannot be asked (a resolver or a file that is away for a moment) stays as it was."""
        if self._config.service is not None:
            await self._look_up(self._config.service)
        if self._config.file is not None:
            self._read(self._config.file)
        return tuple(sorted({*self._config.addresses, *self._resolved, *self._listed}))

    async def changed(self, timeout_s: float) -> None:
        """Returns when the file says something new, at the latest after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            file = self._config.file
            await asyncio.sleep(left_s if file is None else min(left_s, FILE_LOOK_S))
            if file is not None and _look(file) not in (None, self._file_seen):
                return

    async def _look_up(self, service: Address) -> None:
        """Has the name resolved again when it is time, by a task of its own."""
        is_first = self._resolved_s == float("-inf")
        if self._resolving is None and time.monotonic() - self._resolved_s >= RESOLVE_EVERY_S:
            self._resolving = asyncio.create_task(self._resolve(service))
        if self._resolving is not None and is_first:
            await asyncio.wait([self._resolving], timeout=FIRST_ANSWER_S)
            self._resolved_s = time.monotonic()

    async def _resolve(self, service: Address) -> None:
        """No answer of whatever kind (no such name, a server that fails or is silent) says that anybody has left: kept is what was. A new
        answer is the whole truth, so who is not in it has left."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(*service, type=socket.SOCK_STREAM)
            self._resolved = frozenset((str(info[4][0]), int(info[4][1])) for info in found)
            self.is_resolved = True
            self._say(service, "")
        except OSError as error:
            self.is_resolved = False
            self._say(service, f"the peers' service {service[0]} cannot be resolved: {error.strerror}")
        finally:
            self._resolved_s, self._resolving = time.monotonic(), None

    def _read(self, file: Path) -> None:
        seen = _look(file)
        if seen is None or seen == self._file_seen:
            return
        try:
            lines = file.read_text().split()
        except (OSError, ValueError) as error:
            self._say((str(file), 0), f"the list of peers {file} cannot be read: {error}")
            return
        listed = set()
        for line in lines:
            try:
                listed.add(parse_peer_address(line, f"HOST:PORT in each line of {file}"))
            except CacheConfigError as error:
                self._say((str(file), 0), f"{file}: {error}")
        self._listed, self._file_seen = frozenset(listed), seen


def _look(file: Path) -> tuple[int, ...] | None:
    """What changes when the file does."""
    with contextlib.suppress(OSError):
        status = os.stat(file)
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None
