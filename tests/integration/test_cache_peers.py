"""Daemons that share: each byte leaves the origin once, and whatever a peer does, readers get the right bytes."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.seaweed import free_ports
from cache.blocks import BLOCK_BYTES
from cache.client import Cache
from cache.store.format import LABEL_BYTES
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, open_cache, wait_until

__all__ = ["open_cache"]

OpenCache = Callable[[str], Cache]

SIZE = 2 * BLOCK_BYTES + 5000
NUM_OBJECTS = 12


@contextmanager
def cluster(
    num_nodes: int, tmp_path: Path, *, keys: tuple[str, ...] = (), capacity: int = 256 << 20
) -> Iterator[list[CacheDaemon]]:
    """Daemons on loopback that know each other; `keys`: of each, if not the same."""
    ports = free_ports(num_nodes)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    with ExitStack() as stack:
        daemons = []
        for idx, port in enumerate(ports):
            key = tmp_path / f"key{idx}"
            key.write_text(keys[idx] if keys else "0123456789abcdef" * 2)
            key.chmod(0o600)
            options = ("--peers", addresses, "--peer-listen", f"127.0.0.1:{port}", "--peer-key-file", str(key))
            options += ("--scrub-rate", "0")  # or it may find damage before a peer does
            daemons.append(stack.enter_context(CacheDaemon(options=options, capacity=capacity)))
        yield daemons


def members(daemon: CacheDaemon) -> int:
    return int(daemon.status()["peers"]["members"])


def together(daemons: list[CacheDaemon], num: int | None = None) -> None:
    wait_until(lambda: all(members(d) == (num or len(daemons)) for d in daemons), "all daemons are members")


def put_objects(origin: CountingOrigin, num: int = NUM_OBJECTS) -> dict[str, bytes]:
    return {origin.put(f"o{idx}", data): data for idx in range(num) if (data := random_bytes(SIZE, idx))}


def read_all(cache: Cache, objects: dict[str, bytes]) -> None:
    for url, data in objects.items():
        with cache.open(url) as f:
            assert f.read(0, len(data)) == data, url


def counters(daemon: CacheDaemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.status()["counters"]
    return found


def test_each_byte_leaves_the_origin_once_however_many_nodes_read_it(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    objects = put_objects(counting_origin)
    with cluster(3, tmp_path) as daemons:
        together(daemons)
        for daemon in daemons:
            read_all(open_cache(daemon.socket), objects)
        assert counting_origin.bytes_sent == sum(map(len, objects.values()))
        accounts = [counters(daemon) for daemon in daemons]
        # Names of nodes are random: of so few objects one of three may own none, and then lends nothing.
        assert sum(account["lent_bytes"] > 0 for account in accounts) >= 2
        assert sum(a["borrowed_bytes"] for a in accounts) == 2 * sum(map(len, objects.values()))
        assert not any(account["peer_bypasses"] for account in accounts)


def test_a_lone_daemon_among_absent_peers_serves(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Nodes come up one after the other: the first must not wait for the rest."""
    objects = put_objects(counting_origin, 2)
    ports = free_ports(2)
    options = ("--peers", ",".join(f"127.0.0.1:{p}" for p in ports), "--peer-listen", f"127.0.0.1:{ports[0]}")
    with CacheDaemon(options=options) as daemon:
        read_all(open_cache(daemon.socket), objects)
        assert members(daemon) == 1


