"""The other daemons of a cluster: found, greeted once a second, and told apart; from them follows who owns what.

A daemon's name is a random one that lies in its cache directory, so it keeps what it owns over restarts and changes of address. Which of
the addresses is this daemon itself it learns by greeting it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.daemon.discovery import Address, Discovery
from cache.daemon.peerauth import Ask, authorization, is_proven
from cache.daemon.peerconfig import PeerConfig
from cache.daemon.peertls import client_context
from cache.errors import CacheConfigError, PeerError
from cache.residency.origins import Origins
from cache.residency.peerhealth import PeerHealth
from cache.residency.placement import Placement

log = logging.getLogger("railhead.cache")

HELLO_EVERY_S = 1.0
HELLO_TIMEOUT_S = 2.0
MAX_HELLO_BYTES = 16 * 1024


def node_id_of(directory: Path) -> str:
    """The name of the daemon of this directory, made at its first start."""
    path = directory / "node-id"
    with contextlib.suppress(OSError):
        found = path.read_text().strip()
        if len(found) == 32 and all(c in "0123456789abcdef" for c in found):
            return found
    made = secrets.token_hex(16)
    with contextlib.suppress(OSError):  # A disk that takes nothing costs the name at the next start, not this one.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(made + "\n")
        temporary.rename(path)
    return made


def listen(config: PeerConfig) -> socket.socket:
    """The socket that all workers accept peers on. Raises CacheConfigError."""
    host, port = config.listen
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise CacheConfigError(
            f"cannot listen for peers at {host}:{port}: {error.strerror}", advice="choose another --peer-listen address"
        ) from error


class Peers:
    """`on_change`: called when the members are others than before. From the event loop."""

    def __init__(
        self,
        config: PeerConfig,
        key: bytes,
        node_id: str,
        daemon_id: str,
        capacity_bytes: int,
        origins: Origins,
        on_change: Callable[[], None],
    ) -> None:
        self.node_id = node_id
        self.bypassed: Counter[str] = Counter()
        """Why blocks were not taken from their owner."""
        self.last_words: dict[str, str] = {}
        """What was said the last time, by reason."""
        self._config, self._key, self._daemon_id = config, key, daemon_id
        self._capacity_bytes, self._origins, self._on_change = capacity_bytes, origins, on_change
        self._tls: ssl.SSLContext | None = client_context([str(p) for p in config.tls] if config.tls else None)
        self._health = PeerHealth()
        self._discovery = Discovery(config, self._say)
        self._names: dict[Address, str] = {}
        self._own_addresses: set[Address] = set()
        self._said: dict[Address, str] = {}
        self._num_rounds = 0
        self._probing: dict[Address, asyncio.Task[None]] = {}
        origins.placement = Placement(node_id, {node_id: float(capacity_bytes)})

    async def run(self) -> None:
        while True:
            began_s = time.monotonic()
            await self.round()
            await self._discovery.changed(began_s + HELLO_EVERY_S - time.monotonic())

    async def round(self) -> None:
        """Everybody is greeted once; who is listed no longer is forgotten."""
        addresses = await self._discovery.addresses()
        self._own_addresses &= set(addresses)  # An address may come to belong to another.
        for address in [address for address in self._names if address not in addresses]:
            self._health.forget(self._names.pop(address))
        others = [address for address in addresses if address not in self._own_addresses]
        await asyncio.gather(*(self._greet(address) for address in others))
        self._settle()
        self._num_rounds += 1

    def resized(self, capacity_bytes: int) -> None:
        """This node's share of what is owned follows at the next round."""
        self._capacity_bytes = capacity_bytes

    def address_of(self, node_id: str) -> Address | None:
        return next((address for address, name in self._names.items() if name == node_id), None)

    def silence_s(self, node_id: str) -> float:
        """For how long without a sign of life this peer is waited for."""
        return self._health.silence_s(node_id)

    def heard(self, node_id: str, gap_s: float) -> None:
        """A fetch from it went well; between its signs of life there was at most so much time."""
        self._health.heard(node_id, gap_s)

    def failed(self, node_id: str, error: PeerError, silent_for_s: float = 0.0) -> bool:
        """A fetch from a peer failed. True: it is out of use now, and what it owned has another owner; it is greeted at once."""
        self.bypassed[error.reason] += 1
        self.last_words[error.reason] = error.message
        is_out = self._health.failed(node_id, error.reason, time.monotonic(), silent_for_s)
        self._settle()
        address = self.address_of(node_id)
        if is_out and address is not None and address not in self._probing:
            probe = self._probing[address] = asyncio.create_task(self._probe(address))
            probe.add_done_callback(lambda _: self._probing.pop(address, None))
        return is_out

    async def _probe(self, address: Address) -> None:
        await self._greet(address)
        self._settle()

    def account(self) -> dict[str, Any]:
        placement = self._origins.placement
        members = placement.weights if placement is not None else {}
        known = {name: f"{host}:{port}" for (host, port), name in sorted(self._names.items())}
        return {
            "node_id": self.node_id,
            "members": len(members),
            "is_resolved": self._discovery.is_resolved,
            "rounds": self._num_rounds,
            "peers": [
                {"node_id": name, "address": address, "is_member": name in members} for name, address in known.items()
            ],
            "bypassed": dict(self.bypassed),
            "last_words": dict(self.last_words),
        }

    def _settle(self) -> None:
        weights = {**self._health.members(time.monotonic()), self.node_id: float(self._capacity_bytes)}
        placement = self._origins.placement
        if placement is not None and placement.weights == weights:
            return
        log.info("%d of %d known daemons share the data now", len(weights), len(set(self._names.values())) + 1)
        self._origins.placement = Placement(self.node_id, weights)
        self._on_change()

    async def _greet(self, address: Address) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                about = await self._hello(address)
        except (OSError, TimeoutError, ValueError, KeyError, EOFError, PeerError) as error:
            if address in self._names:
                self._health.missed(self._names[address])
            if not isinstance(error, ConnectionRefusedError):
                self._say(address, f"peer {address[0]}:{address[1]} does not answer: {error or type(error).__name__}")
            return
        self._said.pop(address, None)
        name = str(about["node_id"])
        if about["daemon_id"] == self._daemon_id:
            self._own_addresses.add(address)
        elif name == self.node_id:
            self._say(
                address, f"peer {address[0]}:{address[1]} has a copy of this daemon's directory, node-id included"
            )
        else:
            for old in [a for a, n in self._names.items() if n == name and a != address]:
                del self._names[old]
            self._names[address] = name
            now_s = time.monotonic()
            self._health.greeted(name, float(about["capacity_bytes"]), now_s, now_s - began_s)

    async def _hello(self, address: Address) -> dict[str, Any]:
        ask, nonce = Ask("", "", 0, 0), secrets.token_hex(16)
        reader, writer = await asyncio.open_connection(*address, ssl=self._tls)
        try:
            sign = authorization(self._key, ask, nonce, time.time())
            writer.write(f"GET {ask.target} HTTP/1.1\r\nHost: peer\r\nAuthorization: {sign}\r\n\r\n".encode())
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                status = int(head.split(" ", 2)[1])
                if status >= 200:
                    break
            headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in head.split("\r\n")[1:])}
            if status != 200:
                raise PeerError(f"{status} {headers.get('x-railhead-reason', '')}", reason="refused")
            body = await reader.readexactly(min(int(headers["content-length"]), MAX_HELLO_BYTES))
            if not is_proven(self._key, ask, nonce, body.decode(), headers.get("x-railhead-proof", "")):
                raise PeerError("it does not have the key", reason="refused")
            about: dict[str, Any] = json.loads(body)
            return about
        finally:
            writer.close()

    def _say(self, address: Address, text: str) -> None:
        """Once, until it is something else. Empty: there is nothing to say any more."""
        if self._said.get(address, "") != text:
            self._said[address] = text
            if text:
                log.warning("%s", text)
