"""What the launcher tells the cache daemons of a job of each other: who, when, and where the key is while it does."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.gang.events import CacheFailed, CacheServing, NodeLost
from launcher.node.cache_peers import PeerFiles, PeerTerms
from launcher.spec import CacheOptions, JobSpec, Program, ProgramKind

CachePeers = pytest.importorskip("launcher.cluster.ray.cache_peers", reason="needs ray").CachePeers

TWO_NODES = JobSpec(Program(ProgramKind.SCRIPT, "t.py"), 1, 2, cache=CacheOptions("/c", "1GiB"))


def serving(node_id: str, address: str) -> CacheServing:
    return CacheServing(node_id, "/s", 1, False, 0, 1, address)


def test_every_node_is_told_whenever_a_daemon_comes_goes_or_listens_elsewhere() -> None:
    told: list[tuple[str, ...]] = []
    peers = CachePeers(told.append)
    for event in (
        serving("a", "10.0.0.1:1"),
        serving("b", "10.0.0.2:2"),
        CacheFailed("a", "killed"),
        serving("a", "10.0.0.1:3"),  # started again: another port
        NodeLost("b", "gone", 0.0),
    ):
        peers.heard(event)
    peers.gone("a")
    assert told == [
        ("10.0.0.1:1",),
        ("10.0.0.1:1", "10.0.0.2:2"),
        ("10.0.0.2:2",),
        ("10.0.0.1:3", "10.0.0.2:2"),
        ("10.0.0.1:3",),
        (),
    ]


def test_what_changes_nothing_is_not_told() -> None:
    """A daemon that was there before us belongs to somebody else's cluster, or to none."""
    told: list[tuple[str, ...]] = []
    peers = CachePeers(told.append)
    peers.heard(serving("a", ""))
    peers.heard(CacheFailed("a", "never began"))
    peers.gone("b")
    assert told == []


@pytest.mark.parametrize(
    ("spec", "has_key"),
    [
        (TWO_NODES, True),
        (replace(TWO_NODES, max_nodes=1), False),
        (replace(TWO_NODES, cache=None), False),
        (replace(TWO_NODES, cache=CacheOptions("/c", "1GiB", peers="off")), False),
    ],
)
def test_only_daemons_that_may_have_others_get_a_key(spec: JobSpec, has_key: bool) -> None:
    peers = CachePeers(lambda addresses: None)
    assert (peers.key_for(spec) is not None) == has_key


def test_each_run_has_a_key_of_its_own_and_no_repr_shows_it() -> None:
    one, other = (CachePeers(lambda addresses: None).key_for(TWO_NODES) for _ in range(2))
    assert one is not None
    assert len(one) == 64
    assert one != other
    assert one not in repr(PeerTerms(one, "10.0.0.1"))


def test_key_and_list_are_this_users_alone_and_go(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        files = PeerFiles(str(tmp_path / "d"), PeerTerms("k" * 64, "fe80::1"), ["10.0.0.1:1"])
        files.tell(["10.0.0.1:1", "10.0.0.2:2"])
    finally:
        os.umask(old_mask)
    assert files.arguments == [
        *("--peers", f"file:{tmp_path}/d.peers", "--peer-listen", "[fe80::1]:0"),
        *("--peer-key-file", f"{tmp_path}/d.key"),
    ]
    assert (tmp_path / "d.key").read_text() == "k" * 64
    assert (tmp_path / "d.peers").read_text() == "10.0.0.1:1\n10.0.0.2:2\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    files.key_was_read()
    assert [path.name for path in tmp_path.iterdir()] == ["d.peers"]
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_this_machine_does_not_have_is_seen_beforehand() -> None:
    """Behind address translation a node's address is not its own; its daemon would refuse to start, and the node have no cache at all."""
    assert PeerTerms("k", "127.0.0.1").can_listen()
    assert not PeerTerms("k", "192.0.2.1").can_listen()  # TEST-NET-1: nobody has it