def test_an_owner_that_is_killed_is_passed_by(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    objects = put_objects(counting_origin)
    with cluster(3, tmp_path) as daemons:
        together(daemons)
        dead, *others = daemons
        dead.kill()
        for daemon in others:
            read_all(open_cache(daemon.socket), objects)
        # What the dead node owned has another owner now; it is fetched once more at most by each that found it dead in mid-request.
        assert counting_origin.bytes_sent <= 1.5 * sum(map(len, objects.values()))
        wait_until(lambda: all(members(d) == 2 for d in others), "the dead node is no member")
        dead.start()
        together(daemons)


def test_a_frozen_owner_is_passed_by_and_comes_back(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Its kernel still takes connections and its workers live: only the process that decides stands still. Silence tells."""
    objects = put_objects(counting_origin)
    with cluster(2, tmp_path) as daemons:
        together(daemons)
        frozen, reader = daemons
        frozen.freeze()
        read_all(open_cache(reader.socket), objects)
        assert "silent" in reader.status()["peers"]["bypassed"] or members(reader) == 1
        frozen.thaw()
        together(daemons)


def test_wrong_bytes_of_a_peer_are_discarded_counted_and_fetched_from_the_origin(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """The owner's disk turned over a bit while it ran: no reader of another node may see it, and the node is trusted no longer."""
    objects = put_objects(counting_origin)
    with cluster(2, tmp_path) as daemons:
        together(daemons)
        liar, reader = daemons
        read_all(open_cache(liar.socket), objects)
        for path in liar.extent_files:
            with path.open("r+b") as file:
                file.seek(-LABEL_BYTES - 100, os.SEEK_END)
                byte = file.read(1)
                file.seek(-LABEL_BYTES - 100, os.SEEK_END)
                file.write(bytes([byte[0] ^ 1]))
        read_all(open_cache(reader.socket), objects)
        status = reader.status()
        assert status["peers"]["bypassed"].get("wrong-bytes", 0) >= 1
        assert members(reader) == 1


def test_a_daemon_with_another_key_is_no_peer(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    objects = put_objects(counting_origin, 3)
    with cluster(2, tmp_path, keys=("a" * 32, "b" * 32)) as daemons:
        for daemon in daemons:
            read_all(open_cache(daemon.socket), objects)
            wait_until(lambda daemon=daemon: "answer" in daemon.log, "the refusal is in the log")  # type: ignore[misc]
            assert members(daemon) == 1
        assert counting_origin.bytes_sent == 2 * sum(map(len, objects.values()))


def test_noise_at_the_peers_port_hurts_nobody(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    objects = put_objects(counting_origin)
    with cluster(2, tmp_path) as daemons:
        together(daemons)
        port = int(daemons[0].options[3].rpartition(":")[2])
        for seed in range(60):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(random_bytes(200, seed) + b"\r\n\r\n")
        read_all(open_cache(daemons[1].socket), objects)
        assert counting_origin.bytes_sent == sum(map(len, objects.values()))


def test_a_killed_worker_of_the_owner_costs_nobody_a_byte(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """What other nodes ask goes on with the worker that takes its place, and files that it was about to send are not held for ever."""
    objects = put_objects(counting_origin)
    with cluster(2, tmp_path) as daemons:
        together(daemons)
        for pid in daemons[0].worker_pids():
            os.kill(pid, signal.SIGKILL)
        read_all(open_cache(daemons[1].socket), objects)
        read_all(open_cache(daemons[0].socket), objects)
        wait_until(lambda: daemons[0].status()["held_bytes"] == 0, "nothing is held")


def test_what_another_node_can_lend_again_is_evicted_first(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """Two nodes that hold nine tenths of the data each: together they have room for all of it, so the origin is read once. (Names of nodes
    are random; that one of them owns 29 of 32 objects, more than it can hold, is one chance in 100,000.)"""
    objects = {
        counting_origin.put(f"o{i}", data): data for i in range(32) if (data := random_bytes(8 * BLOCK_BYTES, i))
    }
    total = sum(map(len, objects.values()))
    with cluster(2, tmp_path, capacity=int(total * 0.9)) as daemons:
        together(daemons)
        for _ in range(2):
            for daemon in daemons:
                read_all(open_cache(daemon.socket), objects)
        assert counting_origin.bytes_sent <= 1.02 * total


def test_a_list_in_a_file_is_followed_as_nodes_come_and_go(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """How the launcher tells daemons of each other: ports are whatever is free, and who is struck off owns nothing any more."""
    objects = put_objects(counting_origin)
    listed, key = tmp_path / "peers", tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o600)
    options = ("--peers", f"file:{listed}", "--peer-listen", "127.0.0.1:0", "--peer-key-file", str(key))

    def tell(*daemons: CacheDaemon) -> None:
        part = tmp_path / "part"
        part.write_text("".join(f"{daemon.announced['peer_address']}\n" for daemon in daemons))
        part.rename(listed)

    with CacheDaemon(options=options) as one, CacheDaemon(options=options) as other:
        assert members(one) == members(other) == 1
        tell(one, other)
        together([one, other])
        for daemon in (one, other):
            read_all(open_cache(daemon.socket), objects)
        assert counting_origin.bytes_sent == sum(map(len, objects.values()))
        tell(one)
        wait_until(lambda: members(one) == 1, "who was struck off is no member")
        (tmp_path / "part").write_text("no address at all\n")
        (tmp_path / "part").rename(listed)
        wait_until(lambda: "is not an address" in one.log, "a bad line is said")
        tell(one, other)
        together([one, other])


def test_a_public_address_without_a_key_is_refused_at_the_start(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    daemon = CacheDaemon(options=("--peers", "10.0.0.1:1", "--peer-listen", f"0.0.0.0:{port}"))
    with pytest.raises(RuntimeError, match="exit code 2"), daemon:
        pass
