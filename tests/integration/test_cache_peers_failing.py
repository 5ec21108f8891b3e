"""An owner that is killed, frozen or cut off while it fetches or sends: readers get the right bytes, and it serves again afterwards."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.seaweed import free_ports
from cache.client import Cache
from tests.counting_origin import CountingOrigin
from tests.daemon import CacheDaemon, wait_until
from tests.integration.test_cache_peers import OpenCache, members, put_objects, together


class Relay:
    """The link to a port. `limit_bytes`: so many go back to who connected, then the link `ends`: it is cut, or nothing passes any more."""

    def __init__(self, port: int) -> None:
        self.limit_bytes: int | None = None
        self.ends = "cut"
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._is_closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._is_closed.set()
        for sock in (self._listener, *self._open):
            end(sock)

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            threading.Thread(target=self._carry, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        sent = 0
        try:
            while data := source.recv(65536):
                if is_answer and self.limit_bytes is not None and sent + len(data) > self.limit_bytes:
                    sink.sendall(data[: max(0, self.limit_bytes - sent)])
                    if self.ends == "mute":
                        self._is_closed.wait(60)
                    break
                sink.sendall(data)
                sent += len(data)
        except OSError:
            pass
        end(source)
        end(sink)


def end(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextmanager
def owner_behind_a_link(tmp_path: Path) -> Iterator[tuple[CacheDaemon, CacheDaemon, Relay]]:
    """(owner, reader, link): the reader reaches the owner by the link alone."""
    owners, readers = free_ports(2)
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o600)
    link = Relay(owners)

    def options(port: int, other: int) -> tuple[str, ...]:
        peers = f"127.0.0.1:{port},127.0.0.1:{other}"
        return ("--peers", peers, "--peer-listen", f"127.0.0.1:{port}", "--peer-key-file", str(key))

    try:
        with (
            CacheDaemon(options=options(owners, readers)) as owner,
            CacheDaemon(options=options(readers, link.port)) as reader,
        ):
            together([owner, reader])
            yield owner, reader, link
    finally:
        link.close()


def read_beside_each_other(cache: Cache, objects: dict[str, bytes], meanwhile: Callable[[], None]) -> None:
    """All objects at once; each must be right, and come from the daemon."""

    def read(url: str) -> bytes:
        with cache.open(url) as f:
            return f.read(0, f.size)

    with ThreadPoolExecutor(len(objects)) as threads:
        reading = {url: threads.submit(read, url) for url in objects}
        meanwhile()
        for url, data in objects.items():
            assert reading[url].result() == data, url
    assert cache.stats().direct_reads == 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_an_owner_that_goes_while_it_fetches_for_others_is_passed_by(
    signum: signal.Signals, tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """The whole node, workers included: a frozen one closes nothing, and its kernel goes on taking connections."""
    objects = put_objects(counting_origin)
    with owner_behind_a_link(tmp_path) as (owner, reader, _):
        pids = [owner.pid, *owner.worker_pids()]
        for path in counting_origin.objects:
            counting_origin.hold(path)

        def go() -> None:
            wait_until(lambda: int(owner.status()["in_flight_blocks"]) > 0, "the owner fetches for the reader")
            for pid in pids:
                os.kill(pid, signum)
            counting_origin.release()

        try:
            read_beside_each_other(open_cache(reader.socket), objects, go)
            wait_until(lambda: members(reader) == 1, "who is gone is no member")
        finally:
            if signum == signal.SIGSTOP:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
        if signum == signal.SIGKILL:
            owner.kill()
            owner.start()
        together([owner, reader])


@pytest.mark.parametrize("ends", ["cut", "mute"])
def test_a_link_that_ends_in_the_middle_of_a_block_costs_no_byte(
    ends: str, tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    objects = put_objects(counting_origin)
    with owner_behind_a_link(tmp_path) as (owner, reader, link):
        link.ends, link.limit_bytes = ends, 300_000
        read_beside_each_other(open_cache(reader.socket), objects, lambda: None)
        assert sum(reader.status()["peers"]["bypassed"].values()) > 0
        assert counting_origin.bytes_sent <= 2 * sum(map(len, objects.values()))
        link.limit_bytes = None
        together([owner, reader])
